"""Reductions over the vocabulary: what a loss learns of a row of logits.

Each rule gives the row of the new graph that holds the result, made of the log-sum-exp and the other
numbers of the head's operator. A maximum, and a sum of exponentials less it, are only known: they cancel.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.passes.loss_builder import Builder, Found, rows_of, stripped
from graphopt.passes.loss_values import (
    CONSTANT,
    ONE,
    PEAK,
    SOFTMAX,
    SOFTMAX_Z,
    ZERO,
    Head,
    KnownRow,
    Mix,
    Raw,
    Row,
    Shifted,
    Value,
    Z,
)

aten = torch.ops.aten


def as_value(b: Builder, item: Any) -> Value | None:
    """What is known of `item` as a sum of terms; scores become the logits of their head."""
    known = b.known.get(item) if isinstance(item, fx.Node) else None
    if isinstance(known, Raw):
        return Value(known.head, {Z: ONE}) if b.adopt(known) else None
    return known if isinstance(known, Value) else None


_CONSTANTS = {  # operators that make tensors of one number, and where it stands
    aten.new_zeros.default: None,
    aten.zeros.default: None,
    aten.zeros_like.default: None,
    aten.full.default: 1,
    aten.full_like.default: 1,
    aten.new_full.default: 2,
}


def constant_of(item: fx.Node) -> float | None:
    """The number that a tensor is made of everywhere, where that is said by its operator."""
    if item.target not in _CONSTANTS:
        return None
    place = _CONSTANTS[item.target]
    number = 0.0 if place is None else item.args[place]
    return float(number) if isinstance(number, (int, float)) else None


def lifted(b: Builder, item: Any) -> Value | None:
    """As `as_value`; also tensors (N, V) of one number, or of one for each row."""
    value = as_value(b, item)
    if value is not None or not isinstance(item, fx.Node) or not b.is_wide(item):
        return value
    head = b.head_like(item.meta["val"])
    number = constant_of(item)
    if number is not None:
        return Value(None, {CONSTANT: Row({None: number})} if number else {})
    if item.target is aten.expand.default and head is not None:
        row = b.row_of(head, item.args[0])
        return None if row is None else Value(None, {CONSTANT: row} if row.terms else {})
    return None


def logits_of(b: Builder, item: Any) -> tuple[Head, Row] | None:
    """The head and the shift where `item` is its logits plus a row, else None."""
    value = as_value(b, item)
    if value is None or value.head is None or value.extra is not None:
        return None
    if not set(value.terms) <= {Z, CONSTANT} or value.terms.get(Z, ZERO).constant != 1:
        return None
    return value.head, value.terms.get(CONSTANT, ZERO)


def lse_of(b: Builder, head: Head) -> Row:
    """The log-sum-exp of each row."""
    return Row({b.numbers(head)[0]: 1.0})


def is_last(source: Any, dims: Any) -> bool:
    """True where `dims` (a number, or one in a list) is the last dimension of `source`."""
    size = source.meta["val"].dim()
    listed = list(dims) if isinstance(dims, (list, tuple)) else [dims]
    return listed in ([-1], [size - 1])


def mix_node(b: Builder, mix: Mix) -> fx.Node:
    """The product of the factors, as (1 or N, V) in the new graph."""
    found = b.mixes.get(mix)
    for factor in mix if found is None else ():
        node = b.new[factor]
        shape = node.meta["val"].shape
        if len(shape) != 2:
            node = b.call(aten.reshape.default, node, [-1, shape[-1]])
        found = node if found is None else b.call(aten.mul.Tensor, found, node)
    assert found is not None
    b.mixes[mix] = found
    return found


def over_vocabulary(b: Builder, head: Head, value: Value) -> Row | None:
    """The sum over the vocabulary of `value`, as a row."""
    if value.extra is not None:
        return None
    total = ZERO
    for basis, row in value.terms.items():
        term: Row | None = row
        if basis.kind == "1":
            term = row.times(head.vocabulary)
        elif basis.kind == "z":
            head.summed, head.only_nll = True, False
            term = b.product(head, row, Row({b.numbers(head)[2]: 1.0}))
        elif basis.kind == "pz":
            head.expected, head.only_nll = True, False
            term = b.product(head, row, Row({b.numbers(head)[4]: 1.0}))
        elif basis.kind == "mz":
            head.only_nll = False
            numbers = b.numbers(head)
            known = b.adopt_mix(head, basis.mix)
            term = b.product(head, row, Row({numbers[3]: 1.0})) if known else None
        elif basis.kind == "m":
            mix = mix_node(b, basis.mix)
            dtype = torch.promote_types(mix.meta["val"].dtype, torch.float32)
            sums = b.call(aten.sum.dim_IntList, mix, [1], dtype=dtype)
            term = b.product(head, row, Row({b.flat(head, sums): 1.0}))
        if term is None:
            return None
        total = total.plus(term)
    return total


def known_row(b: Builder, head: Head, node: fx.Node, row: Row) -> Found:
    """What is known of `node`, which holds `row`, and the node of the new graph that holds it."""
    if PEAK in row.terms:
        return KnownRow(head, row)
    return KnownRow(head, row), b.shaped(node, b.row(head, row))


def logsumexp(b: Builder, node: fx.Node) -> Found | None:
    """The log-sum-exp of logits plus a row."""
    found = logits_of(b, node.args[0])
    if found is None or not is_last(node.args[0], node.args[1]):
        return None
    head, shift = found
    head.only_nll = False
    return known_row(b, head, node, lse_of(b, head).plus(shift))


def maximum(b: Builder, node: fx.Node) -> Found | None:
    """The maximum of each row: only known, as something that has to cancel."""
    found = logits_of(b, node.args[0])
    if found is None or len(node.args) < 2 or not is_last(node.args[0], node.args[1]):
        return None
    return KnownRow(found[0], Row({PEAK: 1.0}).plus(found[1]))


def exponential(b: Builder, node: fx.Node) -> Found | None:
    """exp(z - lse) is the softmax; with another shift it is that times a row."""
    found = logits_of(b, node.args[0])
    if found is None:
        return None
    head, shift = found
    head.only_nll = False
    power = shift.plus(lse_of(b, head))
    if PEAK in power.terms:
        return Shifted(head, power)
    factor = ONE if not power.terms else Row({b.call(aten.exp.default, b.row(head, power)): 1.0})
    return softmax_times(head, factor)


def times_softmax(b: Builder, value: Value | None, softmax: Value | None) -> Value | None:
    """The product of `softmax`, times a row, with a `value` made of the logits of the same head."""
    if value is None or softmax is None or set(softmax.terms) != {SOFTMAX}:
        return None
    head = softmax.head
    if head is None or value.head not in (None, head) or not set(value.terms) <= {Z, CONSTANT}:
        return None
    terms = {SOFTMAX_Z if k == Z else SOFTMAX: r for k, r in value.terms.items()}
    by = softmax.terms[SOFTMAX]
    return replace(softmax, terms={k: b.product(head, r, by) for k, r in terms.items()})


def softmax_times(head: Head, factor: Row) -> Value:
    """`factor` times the softmax."""
    return Value(head, {SOFTMAX: factor})


def logarithm(b: Builder, node: fx.Node) -> Found | None:
    """The logarithm of a known exponential of rows."""
    known = b.known.get(node.args[0])  # type: ignore[arg-type]
    if not isinstance(known, KnownRow) or not known.exponential or known.factor != ONE:
        return None
    if known.head is None:
        return None
    return known_row(b, known.head, node, known.row)


def total(b: Builder, node: fx.Node) -> Found | None:
    """A sum over the vocabulary, or over everything."""
    source = node.args[0]
    known = b.known.get(source)  # type: ignore[arg-type]
    everything = node.target in (aten.sum.default, aten.mean.default)
    if not everything and not is_last(source, node.args[1]):
        return None
    is_mean = node.target in (aten.mean.default, aten.mean.dim)
    if isinstance(known, Shifted):
        return None if is_mean or everything else KnownRow(known.head, known.shift, True)
    value = as_value(b, source)
    if value is None:
        return None
    head = value.head or b.head_like(source.meta["val"])  # type: ignore[union-attr]
    if head is None:
        return None
    row = over_vocabulary(b, head, value)
    if row is None or PEAK in row.terms:
        return None
    if is_mean:
        row = row.times(1 / head.vocabulary)
    if not everything:
        return known_row(b, head, node, row)
    reduce = aten.mean.default if is_mean else aten.sum.default
    return b.shaped(node, b.call(reduce, b.row(head, row)))


def gather(b: Builder, node: fx.Node) -> Found | None:
    """One element of each row, by an index (.., 1)."""
    source, dim, index = node.args[:3]
    found = logits_of(b, source)
    if found is None or not is_last(source, dim) or not isinstance(index, fx.Node):
        return None
    head, shift = found
    if node.meta["val"].numel() != rows_of(head) or node.meta["val"].shape[-1] != 1:
        return None
    if not b.adopt_index(head, stripped(index)):
        return None
    head.only_nll = False
    return known_row(b, head, node, Row({b.numbers(head)[1]: 1.0}).plus(shift))
