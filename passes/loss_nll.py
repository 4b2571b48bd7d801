"""The fused negative log-likelihood and its gradient, on rows instead of logits.

The sums are those of `aten.nll_loss_forward`: each row counts with the class weight of its target, a row
whose target is the ignore index with zero, and a mean divides by the sum of those weights.
"""

from typing import Any

import torch
from torch import fx

from graphopt.passes.loss_builder import Builder, Found, rows_of, stripped
from graphopt.passes.loss_reductions import logits_of
from graphopt.passes.loss_values import PEAK, Basis, Head, Row, Value

aten = torch.ops.aten
_NONE, _MEAN = 0, 1  # numbers of the reductions; 2 is the sum


def nll_loss(b: Builder, node: fx.Node) -> Found | None:
    """`nll_loss_forward` of log-probabilities (N, V): the loss, and the sum of the weights."""
    source, target, weight, reduction, ignore = node.args
    found = logits_of(b, source)
    if found is None or not _fits(b, found[0], node, source, target, ignore):
        return None
    head, shift = found
    logp = Row({b.numbers(head)[1]: 1.0}).plus(shift)
    if PEAK in logp.terms:
        return None
    row = b.call(aten.neg.default, b.row(head, logp))
    weights, counts = _weights(b, head, target, weight, ignore)
    if weight is not None:
        row = b.call(aten.mul.Tensor, row, weights)
    row = b.where(counts, row)
    total = b.call(aten.sum.default, weights)
    loss = row if reduction == _NONE else b.call(aten.sum.default, row)
    if reduction == _MEAN:
        loss = b.call(aten.div.Tensor, loss, total)
    dtype = source.meta["val"].dtype  # type: ignore[union-attr]
    loss, total = b.cast(loss, dtype), b.cast(total, dtype)
    b.parts[node] = (loss, total)
    return loss


def _fits(b: Builder, head: Head, node: fx.Node, source: Any, target: Any, ignore: Any) -> bool:
    shape = tuple(source.meta["val"].shape)
    return shape == (rows_of(head), head.vocabulary) and b.adopt_index(head, stripped(target), ignore)


def _weights(b: Builder, head: Head, target: Any, weight: Any, ignore: Any) -> tuple[fx.Node, fx.Node]:
    """What each row counts (N,), and whether it does."""
    key = (target, weight, ignore)
    if key not in b.weights:
        index = b.new[target]
        counts = b.call(aten.ne.Scalar, index, ignore)
        dtype = b.numbers(head)[0].meta["val"].dtype
        if weight is None:
            b.weights[key] = b.cast(counts, dtype), counts
        else:
            taken = b.call(aten.index.Tensor, b.new[weight], [b.where(counts, index)])
            b.weights[key] = b.where(counts, b.cast(taken, dtype)), counts
    return b.weights[key]


def part(b: Builder, node: fx.Node) -> Found | None:
    """One result of an operator that was replaced by several nodes."""
    return b.parts[node.args[0]][node.args[1]] if node.args[0] in b.parts else None  # type: ignore[index]


def nll_loss_gradient(b: Builder, node: fx.Node) -> Found | None:
    """`nll_loss_backward`: minus the incoming gradient times the weights, at the targets."""
    gradient, source, target, weight, reduction, ignore, total = node.args
    found = logits_of(b, source)
    if found is None or not _fits(b, found[0], node, source, target, ignore):
        return None
    head = found[0]
    weights, counts = _weights(b, head, target, weight, ignore)
    factor = b.new[gradient]  # type: ignore[index]
    if reduction == _MEAN:
        factor = b.call(aten.div.Tensor, factor, b.new[total])  # type: ignore[index]
    row = b.call(aten.mul.Tensor, weights, b.flat(head, b.call(aten.neg.default, factor)))
    row = b.where(counts, row)
    return Value(head, {Basis("hot", index=stripped(target)): Row({row: 1.0})})  # type: ignore[arg-type]
