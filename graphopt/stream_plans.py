"""The ways to stream a loss: over tokens, over the vocabulary, and as attention over the vocabulary.

Each function is a whole plan, or one half of it, on the operands of `graphopt.streamed`. Sizes: N
tokens, D hidden, V vocabulary. FLOPs: `sweep` 6NDV; `statistics` 2NDV and `gradients` 6NDV; `attention`
4NDV. Sums over blocks are float32 (or float64); gradients have the dtype of the operands.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.streamed import Coefficients, Operands, Statistics, Tile, finite, spans, statistics_of

_MIXED_ROWS = 1024  # rows of a sum of more precision that are added to at a time


class RowNumbers(NamedTuple):
    """For each row (N,): log-sum-exp, target's logit, sum of the logits, by the mix, by the softmax."""

    lse: Tensor
    picked: Tensor
    total: Tensor
    mixed: Tensor
    expected: Tensor

    @classmethod
    def of(cls, found: Statistics) -> "RowNumbers":
        """The numbers that `found` amounts to."""
        return cls(found.lse, found.picked, found.total, found.mixed, found.expected)

    @classmethod
    def empty(cls, x: Tensor) -> "RowNumbers":
        """Memory for those of the rows of x (N, D)."""
        return cls(*(x.new_empty(x.shape[:1], dtype=torch.float64) for _ in cls._fields))


class Gradients(NamedTuple):
    """Of x (N, D), weight (V, D), bias (V,); of size 0 where not asked for."""

    x: Tensor
    weight: Tensor
    bias: Tensor


def statistics(operands: Operands, columns: int) -> RowNumbers:
    """The numbers of every row, from blocks of `columns` of the vocabulary; memory N x columns."""
    tile = Tile(operands, operands.x.shape[0], min(columns, operands.weight.shape[0]))
    found: Statistics | None = None
    for span in spans(operands.weight.shape[0], columns):
        part = operands.columns(span)
        z = tile.logits(part)
        new = statistics_of(z, part.targets, part.mix, part.summed, expected=part.expected)
        found = new if found is None else found.merge(new)
    assert found is not None, "the vocabulary is empty"
    return RowNumbers.of(found)


def gradients(
    operands: Operands, lse: Tensor, by: Coefficients, columns: int, wanted: Sequence[bool]
) -> Gradients:
    """The gradients, from logits made again in blocks of `columns`; the weight's is written once."""
    x, weight, dtype = operands.x, operands.weight, operands.dtype
    sums = _empty(x, wanted[0], x.shape, dtype)
    into = Gradients(sums.zero_(), *_outputs(operands, (False, *wanted[1:]))[1:])
    tile = Tile(operands, x.shape[0], min(columns, weight.shape[0]))
    for span in spans(weight.shape[0], columns):
        part = operands.columns(span)
        tile.logits(part)
        gradient = tile.gradient(part, lse, by)
        if wanted[0]:
            add_product(into.x, gradient, part.weight)
        if wanted[1]:
            torch.mm(gradient.t(), x, out=into.weight[span])
        if wanted[2]:
            into.bias[span] = tile.summed(gradient)
    del tile
    return into._replace(x=into.x.to(x.dtype))


def sweep(
    operands: Operands,
    by: Coefficients,
    p_per_lse: Tensor | None,
    rows: int,
    wanted: Sequence[bool],
) -> tuple[RowNumbers, Gradients]:
    """Numbers and gradients in one pass over blocks of `rows` tokens; memory rows x V.

    The coefficient of the softmax is `by.p + p_per_lse * lse`; that of the softmax times z must be None.
    """
    x, weight, dtype = operands.x, operands.weight, operands.dtype
    numbers = RowNumbers.empty(x)
    into = _outputs(operands, wanted)
    sums = _empty(x, wanted[1], weight.shape, dtype) if x.dtype is not dtype else into.weight
    bias = _empty(x, wanted[2], weight.shape[:1], dtype)
    sums.zero_()
    bias.zero_()
    tile = Tile(operands, min(rows, x.shape[0]), weight.shape[0])
    for span in spans(x.shape[0], rows):
        part = operands.rows(span)
        z = tile.logits(part)
        slope = tile.slope_of(part)
        found = statistics_of(z, part.targets, part.mix, part.summed, expected=part.expected)
        for number, value in zip(numbers, RowNumbers.of(found), strict=True):
            number[span] = value
        mine = _with_lse(by.rows(span), p_per_lse, span, found.lse)
        mine = mine._replace(p=None if mine.p is None else mine.p / found.mass)
        gradient = tile.finished(part, z, mine, slope)
        if wanted[0]:
            torch.mm(gradient, weight, out=into.x[span])
        if wanted[1]:
            add_product(sums, gradient.t(), part.x)
        if wanted[2]:
            bias += tile.summed(gradient)
    del tile
    if sums is not into.weight:
        into.weight.copy_(sums)
    return numbers, into._replace(bias=bias.to(x.dtype))


def _with_lse(by: Coefficients, factor: Tensor | None, span: slice, lse: Tensor) -> Coefficients:
    if factor is None:
        return by
    added = factor[span] * lse
    return by._replace(p=added if by.p is None else by.p + added)


def attention(operands: Operands, columns: int) -> tuple[RowNumbers, Tensor]:
    """The numbers of every row, and the mean weight row under its softmax (N, D); without a soft cap.

    That is attention with queries x, and the weight as keys and values, kept as in Dao et al.,
    "FlashAttention", 2022, algorithm 1.
    """
    x, weight = operands.x, operands.weight
    tile = Tile(operands, x.shape[0], min(columns, weight.shape[0]))
    mean = x.new_zeros(x.shape, dtype=operands.dtype)
    found: Statistics | None = None
    for span in spans(weight.shape[0], columns):
        part = operands.columns(span)
        z = tile.logits(part)
        least = None if found is None else found.peak
        new = statistics_of(z, part.targets, part.mix, part.summed, least, part.expected)
        if found is not None:
            mean.mul_((found.peak - finite(new.peak)).exp().to(mean.dtype)[:, None])
        add_product(mean, tile.lowered(z), part.weight)
        found = new if found is None else found.merge(new)
    assert found is not None, "the vocabulary is empty"
    mean.div_(found.mass.to(mean.dtype)[:, None])
    return RowNumbers.of(found), mean


def attention_gradient(operands: Operands, mean: Tensor, by: Coefficients) -> Tensor:
    """The gradient of x (N, D) from the mean weight rows (N, D) of `attention`; without `by.pz`."""
    weight, dtype = operands.weight, operands.dtype
    p, hot, one, mixed, _ = by.times(operands.head.inner, dtype)
    found = torch.zeros_like(mean) if p is None else mean * p[:, None]
    if hot is not None and operands.targets is not None:
        inside = (operands.targets >= 0) & (operands.targets < weight.shape[0])
        picked = weight.index_select(0, torch.where(inside, operands.targets, 0))
        found.addcmul_(picked.to(dtype), torch.where(inside, hot, 0.0)[:, None])
    if one is not None:
        found.addcmul_(_column_sums(weight, dtype)[None], one[:, None])
    if mixed is not None and operands.mix is not None:
        found.addcmul_(torch.mm(operands.mix.to(weight.dtype), weight).to(dtype), mixed[:, None])
    return found.to(operands.x.dtype)


def _outputs(operands: Operands, wanted: Sequence[bool]) -> Gradients:
    x, weight = operands.x, operands.weight
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return Gradients(*(_empty(x, w, s, x.dtype) for w, s in zip(wanted, shapes, strict=True)))


def _empty(like: Tensor, wanted: bool, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return like.new_empty(shape if wanted else (0,), dtype=dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may have more precision than a and b; then in parts of its rows."""
    if total.dtype is a.dtype:
        total.addmm_(a, b)
        return
    for span in spans(total.shape[0], _MIXED_ROWS):
        total[span].add_(torch.mm(a[span], b).to(total.dtype))


def _column_sums(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The sums over rows, in `dtype`, without a copy of the whole in it."""
    found = matrix.new_zeros(matrix.shape[1:], dtype=dtype)
    for span in spans(matrix.shape[0], _MIXED_ROWS):
        found += matrix[span].to(dtype).sum(0)
    return found
