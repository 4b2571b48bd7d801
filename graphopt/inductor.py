"""The planned graphs in Inductor's hands: our partition in its pipeline, its kernels in our step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import CustomPartitionerFn

from graphopt.cost_models.nodes import runs_kernel
from graphopt.inductor_memory import Half
from graphopt.lower import last_uses
from graphopt.ops import is_elementwise
from graphopt.program import Program, bytes_behind, leaves, storages_of

aten = torch.ops.aten
# The order is the plan's. A freed buffer that waits to be used again would stay allocated meanwhile.
_AS_PLANNED: dict[str, Any] = {"reorder_for_peak_memory": False, "allow_buffer_reuse": False}


class PlannedGraph(Protocol):
    """What this module asks of a graph on its way through AOTAutograd."""

    @property
    def room_bytes(self) -> int | None:
        """What one half of the step may hold beside parameters and inputs; None for any amount."""

    @property
    def scratch_bytes(self) -> Mapping[str, int]:
        """What library kernels hold while they run, by the name of their node."""

    def note_peak(self, peak_bytes: int) -> None:
        """What one half of the step holds at most beside parameters and inputs, as compiled."""

    def partition(
        self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **options: Any
    ) -> Any: ...

    def planned_inference(self, module: fx.GraphModule) -> Program: ...

    def backward_of(
        self, placeholders: Sequence[fx.Node], usual: Callable[..., Any]
    ) -> Callable[..., Any]: ...


def compile_with_inductor(
    module: fx.GraphModule, example_inputs: Sequence[Any], graph: PlannedGraph
) -> Callable[..., Any]:
    """Inductor's compilation of `module`, with the partition of `graph`.

    The backward is compiled here and not at its first call, so that the peak of the step is known.
    """
    copies: dict[str, int] = {}
    owners: dict[str, str | None] = {}

    def inner(part: fx.GraphModule, inputs: Sequence[Any], **options: Any) -> Any:
        if options.get("is_inference"):
            part = graph.planned_inference(part).module
        placeholders = [n for n in part.graph.nodes if n.op == "placeholder"]
        results: Any = part.graph.output_node().args[0]
        returned = [n.name if n in placeholders else None for n in results]
        half = Half(graph.room_bytes, graph.scratch_bytes, returned, owners, copies, graph.note_peak)
        with config.patch({"_post_fusion_custom_pass": lambda nodes: half.fitted(nodes), **_AS_PLANNED}):
            compiled = compile_fx_inner(part, inputs, **options)
        return graph.backward_of(placeholders, compiled) if options.get("is_backward") else compiled

    patches = {"custom_partitioner_fn": _Partitioner(graph, owners)}
    with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        compiled: Any = compile_fx(
            module, list(example_inputs), inner_compile=inner, config_patches=patches
        )
    return compiled  # type: ignore[no-any-return]


def _let_strides_change(backward: fx.GraphModule) -> None:
    """Views of saved tensors become reshapes: Inductor may save a tensor in another layout."""
    for node in backward.graph.find_nodes(op="call_function", target=aten.view.default):
        node.target = aten.reshape.default


def keep_places(part: fx.GraphModule) -> None:
    """What the plan computes early, to be rid of its operands, Inductor does not put off.

    It computes an elementwise result where it is used, up to which all operands stay alive: here such a
    result becomes a tensor of its own where its operands die and are more than itself. And of a product
    and a sum it makes one `addmm`, in the place of the sum: its pattern does not see through two views
    that do nothing.
    """
    place = {n: i for i, n in enumerate(n for n in part.graph.nodes if runs_kernel(n))}
    storages = storages_of(part.graph)
    read_last = last_uses(part.graph, storages)
    end = {s: place.get(n, len(place)) for s, n in read_last.items()}
    for node, here in place.items():
        if is_elementwise(node) and end.get(storages[node][0], 0) > here + 1:
            operands = {s for n in node.all_input_nodes for s in storages[n]}
            dying = (s for s in operands if end[s] == here and not s[0].name.startswith("primals"))
            if sum(leaves(n)[i].nbytes for n, i in dying) > bytes_behind(node):
                node.meta["inductor_realize_to_strides"] = True
        if node.target is aten.add.Tensor:
            for product in node.all_input_nodes:
                if product.target is aten.mm.default and here > place[product] + 1:
                    _hide_product(product, node)
    part.recompile()


def _hide_product(product: fx.Node, user: fx.Node) -> None:
    with user.graph.inserting_before(user):
        flat = user.graph.call_function(aten.view.default, (product, [-1]))
        same = user.graph.call_function(aten.view.default, (flat, list(product.meta["val"].shape)))
    flat.meta = product.meta | {"val": product.meta["val"].view(-1)}
    same.meta = dict(product.meta)
    user.replace_input_with(product, same)


def _saved_views(forward: fx.Graph) -> dict[str, str | None]:
    """Results of `forward` that look at an input of it, or at all of the storage of an earlier result."""
    storages, first, found = storages_of(forward), dict[Any, str](), dict[str, str | None]()
    for node in forward.output_node().all_input_nodes:
        tensor = node.meta["val"]
        if len(storages[node]) != 1 or not isinstance(tensor, torch.Tensor):
            continue
        (storage,) = storages[node]
        if storage[0].op == "placeholder":
            found[node.name] = None
        elif tensor.numel() * tensor.element_size() == bytes_behind(node):
            owner = first.setdefault(storage, node.name)
            found |= {node.name: owner} if owner != node.name else {}
    return found


class _Partitioner(CustomPartitionerFn):
    """Our partition as Inductor calls it. A plan belongs to one process, so nothing is cached.

    `owners` gets the name of each saved view, and that of the saved tensor with all of its storage, None
    where that is an input of the forward.
    """

    def __init__(self, graph: PlannedGraph, owners: dict[str, str | None]) -> None:
        self.graph, self.owners = graph, owners

    def __call__(self, gm: torch.fx.GraphModule, joint_inputs: Sequence[object], **options: Any) -> Any:
        forward, backward = self.graph.partition(gm, joint_inputs, **options)
        self.owners.update(_saved_views(forward.graph))
        _let_strides_change(backward)
        if self.graph.room_bytes is not None:
            keep_places(backward)
        return forward, backward

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Partitioner":
        """Itself: Inductor copies its settings, and this belongs to one graph."""
        return self

    def uuid(self) -> None:
        """None: Inductor must not reuse what it compiled for another plan."""
        return None
