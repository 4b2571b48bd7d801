"""From the loss back to the projection: gradients over the vocabulary, and the products they end in."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graphopt.passes.loss_builder import Builder, Found, stripped, transposed_root
from graphopt.passes.loss_reductions import (
    constant_of,
    is_last,
    lifted,
    logits_of,
    lse_of,
    over_vocabulary,
    times_softmax,
)
from graphopt.passes.loss_values import (
    CONSTANT,
    ONE,
    SOFTMAX,
    ZERO,
    Basis,
    Head,
    Raw,
    Slice,
    Turned,
    Value,
    Z,
)
from graphopt.stream_ops import COMMON, ops

aten = torch.ops.aten
KINDS = {"p", "hot", "1", "m", "pz"}  # of the terms of a gradient


def log_softmax(b: Builder, node: fx.Node) -> Found | None:
    """z - lse, whatever row was added to z before."""
    found = logits_of(b, node.args[0])
    if found is None or not is_last(node.args[0], node.args[1]):
        return None
    return Value(found[0], {Z: ONE, CONSTANT: lse_of(b, found[0]).times(-1)})


def softmax(b: Builder, node: fx.Node) -> Found | None:
    """The softmax, whatever row was added to z before."""
    found = logits_of(b, node.args[0])
    if found is None or not is_last(node.args[0], node.args[1]):
        return None
    found[0].only_nll = False
    return Value(found[0], {SOFTMAX: ONE})


def log_softmax_gradient(b: Builder, node: fx.Node) -> Found | None:
    """G - softmax sum(G) for the gradient G of the log-softmax."""
    gradient, found = lifted(b, node.args[0]), logits_of(b, node.args[1])
    if gradient is None or found is None or not is_last(node.args[0], node.args[2]):
        return None
    head = found[0]
    if gradient.head not in (None, head) or not gradient.kinds <= KINDS:
        return None
    return _centred(b, head, gradient)


def softmax_gradient(b: Builder, node: fx.Node) -> Found | None:
    """G softmax - softmax sum(G softmax) for the gradient G of the softmax."""
    gradient, known = lifted(b, node.args[0]), b.known.get(node.args[1])  # type: ignore[arg-type]
    if gradient is None or gradient.extra is not None or not is_last(node.args[0], node.args[2]):
        return None
    value = times_softmax(b, gradient, known if isinstance(known, Value) else None)
    return None if value is None or value.head is None else _centred(b, value.head, value)


def _centred(b: Builder, head: Head, value: Value) -> Value | None:
    """`value` less the softmax times the sum of `value` over the vocabulary."""
    total = over_vocabulary(b, head, value)
    if total is None:
        return None
    softmax = value.terms.get(SOFTMAX, ZERO).plus(total, -1)
    return replace(value, head=head, terms={**value.terms, SOFTMAX: softmax})


def tanh_gradient(b: Builder, node: fx.Node) -> Found | None:
    """The gradient before a soft cap, from that after it."""
    value = lifted(b, node.args[0])
    known = b.known.get(node.args[1])  # type: ignore[arg-type]
    if value is None or value.head is None or value.head.form is None or value.extra is not None:
        return None
    form = value.head.form
    if not isinstance(known, Raw) or value.uncapped or not form.capped:
        return None
    same = replace(known, outer=form.outer, slices=form.slices) == form and known.outer == 1
    return replace(value, uncapped=True) if same else None


def slice_gradient(b: Builder, node: fx.Node) -> Found | None:
    """The gradient before a slice of rows."""
    return _unsliced_value(b, node, node.args[0], node.args[1], *node.args[2:])


def slice_put_back(b: Builder, node: fx.Node) -> Found | None:
    """The same, written as a slice put into zeros."""
    zeros, source, *place = node.args
    if not isinstance(zeros, fx.Node) or constant_of(zeros) != 0:
        return None
    return _unsliced_value(b, node, source, node.meta["val"].shape, *slice_of(place))


def slice_of(arguments: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """dim, start, end and step of a slice, of which the last may be left out."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    given = dict(enumerate(arguments))
    dim, start, end, step = (given.get(i, default) for i, default in enumerate(defaults))
    return dim, start, end, step


def _unsliced_value(
    b: Builder, node: fx.Node, source: Any, sizes: Any, dim: Any, start: Any, end: Any, step: Any
) -> Found | None:
    value = lifted(b, source)
    if value is None or value.head is None or value.head.form is None:
        return None
    shape = tuple(source.meta["val"].shape)
    slices = value.head.form.slices
    if tuple(sizes) != shape:
        if value.undone >= len(slices):
            return None
        mine = Slice(tuple(sizes)[:-1], dim % len(sizes), start, end, step)
        if not same_slice(mine, slices[len(slices) - 1 - value.undone]):
            return None
        value = replace(value, undone=value.undone + 1)
    if value.extra is not None:
        mapped = [value.extra if a is source else b.new.get(a, a) for a in node.args]  # type: ignore
        value = replace(value, extra=b.call(node.target, *mapped))
    return value


def same_slice(a: Slice, b: Slice) -> bool:
    """True where both take the same rows of the same shape."""
    if (a.lead, a.dim) != (b.lead, b.dim):
        return False
    length = range(a.lead[a.dim])
    return length[a.start : a.end : a.step] == length[b.start : b.end : b.step]


def scattered(b: Builder, node: fx.Node) -> Found | None:
    """Numbers put into zeros (N, V), one in each row."""
    zeros, dim, index, source = node.args[:4]
    base = lifted(b, zeros)
    if base is None or base.terms or base.extra is not None or not is_last(zeros, dim):
        return None
    shape = tuple(index.meta["val"].shape)  # type: ignore[union-attr]
    head = b.head_like(node.meta["val"])
    if head is None or shape[-1] != 1 or len(shape) != node.meta["val"].dim():
        return None
    row = b.row_of(head, source)
    root = stripped(index)  # type: ignore[arg-type]
    return None if row is None else Value(None, {Basis("hot", index=root): row})


# --- products ----------------------------------------------------------------------------------


def product(b: Builder, node: fx.Node) -> Found | None:
    """A matrix product of the gradient of the scores with the weight, or with x."""
    left, right = (b.known.get(n) for n in node.args[:2])  # type: ignore[arg-type]
    if isinstance(left, Turned):
        return _weight_gradient(b, left.value, node.args[1], None)
    if isinstance(right, Value):
        root, turned = transposed_root(node.args[0])  # type: ignore[arg-type]
        return _weight_gradient(b, right, root, node) if turned else None
    if not isinstance(left, Value):
        return None
    head = left.head
    if head is None:
        return None
    root, turned = transposed_root(head.weight)
    if transposed_root(node.args[1]) != (root, not turned):  # type: ignore[arg-type]
        return None
    found = gradients_of(b, left)
    if found is None:
        return None
    dx = found[0]
    if left.extra is not None:
        dx = b.call(aten.add.Tensor, dx, b.call(aten.mm.default, left.extra, b.new[node.args[1]]))  # type: ignore
    return dx


def _weight_gradient(b: Builder, value: Value, x: Any, turned: fx.Node | None) -> Found | None:
    head = value.head
    if head is None or transposed_root(x) != transposed_root(head.x):
        return None
    found = gradients_of(b, value)
    if found is None:
        return None
    dw = found[1]
    if value.extra is not None:
        more = b.call(aten.mm.default, b.turned(value.extra), b.new[x])
        dw = b.call(aten.add.Tensor, dw, more)
    return dw if turned is None else b.turned(dw)


def column_sum(b: Builder, node: fx.Node) -> Found | None:
    """The gradient of the bias: the sum over rows of that of the scores."""
    arguments: tuple[Any, ...] = node.args
    source, dims = arguments[:2]
    value = b.known.get(source)
    leading = list(range(source.meta["val"].dim() - 1))
    if not isinstance(value, Value) or list(dims) != leading or node.kwargs:
        return None
    found = gradients_of(b, value)
    if found is None:
        return None
    bias = found[2]
    if value.extra is not None:
        more = b.call(aten.sum.dim_IntList, value.extra, dims)
        bias = b.call(aten.add.Tensor, bias, b.call(aten.view.default, more, [-1]))
    return b.shaped(node, bias)


def gradients_of(b: Builder, value: Value) -> tuple[fx.Node, ...] | None:
    """The nodes of the gradients of x, weight and bias for the gradient `value` of the scores."""
    head = value.head
    if head is None or head.form is None or not value.kinds <= KINDS:
        return None
    form = head.form
    if value.undone != len(form.slices) or value.uncapped is not form.capped:
        return None
    if head.result_of is not None:
        return head.results if head.result_of == replace(value, extra=None) else None
    for basis in value.terms:
        if basis.index is not None and not b.adopt_index(head, basis.index):
            return None
        if basis.mix and not b.adopt_mix(head, basis.mix):
            return None
    by = _coefficients(b, head, value, form)
    lse = b.numbers(head)[0]
    assert head.statistics is not None
    common = head.statistics.args[:COMMON]
    wanted = [True, True, True]
    name = f"{head.linear.name}_gradients"
    target = ops.streamed_gradients.default
    head.gradients = b.call(target, *common, lse, *by, head.vocabulary, wanted, name=name)
    items = b.items(head.gradients)
    head.results = (_unsliced(b, head, items[0]), *items[1:])
    head.result_of = replace(value, extra=None)
    return head.results


def _coefficients(b: Builder, head: Head, value: Value, form: Raw) -> list[fx.Node | None]:
    """The rows of softmax, one-hot, constant, mix, softmax times z; None for a term that is not there."""
    scale = 1 / (form.inner * form.outer)
    found: dict[str, fx.Node | None] = dict.fromkeys(("p", "hot", "1", "m", "pz"))
    for basis, row in value.terms.items():
        if row != ZERO:
            found[basis.kind] = b.row(head, row.times(scale))
    return [found[kind] for kind in ("p", "hot", "1", "m", "pz")]


def _unsliced(b: Builder, head: Head, dx: fx.Node) -> fx.Node:
    """The gradient of all rows of x from that of the rows that the loss reads."""
    assert head.form is not None
    hidden = dx.meta["val"].shape[-1]
    for item in reversed(head.form.slices):
        length = len(range(item.lead[item.dim])[item.start : item.end : item.step])
        shape = [*item.lead[: item.dim], length, *item.lead[item.dim + 1 :], hidden]
        dx = b.call(aten.view.default, dx, shape)
        zeros = b.number(0, dx.meta["val"].new_empty((*item.lead, hidden)))
        start = 0 if item.start is None else item.start
        end = 2**63 - 1 if item.end is None else item.end
        dx = b.call(aten.slice_scatter.default, zeros, dx, item.dim, start, end, item.step)
    return b.call(aten.view.default, dx, [-1, hidden]) if head.form.slices else dx
