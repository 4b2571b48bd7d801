"""The choice for the whole step: one option per span, or per run of adjacent spans, under a peak.

With the borders of the chosen runs kept, the peak while a run's backward works is what earlier runs
keep plus the run's own peak. So a choice is a path over the cuts whose only state is the bytes kept
so far, and a dynamic programme over Pareto sets of (bytes kept, seconds) finds the best one. The
structure is that of the optimal persistent schedules for chains (Beaumont et al., "Optimal
checkpointing for heterogeneous chains", 2019), with several options per stage.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from graphopt.cost_models.memory import Dataflow
from graphopt.passes.forgetting import Forget
from graphopt.passes.local_problem import LocalProblem, Placed, Surroundings, place
from graphopt.passes.segments import Spans, spans
from graphopt.passes.span_options import ANY, Freedom, Labels, Option, options

MERGE = 2  # the most adjacent spans that are recomputed as one
STATES = 256  # the most partial choices kept at a cut


@dataclass(frozen=True)
class Run:
    """Adjacent spans `first` to before `stop`, treated as one, and what can be done with them."""

    first: int
    stop: int
    placed: Placed
    options: tuple[Option, ...]


@dataclass(frozen=True)
class Choice:
    """Labels for the whole dataflow: the values kept, and those recomputed for each use.

    `order` are the operators of the backward that run once, in the order in which they do. After each
    of them that `forget` names, some recomputed values are given up, and made again where they are read.
    """

    keep: frozenset[int]
    ephemeral: frozenset[int]
    order: tuple[int, ...]
    seconds: float
    peak_bytes: int
    forget: Forget = ()


class _RunSolver:
    """Finds the options of runs; equal runs are solved once."""

    def __init__(self, world: Surroundings, freedom: Freedom) -> None:
        self.world = world
        self.freedom = freedom
        self.solved: dict[LocalProblem, tuple[Option, ...]] = {}

    def run(self, first: int, stop: int) -> Run:
        """The run of the spans from `first` to before `stop`."""
        placed = place(self.world, first, stop)
        if placed.problem not in self.solved:
            seeds = self._seeds(first, stop, placed) if stop - first > 1 else ()
            self.solved[placed.problem] = options(placed.problem, self.freedom, seeds)
        return Run(first, stop, placed, self.solved[placed.problem])

    def _seeds(self, first: int, stop: int, placed: Placed) -> Iterator[Labels]:
        """What is best for the parts, with the values between them kept or not."""
        parts = [self.run(k, k + 1) for k in range(first, stop)]
        number = {value: local for local, value in enumerate(placed.values)}
        between = {v for k in range(first + 1, stop) for v in self.world.spans.crossing[k]}
        for wish in (_peak, _kept, _time):
            tried = [(part, min(part.options, key=wish)) for part in parts]
            best = [(part.placed.values, option) for part, option in tried]
            keep = {number[values[v]] for values, option in best for v in option.keep}
            ephemeral = {number[values[v]] for values, option in best for v in option.ephemeral}
            inner = {number[v] for v in between if v in number}
            local = {index: k for k, index in enumerate(placed.operators)}
            order = tuple(local[p.placed.operators[a]] for p, o in reversed(tried) for a in o.order)
            yield frozenset(keep | inner), frozenset(ephemeral), order
            yield frozenset(keep - inner), frozenset(ephemeral), order
            yield frozenset(keep - inner), frozenset(ephemeral | inner), order


def _peak(option: Option) -> float:
    return option.backward_bytes


def _kept(option: Option) -> float:
    return option.kept_bytes + option.backward_bytes


def _time(option: Option) -> float:
    return option.seconds


@dataclass(frozen=True)
class _States:
    """Partial choices at one cut, as columns: bytes kept so far, seconds, peak so far.

    `origin` says how each came about: row in the table of its first cut, number of the run there, and
    number of the option.
    """

    kept_bytes: np.ndarray
    seconds: np.ndarray
    peak_bytes: np.ndarray
    origin: np.ndarray

    @staticmethod
    def start() -> "_States":
        """Nothing chosen yet."""
        zero = np.zeros(1)
        return _States(zero, zero, zero, np.full((1, 4), -1))

    @staticmethod
    def together(parts: Sequence["_States"]) -> "_States":
        """All partial choices of `parts`."""
        return _States(
            np.concatenate([p.kept_bytes for p in parts]),
            np.concatenate([p.seconds for p in parts]),
            np.concatenate([p.peak_bytes for p in parts]),
            np.concatenate([p.origin for p in parts]),
        )

    def rows(self, index: np.ndarray) -> "_States":
        """The partial choices at `index`."""
        return _States(
            self.kept_bytes[index], self.seconds[index], self.peak_bytes[index], self.origin[index]
        )

    def __len__(self) -> int:
        return len(self.kept_bytes)


@dataclass(frozen=True)
class Chain:
    """The runs that start at each cut, in order of the forward.

    `run` gives any run, from its first span to before its last; equal ones are solved once.
    """

    spans: Spans
    runs: tuple[tuple[Run, ...], ...]
    run: Callable[[int, int], Run] = field(repr=False, compare=False)

    @staticmethod
    def of(flow: Dataflow, freedom: Freedom = ANY) -> "Chain":
        """Cut `flow` and find the options of every run; equal runs are solved once."""
        cut = spans(flow)
        solver = _RunSolver(Surroundings.of(flow, cut), freedom)
        runs = []
        for first in range(len(cut)):
            last = min(first + MERGE, len(cut))
            runs.append(tuple(solver.run(first, stop) for stop in range(first + 1, last + 1)))
        return Chain(cut, tuple(runs), solver.run)

    def light(self) -> "Chain":
        """The chain without options that repeat a matrix product or a convolution."""
        return replace(self, runs=tuple(tuple(_light(run) for run in row) for row in self.runs))

    def least_peak(self) -> Choice:
        """The choice of the lowest peak, and the fastest of those."""
        table = self._solve(None)
        assert table is not None  # without a limit, every path is allowed
        choice = self.within(int(table[-1].peak_bytes.min()))
        assert choice is not None
        return choice

    def within(self, limit_bytes: int) -> Choice | None:
        """The choice of the least recomputation whose peak is at most `limit_bytes`, or None."""
        table = self._solve(limit_bytes)
        if table is None:
            return None
        last = table[-1]
        return self._labels(table, int(np.lexsort((last.peak_bytes, last.seconds))[0]))

    def _solve(self, limit_bytes: int | None) -> list[_States] | None:
        parts: list[list[_States]] = [[] for _ in range(len(self.spans) + 1)]
        parts[0].append(_States.start())
        table: list[_States] = []
        for cut, row in enumerate(self.runs):
            if not parts[cut]:  # longer runs may still pass over this cut
                table.append(_States.start().rows(np.zeros(0, dtype=int)))
                continue
            table.append(_pruned(_States.together(parts[cut]), limit_bytes is None))
            for number, run in enumerate(row):
                after = _extend(table[cut], run, (cut, number))
                if limit_bytes is not None:
                    after = after.rows(np.flatnonzero(after.peak_bytes <= limit_bytes))
                if len(after):
                    parts[run.stop].append(after)
        if not parts[-1]:
            return None
        return [*table, _States.together(parts[-1])]

    def _labels(self, table: list[_States], row: int) -> Choice:
        keep: set[int] = set(self.spans.pinned)
        ephemeral: set[int] = set()
        order: list[int] = []
        states = table[-1]
        seconds, peak = float(states.seconds[row]), int(states.peak_bytes[row])
        cut, number, previous, option_number = states.origin[row]
        while cut >= 0:
            run = self.runs[cut][number]
            option = run.options[option_number]
            keep.update(run.placed.values[v] for v in option.keep)
            ephemeral.update(run.placed.values[v] for v in option.ephemeral)
            order.extend(run.placed.operators[a] for a in option.order)
            cut, number, previous, option_number = table[cut].origin[previous]
        return Choice(frozenset(keep), frozenset(ephemeral - keep), tuple(order), seconds, peak)


def _light(run: Run) -> Run:
    least = min(o.flops for o in run.options)
    return replace(run, options=tuple(o for o in run.options if o.flops == least))


def _extend(states: _States, run: Run, origin: tuple[int, int]) -> _States:
    """Every partial choice of `states` followed by every option of `run`."""
    kept = np.array([o.kept_bytes for o in run.options], dtype=float)
    seconds = np.array([o.seconds for o in run.options])
    passing = run.placed.passing_bytes
    local = np.array([max(o.backward_bytes + passing, o.forward_bytes) for o in run.options], dtype=float)
    count, size = len(run.options), len(states)
    trail = np.empty((count, size, 4), dtype=np.int64)
    trail[:, :, 0], trail[:, :, 1] = origin
    trail[:, :, 2] = np.arange(size)
    trail[:, :, 3] = np.arange(count)[:, None]
    peak = np.maximum(states.peak_bytes, states.kept_bytes + local[:, None])
    return _States(
        (states.kept_bytes + kept[:, None]).ravel(),
        (states.seconds + seconds[:, None]).ravel(),
        peak.ravel(),
        trail.reshape(-1, 4),
    )


def _pruned(states: _States, for_peak: bool) -> _States:
    """The states that no other beats in kept bytes and in seconds (or in peak), thinned out."""
    rank = states.peak_bytes if for_peak else states.seconds
    order = np.lexsort((rank, states.kept_bytes))
    lowest = np.minimum.accumulate(rank[order])
    better = np.concatenate(([True], lowest[1:] < lowest[:-1]))
    best = order[better]
    if len(best) > STATES:
        kept = states.kept_bytes[best]
        edges = np.linspace(kept[0], kept[-1], STATES)
        picks = np.searchsorted(kept, edges, side="right") - 1
        best = best[np.unique(np.append(picks, (0, len(best) - 1)))]
    return states.rows(best)


def problem_size(chain: Chain) -> int:
    """How many different runs the chain has."""
    return len({run.placed.problem for row in chain.runs for run in row})
