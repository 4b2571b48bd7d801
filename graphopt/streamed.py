"""Losses over a vocabulary without its logits: statistics of rows, merged block by block, and gradients.

For hidden rows x (N, D), a weight (V, D) and a bias (V,) the *raw* scores are x weight^T + bias (N, V),
and the *logits* z are `Head.inner` times them, soft-capped where `Head.cap` is positive. A loss sees a
row of z through a few numbers: its log-sum-exp, the logit its target picks, the sum of its logits, and
their sum weighted by a `mix` (class weights, or probabilities as targets), and their mean under the
softmax (the log-sum-exp less that is the entropy). So it reaches z as

    dz[n, v] = (p[n] + pz[n] z[n, v]) softmax(z[n])[v] + hot[n] [v == target[n]] + one[n]
               + mixed[n] mix[n, v]

with one coefficient per row and term (`Coefficients`), which holds for every reduction, smoothing, class
weight, z-loss and gradient per token. Numbers of rows are float64:
a log-sum-exp of large logits has too few digits after the point in float32.

`Statistics` of disjoint parts of the vocabulary merge: the maximum and the sum of exponentials as in
Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018, section 3; the others add.
The sweep over tokens that makes gradients in the forward is known from Liger Kernel (Hsu et al., 2024,
section 3.2), recomputation in vocabulary blocks from Wijmans et al., "Cut Your Losses in Large-Vocabulary
Language Models", ICLR 2025, section 4; nothing is filtered here.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """From raw scores to logits: `inner * raw`, or `cap * tanh(inner * raw)` where `cap` is positive."""

    inner: float = 1.0
    cap: float = 0.0


class Operands(NamedTuple):
    """What logits are made of: x (N, D), weight (V, D), bias (V,), targets (N,), mix (1 or N, V).

    Targets outside of [0, V) pick nothing. Without `summed` the sums of logits stay zero, and without
    `expected` nothing is to be read from their means under the softmax.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    targets: Tensor | None = None
    mix: Tensor | None = None
    head: Head = Head()
    summed: bool = False
    expected: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of tiles: float64 for float64 operands, else float32."""
        return torch.float64 if self.x.dtype is torch.float64 else torch.float32

    def rows(self, span: slice) -> "Operands":
        """The operands of some tokens."""
        targets = None if self.targets is None else self.targets[span]
        mix = self.mix[span] if self.mix is not None and self.mix.shape[0] > 1 else self.mix
        return self._replace(x=self.x[span], targets=targets, mix=mix)

    def columns(self, span: slice) -> "Operands":
        """The operands of some of the vocabulary; targets count from its beginning."""
        bias = None if self.bias is None else self.bias[span]
        targets = None if self.targets is None else self.targets - span.start
        mix = None if self.mix is None else self.mix[:, span]
        return self._replace(weight=self.weight[span], bias=bias, targets=targets, mix=mix)


class Coefficients(NamedTuple):
    """The factors (N,), float64, of the terms of a row's gradient; None for a term that is not there."""

    p: Tensor | None = None
    hot: Tensor | None = None
    one: Tensor | None = None
    mixed: Tensor | None = None
    pz: Tensor | None = None

    def rows(self, span: slice) -> "Coefficients":
        """The coefficients of some tokens."""
        return Coefficients(*(None if c is None else c[span] for c in self))

    def rebased(self, base: Tensor, lse: Tensor) -> "Coefficients":
        """The coefficients where exp(z - base) stands for the softmax."""
        assert self.p is not None
        return self._replace(p=self.p * (base - lse).exp())

    def times(self, factor: float, dtype: torch.dtype) -> "Coefficients":
        """The coefficients, scaled, in the dtype of a tile."""
        return Coefficients(*(None if c is None else (c * factor).to(dtype) for c in self))


class Statistics(NamedTuple):
    """Of the logits of each row (N,), float64: maximum, sum of exp(z - maximum), target's logit, sums.

    `moment` is the sum of exp(z - maximum) (z - maximum), zero where it was not asked for.
    """

    peak: Tensor
    mass: Tensor
    picked: Tensor
    total: Tensor
    mixed: Tensor
    moment: Tensor

    def merge(self, other: "Statistics") -> "Statistics":
        """The statistics of both parts of the vocabulary together.

        >>> z = torch.randn(3, 10, dtype=torch.float64)
        >>> halves = [statistics_of(part, None) for part in z.clone().split([4, 6], 1)]
        >>> torch.allclose(halves[0].merge(halves[1]).lse, z.double().logsumexp(1))
        True
        """
        peak = torch.maximum(self.peak, other.peak)
        base = finite(peak)
        parts = [s.rebased(base) for s in (self, other)]
        return Statistics(peak, *(sum(numbers) for numbers in zip(*parts, strict=True)))

    def rebased(self, base: Tensor) -> tuple[Tensor, ...]:
        """All but the maximum, with `base` (N,) in its place."""
        scale = (self.peak - base).exp()
        moment = self.moment + self.mass * (finite(self.peak) - base)
        return self.mass * scale, *self[2:5], moment * scale

    @property
    def lse(self) -> Tensor:
        """The log-sum-exp of each row (N,)."""
        return self.peak + self.mass.log()

    @property
    def expected(self) -> Tensor:
        """The mean of the logits of each row under their softmax (N,)."""
        return self.peak + self.moment / self.mass


def statistics_of(
    z: Tensor,
    targets: Tensor | None,
    mix: Tensor | None = None,
    summed: bool = False,
    least: Tensor | None = None,
    expected: bool = False,
) -> Statistics:
    """The statistics of logits z (N, V), which is overwritten with exp(z - maximum).

    With `expected` a copy of them is made, and the `moment`. `least` (N,) are maxima of other parts:
    where they are larger, they take the place of the maximum.
    """
    picked = picked_of(z, targets)
    total = z.sum(1) if summed else z.new_zeros(z.shape[:1])
    mixed = z.new_zeros(z.shape[:1]) if mix is None else _dot(z, mix.to(z.dtype))
    peak = z.amax(1) if least is None else torch.maximum(z.amax(1), least.to(z.dtype))
    z.sub_(finite(peak)[:, None])
    below = z.clone() if expected else None
    z.exp_()
    moment = z.new_zeros(z.shape[:1]) if below is None else _dot(z, below)
    return Statistics(*(s.double() for s in (peak, z.sum(1), picked, total, mixed, moment)))


def finite(peak: Tensor) -> Tensor:
    """Maxima, the least number in place of that of a row without a finite logit."""
    return peak.clamp_min(torch.finfo(peak.dtype).min)


def _dot(z: Tensor, mix: Tensor) -> Tensor:
    """The sums of z mix over the vocabulary (N,)."""
    if mix.shape[0] == 1:
        return torch.mv(z, mix[0])
    return torch.bmm(z[:, None, :], mix[:, :, None])[:, 0, 0]


def picked_of(z: Tensor, targets: Tensor | None) -> Tensor:
    """z[n, targets[n]] (N,), zero where the target lies outside."""
    if targets is None:
        return z.new_zeros(z.shape[:1])
    index, inside = _inside(z, targets)
    return torch.where(inside, z.gather(1, index)[:, 0], 0.0)


def _inside(z: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    inside = (targets >= 0) & (targets < z.shape[1])
    return torch.where(inside, targets, 0)[:, None], inside


class Tile:
    """Memory for the logits of one block (n, c), and for a copy in a low precision."""

    def __init__(self, operands: Operands, rows: int, columns: int) -> None:
        x, dtype = operands.x, operands.dtype
        self.wide = x.new_empty((rows, columns), dtype=dtype)
        self.low = None if x.dtype is dtype else x.new_empty((rows, columns))
        self.slope = torch.empty_like(self.wide) if operands.head.cap else None

    def logits(self, operands: Operands) -> Tensor:
        """The logits of `operands` (n, c), in this memory."""
        n, c = operands.x.shape[0], operands.weight.shape[0]
        z, raw = _front(self.wide, n, c), self._product(n, c)
        if operands.bias is None:
            torch.mm(operands.x, operands.weight.t(), out=raw)
        else:
            torch.addmm(operands.bias, operands.x, operands.weight.t(), out=raw)
        if raw is not z:
            z.copy_(raw)
        inner, cap = operands.head
        if inner != 1:
            z.mul_(inner)
        return z.tanh_().mul_(cap) if cap else z

    def _product(self, n: int, c: int) -> Tensor:
        return _front(self.wide if self.low is None else self.low, n, c)

    def gradient(self, operands: Operands, lse: Tensor, by: Coefficients) -> Tensor:
        """The gradient of the raw scores (n, c) over the logits in this memory, in the dtype of x."""
        n, c = operands.x.shape[0], operands.weight.shape[0]
        slope, z = self.slope_of(operands), _front(self.wide, n, c)
        rounded = lse.to(z.dtype)
        scores = None if by.pz is None else z.clone()
        softmax = z.sub_(rounded[:, None]).exp_()
        off = (rounded - lse).exp()
        p, pz = (None if c is None else c * off for c in (by.p, by.pz))
        return self.finished(operands, softmax, by._replace(p=p, pz=pz), slope, scores)

    def slope_of(self, operands: Operands) -> Tensor | None:
        """dz/draw (n, c) of a soft cap, from the logits in this memory: inner (cap - z^2 / cap)."""
        if self.slope is None:
            return None
        inner, cap = operands.head
        n, c = operands.x.shape[0], operands.weight.shape[0]
        z, slope = _front(self.wide, n, c), _front(self.slope, n, c)
        return torch.mul(z, z, out=slope).mul_(-inner / cap).add_(inner * cap)

    def finished(
        self,
        operands: Operands,
        softmax: Tensor,
        by: Coefficients,
        slope: Tensor | None,
        scores: Tensor | None = None,
    ) -> Tensor:
        """The gradient of the raw scores (n, c), over their softmax (n, c).

        `by.pz` needs the `scores` (n, c), the logits, which are overwritten.
        """
        inner = operands.head.inner if slope is None else 1.0
        p, hot, one, mixed, pz = by.times(inner, softmax.dtype)
        if scores is not None and pz is not None:
            scores.mul_(pz[:, None])
            softmax.mul_(scores if p is None else scores.add_(p[:, None]))
        else:
            softmax = softmax.zero_() if p is None else softmax.mul_(p[:, None])
        if hot is not None and operands.targets is not None:
            index, inside = _inside(softmax, operands.targets)
            softmax.scatter_add_(1, index, torch.where(inside, hot, 0.0)[:, None])
        if one is not None:
            softmax.add_(one[:, None])
        if mixed is not None and operands.mix is not None:
            softmax.addcmul_(operands.mix.to(softmax.dtype), mixed[:, None])
        if slope is not None:
            softmax.mul_(slope)
        return self.lowered(softmax)

    def lowered(self, block: Tensor) -> Tensor:
        """`block` (n, c) in the dtype of x, in the memory for that."""
        return block if self.low is None else _front(self.low, *block.shape).copy_(block)

    def summed(self, gradient: Tensor) -> Tensor:
        """The sum over rows (c,) of the gradient (n, c) in this memory, before it lost precision."""
        return _front(self.wide, *gradient.shape).sum(0)


def _front(memory: Tensor, n: int, c: int) -> Tensor:
    """The first elements of `memory` as a contiguous (n, c)."""
    return memory if memory.shape == (n, c) else memory.view(-1)[: n * c].view(n, c)


_SOME = ContextVar("some spans", default=False)


@contextmanager
def some_spans() -> Iterator[None]:
    """`spans` leaves out those in the middle, which hold what the second holds, to find the peak."""
    token = _SOME.set(True)
    try:
        yield
    finally:
        _SOME.reset(token)


def spans(length: int, step: int) -> Iterator[slice]:
    """`range(length)` in parts of `step`.

    >>> [(s.start, s.stop) for s in spans(5, 2)]
    [(0, 2), (2, 4), (4, 5)]
    """
    starts: Sequence[int] = range(0, length, step)
    if _SOME.get() and len(starts) > 4:
        starts = [*starts[:2], *starts[-2:]]
    return (slice(start, min(start + step, length)) for start in starts)
