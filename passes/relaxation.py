"""Labels with less recomputation at the same peak: what is kept without need of more memory, what is
exchanged for something that costs less, and what chance finds.

A search for the least peak, or one over spans, leaves three kinds of gain. Values are recomputed that
could stay without anything rising above the limit. A value is kept whose bytes, at the peak, would let
others stay that take longer to make. And some labels only pay together, which annealing finds. All of it
is work on labels that are simulated in machine code, bounded by the steps that are simulated.
"""

import functools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.passes.annealing import annealed
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint_choice import made_for, pruned, steps_of
from graphopt.passes.forgetting import forgotten
from graphopt.passes.label_search import Found, LabelSearch

WORK = 2_000_000  # steps of backwards that each of the three may simulate
ROUNDS = 6
GIVEN_UP = 12  # of the groups of kept values that free the most bytes for their seconds
EJECTIONS = 6  # groups that are given up for one value
_EPSILON = 1e-12


def relaxed(flow: Dataflow, choice: Choice, limit_bytes: int) -> Choice:
    """`choice` with less recomputation, its peak still at most `limit_bytes`, static bytes left out.

    A choice that forgets, as a nested one does, stays as it is.
    """
    if choice.forget:
        return choice
    search = _Search(flow, limit_bytes, choice.order)
    best = search.run(choice)
    for improve in (search.fill, search.exchange, functools.partial(annealed, search), search.fill):
        search.left = WORK
        best = improve(best)
    steps = steps_of(flow, best.choice)
    forget = forgotten(steps, dict(best.choice.forget), best.choice.keep)
    return pruned(flow, replace(best.choice, forget=forget))


class _Search(LabelSearch):
    """Labels filled up, and exchanged."""

    # --- values that can stay ------------------------------------------------------------------

    def fill(self, best: Found) -> Found:
        """Keep, or make once, whatever the limit allows; what takes the most time first."""
        for _ in range(ROUNDS):
            filled = self.filled(best, frozenset())
            if filled.seconds >= best.seconds - _EPSILON:
                return best
            best = filled
        return best

    def filled(self, best: Found, without: Collection[int], below: float | None = None) -> Found:
        """One round, which leaves `without` alone and stops where it cannot come `below` any more."""
        saving = self._made_again(best)
        rest = sum(saving.values())
        for value in sorted(saving, key=lambda v: (-saving[v], v)):
            if self.left <= 0 or (below is not None and best.seconds - rest >= below):
                break
            rest -= saving[value]
            for trial in () if value in without else _moves(best.choice, value):
                found = self.run(trial)
                is_better = found.seconds < best.seconds and self.fits(found)
                if is_better and (whole := self.accepted(found)) is not None:
                    best = whole
                    break
        return best

    def _made_again(self, found: Found) -> dict[int, float]:
        """The values of the forward that are made again, and the seconds that their operators take."""
        flow = self.flow
        runs = Counter(found.profile.operators.tolist())
        return {
            value: count * flow.operators[index].seconds
            for index, count in runs.items()
            if not flow.operators[index].backward
            for value in flow.operators[index].writes
            if value not in found.choice.keep
        }

    # --- values that make room for others ------------------------------------------------------

    def exchange(self, best: Found) -> Found:
        """Give up kept values where others that then stay take longer to make."""
        for _ in range(ROUNDS):
            before = best.seconds
            for group in self._cheapest(best)[:GIVEN_UP]:
                for is_ephemeral in (False, True):
                    if group <= best.choice.keep and self.left > 0:
                        trial = self.run(self._without(best.choice, group, is_ephemeral))
                        best = self._better(best, trial if self.fits(trial) else None, group)
            for value in self._made_again(best):
                for is_ephemeral in (False, True):
                    for is_capped in (True, False):
                        if value not in best.choice.keep and self.left > 0:
                            kept, gone = self._ejected(best, value, is_ephemeral, is_capped)
                            best = self._better(best, kept, gone)
            if best.seconds >= before - _EPSILON:
                break
        return best

    def _better(self, best: Found, trial: Found | None, without: Collection[int]) -> Found:
        """`trial`, filled up, if it takes less time than `best`."""
        if trial is None:
            return best
        found = self.filled(trial, without, best.seconds)
        if found.seconds >= best.seconds - _EPSILON:
            return best
        return self.accepted(found) or best

    def _ejected(
        self, best: Found, value: int, is_ephemeral: bool, is_capped: bool
    ) -> tuple[Found | None, frozenset[int]]:
        """`value` kept, and what was given up at the peaks for that; None where it does not fit.

        Where `is_capped`, bytes beyond those that are too many count for nothing.
        """
        gone: frozenset[int] = frozenset()
        choice = next(_moves(best.choice, value))
        for _ in range(EJECTIONS):
            found = self.run(choice)
            if self.fits(found) or self.left <= 0:
                return (found if self.fits(found) else None), gone
            excess = found.profile.peak_bytes - self.limit
            groups = self._groups(choice, self._at_peak(found), best.seconds, value)
            if not groups:
                break
            worth = {g: s / (min(n, excess) if is_capped else n) for g, (s, n) in groups.items()}
            group = min(worth, key=lambda g: (worth[g], sorted(g)))
            gone, choice = gone | group, self._without(choice, group, is_ephemeral)
        return None, gone

    def _at_peak(self, found: Found) -> list[int]:
        """The kept values that are alive where the backward is at its peak."""
        profile = found.profile
        peak = int(profile.during.argmax())
        read = {v for i in profile.operators[peak:].tolist() for v in self.flow.own_reads[i]}
        return [v for v in found.choice.keep if v in read]

    def _cheapest(self, best: Found) -> list[frozenset[int]]:
        """Groups of kept values, those first that free the most bytes for their seconds."""
        groups = self._groups(best.choice, best.choice.keep, best.seconds, None)
        return sorted(groups, key=lambda g: (groups[g][0] / groups[g][1], sorted(g)))

    def _groups(
        self, choice: Choice, values: Iterable[int], most: float, without: int | None
    ) -> dict[frozenset[int], tuple[float, int]]:
        """Kept results of one operator that can be made again in less than `most`: seconds and bytes."""
        flow, found = self.flow, dict[frozenset[int], tuple[float, int]]()
        for producer in {flow.values[v].producer for v in values} - {NO_PRODUCER}:
            group = (frozenset(flow.operators[producer].writes) & choice.keep) - {without}
            nbytes = sum(flow.sizes[v] for v in group)
            if not nbytes:
                continue
            made = made_for(flow, min(group), choice.keep - group)
            makers = [flow.operators[i] for i in {flow.values[v].producer for v in made}]
            seconds = sum(o.seconds for o in makers)
            if all(o.recomputable for o in makers) and seconds < most:
                found[group] = seconds, nbytes
        return found

    def _without(self, choice: Choice, group: frozenset[int], is_ephemeral: bool) -> Choice:
        """`group` made again: once, or with all on the way to it for each use."""
        keep, ephemeral = choice.keep - group, choice.ephemeral
        if is_ephemeral:
            ephemeral = ephemeral.union(*(made_for(self.flow, v, keep) for v in group))
        return replace(choice, keep=keep, ephemeral=ephemeral)


def _moves(choice: Choice, value: int) -> Iterator[Choice]:
    """`value` kept; or, where it is made for each use, made once."""
    held = choice.ephemeral - {value}
    yield replace(choice, keep=choice.keep | {value}, ephemeral=held)
    if value in choice.ephemeral:
        yield replace(choice, ephemeral=held)
