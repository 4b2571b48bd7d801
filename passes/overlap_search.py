"""The order of a task graph: a portfolio of list schedules and a seeded search, ranked by running them.

The search changes priorities where computing stood still: the chain of tasks that leads to a transfer
that was waited for becomes more urgent by the time lost, and all priorities vary a little at random
(after Joslin and Clements, "Squeaky wheel optimization", Journal of Artificial Intelligence Research 10,
1999). Then single tasks move within the best order, as no list schedule waits for what is better done
first. The search ends when the time is within `gap` of the lower bound.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.overlap_bound import Bound, bound, tails
from graphopt.cost_models.overlap_run import Run, peak_of, run_order, seconds_of
from graphopt.cost_models.task_graph import COMPUTE, TaskGraph
from graphopt.errors import PlanError
from graphopt.passes.list_schedules import NO_LIMIT, list_order, priorities

GAP = 1.01
_WORK = 400_000  # tasks that a search places before it ends
_TRIALS = (24, 400)  # at least and at most
_LEAST_GAIN = 1e-3  # of the time: for less the order stays
_CAPTURED = "captured order, as it is"
_RETRIES = 4  # list schedules of one priority that leave more and more memory to what computes


@dataclass(frozen=True, eq=False)
class Schedule:
    """An order of a task graph, its run, the lower bound, and the rule that found it in `tried`."""

    order: tuple[int, ...]
    run: Run
    bound: Bound
    found_by: str
    tried: int

    @property
    def gap(self) -> float:
        """How many times the bound the order takes."""
        return self.run.seconds / self.bound.seconds if self.bound.seconds else 1.0


class _Best:
    """The best order so far: the fastest within the memory, then the one of least peak."""

    def __init__(self, graph: TaskGraph, memory_bytes: int | None) -> None:
        self.graph, self.limit = graph, NO_LIMIT if memory_bytes is None else memory_bytes
        self.order: np.ndarray | None = None
        self.key: tuple[float, int] = (np.inf, 0)
        self.found_by, self.tried, self.least_bytes = "", 0, NO_LIMIT

    def add(self, order: np.ndarray, found_by: str) -> None:
        """Take `order` where it is better."""
        self.tried += 1
        peak = peak_of(self.graph, order)
        self.least_bytes = min(self.least_bytes, peak)
        if peak > self.limit:
            return
        key = (seconds_of(self.graph, order), peak)
        if key < self.key:
            self.order, self.key, self.found_by = order, key, found_by

    def add_late_waits(self) -> None:
        """Take the best order with its waits late, where that is as fast and fits."""
        assert self.order is not None
        order = sunk(self.graph, self.order.tolist())
        most = seconds_of(self.graph, self.order) * (1 + 1e-9)
        if peak_of(self.graph, order) <= self.limit and seconds_of(self.graph, order) <= most:
            self.order = order


def schedule(
    graph: TaskGraph,
    *,
    memory_bytes: int | None = None,
    seed: int = 0,
    gap: float = GAP,
    trials: int | None = None,
) -> Schedule:
    """An order of `graph` whose peak is at most `memory_bytes`; the same for the same arguments.

    `trials` is how many orders either search tries at most; None: fewer, the larger the graph. PlanError
    with `reachable_bytes` where no order that was found fits.
    """
    limit = bound(graph)
    best = _Best(graph, memory_bytes)
    captured = np.arange(len(graph.tasks))
    best.add(captured, _CAPTURED)
    random = np.random.default_rng(seed)
    if trials is None:
        trials = int(np.clip(_WORK // max(1, len(graph.tasks)), *_TRIALS))
    for order, name in _candidates(graph, memory_bytes, trials, random):
        if best.key[0] <= gap * limit.seconds:
            break
        best.add(order, name)
    for _ in range(trials):
        if best.order is None or best.key[0] <= gap * limit.seconds:
            break
        best.add(_moved(graph, best.order, random), "search from the best order")
    if best.order is None:
        raise PlanError(
            f"no order of the operators found fits {format_bytes(memory_bytes or 0)}; "
            f"the least peak found is {format_bytes(best.least_bytes)}",
            reachable_bytes=best.least_bytes,
        )
    plain = seconds_of(graph, captured)
    if peak_of(graph, captured) <= best.limit and best.key[0] > (1 - _LEAST_GAIN) * plain:
        best.order, best.found_by = captured, _CAPTURED
    best.add_late_waits()
    run = run_order(graph, best.order)
    return Schedule(run.order, run, limit, best.found_by, best.tried)


def _candidates(
    graph: TaskGraph, memory_bytes: int | None, trials: int, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, str]]:
    rules = priorities(graph)
    for name, priority in rules.items():
        for early in (False, True):
            for order in _within(graph, priority, early, memory_bytes):
                yield order, f"{name}{', transfers early' if early else ''}"
    seconds = graph.arrays.seconds
    blame = np.zeros(len(seconds))
    for trial in range(trials):
        noise = 1.0 + random.choice((0.0, 0.05, 0.2)) * random.standard_normal(len(seconds))
        rule = "critical path" if trial % 2 else "breadth"
        base = tails(graph, seconds + blame) + seconds
        if rule == "breadth":  # as much by how early a task can run as by what waits for it
            base += rules[rule] * base.max(initial=0.0) / max(1, len(seconds))
        for order in _within(graph, base * noise, bool(random.integers(2)), memory_bytes):
            yield order, f"search from {rule}"
        blame = 0.5 * blame + run_order(graph, order).idle


def _within(
    graph: TaskGraph, priority: np.ndarray, early: bool, memory_bytes: int | None
) -> Iterator[np.ndarray]:
    """List schedules of one priority, each with more memory left to what computes, until one fits."""
    reserve = 0
    for _ in range(_RETRIES):
        order = list_order(graph, priority, early=early, memory_bytes=memory_bytes, reserve_bytes=reserve)
        yield order
        over = 0 if memory_bytes is None else peak_of(graph, order) - memory_bytes
        if over <= 0:
            return
        reserve += over


def _moved(graph: TaskGraph, order: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """`order` with one task somewhere else between those before it and those behind it."""
    a, count = graph.arrays, len(order)
    place = np.empty(count, np.int64)
    place[order] = np.arange(count)
    task = int(random.integers(count))
    before = place[a.after[a.after_at[task] : a.after_at[task + 1]]].max(initial=-1)
    behind = place[a.users[a.users_at[task] : a.users_at[task + 1]]].min(initial=count)
    target = int(random.integers(before + 1, behind))
    return np.insert(np.delete(order, place[task]), target, task)


def sunk(graph: TaskGraph, order: Sequence[int]) -> np.ndarray:
    """`order` with each task of no time, such as a wait, right before the first one that needs it."""
    held: set[int] = set()
    found: list[int] = []
    for task in order:
        held.add(int(task))
        if graph.tasks[task].seconds == 0.0 and graph.tasks[task].channel == COMPUTE:
            continue
        _release(graph, int(task), held, found)
    for task in order:
        if int(task) in held:
            _release(graph, int(task), held, found)
    return np.array(found, np.int64)


def _release(graph: TaskGraph, task: int, held: set[int], found: list[int]) -> None:
    """Append `task` to `found`, after those of `held` that it waits for."""
    stack = [task]
    while stack:
        missing = [before for before in graph.tasks[stack[-1]].after if before in held]
        if missing:
            stack.extend(reversed(missing))
        elif (last := stack.pop()) in held:
            held.remove(last)
            found.append(last)
