"""The planned graphs in Inductor's hands: our partition in its pipeline, its kernels in our step."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn


class PlannedGraph(Protocol):
    """What this module asks of a graph on its way through AOTAutograd."""

    def partition(
        self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any
    ) -> Any: ...

    def record_inference(self, module: fx.GraphModule) -> None: ...

    def backward_of(
        self, placeholders: Sequence[fx.Node], usual: Callable[..., Any]
    ) -> Callable[..., Any]: ...


def compile_with_inductor(
    module: fx.GraphModule, example_inputs: Sequence[Any], graph: PlannedGraph
) -> Callable[..., Any]:
    """Inductor's compilation of `module`, with the partition of `graph`."""

    def inner(part: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        placeholders = [n for n in part.graph.nodes if n.op == "placeholder"]
        if options.get("is_inference"):
            graph.record_inference(part)
        compiled = compile_fx_inner(part, inputs, **options)
        return graph.backward_of(placeholders, compiled) if options.get("is_backward") else compiled

    patches = {"custom_partitioner_fn": _Partitioner(graph)}
    compiled: Any = compile_fx(module, list(example_inputs), inner_compile=inner, config_patches=patches)
    return compiled  # type: ignore[no-any-return]


def _let_strides_change(backward: fx.GraphModule) -> None:
    """Views of saved tensors become reshapes: Inductor may save a tensor in another layout."""
    for node in backward.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default):
        node.target = torch.ops.aten.reshape.default


class _Partitioner(CustomPartitionerFn):
    """Our partition as Inductor calls it. A plan belongs to one process, so nothing is cached."""

    def __init__(self, graph: PlannedGraph) -> None:
        self.graph = graph

    def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Sequence[object], **options: Any) -> Any:
        forward, backward = self.graph.partition(gm, joint_inputs, **options)
        _let_strides_change(backward)
        return forward, backward

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Partitioner":
        """Itself: Inductor copies its settings, and this belongs to one graph."""
        return self

    def uuid(self) -> None:
        """None: Inductor must not reuse what it compiled for another plan."""
        return None
