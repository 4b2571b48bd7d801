"""Which transfers are not hidden in a run, for how long computing stands still, and why."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphopt.cost_models.overlap_run import Run
from graphopt.cost_models.task_graph import COMPUTE, DEVICE_TO_HOST

Reason = Literal["", "dependency", "channel busy", "memory"]
_NOTHING_S = 1e-12


@dataclass(frozen=True)
class Exposure:
    """Of one transfer (a task): the seconds that computing waits for it, and what made it so late.

    "dependency": it began when what it sends was made. "channel busy": another transfer was before it.
    "memory": its results would not have fitted earlier, or what it sends had to leave before the rest
    was computed.
    """

    task: int
    seconds: float
    reason: Reason


def exposures(run: Run, memory_bytes: int | None = None) -> tuple[Exposure, ...]:
    """One entry for each transfer of the graph, in the graph's order.

    >>> from graphopt.cost_models.overlap_run import run_order
    >>> from graphopt.cost_models.task_graph import Task, TaskGraph
    >>> make, send = Task("make", "compute", 1.0), Task("send", "link", 2.0, (0,))
    >>> exposures(run_order(TaskGraph((make, send, Task("use", "compute", 1.0, (1,)))), (0, 1, 2)))
    (Exposure(task=1, seconds=2.0, reason='dependency'),)
    """
    graph = run.graph
    lost = dict.fromkeys(graph.transfers, 0.0)
    for task in np.flatnonzero(run.idle > _NOTHING_S).tolist():
        waited = [i for i in graph.tasks[task].after if i in lost]
        if waited:
            lost[max(waited, key=lambda i: run.end[i])] += float(run.idle[task])
    return tuple(
        Exposure(i, seconds, _reason(run, i, memory_bytes) if seconds else "")
        for i, seconds in lost.items()
    )


def _reason(run: Run, transfer: int, memory_bytes: int | None) -> Reason:
    """Why `transfer` did not begin when all that it waits for had ended."""
    graph, task = run.graph, run.graph.tasks[transfer]
    if _makes_room(run, transfer):
        return "memory"
    ready = max((run.end[i] for i in task.after), default=0.0)
    held = run.issued[transfer] - ready
    if held > _NOTHING_S and memory_bytes is not None:
        needed = sum(graph.nbytes[b] for b in task.writes)
        meanwhile = [i for i in run.order if ready <= run.issued[i] < run.issued[transfer]]
        if any(run.live_bytes[i] + needed > memory_bytes for i in meanwhile):
            return "memory"
    same = [i for i in graph.transfers if graph.tasks[i].channel == task.channel and i != transfer]
    before = [run.end[i] for i in same if run.begin[i] < run.begin[transfer]]
    return "channel busy" if max(before, default=0.0) > ready + _NOTHING_S else "dependency"


def _makes_room(run: Run, transfer: int) -> bool:
    """True where no task needs what `transfer` makes, and yet some compute behind the wait for it."""
    tasks, a = run.graph.tasks, run.graph.arrays
    waits = a.users[a.users_at[transfer] : a.users_at[transfer + 1]].tolist()
    if tasks[transfer].channel != DEVICE_TO_HOST or any(a.users_at[w] < a.users_at[w + 1] for w in waits):
        return False
    first = min(map(run.order.index, waits), default=len(run.order))
    return any(tasks[i].channel == COMPUTE and tasks[i].seconds for i in run.order[first:])
