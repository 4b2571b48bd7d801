"""The cross-entropy of a row from a few numbers of its logits, with the options of `F.cross_entropy`.

With lse the log-sum-exp of row n, z_t the logit of its target t, w class weights (else 1), e the
smoothing, V words, the loss of a row whose target is not the ignore index is

    l[n] = (1 - e) w[t] (lse - z_t) + (e / V) (sum(w) lse - sum(w z)) + c lse^2

where c is the z-loss (Chowdhery et al., "PaLM", 2022, section 5). "mean" divides the sum of all l by the
sum of w[t] of the rows that count, as `F.cross_entropy` does. With probabilities q (N, V) as targets

    l[n] = sum(m) lse - sum(m z) + c lse^2,  m = w ((1 - e) q[n] + e / V)

and "mean" divides by N.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.stream_plans import RowNumbers
from graphopt.streamed import Coefficients

_ROWS = 16  # rows of probabilities that are held in float64 at a time
REDUCTIONS = ("none", "mean", "sum")


@dataclass(frozen=True)
class LossOptions:
    """The options of a cross-entropy; `z_loss` is the factor of the squared log-sum-exp."""

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"{self.reduction} is not a valid value for reduction")
        if not 0.0 <= self.label_smoothing <= 1.0:
            raise GraphoptError(
                f"label_smoothing must be between 0.0 and 1.0. Got: {self.label_smoothing}"
            )


class Targets(NamedTuple):
    """What the targets (N,) and the options fix before any logit is known; numbers are float64.

    `counts` (N,) says which of the targets `word` (N,) do. `hot` (N,) is the factor of lse - z_t,
    `spread` the one of the sums over all words, `width` the sum of the class weights, `divisor` what the
    reduction divides by. Of probabilities, `word` lies outside of the vocabulary, so that z_t is zero,
    `hot` is sum(m), `spread` one, and `width` zero.
    """

    word: Tensor
    counts: Tensor
    hot: Tensor
    spread: float
    width: Tensor
    divisor: Tensor
    options: LossOptions

    def rows(self, span: slice) -> "Targets":
        """Those of some rows."""
        word, counts, hot = (t[span] for t in self[:3])
        return self._replace(word=word, counts=counts, hot=hot)


def targets_of(word: Tensor, words: int, class_weight: Tensor | None, options: LossOptions) -> Targets:
    """Check the targets (N,), and weigh them; IndexError for one outside of the vocabulary."""
    counts = word != options.ignore_index
    _check(word, counts & ((word < 0) | (word >= words)))
    weight = torch.ones((), dtype=torch.float64, device=word.device)
    weights = weight if class_weight is None else class_weight.double()
    per_row = weights.expand(words)[torch.where(counts, word, 0)]
    per_row = torch.where(counts, per_row, 0.0)
    smoothing = options.label_smoothing
    divisor = per_row.sum() if options.reduction == "mean" else weight
    width = weights.expand(words).sum()
    hot = (1 - smoothing) * per_row
    return Targets(word, counts, hot, smoothing / words, width, divisor, options)


def blend(probability: Tensor, words: int, class_weight: Tensor | None, options: LossOptions) -> Tensor:
    """The mix m of some of `words` words: their `probability` (N, v), weighted (v,) and smoothed.

    It is `probability` itself, without a copy, where there are no weights and no smoothing.
    """
    smoothing = options.label_smoothing
    if smoothing:
        probability = probability * (1 - smoothing) + smoothing / words
    return probability if class_weight is None else probability * class_weight


def probable_targets(probability: Tensor, class_weight: Tensor | None, options: LossOptions) -> Targets:
    """Weigh probabilities (N, V) as targets; GraphoptError for an ignore index, as they have none."""
    if options.ignore_index >= 0:
        raise GraphoptError("ignore_index is not supported for probabilities as targets")
    (count, words), device = probability.shape, probability.device
    rows = [blend(p.double(), words, class_weight, options).sum(1) for p in probability.split(_ROWS)]
    one = torch.ones((), dtype=torch.float64, device=device)
    outside = torch.full((count,), -1, device=device)
    divisor = one * count if options.reduction == "mean" else one
    hot = torch.cat(rows)
    return Targets(outside, outside < 0, hot, 1.0, 0 * one, divisor, options)


def _check(word: Tensor, wrong: Tensor) -> None:
    if word.device.type != "cpu":
        torch._assert_async(~wrong.any(), "a target is out of bounds")
    elif bool(wrong.any()):
        raise IndexError(f"Target {int(word[wrong][0])} is out of bounds.")


def loss_of(numbers: RowNumbers, targets: Targets) -> Tensor:
    """The reduced loss (), or the loss of each row (N,)."""
    lse, options = numbers.lse, targets.options
    rows = targets.hot * (lse - numbers.picked)
    if targets.spread:
        rows = rows + targets.spread * (targets.width * lse - _sums(numbers))
    if options.z_loss:
        rows = rows + options.z_loss * lse.square()
    rows = torch.where(targets.counts, rows, 0.0)
    return rows if options.reduction == "none" else rows.sum() / targets.divisor


def _sums(numbers: RowNumbers) -> Tensor:
    """The sums of logits, by class weight where there is one: the other number is zero."""
    return numbers.total + numbers.mixed


def coefficients(lse: Tensor, targets: Targets, upstream: Tensor, weighted: bool) -> Coefficients:
    """How the loss reaches the logits, for a gradient of the loss (N,) or ()."""
    options = targets.options
    scale = torch.where(targets.counts, upstream / targets.divisor, 0.0)
    hot = scale * targets.hot
    p, spread = hot, scale * targets.spread
    if targets.spread:
        p = p + spread * targets.width
    if options.z_loss:
        p = p + scale * (2 * options.z_loss) * lse
    if not targets.spread:
        return Coefficients(p, -hot)
    return Coefficients(p, -hot, mixed=-spread) if weighted else Coefficients(p, -hot, one=-spread)
