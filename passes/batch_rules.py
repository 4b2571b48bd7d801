"""Which operators compute the samples of a batch apart from each other, and along which dimensions.

An operator that is cut gives the same rows on a part of the batch as on all of it. A rule says so of one
operator, from the dimensions along which its operands are cut; nothing else is assumed of the program.
Along a dimension the batch is outermost: one of n elements, where the batch has b samples, is cut at
multiples of n / b.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from graphopt import ops
from graphopt.errors import PlanError
from graphopt.program import tensors_of

aten = torch.ops.aten


class NotByRows(PlanError):
    """Why an operator cannot be cut along the batch; the text follows its name in a sentence."""


@dataclass(frozen=True)
class Batch:
    """`size` samples, or tokens of one text, in `parts` parts, none empty and as equal as can be.

    >>> Batch(5, 2).cuts(20)
    [0, 8, 20]
    """

    size: int
    parts: int
    along: Literal["batch", "sequence"] = "batch"

    def cuts(self, elements: int) -> list[int]:
        """Where a dimension of `elements` is cut, its first and its last place included."""
        return [i * self.size // self.parts * (elements // self.size) for i in range(self.parts + 1)]


@dataclass(frozen=True)
class RowRule:
    """How an operator is cut.

    `dims` has the dimension for each result; None for one that sums over the batch, which is then left to
    a call on the whole batch: `mask` is the position of the argument that says which results are wanted.
    `operands` are cut along these dimensions, others are read whole. `sizes` is the position of an
    argument that gives sizes, those of the result's dimensions. Of the arguments at positions `upto` a
    part reads all rows up to its own last one.
    """

    dims: tuple[int | None, ...]
    operands: Mapping[fx.Node, int] = field(default_factory=dict)
    sizes: int | None = None
    mask: int | None = None
    upto: tuple[int, ...] = ()


Known = Mapping[fx.Node, RowRule]
_NONE: Mapping[Any, Any] = {}


def row_rule(node: fx.Node, known: Known, batch: Batch, more: Mapping[Any, Any] = _NONE) -> RowRule:
    """The rule of `node`, at least one of whose operands is `known` to be cut; `more` has more rules.

    Raises NotByRows with the reason where samples of its results depend on other samples, or where that
    is not known.
    """
    if ops.mutates(node.target) or ops.is_random(node):
        raise NotByRows("writes to an operand or is random")
    make = more.get(node.target) or _RULES.get(node.target)
    make = make or _COLLECTIVES.get(ops.schema_name(node.target))
    if make is None and ops.is_elementwise(node):
        make = _pointwise
    if make is None:
        raise NotByRows("is not known to treat samples apart")
    rule = make(node, known)
    cut = [(t, d) for t, d in zip(tensors_of(node), rule.dims, strict=True) if t is not None]
    cut += [(n.meta["val"], dim) for n, dim in rule.operands.items()]
    for tensor, dim in cut:
        size = tensor.shape[dim] if dim is not None else batch.size
        if not isinstance(size, int) or size % batch.size:
            raise NotByRows(f"has {size} rows, no multiple of the batch of {batch.size}")
    if wrong := [n.name for n, dim in rule.operands.items() if n in known and known[n].dims != (dim,)]:
        raise NotByRows(f"needs another cut of {wrong[0]}")
    return rule


def _dim(node: Any, known: Known) -> int | None:
    """The dimension along which the one tensor `node` is cut; None where it is whole."""
    rule = known.get(node) if isinstance(node, fx.Node) else None
    return rule.dims[0] if rule is not None and len(rule.dims) == 1 else None


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def _argument(node: fx.Node, position: int, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else default


def _one(node: fx.Node, known: Known) -> int:
    """The dimension of the first operand; nothing else may be cut."""
    dim = _dim(node.args[0], known)
    if dim is None or any(n in known for n in node.all_input_nodes if n is not node.args[0]):
        raise NotByRows("has the batch in an operand where it is not expected")
    return dim


def _alike(node: fx.Node, known: Known, count: int) -> tuple[int, dict[fx.Node, int]]:
    """The dimension that all of the first `count` operands are cut along; nothing else may be cut."""
    first: Any = list(node.args[:count])
    found = {d for n in first if (d := _dim(n, known)) is not None}
    if len(found) != 1 or any(n in known for n in node.all_input_nodes if n not in first):
        raise NotByRows("has the batch in an operand where it is not expected")
    dim = found.pop()
    return dim, dict.fromkeys(first, dim)


def _pointwise(node: fx.Node, known: Known) -> RowRule:
    """Elementwise; operands are broadcast from the right, and those of one row are read whole."""
    shape = _shape(node)
    behind = {len(_shape(n)) - d for n in node.all_input_nodes if (d := _dim(n, known)) is not None}
    if len(behind) != 1:
        raise NotByRows("combines batches that lie along different dimensions")
    back = behind.pop()
    rows = shape[len(shape) - back]
    sources = [n for n in node.all_input_nodes if len(_shape(n)) >= back]
    cut = {n: len(_shape(n)) - back for n in sources if _shape(n)[len(_shape(n)) - back] == rows}
    return RowRule((len(shape) - back,), cut)


def _same(node: fx.Node, known: Known) -> RowRule:
    """Nothing about the dimensions changes."""
    dim = _one(node, known)
    return RowRule((dim,), {node.all_input_nodes[0]: dim})


def _view(node: fx.Node, known: Known) -> RowRule:
    """Other dimensions over the same elements in the same order."""
    dim, old, new = _one(node, known), _shape(node.all_input_nodes[0]), _shape(node)
    before = math.prod(old[:dim])
    for place in range(len(new)):
        if math.prod(new[:place]) == before and new[place] > 1:
            return RowRule((place,), {node.all_input_nodes[0]: dim}, sizes=1)
    raise NotByRows("merges the batch with a dimension before it")


def _expand(node: fx.Node, known: Known) -> RowRule:
    dim, old, new = _one(node, known), _shape(node.all_input_nodes[0]), _shape(node)
    return RowRule((dim + len(new) - len(old),), {node.all_input_nodes[0]: dim}, sizes=1)


def _permuted(order: Callable[[fx.Node, int], Sequence[int]]) -> Callable[..., RowRule]:
    def rule(node: fx.Node, known: Known) -> RowRule:
        dim, source = _one(node, known), node.all_input_nodes[0]
        places = [d % len(_shape(source)) for d in order(node, len(_shape(source)))]
        return RowRule((places.index(dim),), {source: dim})

    return rule


def _swapped(first: int, second: int, count: int) -> list[int]:
    order = list(range(count))
    order[first], order[second] = order[second], order[first]
    return order


def _other(node: fx.Node, known: Known, position: int = 1, default: Any = 0) -> tuple[int, int]:
    """The dimension of the batch, and that which argument `position` names; they have to differ."""
    dim, rank = _one(node, known), len(_shape(node.all_input_nodes[0]))
    named = _argument(node, position, default) % rank
    if named == dim:
        raise NotByRows("works along the batch")
    return dim, named


def _unsqueeze(node: fx.Node, known: Known) -> RowRule:
    dim, place = _one(node, known), _argument(node, 1) % len(_shape(node))
    return RowRule((dim + (place <= dim),), {node.all_input_nodes[0]: dim})


def _squeeze(node: fx.Node, known: Known) -> RowRule:
    dim, place = _other(node, known)
    gone = place < dim and _shape(node.all_input_nodes[0])[place] == 1
    return RowRule((dim - gone,), {node.all_input_nodes[0]: dim})


def _slice(node: fx.Node, known: Known) -> RowRule:
    dim, _ = _other(node, known)
    return RowRule((dim,), {node.all_input_nodes[0]: dim})


def _select(node: fx.Node, known: Known) -> RowRule:
    dim, place = _other(node, known)
    return RowRule((dim - (place < dim),), {node.all_input_nodes[0]: dim})


def _split(node: fx.Node, known: Known) -> RowRule:
    dim, _ = _other(node, known, position=2)
    return RowRule((dim,) * len(tensors_of(node)), {node.all_input_nodes[0]: dim})


def _slice_backward(node: fx.Node, known: Known) -> RowRule:
    dim, _ = _other(node, known, position=2)
    return RowRule((dim,), {node.all_input_nodes[0]: dim}, sizes=1)


def _select_backward(node: fx.Node, known: Known) -> RowRule:
    dim, place = _one(node, known), _argument(node, 2) % len(_shape(node))
    return RowRule((dim + (place <= dim),), {node.all_input_nodes[0]: dim}, sizes=1)


def _pad(node: fx.Node, known: Known) -> RowRule:
    dim, pads = _one(node, known), node.args[1]
    place = 2 * (len(_shape(node)) - 1 - dim)
    if any(pads[place : place + 2]):  # type: ignore
        raise NotByRows("works along the batch")
    return RowRule((dim,), {node.all_input_nodes[0]: dim})


def _cat(node: fx.Node, known: Known) -> RowRule:
    found = {d for n in node.all_input_nodes if (d := _dim(n, known)) is not None}
    along = _argument(node, 1, 0) % len(_shape(node))
    if len(found) != 1 or along in found:
        raise NotByRows("joins along the batch")
    dim = found.pop()
    return RowRule((dim,), dict.fromkeys(node.all_input_nodes, dim))


def _item(node: fx.Node, known: Known) -> RowRule:
    source, index = node.args
    dim = known[source].dims[index]  # type: ignore
    if dim is None:
        raise NotByRows("sums over the batch")
    return RowRule((dim,))


def _product(left: int) -> Callable[..., RowRule]:
    """A matrix product of the operands `left` and the one behind it, to which others are added."""

    def rule(node: fx.Node, known: Known) -> RowRule:
        first, second = node.args[left : left + 2]
        dims = _dim(first, known), _dim(second, known)
        if dims not in ((0, None), (None, 1)) or first is second:
            raise NotByRows("sums over the batch")
        dim, operand = (0, first) if dims[0] == 0 else (1, second)
        back, cut = 2 - dim, {operand: dim}
        for added in node.args[:left]:
            rank = len(_shape(added))  # type: ignore[arg-type]
            if rank >= back and _shape(added)[rank - back] == _shape(node)[dim]:  # type: ignore[arg-type]
                cut[added] = rank - back
            elif added in known:
                raise NotByRows("adds a batch that lies along another dimension")
        return RowRule((dim,), cut)  # type: ignore[arg-type]

    return rule


def _products(node: fx.Node, known: Known) -> RowRule:
    """A matrix product for each sample."""
    dim, cut = _alike(node, known, 2)
    if dim != 0:
        raise NotByRows("sums over the batch")
    return RowRule((0,), cut)


def _reduction(node: fx.Node, known: Known) -> RowRule:
    dim, rank = _one(node, known), len(_shape(node.all_input_nodes[0]))
    named: Any = _argument(node, 1, ())
    along = {d % rank for d in named or range(rank)}
    if dim in along:
        raise NotByRows("sums over the batch")
    gone = 0 if _argument(node, 2, False) else sum(d < dim for d in along)
    return RowRule((dim - gone,), {node.all_input_nodes[0]: dim})


def _by_rows(count: int) -> Callable[..., RowRule]:
    """Along one dimension, which the argument behind `count` tensors names."""

    def rule(node: fx.Node, known: Known) -> RowRule:
        dim, cut = _alike(node, known, count)
        if _argument(node, count) % len(_shape(node)) == dim:
            raise NotByRows("works along the batch")
        return RowRule((dim,), cut)

    return rule


def _norm(node: fx.Node, known: Known) -> RowRule:
    """A norm over the last dimensions, with its statistics."""
    dim = _one(node, known)
    if dim >= len(_shape(node.all_input_nodes[0])) - len(node.args[1]):  # type: ignore[arg-type]
        raise NotByRows("works along the batch")
    return RowRule((dim,) * len(tensors_of(node)), {node.all_input_nodes[0]: dim})


def _norm_backward(statistics: int) -> Callable[..., RowRule]:
    """The gradients of a norm: that of its weight sums over the batch."""

    def rule(node: fx.Node, known: Known) -> RowRule:
        cut: Any = [*node.args[:2], *node.args[3 : 3 + statistics]]
        dims = {d for n in cut if (d := _dim(n, known)) is not None}
        if len(dims) != 1 or any(n in known for n in node.all_input_nodes if n not in cut):
            raise NotByRows("has the batch in an operand where it is not expected")
        dim = dims.pop()
        results = (dim, *(None for _ in tensors_of(node)[1:]))
        return RowRule(results, dict.fromkeys(cut, dim), mask=len(node.args) - 1)

    return rule


def _embedding(node: fx.Node, known: Known) -> RowRule:
    table, rows = node.args[:2]
    dim = _dim(rows, known)
    if dim is None or table in known:
        raise NotByRows("has the batch in its table")
    return RowRule((dim,), {rows: dim})  # type: ignore[dict-item]


def _attention(tensors: int) -> Callable[..., RowRule]:
    """Attention of [batch, heads, length, width], or its gradients; a mask may have a batch, too."""

    def rule(node: fx.Node, known: Known) -> RowRule:
        cut: Any = list(node.args[:tensors])
        mask = node.kwargs.get("attn_mask")
        rows = _shape(cut[0])[0]
        if isinstance(mask, fx.Node) and len(_shape(mask)) == 4 and _shape(mask)[0] == rows:
            cut.append(mask)
        if any(_dim(n, known) not in (0, None) for n in cut):
            raise NotByRows("attends over the batch")
        return RowRule(tuple(0 for _ in tensors_of(node)), dict.fromkeys(cut, 0))

    return rule


def _nll_backward(node: fx.Node, known: Known) -> RowRule:
    """The gradient of the negative log-likelihood of [rows, classes], its weights summed up before."""
    gradient, scores, targets, weight, reduction = node.args[:5]
    cut: Any = {scores: 0, targets: 0} | ({gradient: 0} if reduction == 0 else {})
    if len(_shape(node)) != 2 or any(_dim(n, known) not in (0, None) for n in cut) or weight in known:
        raise NotByRows("has the batch in an operand where it is not expected")
    return RowRule((0,), cut)


def _gathered(node: fx.Node, known: Known) -> RowRule:
    """The ranks' tensors one behind the other along the first dimension, or such a tensor scattered."""
    if _one(node, known) == 0:
        raise NotByRows("works along the batch")
    return _same(node, known)


_COLLECTIVES: Mapping[str, Callable[[fx.Node, Known], RowRule]] = {
    "_c10d_functional::all_reduce": _same,
    "_c10d_functional::wait_tensor": _same,
    "_c10d_functional::all_gather_into_tensor": _gathered,
    "_c10d_functional::reduce_scatter_tensor": _gathered,
}

_RULES: Mapping[Any, Callable[[fx.Node, Known], RowRule]] = {
    operator.getitem: _item,
    **dict.fromkeys((aten.alias.default, aten.detach.default, aten._to_copy.default), _same),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _view),
    aten.expand.default: _expand,
    aten.t.default: _permuted(lambda n, rank: range(rank)[::-1]),
    aten.transpose.int: _permuted(lambda n, rank: _swapped(n.args[1], n.args[2], rank)),  # type: ignore
    aten.permute.default: _permuted(lambda n, rank: n.args[1]),  # type: ignore
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), _split),
    aten.slice_backward.default: _slice_backward,
    aten.select_backward.default: _select_backward,
    aten.constant_pad_nd.default: _pad,
    aten.cat.default: _cat,
    aten.mm.default: _product(0),
    aten.addmm.default: _product(1),
    aten.bmm.default: _products,
    **dict.fromkeys(
        (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default), _reduction
    ),
    **dict.fromkeys((aten._softmax.default, aten._log_softmax.default), _by_rows(1)),
    **dict.fromkeys(
        (aten._softmax_backward_data.default, aten._log_softmax_backward_data.default), _by_rows(2)
    ),
    **dict.fromkeys((aten.native_layer_norm.default, aten._fused_rms_norm.default), _norm),
    aten.native_layer_norm_backward.default: _norm_backward(2),
    aten._fused_rms_norm_backward.default: _norm_backward(1),
    aten.embedding.default: _embedding,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention(3),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention(6),
    aten.nll_loss_backward.default: _nll_backward,
}
