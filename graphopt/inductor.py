"""The planned graphs in Inductor's hands: our partition in its pipeline, its kernels in our step."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from graphopt.cost_models.nodes import runs_kernel

aten = torch.ops.aten


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
    for node in backward.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default


def let_products_stay(part: fx.GraphModule) -> None:
    """Products that are added to something later stay where the plan has them.

    Inductor makes one `addmm` of a product and a sum, at the place of the sum, up to which the operands
    of the product would stay alive. Its pattern does not see through two views that do nothing.
    """
    place = {n: i for i, n in enumerate(n for n in part.graph.nodes if runs_kernel(n))}
    for node in part.graph.find_nodes(op="call_function", target=aten.add.Tensor):
        for product in node.all_input_nodes:
            if product.target is aten.mm.default and place[node] > place[product] + 1:
                with part.graph.inserting_before(node):
                    flat = part.graph.call_function(aten.view.default, (product, [-1]))
                    same = part.graph.call_function(
                        aten.view.default, (flat, list(product.meta["val"].shape))
                    )
                flat.meta = product.meta | {"val": product.meta["val"].view(-1)}
                same.meta = dict(product.meta)
                node.replace_input_with(product, same)
    part.recompile()


class _Partitioner(CustomPartitionerFn):
    """Our partition as Inductor calls it. A plan belongs to one process, so nothing is cached."""

    def __init__(self, graph: PlannedGraph) -> None:
        self.graph = graph

    def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Sequence[object], **options: Any) -> Any:
        forward, backward = self.graph.partition(gm, joint_inputs, **options)
        _let_strides_change(backward)
        let_products_stay(backward)
        return forward, backward

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Partitioner":
        """Itself: Inductor copies its settings, and this belongs to one graph."""
        return self

    def uuid(self) -> None:
        """None: Inductor must not reuse what it compiled for another plan."""
        return None
