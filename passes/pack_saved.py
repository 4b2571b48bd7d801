"""Saved tensors in fewer bits, without loss: masks of dropout, and places of a maximum.

After Jain et al., "Gist: Efficient Data Encoding for Deep Neural Network Training", ISCA 2018, section 4
(its lossless encodings). A mask that was drawn is saved as bits, an eighth of its bytes; the indices of a
maximum pooling as places within their windows, likewise. The forward packs them, the backward unpacks
them where it first reads them. Masks that follow from other tensors by comparison are left: what they are
compared from can be recomputed, and mostly is there. The output of a ReLU in place of its input is
what autograd saves itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from operator import getitem
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt import ops
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.values import shape_of
from graphopt.errors import PlanError
from graphopt.packed_ops import ops as packed
from graphopt.passes.base import Pass
from graphopt.plan import Plan
from graphopt.program import Program, insert_call, leaves
from graphopt.split import late_nodes

aten = torch.ops.aten
LEAST_BYTES = 4096  # below, the two operators cost more than they save
_DRAWN = (aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar, aten.bernoulli.p)


@dataclass(frozen=True)
class PackSavedPlan(Plan):
    """The names of the tensors that are packed, with their form ("bits" or "window").

    `saved_bytes` is what they take from the forward to the backward, `packed_bytes` what the packed do.
    """

    packed: tuple[tuple[str, str], ...]
    saved_bytes: int
    packed_bytes: int

    def __str__(self) -> str:
        if not self.packed:
            return "no saved tensor can be packed"
        return (
            f"{len(self.packed)} saved tensors in {format_bytes(self.packed_bytes)} "
            f"instead of {format_bytes(self.saved_bytes)}"
        )


@dataclass(frozen=True)
class PackSaved(Pass):
    """Save masks as bits and places of a maximum as bytes; everything is computed as before.

    It has an effect where the backward would otherwise take the mask or the places from the forward: put
    it before `Checkpoint`, which then keeps or recomputes what is packed. In compiled code masks are not
    saved, but drawn again from their seed, so that with `compiler="inductor"` nothing is packed.
    """

    name: ClassVar[str] = "pack-saved"

    def plan(self, program: Program, costs: Costs) -> PackSavedPlan:
        """Which tensors are packed."""
        found = [] if costs.fused or not program.is_joint else list(_packable(program))
        saved = sum(_nbytes(node) for node, _ in found)
        less = sum(_packed_bytes(node, form) for node, form in found)
        return PackSavedPlan(tuple((node.name, form) for node, form in found), saved, less)

    def apply(self, program: Program, plan: PackSavedPlan) -> Program:
        """The program with the packed tensors; PlanError for a tensor that cannot be packed so."""
        result = program.copy()
        possible = {node.name: (node, form) for node, form in _packable(result)}
        for name, form in plan.packed:
            node, its_form = possible.get(name, (None, None))
            if node is None or form != its_form:
                raise PlanError(f"{name!r} is no tensor of this program that can be packed as {form!r}")
            _pack(result, node, form)
        return result


def _packable(program: Program) -> Iterator[tuple[fx.Node, str]]:
    late = late_nodes(program)
    fixed = {o for o in program.outputs if isinstance(o, fx.Node)}
    for node in program.operators():
        form = None if node in late or node in fixed else _form(node)
        if form and _nbytes(node) >= LEAST_BYTES and next(backward_readers(node, late), None):
            yield node, form


def _form(node: fx.Node) -> str | None:
    """How the tensor of `node` can be packed, None where it cannot."""
    tensor = node.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
        return None
    if tensor.dtype is torch.bool and _is_drawn(node):
        return "bits"
    pool = node.args[0] if node.target is getitem else None
    if not isinstance(pool, fx.Node) or pool.target is not aten.max_pool2d_with_indices.default:
        return None
    return "window" if node.args[1] == 1 and math.prod(_window(pool)[0]) <= 256 else None


def _is_drawn(node: fx.Node) -> bool:
    """True for a mask that an operator draws, or that comes from numbers drawn."""
    makers = [node, *node.all_input_nodes]
    if node.target is getitem:
        return ops.is_random(makers[1])
    return any(ops.is_random(m) for m in makers) and (node.target in _DRAWN or ops.is_random(node))


def backward_readers(node: fx.Node, late: set[fx.Node]) -> Iterator[fx.Node]:
    """Nodes of the backward that read `node`, or a view of it that the forward made."""
    for user in node.users:
        if user in late:
            yield user
        elif _is_view_of(user, node):
            yield from backward_readers(user, late)


def _is_view_of(user: fx.Node, node: fx.Node) -> bool:
    alone = user.all_input_nodes == [node] and isinstance(user.meta.get("val"), torch.Tensor)
    return alone and [leaf.alias for leaf in leaves(user)] == [(0, 0)] and not ops.mutates(user.target)


def _window(pool: fx.Node) -> tuple[tuple[int, int], ...]:
    """Kernel, stride, padding and dilation of a maximum pooling."""
    given: list[Any] = [*pool.args[1:], *[None] * 4]
    kernel, stride, padding, dilation = (_pair(v) for v in given[:4])
    assert kernel is not None
    return kernel, stride or kernel, padding or (0, 0), dilation or (1, 1)


def _pair(value: Any) -> tuple[int, int] | None:
    if value is None or value == []:
        return None
    both = tuple(value) if isinstance(value, list | tuple) else (value,)
    return both[0], both[-1]


def _nbytes(node: fx.Node) -> int:
    tensor = node.meta["val"]
    return math.prod(shape_of(tensor)) * int(tensor.element_size())


def _packed_bytes(node: fx.Node, form: str) -> int:
    return -(-_nbytes(node) // 8)  # eight of its elements to a byte, or one of eight bytes


def _pack(program: Program, node: fx.Node, form: str) -> None:
    """The forward packs `node`, and what the backward reads of it is unpacked there."""
    graph, late = program.graph, late_nodes(program)
    first = min(backward_readers(node, late), key=list(graph.nodes).index)
    if form == "bits":
        pack, arguments = packed.pack_bits.default, ()
        unpack, back = packed.unpack_bits.default, (list(node.meta["val"].shape),)
    else:
        pool: Any = node.args[0]
        width = pool.args[0].meta["val"].shape[-1]
        pack, unpack = packed.pack_window.default, packed.unpack_window.default
        arguments = back = (*map(list, _window(pool)), width)
    with graph.inserting_after(node):
        saved = insert_call(graph, node, pack, (node, *arguments), name=f"{node.name}_packed")
    with graph.inserting_before(first):
        again = marked_late(insert_call(graph, node, unpack, (saved, *back)))
        read_instead(graph, node, again, late)


def marked_late(node: fx.Node) -> fx.Node:
    """`node`, marked as part of the backward."""
    node.meta |= {"partitioner_tag": "is_backward", "autograd_backward": True}
    return node


def read_instead(graph: fx.Graph, node: fx.Node, again: fx.Node, late: set[fx.Node]) -> None:
    """Let the backward read `again` in place of `node`, and views of it in place of views."""
    for user in list(node.users):
        if user in late:
            user.replace_input_with(node, again)
        elif _is_view_of(user, node) and next(backward_readers(user, late), None):
            args = tuple(again if argument is node else argument for argument in user.args)
            target: Any = user.target
            view = marked_late(insert_call(graph, user, target, args, user.kwargs))
            read_instead(graph, user, view, late)
