"""How soon a task graph can be done at best, in any order.

Two bounds. No order ends before its longest chain of tasks. And a channel runs one task at a time: task j
cannot begin before its head (the longest chain that leads to it) and, when it has ended, its tail (the
longest chain that follows) is still to come. The best that one machine can do with heads, times and
tails, where tasks may be interrupted, is found by always running the released task of longest tail
(Jackson's preemptive schedule; Carlier, "The one-machine sequencing problem", European Journal of
Operational Research 11, 1982). Memory and the launch of transfers are left out, so that the bound holds
with and without them.

Contention k slows down what runs side by side, for X seconds, say, to 1 / (1 + k). An order of T seconds
is then one of T - k X / (1 + k) without contention, which is at least the bound L of that. And where one
of the two stands still the other runs, so that C seconds of computing and N of transfers need
C + N - X (1 - k) / (1 + k) at least. Together: T is at least (1 - k) L + k (C + N), whatever X.
"""

import heapq
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.compiled import compiled
from graphopt.cost_models.task_graph import TaskGraph


@dataclass(frozen=True)
class Bound:
    """Seconds that no order is faster than, and what says so: "critical path" or a channel's name."""

    seconds: float
    by: str


def heads(graph: TaskGraph, weights: np.ndarray | None = None) -> np.ndarray:
    """For each task, the seconds (or `weights`) of the longest chain of tasks that it waits for."""
    a = graph.arrays
    weights = a.seconds if weights is None else weights
    found: np.ndarray = compiled(_heads, on_disk=True)(weights, a.after_at, a.after)
    return found


def tails(graph: TaskGraph, weights: np.ndarray | None = None) -> np.ndarray:
    """For each task, the seconds (or `weights`) of the longest chain of tasks that wait for it."""
    a = graph.arrays
    weights = a.seconds if weights is None else weights
    found: np.ndarray = compiled(_tails, on_disk=True)(weights, a.users_at, a.users)
    return found


def bound(graph: TaskGraph) -> Bound:
    """The larger of the two bounds, contention considered, in O(n log n).

    >>> from graphopt.cost_models.task_graph import Task
    >>> work = (Task("a", "compute", 1.0), Task("b", "compute", 1.0))
    >>> tasks = (*work, Task("send a", "link", 2.0, (0,)), Task("send b", "link", 2.0, (1,)))
    >>> bound(TaskGraph(tasks))
    Bound(seconds=5.0, by='link')
    >>> bound(TaskGraph(tasks, contention={"link": 0.5})).seconds
    5.5
    """
    best = _without_contention(graph, graph.arrays.seconds)
    for number, k in enumerate(graph.arrays.contention):
        if not (number and k):
            continue
        a = graph.arrays
        seconds = np.where(
            (a.channel == 0) | (a.channel == number), a.seconds, 0.0
        )  # the others take none
        alone, share = _without_contention(graph, seconds), min(1.0, float(k))
        slowed = (1 - share) * alone.seconds + share * float(seconds.sum())
        if slowed > best.seconds * (1 + 1e-12):
            best = Bound(slowed, alone.by)
    return best


def _without_contention(graph: TaskGraph, seconds: np.ndarray) -> Bound:
    """The bound where the tasks take `seconds` and leave each other alone."""
    a, head, tail = graph.arrays, heads(graph, seconds), tails(graph, seconds)
    path = float((head + seconds + tail).max(initial=0.0))
    best = Bound(path, "critical path")
    for number, name in enumerate(graph.channels):
        mine = np.flatnonzero(a.channel == number)
        mine = mine[np.argsort(head[mine], kind="stable")]
        found = compiled(_one_machine, on_disk=True)(head[mine], seconds[mine], tail[mine])
        if found > best.seconds * (1 + 1e-12):
            best = Bound(float(found), name)
    return best


# --- compiled ----------------------------------------------------------------------------------


def _heads(seconds: Any, after_at: Any, after: Any) -> Any:
    found = np.zeros(len(seconds))
    for task in range(len(seconds)):
        for before in after[after_at[task] : after_at[task + 1]]:
            found[task] = max(found[task], found[before] + seconds[before])
    return found


def _tails(seconds: Any, users_at: Any, users: Any) -> Any:
    found = np.zeros(len(seconds))
    for task in range(len(seconds) - 1, -1, -1):
        for user in users[users_at[task] : users_at[task + 1]]:
            found[task] = max(found[task], found[user] + seconds[user])
    return found


def _one_machine(head: Any, seconds: Any, tail: Any) -> Any:
    """The end of Jackson's preemptive schedule; the tasks are sorted by head."""
    released = [(0.0, 0.0)]  # of each task that may run: minus its tail, and the seconds left
    released.clear()
    now, best, place, count = 0.0, 0.0, 0, len(head)
    while place < count or len(released) > 0:
        if len(released) == 0:
            now = max(now, head[place])
        while place < count and head[place] <= now:
            heapq.heappush(released, (-tail[place], seconds[place]))
            place += 1
        minus, left = heapq.heappop(released)
        until = head[place] if place < count else np.inf
        if now + left > until:
            heapq.heappush(released, (minus, left - (until - now)))
            now = until
        else:
            now += left
            best = max(best, now - minus)
    return best
