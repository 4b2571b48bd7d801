"""How many tokens to draft, and which drafts to accept, learnt while generating.

Lu et al., "AdaSD: Adaptive Speculative Decoding for Efficient Language Model Inference" (arXiv
2512.11280): drafting stops by a threshold of the draft's entropy, and a draft that is not the verifier's
choice may pass by a threshold of the Jensen-Shannon distance between the two distributions; both follow
the drafts verified so far, without a parameter to set. Of that paper the abstract and summaries were at
hand, not its formulas: that a threshold is halfway between the means over drafts that agreed and drafts
that did not, and that a draft is bounded by the last one, is our reading.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor


class DraftLength(Protocol):
    """A rule for the length of one row's drafts, which learns from those that were verified."""

    needs_entropy: bool

    def stops(self, entropies: Sequence[float]) -> bool:
        """Whether a draft ends whose tokens had these entropies, in nats."""

    def learn(self, entropies: Sequence[float], passed: int) -> None:
        """After a verification: how many tokens passed before one did not."""


class FixedLength:
    """A number of tokens."""

    needs_entropy = False

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def stops(self, entropies: Sequence[float]) -> bool:
        """At that number."""
        return len(entropies) >= self.tokens

    def learn(self, entropies: Sequence[float], passed: int) -> None:
        """Nothing."""


class Midpoint:
    """Halfway between the mean of a number over drafts that agreed and over those that did not.

    >>> threshold = Midpoint()
    >>> for number, agreed in ((0.25, True), (0.75, True), (1.5, False)):
    ...     threshold.add(number, agreed)
    >>> threshold.value
    1.0
    """

    def __init__(self) -> None:
        self._sums, self._counts = [0.0, 0.0], [0, 0]

    def add(self, number: float, agreed: bool) -> None:
        """One more draft."""
        self._sums[agreed] += number
        self._counts[agreed] += 1

    @property
    def value(self) -> float | None:
        """None until there was a draft of each kind."""
        if not all(self._counts):
            return None
        return sum(total / count for total, count in zip(self._sums, self._counts, strict=True)) / 2


class Bound:
    """The most tokens of a draft: one more than twice as many as were right of the last that went wrong.

    Drafts that were right raise it and never lower it. A draft that went astray is often sure of itself.

    >>> bound = Bound()
    >>> for drafted, passed in ((1, 1), (3, 3), (2, 2), (7, 2)):
    ...     bound.learn(drafted, passed)
    ...     print(bound.most)
    3
    7
    7
    5
    """

    def __init__(self) -> None:
        self.most = 1

    def learn(self, drafted: int, passed: int) -> None:
        """After a verification."""
        self.most = max(self.most if passed == drafted else 1, 2 * passed + 1)


class EntropyThreshold:
    """AdaSD: a draft ends with a token whose entropy is above the threshold, or at the bound."""

    needs_entropy = True

    def __init__(self) -> None:
        self.threshold, self.bound = Midpoint(), Bound()

    def stops(self, entropies: Sequence[float]) -> bool:
        """By the last token's entropy."""
        threshold = self.threshold.value
        over = threshold is not None and entropies[-1] > threshold
        return over or len(entropies) >= self.bound.most

    def learn(self, entropies: Sequence[float], passed: int) -> None:
        """Moves the threshold and the bound."""
        for number, entropy in enumerate(entropies[: passed + 1]):
            self.threshold.add(entropy, number < passed)
        self.bound.learn(len(entropies), passed)


class ExpectedGain:
    """A draft goes on while that is expected to make more tokens for each block that runs.

    A draft of k tokens makes as many as pass, and one more in place of the first that does not: the
    expected number grows by the chance that all k pass when one more is drafted. It goes on while that
    chance, for the `draft` blocks of one more token, is above the number for all blocks of the round,
    k times `draft` plus `verify`, up to the bound. The chance that a token passes is counted for each
    octave of its entropy, begun with one token at the rate of all octaves, and that with one of each
    kind.

    >>> rule = ExpectedGain(draft=2, verify=6)
    >>> rule.chance(0.3)
    0.5
    >>> rule.learn([0.3, 0.3], passed=2)
    >>> rule.chance(0.3), rule.stops([0.3, 0.3])
    (0.9166666666666666, False)
    """

    needs_entropy = True

    def __init__(self, draft: int, verify: int) -> None:
        self.draft, self.verify, self.bound = draft, verify, Bound()
        self._counts: Counter[tuple[int, bool]] = Counter()
        self._all = Counter({True: 1, False: 1})

    def chance(self, entropy: float) -> float:
        """That a token of this entropy passes."""
        octave = _octave(entropy)
        passed, others = self._counts[octave, True], self._counts[octave, False]
        return (passed + self._all[True] / self._all.total()) / (passed + others + 1)

    def stops(self, entropies: Sequence[float]) -> bool:
        """By the chances of all tokens."""
        expected, alive = 0.0, 1.0
        for entropy in entropies:
            expected, alive = expected + alive, alive * self.chance(entropy)
        blocks = len(entropies) * self.draft + self.verify
        return alive * blocks <= expected * self.draft or len(entropies) >= self.bound.most

    def learn(self, entropies: Sequence[float], passed: int) -> None:
        """Counts the tokens."""
        for number, entropy in enumerate(entropies[: passed + 1]):
            self._counts[_octave(entropy), number < passed] += 1
            self._all[number < passed] += 1
        self.bound.learn(len(entropies), passed)


def _octave(entropy: float) -> int:
    """From -8 to 3, where 0 stands for half a nat to one."""
    return max(-8, min(3, math.frexp(entropy)[1])) if entropy > 0 else -8


LENGTHS: Mapping[str, Callable[[int, int], DraftLength]] = {
    "expected": ExpectedGain,
    "adasd": lambda draft, verify: EntropyThreshold(),
}


def entropies(logits: Tensor) -> list[float]:
    """In nats, of logits of shape (rows, classes).

    >>> [round(math.exp(nats), 3) for nats in entropies(torch.zeros(2, 8))]
    [8.0, 8.0]
    """
    logs = logits.log_softmax(-1)
    return (-(logs.exp() * logs).sum(-1)).tolist()


def js_distance(one: Tensor, other: Tensor) -> Tensor:
    """The Jensen-Shannon distance of two distributions, 0 to 1, of logits of shape (..., classes).

    The square root of the divergence in bits: Endres and Schindelin, "A new metric for probability
    distributions" (2003).

    >>> apart = torch.tensor([[0.0, -90.0], [-90.0, 0.0]])
    >>> round(float(js_distance(apart[0], apart[1])), 4)
    1.0
    """
    p, q = one.softmax(-1), other.softmax(-1)
    tiny = torch.finfo(p.dtype).tiny
    middle = ((p + q) / 2).clamp(min=tiny).log()
    to_middle = [(r * (r.clamp(min=tiny).log() - middle)).sum(-1) for r in (p, q)]
    return ((to_middle[0] + to_middle[1]) / (2 * math.log(2))).clamp(min=0).sqrt()
