"""Which blocks to remove for a given number of them: rules of the literature, and a search of our own."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.errors import PlanError
from graphopt.passes.blocks import Batch, Stack, call, evaluation
from graphopt.passes.layer_trials import LayerTrials, States, hidden_states, logits_of

Removed = frozenset[int]
Strategy = Callable[[int], Removed]  # the blocks to remove, given how many

EXACT_TRIALS = 2000  # sets of blocks that "exact" tries at most
CANDIDATES = 6  # blocks of least influence that a step of "greedy" tries


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a strategy may look at; each is made when it is first asked for."""

    model: nn.Module
    stack: Stack
    batches: tuple[Batch, ...]

    @property
    def blocks(self) -> int:
        """How many blocks the model has."""
        return len(self.stack.blocks)

    @cached_property
    def states(self) -> States:
        """Hidden states of the whole model."""
        return hidden_states(self.model, self.stack, self.batches)

    @cached_property
    def influence(self) -> tuple[float, ...]:
        """Block Influence of each block."""
        return block_influence(self.states)

    @cached_property
    def has_logits(self) -> bool:
        """Whether quality can be measured."""
        with evaluation(self.model):
            return logits_of(call(self.model, self.batches[0])) is not None

    @cached_property
    def trials(self) -> LayerTrials:
        """Runs without some blocks."""
        return LayerTrials(self.model, self.stack, self.batches)


def block_influence(states: States) -> tuple[float, ...]:
    """1 − the mean cosine of a token's hidden states before and after each block.

    Men et al., ShortGPT (arXiv 2403.03853), equation 1. Of states of shape (..., tokens, width).

    >>> x = torch.eye(2)
    >>> block_influence([(x, 3 * x, x.flip(0))])
    (0.0, 1.0)
    """
    pairs = [
        [F.cosine_similarity(a.float(), b.float(), dim=-1).flatten() for a, b in itertools.pairwise(row)]
        for row in states
    ]
    means = (float(torch.cat(cosines).mean()) for cosines in zip(*pairs, strict=True))
    return tuple(1 - mean for mean in means)


def angular_distances(states: States, count: int) -> tuple[float, ...]:
    """The mean angle, over π, of the last token's hidden states `count` blocks apart.

    Gromov et al. (arXiv 2403.17887), equation 2; one figure for each first block.
    """
    last = [[state[..., -1, :].float() for state in row] for row in states]
    found = []
    for first in range(len(states[0]) - count):
        cosines = [F.cosine_similarity(row[first], row[first + count], dim=-1) for row in last]
        angles = torch.cat([c.flatten() for c in cosines]).clamp(-1, 1).arccos()
        found.append(float(angles.mean()) / math.pi)
    return tuple(found)


def unified_kept(blocks: int, kept: int) -> tuple[int, ...]:
    """Evenly spaced blocks with both ends: Liu et al., Unified Layer Skipping (arXiv 2404.06954),
    repaired so that the gaps differ by one at most.

    >>> unified_kept(24, 16)
    (0, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18, 20, 21, 23)
    """
    _needs_two("unified", kept)
    return tuple(round(i * (blocks - 1) / (kept - 1)) for i in range(kept))


def unified_published_kept(blocks: int, kept: int) -> tuple[int, ...]:
    """The rule of arXiv 2404.06954 as its code has it: the first and the last block, and of the inner
    ones the first whose position is a multiple of an interval that is rounded down.

    >>> unified_published_kept(24, 16)
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 23)
    """
    _needs_two("unified_published", kept)
    interval = blocks // (kept - 1)
    inner = [i for i in range(1, blocks - 1) if i % interval == 0]
    return (0, *inner[: kept - 2], blocks - 1)


def _needs_two(strategy: str, kept: int) -> None:
    if kept < 2:
        raise PlanError(f"strategy={strategy!r} keeps the first and the last block, not {kept}")


class Greedy:
    """Removes, one at a time, the block whose absence costs the least KL divergence; then swaps.

    As SLEB (Song et al., arXiv 2402.09025), with three changes: of each step only the `CANDIDATES`
    blocks of least Block Influence are tried; a trial starts from the states of the current model in
    front of the block that it removes; and at the end a removed block returns for another candidate of
    the last step as long as that lowers the divergence. No such swap improves the result; it is not
    always the best of all sets, which "exact" finds.
    """

    def __init__(self, trials: LayerTrials, influence: Sequence[float]) -> None:
        self.trials = trials
        self.order = sorted(range(len(influence)), key=lambda i: (influence[i], i))
        self.path: list[Removed] = [frozenset()]
        self.scores: dict[int, float] = {}  # of the last step: KL by removed block

    def __call__(self, count: int) -> Removed:
        """The blocks to remove; from a smaller count to a greater one the search goes on."""
        while len(self.path) <= count:
            self.path.append(self._grown(self.path[-1]))
        self.path[count] = self._refined(self.path[count])
        return self.path[count]

    def _grown(self, removed: Removed) -> Removed:
        """One more block removed."""
        states = self.trials.states_without(removed)
        left = [i for i in self.order if i not in removed]
        candidates = left[: max(CANDIDATES, len(self.order) // 4)]
        candidates.sort(key=lambda i: self.scores.get(i, math.inf))  # likely ones bound the others
        best, self.scores = math.inf, {}
        for block in candidates:
            self.scores[block] = self.trials.kl(removed | {block}, (block, states), best)
            best = min(best, self.scores[block])
        return removed | {min(candidates, key=lambda i: (self.scores[i], i))}

    def _refined(self, removed: Removed) -> Removed:
        """Swapped, as long as a swap lowers the divergence."""
        best = self.trials.kl(removed)
        while True:
            swapped, kl = self._best_swap(removed, best)
            if kl >= best:
                return removed
            removed, best = swapped, kl

    def _best_swap(self, removed: Removed, best: float) -> tuple[Removed, float]:
        states = self.trials.states_without(removed)
        others = sorted(set(self.scores) - removed, key=lambda i: self.scores[i])
        found = removed
        for back, gone in itertools.product(sorted(removed), others):
            trial = removed - {back} | {gone}
            kl = self.trials.kl(trial, (min(back, gone), states), best)
            if kl < best:
                found, best = trial, kl
        return found, best


def _greedy(evidence: Evidence) -> Strategy:
    return Greedy(evidence.trials, evidence.influence)


def _by_influence(evidence: Evidence) -> Strategy:
    """The blocks of least Block Influence, all at once."""
    order = sorted(range(evidence.blocks), key=lambda i: (evidence.influence[i], i))
    return lambda count: frozenset(order[:count])


def _by_angle(evidence: Evidence) -> Strategy:
    """The contiguous blocks whose input and output have the least angle."""

    def removed(count: int) -> Removed:
        distances = angular_distances(evidence.states, count)
        first = distances.index(min(distances))
        return frozenset(range(first, first + count))

    return removed


def _exact(evidence: Evidence) -> Strategy:
    """The set of least KL divergence, of all."""

    def removed(count: int) -> Removed:
        number = math.comb(evidence.blocks, count)
        if number > EXACT_TRIALS:
            raise PlanError(
                f"strategy='exact' would try {number} sets of {count} of {evidence.blocks} blocks; "
                f"it is for at most {EXACT_TRIALS}"
            )
        best, found = math.inf, frozenset[int]()
        for chosen in itertools.combinations(range(evidence.blocks), count):
            prefix = (chosen[0], evidence.states)
            kl = evidence.trials.kl(frozenset(chosen), prefix, best)
            if kl < best:
                best, found = kl, frozenset(chosen)
        return found

    return removed


def _spaced(rule: Callable[[int, int], tuple[int, ...]]) -> Callable[[Evidence], Strategy]:
    def strategy(evidence: Evidence) -> Strategy:
        every = frozenset(range(evidence.blocks))
        return lambda count: every - set(rule(evidence.blocks, evidence.blocks - count))

    return strategy


STRATEGIES: dict[str, Callable[[Evidence], Strategy]] = {
    "greedy": _greedy,
    "block_influence": _by_influence,
    "angular": _by_angle,
    "exact": _exact,
    "unified": _spaced(unified_kept),
    "unified_published": _spaced(unified_published_kept),
}
POSITION_ONLY = ("unified", "unified_published")  # need no calibration
