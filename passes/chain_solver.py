"""The choice for the whole step: one option per span, or per run of adjacent spans, under a peak.

With the borders of the chosen runs kept, the peak while a run's backward works is what earlier runs
keep plus the run's own peak. So a choice is a path over the cuts whose only state is the bytes kept
so far, and a dynamic programme over Pareto sets of (bytes kept, seconds) finds the best one. The
structure is that of the optimal persistent schedules for chains (Beaumont et al., "Optimal
checkpointing for heterogeneous chains", 2019), with several options per stage.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphopt.cost_models.memory import Dataflow
from graphopt.passes.local_problem import LocalProblem, Placed, Surroundings, place
from graphopt.passes.segments import Spans, spans
from graphopt.passes.span_options import Option, options

MERGE = 2  # the most adjacent spans that are recomputed as one
STATES = 96  # the most partial choices kept at a cut


@dataclass(frozen=True)
class Run:
    """Adjacent spans `first` to before `stop`, treated as one, and what can be done with them."""

    first: int
    stop: int
    placed: Placed
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Choice:
    """Labels for the whole dataflow: the values kept, and those recomputed for each use."""

    keep: frozenset[int]
    ephemeral: frozenset[int]
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class _State:
    kept_bytes: int
    output_bytes: int
    seconds: float
    peak_bytes: int
    path: "tuple[_State, Run, Option] | None"


@dataclass(frozen=True)
class Chain:
    """The runs that start at each cut, in order of the forward; `base_bytes` is always alive."""

    spans: Spans
    runs: tuple[tuple[Run, ...], ...]

    @staticmethod
    def of(flow: Dataflow) -> "Chain":
        """Cut `flow` and find the options of every run; equal runs are solved once."""
        cut = spans(flow)
        world = Surroundings.of(flow, cut)
        solved: dict[LocalProblem, tuple[Option, ...]] = {}
        runs = []
        for first in range(len(cut)):
            row = []
            for stop in range(first + 1, min(first + MERGE, len(cut)) + 1):
                placed = place(world, first, stop)
                if placed.problem not in solved:
                    solved[placed.problem] = options(placed.problem)
                row.append(Run(first, stop, placed, solved[placed.problem]))
            runs.append(tuple(row))
        return Chain(cut, tuple(runs))

    def light(self) -> "Chain":
        """The chain without options that repeat a matrix product or a convolution."""
        return replace(self, runs=tuple(tuple(_light(run) for run in row) for row in self.runs))

    def least_peak(self) -> Choice:
        """The choice of the lowest peak, and the fastest of those."""
        states = self._solve(None)
        return self.within(min(s.peak_bytes for s in states))  # type: ignore[return-value]

    def within(self, limit_bytes: int) -> Choice | None:
        """The choice of the least recomputation whose peak is at most `limit_bytes`, or None."""
        states = self._solve(limit_bytes)
        if not states:
            return None
        return self._labels(min(states, key=lambda s: (s.seconds, s.peak_bytes)))

    def _solve(self, limit_bytes: int | None) -> list[_State]:
        table: list[list[_State]] = [[] for _ in range(len(self.spans) + 1)]
        table[0] = [_State(0, 0, 0.0, 0, None)]
        for cut, row in enumerate(self.runs):
            table[cut] = _pruned(table[cut], limit_bytes is None)
            for run in row:
                for option in run.options:
                    for state in table[cut]:
                        after = _extend(state, run, option)
                        if limit_bytes is None or after.peak_bytes <= limit_bytes:
                            table[run.stop].append(after)
        return table[-1]

    def _labels(self, state: _State) -> Choice:
        keep: set[int] = set(self.spans.pinned)
        ephemeral: set[int] = set()
        current = state
        while current.path is not None:
            current, run, option = current.path
            keep.update(run.placed.values[v] for v in option.keep)
            ephemeral.update(run.placed.values[v] for v in option.ephemeral)
        return Choice(frozenset(keep), frozenset(ephemeral - keep), state.seconds, state.peak_bytes)


def _light(run: Run) -> Run:
    least = min(o.flops for o in run.options)
    return replace(run, options=tuple(o for o in run.options if o.flops == least))


def _extend(state: _State, run: Run, option: Option) -> _State:
    local = max(
        option.backward_bytes + run.placed.passing_bytes,
        option.forward_bytes + state.output_bytes,
    )
    return _State(
        state.kept_bytes + option.kept_bytes,
        state.output_bytes,
        state.seconds + option.seconds,
        max(state.peak_bytes, state.kept_bytes + local),
        (state, run, option),
    )


def _pruned(states: Sequence[_State], for_peak: bool) -> list[_State]:
    """The states that no other beats in kept bytes and in seconds (or in peak), thinned out."""
    best: list[_State] = []
    lowest = float("inf")
    for state in sorted(
        states, key=lambda s: (s.kept_bytes, s.peak_bytes if for_peak else s.seconds)
    ):
        rank = float(state.peak_bytes) if for_peak else state.seconds
        if rank < lowest:
            best.append(state)
            lowest = rank
    if len(best) <= STATES:
        return best
    width = (best[-1].kept_bytes - best[0].kept_bytes) / STATES
    edges = [best[0].kept_bytes + width * i for i in range(STATES + 1)]
    kept = [s.kept_bytes for s in best]
    picks = {max(0, bisect_right(kept, edge) - 1) for edge in edges}
    return [best[i] for i in sorted(picks | {0, len(best) - 1})]


def problem_size(chain: Chain) -> int:
    """How many different runs the chain has."""
    return len({run.placed.problem for row in chain.runs for run in row})
