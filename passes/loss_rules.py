"""What operators do to the values of `graphopt.passes.loss_values`: one rule for each operator.

A rule is given the `Builder` and an original node, and returns what the node's result is known to be, a
node of the new graph that holds it, or both; None where it knows nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.passes import loss_gradients as gradients
from graphopt.passes import loss_reductions as reductions
from graphopt.passes.loss_builder import Builder, Found, Rule, stripped
from graphopt.passes.loss_nll import nll_loss, nll_loss_gradient, part
from graphopt.passes.loss_reductions import lifted
from graphopt.passes.loss_values import (
    CONSTANT,
    ONE,
    SOFTMAX,
    ZERO,
    Basis,
    Head,
    KnownRow,
    Raw,
    Row,
    Shifted,
    Slice,
    Turned,
    Value,
)

aten, prims = torch.ops.aten, torch.ops.prims

# --- layout ------------------------------------------------------------------------------------


def same_elements(b: Builder, node: fx.Node) -> Found | None:
    """Views, copies and casts that leave the vocabulary the last dimension."""
    source = node.args[0]
    known = b.known.get(source)  # type: ignore[arg-type]
    new, old = node.meta["val"], source.meta["val"]  # type: ignore[union-attr]
    if isinstance(known, KnownRow) and known.exponential and new.numel() != old.numel():
        return known if b.is_wide(node) else None
    if known is None or not new.dtype.is_floating_point or new.numel() != old.numel():
        return None
    if isinstance(known, KnownRow):
        return known
    if isinstance(known, Turned) or new.dim() == 0 or new.shape[-1] != old.shape[-1]:
        return None
    if isinstance(known, Value) and known.extra is not None:
        options: Any = node.kwargs
        known = replace(known, extra=b.call(node.target, known.extra, *node.args[1:], **options))
    return known


def turned(b: Builder, node: fx.Node) -> Found | None:
    """The transpose of a matrix (N, V)."""
    known = b.known.get(node.args[0])  # type: ignore[arg-type]
    if node.target is aten.permute.default and list(node.args[1]) != [1, 0]:  # type: ignore[arg-type]
        return None
    return Turned(known) if isinstance(known, Value) and node.meta["val"].dim() == 2 else None


def sliced(b: Builder, node: fx.Node) -> Found | None:
    """Some of the rows of the scores."""
    given: tuple[Any, ...] = node.args
    source, (dim, start, end, step) = given[0], gradients.slice_of(given[1:])
    known, shape = b.known.get(source), tuple(source.meta["val"].shape)
    if tuple(node.meta["val"].shape) == shape:
        return known if isinstance(known, (Raw, Value)) else None
    dim = dim % len(shape)
    if not isinstance(known, Raw) or dim == len(shape) - 1:
        return None
    item = Slice(shape[:-1], dim, start, end, step)
    return replace(known, slices=(*known.slices, item))


# --- arithmetic --------------------------------------------------------------------------------


def times(b: Builder, node: fx.Node) -> Found | None:
    """Scores times a number; a value times a number, a row, or a tensor of the user's."""
    left, right = node.args[:2]
    for one, other in ((left, right), (right, left)):
        raw = b.known.get(one) if isinstance(one, fx.Node) else None
        if isinstance(raw, Raw) and isinstance(other, (int, float)) and other:
            return raw.scaled(other)
        below = b.known.get(other) if isinstance(other, fx.Node) else None
        if isinstance(raw, Shifted) and isinstance(below, KnownRow) and below.exponential:
            power = raw.shift.plus(below.row)
            return None if power.terms else Value(raw.head, {SOFTMAX: below.factor})
    for one, other in ((left, right), (right, left)):
        value = _plain(b, one)
        head = None if value is None else value.head or b.head_like(node.meta["val"])
        if value is None or head is None:
            continue
        row = b.row_of(head, other) or _constant_row(b, other)
        if row is not None:
            terms = {k: b.product(head, r, row) for k, r in value.terms.items()}
            return replace(value, terms=_without_zeros(terms))
        found = reductions.times_softmax(b, _plain(b, other), value) or _mixed(b, head, value, other)
        if found is not None:
            return found
    return None


def _plain(b: Builder, item: Any) -> Value | None:
    """What is known of `item`, where that is all there is to it."""
    value = lifted(b, item)
    return None if value is None or value.extra is not None else value


def _constant_row(b: Builder, item: Any) -> Row | None:
    """The row behind a value that is the same over the vocabulary."""
    value = _plain(b, item)
    if value is None or not set(value.terms) <= {CONSTANT}:
        return None
    return value.terms.get(CONSTANT, ZERO)


def _without_zeros(terms: Mapping[Basis, Row]) -> dict[Basis, Row]:
    return {k: r for k, r in terms.items() if r.terms}


def _mixed(b: Builder, head: Head, value: Value, factor: Any) -> Value | None:
    """`value` times a tensor (N, V), (1, V) or (V,) that depends on no score."""
    if not isinstance(factor, fx.Node) or factor in b.known:
        return None
    tensor = factor.meta.get("val")
    if not isinstance(tensor, torch.Tensor) or not tensor.dim():
        return None
    if tensor.shape[-1] != head.vocabulary or not tensor.dtype.is_floating_point:
        return None
    if tensor.numel() != head.vocabulary and b.head_like(tensor) is None:
        return None
    root = stripped(factor) if tensor.numel() == head.vocabulary else factor
    found: dict[Basis, Row] = {}
    for basis, row in value.terms.items():
        if basis.kind not in ("z", "1", "m", "mz"):
            return None
        mix = tuple(sorted((*basis.mix, root), key=lambda n: n.name))
        found[Basis("mz" if "z" in basis.kind else "m", None, mix)] = row
    return replace(value, terms=found)


def divided(b: Builder, node: fx.Node) -> Found | None:
    """Scores or a value divided by a number or a row; a softmax from its parts."""
    left, right = node.args[:2]
    known = b.known.get(left) if isinstance(left, fx.Node) else None
    below = b.known.get(right) if isinstance(right, fx.Node) else None
    if isinstance(known, Shifted) and isinstance(below, KnownRow) and below.exponential:
        return Value(known.head, {SOFTMAX: ONE}) if below == KnownRow(*_exp(known)) else None
    if isinstance(below, KnownRow) and below.exponential and below.head and below.factor == ONE:
        above = b.row_of(below.head, left)
        return None if above is None else KnownRow(below.head, below.row.times(-1), True, above)
    if isinstance(right, (int, float)):
        if isinstance(known, Raw):
            return known.scaled(1 / right)
        value = _plain(b, left)
        return None if value is None else value.times(1 / right)
    value = _plain(b, left)
    head = None if value is None else value.head or b.head_like(node.meta["val"])
    row = None if head is None else b.row_of(head, right)
    if value is None or head is None or row is None:
        return None
    inverse = Row({b.call(aten.reciprocal.default, b.row(head, row)): 1.0})
    return replace(value, terms={k: b.product(head, r, inverse) for k, r in value.terms.items()})


def _exp(known: Shifted) -> tuple[Head, Row, bool]:
    return known.head, known.shift, True


def added(b: Builder, node: fx.Node) -> Found | None:
    """Sums and differences of values and rows; the bias of scores; gradients from elsewhere."""
    sign = -1.0 if node.target in (aten.sub.Tensor, aten.sub.Scalar) else 1.0
    if node.kwargs.get("alpha", 1) != 1 or len(node.args) > 2:
        return None
    left, right = node.args
    raw = b.known.get(left) if isinstance(left, fx.Node) else None
    if isinstance(raw, Raw) and sign > 0 and _is_bias(raw, right):
        return replace(raw, bias=right)  # type: ignore[arg-type]
    for one, other, factor in ((left, right, sign), (right, left, 1.0)):
        value = lifted(b, one)
        if value is None:
            continue
        if one is right:
            value = value if sign > 0 else value.times(-1) if value.extra is None else None
        found = None if value is None else _sum(b, value, other, factor)
        if found is not None:
            return found
    return None


def _is_bias(raw: Raw, item: Any) -> bool:
    untouched = raw == Raw(raw.head) and isinstance(item, fx.Node)
    return untouched and tuple(item.meta["val"].shape) == (raw.head.vocabulary,)


def _sum(b: Builder, value: Value, other: Any, factor: float) -> Value | None:
    second = lifted(b, other)
    if second is not None:
        return _sum_of_values(b, value, second, factor)
    head = value.head
    row = None if head is None else b.row_of(head, other)
    if row is not None:
        terms = {**value.terms, CONSTANT: value.terms.get(CONSTANT, ZERO).plus(row, factor)}
        return replace(value, terms=_without_zeros(terms))
    gradient = value.kinds <= gradients.KINDS and factor == 1 and value.extra is None
    if not gradient or not isinstance(other, fx.Node) or other in b.known or not b.is_wide(other):
        return None
    return replace(value, extra=b.new[other])


def _sum_of_values(b: Builder, a: Value, c: Value, factor: float) -> Value | None:
    if None not in (a.head, c.head) and (a.head, a.undone, a.uncapped) != (c.head, c.undone, c.uncapped):
        return None
    if c.extra is not None and (factor != 1 or a.extra is not None):
        return None
    terms = dict(a.terms)
    for basis, row in c.terms.items():
        terms[basis] = terms.get(basis, ZERO).plus(row, factor)
    base = a if a.head is not None else c
    return replace(base, terms=_without_zeros(terms), extra=a.extra or c.extra)


def negated(b: Builder, node: fx.Node) -> Found | None:
    """The negative of a value."""
    value = _plain(b, node.args[0])
    return None if value is None else value.times(-1)


def capped(b: Builder, node: fx.Node) -> Found | None:
    """The tanh of scores."""
    known = b.known.get(node.args[0])  # type: ignore[arg-type]
    return replace(known, capped=True) if isinstance(known, Raw) and not known.capped else None


# --- masks -------------------------------------------------------------------------------------


def chosen(b: Builder, node: fx.Node) -> Found | None:
    """A one-hot made by comparing indices, or a value where a mask of rows holds and zero elsewhere."""
    mask, yes, no = node.args
    one_hot = _one_hot(b, node)
    if one_hot is not None:
        return one_hot
    value, other = _plain(b, yes), _constant(b, no)
    return _masked(b, node, value, mask) if other == 0 else None


def _constant(b: Builder, item: Any) -> float | None:
    """The number that a tensor made of one number holds."""
    if isinstance(item, (int, float)):
        return float(item)
    if isinstance(item, fx.Node) and item.target in (aten.scalar_tensor.default, aten.full.default):
        number = item.args[0] if item.target is aten.scalar_tensor.default else item.args[1]
        return float(number) if isinstance(number, (int, float)) else None
    return None


def _one_hot(b: Builder, node: fx.Node) -> Value | None:
    mask, yes, no = node.args
    hit, miss = _constant(b, yes), _constant(b, no)
    head = b.head_like(node.meta["val"])
    if head is None or hit is None or miss is None or not isinstance(mask, fx.Node):
        return None
    if mask.target is not aten.eq.Tensor:
        return None
    index, numbers = mask.args
    if stripped(numbers).target is not prims.iota.default:  # type: ignore[arg-type]
        return None
    iota = stripped(numbers)  # type: ignore[arg-type]
    if iota.args[0] != head.vocabulary or iota.kwargs.get("start") != 0 or iota.kwargs.get("step") != 1:
        return None
    root = stripped(index)  # type: ignore[arg-type]
    root = stripped(root.all_input_nodes[0]) if root.target is aten.expand.default else root
    terms = {Basis("hot", root): Row({None: hit - miss}), CONSTANT: Row({None: miss})}
    return Value(None, {k: r.times(1) for k, r in terms.items() if r.times(1).terms})


def masked(b: Builder, node: fx.Node) -> Found | None:
    """A value, zero where a mask of rows holds."""
    source, mask, number = node.args
    head = b.head_like(node.meta["val"])
    row = None if head is None else b.mask_of(head, mask)
    if row is None or number != 0:
        return None
    return _masked(b, node, _plain(b, source), b.call(aten.logical_not.default, row), True)


def _masked(
    b: Builder, node: fx.Node, value: Value | None, mask: Any, is_row: bool = False
) -> Value | None:
    head: Head | None = None if value is None else value.head or b.head_like(node.meta["val"])
    if value is None or head is None:
        return None
    row = mask if is_row else b.mask_of(head, mask)
    if row is None:
        return None
    kept = {k: Row({b.where(row, b.row(head, r)): 1.0}) for k, r in value.terms.items()}
    return replace(value, terms=kept)


_SAME = (
    *(aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.detach.default),
    *(aten.alias.default, aten.clone.default, aten.contiguous.default, aten._to_copy.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default),
    *(aten.expand.default, prims.convert_element_type.default),
)
RULES: Mapping[Any, Rule] = {
    **dict.fromkeys(_SAME, same_elements),
    **dict.fromkeys((aten.t.default, aten.permute.default), turned),
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), times),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), divided),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar), added),
    **dict.fromkeys(
        (aten.scatter.value, aten.scatter.src, aten.scatter_add.default), gradients.scattered
    ),
    **dict.fromkeys((aten.sum.default, aten.mean.default, aten.mean.dim), reductions.total),
    aten.sum.dim_IntList: lambda b, n: gradients.column_sum(b, n) or reductions.total(b, n),
    aten.slice.Tensor: sliced,
    aten.slice_backward.default: gradients.slice_gradient,
    aten.slice_scatter.default: gradients.slice_put_back,
    aten.neg.default: negated,
    aten.tanh.default: capped,
    aten.tanh_backward.default: gradients.tanh_gradient,
    aten.where.self: chosen,
    aten.where.ScalarOther: chosen,
    aten.masked_fill.Scalar: masked,
    aten.exp.default: reductions.exponential,
    aten.log.default: reductions.logarithm,
    aten.logsumexp.default: reductions.logsumexp,
    aten.amax.default: reductions.maximum,
    aten.gather.default: reductions.gather,
    aten._log_softmax.default: gradients.log_softmax,
    aten._softmax.default: gradients.softmax,
    aten._log_softmax_backward_data.default: gradients.log_softmax_gradient,
    aten._softmax_backward_data.default: gradients.softmax_gradient,
    aten.nll_loss_forward.default: nll_loss,
    aten.nll_loss_backward.default: nll_loss_gradient,
    aten.mm.default: gradients.product,
    getitem: part,
}
