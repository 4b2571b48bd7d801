"""What a split loss is made of, and how the numbers of its rows go from rank to rank.

Collectives of an exchange of n rows, with k float64 numbers (2; 3 with label smoothing or probabilities)
for each: "three-barrier" reduces n, then k n of them; the others gather k n of each rank once.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.stream_plans import RowNumbers
from graphopt.streamed import Coefficients, Head, Operands
from graphopt.vocab_loss import Targets, coefficients
from graphopt.vocab_shard import Shard, finished, max_over, start_gather, sum_over

ALGORITHMS = ("three-barrier", "two-barrier", "one-barrier")
STREAMS = ("tokens", "words")


class Way(NamedTuple):
    """How a split loss runs: the algorithm, and blocks of so many tokens, or words."""

    algorithm: str = "two-barrier"
    stream: str = "words"
    block: int = 2048


@dataclass(frozen=True, slots=True)
class SplitSizes:
    """N tokens, D hidden, V words over so many ranks; `numbers` of a row are exchanged (2 or 3)."""

    tokens: int
    hidden: int
    words: int
    ranks: int
    dtype: torch.dtype = torch.float32
    numbers: int = 2
    training: bool = True
    capped: bool = False

    @property
    def own_words(self) -> int:
        """The words of the largest part."""
        return math.ceil(self.words / self.ranks)

    @property
    def wide_bytes(self) -> int:
        """Bytes of a logit in a tile."""
        return max(4, self.dtype.itemsize)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of x and of the rank's weight."""
        return (self.tokens + self.own_words) * self.hidden * self.dtype.itemsize

    def blocks(self, way: Way) -> int:
        """Blocks of one pass over the logits."""
        return math.ceil((self.tokens if way.stream == "tokens" else self.own_words) / way.block)


class Problem(NamedTuple):
    """What a split loss has besides x, the weight and the bias. `mix` is (1 or N, V_i) or None."""

    shard: Shard
    targets: Targets
    mix: Tensor | None
    head: Head
    way: Way

    def operands(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Operands:
        """Those of this rank's words."""
        local = self.targets.word - self.shard.start
        summed = bool(self.targets.spread) and self.mix is None
        return Operands(x, weight, bias, local, self.mix, self.head, summed)

    def rows(self, span: slice) -> "Problem":
        """The same loss of some tokens; the divisor stays."""
        return self._replace(targets=self.targets.rows(span))

    def by(self, lse: Tensor, upstream: Tensor) -> Coefficients:
        """The coefficients of all rows, for a gradient of the loss () or (N,)."""
        return coefficients(lse, self.targets, upstream, self.mix is not None)


def exchange(own: RowNumbers, operands: Operands, problem: Problem) -> RowNumbers:
    """The numbers of the rows over the whole vocabulary, from those of this rank's words."""
    if problem.way.algorithm != "three-barrier":
        return end_exchange(begin_exchange(own, operands, problem), operands, problem)
    packed, shard = _packed(own, operands), problem.shard
    peak = max_over(packed[0], shard)
    packed[0].sub_(peak.clamp_min(torch.finfo(peak.dtype).min)).exp_()
    packed = sum_over(packed, shard)
    return _unpacked(packed, packed[0].log() + peak, operands)


def begin_exchange(own: RowNumbers, operands: Operands, problem: Problem) -> Tensor:
    """Begin the one exchange of the two- and the one-barrier algorithm."""
    return start_gather(_packed(own, operands), problem.shard)


def end_exchange(begun: Tensor, operands: Operands, problem: Problem) -> RowNumbers:
    """The numbers over the whole vocabulary; waits for them."""
    ranks = problem.shard.ranks
    every = finished(begun).unflatten(0, (ranks, begun.shape[0] // ranks))
    return _unpacked(every.sum(0), every[:, 0].logsumexp(0), operands)


def _packed(numbers: RowNumbers, operands: Operands) -> Tensor:
    """The numbers that the loss needs (k, n)."""
    sums = [numbers.total] if operands.summed else [] if operands.mix is None else [numbers.mixed]
    return torch.stack([numbers.lse, numbers.picked, *sums])


def _unpacked(packed: Tensor, lse: Tensor, operands: Operands) -> RowNumbers:
    zero = torch.zeros_like(lse)
    total = packed[2] if operands.summed else zero
    mixed = zero if operands.mix is None else packed[2]
    return RowNumbers(lse, packed[1], total, mixed, zero)
