"""Which blocks to remove for a given number of them: rules of the literature, and a search of our own."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import nn

from graphopt.errors import PlanError
from graphopt.passes.blocks import Batch, Stack, call, evaluation
from graphopt.passes.compensation import Call, block_calls, compensate
from graphopt.passes.layer_trials import (
    LayerTrials,
    Quality,
    States,
    hidden_states,
    logits_of,
    token_mask,
)
from graphopt.passes.skip_units import Unit, empty_blocks, units_of
from graphopt.passes.sublayer_removal import empty_cache, without_units

Removed = frozenset[int]
Ranking = list[tuple[Removed, float]]  # sets and their losses, the least first
Strategy = Callable[[int], Removed]  # the blocks to remove, given how many

EXACT_TRIALS = 2000  # sets of blocks that "exact" tries at most
CANDIDATES = 6  # units of least score that a step of "greedy" tries
FINALISTS = 6  # of these, how many are compared after compensation
SURE = 3  # of these, for the best set: what runs whatever it costs
BEAM = 3  # sets of each size that "greedy" continues
BEAM_SHARE, SWAP_SHARE = 0.25, 0.3  # of the naive number of layer runs: what it has to stay below
FREE_RUNS = 500  # of layers on a batch, that need no such share


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a strategy may look at; each is made when it is first asked for."""

    model: nn.Module
    stack: Stack
    batches: tuple[Batch, ...]
    granularity: str = "layers"
    compensation: str = "none"

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """What can go."""
        return units_of(self.model, self.stack, self.granularity, self.batches[0])

    @property
    def count(self) -> int:
        """How many units the model has."""
        return len(self.units)

    @cached_property
    def states(self) -> States:
        """Hidden states of the whole model."""
        return hidden_states(self.model, self.stack, self.batches)

    @cached_property
    def calls(self) -> Sequence[Sequence[Call]]:
        """What the blocks of the whole model are called with."""
        return block_calls(self.model, self.stack, self.batches)

    @cached_property
    def losses(self) -> dict[Removed, float]:
        """Losses found so far."""
        return {}

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
        return LayerTrials(self.model, self.stack, self.batches, self.units)

    @cached_property
    def scores(self) -> tuple[float, ...]:
        """How much each unit matters: Block Influence of blocks, of sublayers the divergence without."""
        if self.granularity == "layers":
            return self.influence
        prefixes = ((unit.block, self.states) for unit in self.units)
        return tuple(self.trials.kl(frozenset({i}), prefix) for i, prefix in enumerate(prefixes))

    def possible(self, removed: Removed) -> bool:
        """Whether the model without the units `removed` could generate."""
        return empty_cache(self.model, self.stack, self.units, removed) is None

    def quality(self, removed: Removed) -> Quality:
        """What is lost without the units `removed`, after compensation."""
        if self.compensation == "none":
            return self.trials.quality(removed)
        short = without_units(self.model, self.stack, self.units, removed, share=True)
        self.refit(short, removed)
        return self.trials.quality(frozenset(), short)

    def loss(self, removed: Removed) -> float:
        """Mean KL divergence without the units `removed`, after compensation."""
        if removed not in self.losses:
            short = without_units(self.model, self.stack, self.units, removed, share=True)
            end = len(self.stack.blocks), self.refit(short, removed)
            self.losses[removed] = self.trials.kl(frozenset(), end)
        return self.losses[removed]

    def refit(self, short: nn.Module, removed: Removed) -> States:
        """Compensate in `short`, a copy of the model, for the units `removed`; it gets new parameters.

        Returns the model's hidden states, those behind the last block as in `short`.
        """
        gone = empty_blocks(self.stack, self.units, removed)
        kept = [i for i in range(len(self.stack.blocks)) if i not in gone]
        partly = {self.units[i].block for i in removed} - gone
        blocks = tuple(short.get_submodule(self.stack.path).children())
        masks = [token_mask(batch) for batch in self.batches]
        with evaluation(short):
            return compensate(
                self.compensation, blocks, self.stack, kept, partly, self.calls, self.states, masks
            )


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
    """Removes, one at a time, the unit whose absence costs the least KL divergence; then swaps.

    As SLEB (Song et al., arXiv 2402.09025), and BlockPruner (Zhong et al., arXiv 2406.10594) where the
    units are sublayers, with five changes: of each step only the `CANDIDATES` of least score are tried;
    a trial starts from the states of the current model in front of what it removes; the `BEAM` best
    sets of a step are continued, not only the best; where the loss is another than the divergence, as
    after compensation, the `FINALISTS` of least divergence are compared by it; and at the end a removed
    unit returns for another one as long as that lowers the loss. Sets beside the best, candidates behind
    the first `SURE`, and swaps are tried only within the shares `BEAM_SHARE` and `SWAP_SHARE` of the
    naive number of layer runs (`naive_runs`), or `FREE_RUNS`. The result is not always the best of all
    sets, which "exact" finds.
    """

    def __init__(
        self,
        trials: LayerTrials,
        scores: Sequence[float],
        loss: Callable[[Removed], float] | None = None,
        possible: Callable[[Removed], bool] = lambda removed: True,
    ) -> None:
        self.trials, self.loss, self.possible = trials, loss, possible
        self.order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
        self.path: list[Ranking] = [[(frozenset(), 0.0)]]  # of each size the best sets
        self.scores: dict[int, float] = {}  # of the last step: the least KL of a set, by its units
        self.runs = 0  # of layers, so far

    def __call__(self, count: int) -> Removed:
        """The units to remove; from a smaller count to a greater one the search goes on."""
        while len(self.path) <= count:
            self.path.append(self._grown(self.path[-1]))
        best = self._refined(*self.path[count][0])
        others = (other for other in self.path[count] if other[0] != best[0])
        self.path[count] = [best, *others][:BEAM]
        return best[0]

    def _grown(self, sets: Ranking) -> Ranking:
        """The best sets with one unit more."""
        found: dict[Removed, float] = {}
        sure = SURE
        for removed, _ in sets:
            limit = self._limit(len(removed) + 1, BEAM_SHARE)
            left = [i for i in self.order if i not in removed]
            candidates = left[: max(CANDIDATES, len(self.order) // 4)]
            candidates.sort(key=lambda i: self.scores.get(i, math.inf))  # likely ones bound the others
            self._try(removed, [(removed | {i}, i) for i in candidates], limit, found, sure)
            sure = 0
        if not found:
            raise PlanError(f"no more than {len(sets[0][0])} sublayers can go: an attention has to stay")
        units = frozenset[int]().union(*found)
        self.scores = {i: min(kl for trial, kl in found.items() if i in trial) for i in units}
        return self._ranking(found)[:BEAM]

    def _refined(self, removed: Removed, loss: float) -> tuple[Removed, float]:
        """Swapped, as long as a swap lowers the loss."""
        limit = self._limit(len(removed), SWAP_SHARE)
        while True:
            others = sorted(set(self.order) - removed, key=lambda i: (self.scores.get(i, math.inf), i))
            pairs = itertools.product(others, sorted(removed, reverse=True))
            swaps = [(removed - {back} | {gone}, min(back, gone)) for gone, back in pairs]
            found = {} if self.loss is not None else {removed: loss}  # others stop above it
            self._try(removed, swaps, limit, found)
            best = self._ranking(found)[:1]
            if not best or best[0][1] >= loss:
                return removed, loss
            ((removed, loss),) = best

    def _try(
        self,
        base: Removed,
        trials: Iterable[tuple[Removed, int]],
        limit: float,
        found: dict[Removed, float],
        sure: int = 0,
    ) -> None:
        """Add the divergence of each trial to `found`, after `sure` ones as long as the layer runs stay
        within `limit`; that of those which are not among the best is a lower bound.

        A trial is a set, and its first unit that makes it another than `base`.
        """
        if self._cost(0) > limit and not sure:
            return
        begin = self.trials.layer_runs - self.runs
        states = self.trials.states_without(base)
        enough = BEAM if self.loss is None else FINALISTS
        for removed, first in trials:
            self.runs = self.trials.layer_runs - begin
            block = self.trials.units[first].block
            if removed in found or not self.possible(removed):
                continue
            if self._cost(block) > limit and sure <= 0:
                continue
            sure -= 1
            bound = sorted(found.values())[enough - 1] if len(found) >= enough else math.inf
            found[removed] = self.trials.kl(removed, (block, states), bound)
        self.runs = self.trials.layer_runs - begin

    def _cost(self, block: int) -> int:
        """The layer runs with one trial more, from `block` on."""
        return self.runs + len(self.trials.batches) * (len(self.trials.stack.blocks) - block)

    def _limit(self, count: int, share: float) -> float:
        """The layer runs that removing `count` units may cost."""
        naive = naive_runs(len(self.order), len(self.trials.stack.blocks), count)
        return len(self.trials.batches) * max(FREE_RUNS, share * naive)

    def _ranking(self, found: dict[Removed, float]) -> Ranking:
        """The trials of least loss, and their losses, the best first."""
        ranked = sorted(found.items(), key=lambda trial: (trial[1], sorted(trial[0])))
        if self.loss is None:
            return ranked
        losses = {removed: self.loss(removed) for removed, _ in ranked[:FINALISTS]}
        return sorted(losses.items(), key=lambda trial: trial[1])


def naive_runs(units: int, blocks: int, count: int) -> int:
    """How often a batch runs a block where each step tries all units that are left, from the start.

    Of sublayers, each is taken for its share of a block.

    >>> naive_runs(24, 24, 6)
    2662
    """
    return sum((units - k) * (units - k - 1) for k in range(count)) * blocks // units


def _greedy(evidence: Evidence) -> Strategy:
    loss = None if evidence.compensation == "none" else evidence.loss
    return Greedy(evidence.trials, evidence.scores, loss, evidence.possible)


def _by_influence(evidence: Evidence) -> Strategy:
    """The blocks of least Block Influence, all at once."""
    order = sorted(range(evidence.count), key=lambda i: (evidence.influence[i], i))
    return lambda count: frozenset(order[:count])


def _by_angle(evidence: Evidence) -> Strategy:
    """The contiguous blocks whose input and output have the least angle."""

    def removed(count: int) -> Removed:
        distances = angular_distances(evidence.states, count)
        first = distances.index(min(distances))
        return frozenset(range(first, first + count))

    return removed


def _exact(evidence: Evidence) -> Strategy:
    """The set of least KL divergence, after compensation, of all."""

    def removed(count: int) -> Removed:
        number = math.comb(evidence.count, count)
        if number > EXACT_TRIALS:
            raise PlanError(
                f"strategy='exact' would try {number} sets of {count} of {evidence.count} units; "
                f"it is for at most {EXACT_TRIALS}"
            )
        best, found = math.inf, frozenset[int]()
        for chosen in itertools.combinations(range(evidence.count), count):
            if not evidence.possible(frozenset(chosen)):
                continue
            kl = _loss(evidence, chosen, best)
            if kl < best:
                best, found = kl, frozenset(chosen)
        if not found:
            raise PlanError(f"no {count} sublayers can go: an attention has to stay")
        return found

    return removed


def _loss(evidence: Evidence, chosen: tuple[int, ...], bound: float) -> float:
    """The loss without the units `chosen`; a lower bound of it where that is above `bound` already."""
    if evidence.compensation != "none":
        return evidence.loss(frozenset(chosen))
    prefix = (evidence.units[chosen[0]].block, evidence.states)
    return evidence.trials.kl(frozenset(chosen), prefix, bound)


def _spaced(rule: Callable[[int, int], tuple[int, ...]]) -> Callable[[Evidence], Strategy]:
    def strategy(evidence: Evidence) -> Strategy:
        every = frozenset(range(evidence.count))
        return lambda count: every - set(rule(evidence.count, evidence.count - count))

    return strategy


STRATEGIES: dict[str, Callable[[Evidence], Strategy]] = {
    "greedy": _greedy,
    "block_influence": _by_influence,
    "angular": _by_angle,
    "exact": _exact,
    "fold": _by_influence,  # what stays then shares weights
    "unified": _spaced(unified_kept),
    "unified_published": _spaced(unified_published_kept),
}
POSITION_ONLY = ("unified", "unified_published")  # need no calibration
SUBLAYER_STRATEGIES = ("greedy", "exact")  # those that do not look at the states around blocks
