"""One order of a task graph, run: when each task begins and ends, what waits, and the bytes alive.

While a task computes and channels with contention k1, k2, ... transfer, computing proceeds at the rate
1 / (1 + k1 + k2 + ...) and channel i at 1 / (1 + ki). With one channel, C seconds of computing beside N
seconds of transfer so take max(C, N) + k min(C, N).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.compiled import compiled
from graphopt.cost_models.task_graph import TaskGraph


@dataclass(frozen=True, eq=False)
class Run:
    """What happens when `graph` runs in `order`; arrays are by task, in seconds from the start.

    `issued` is when the host comes to a task, `begin` and `end` when its channel runs it, `idle` how
    long the compute channel waits for a transfer that the task needs. `live_bytes` are alive while the
    task is started, its results and scratch included, and what is there all the time.
    """

    graph: TaskGraph
    order: tuple[int, ...]
    issued: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    idle: np.ndarray
    live_bytes: np.ndarray

    @property
    def seconds(self) -> float:
        """From the start to the end of the last task."""
        return float(self.end.max(initial=0.0))

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return int(self.live_bytes.max(initial=0))


def run_order(graph: TaskGraph, order: Sequence[int] | np.ndarray) -> Run:
    """`graph` run in `order`, in which every task comes after those that it waits for.

    >>> from graphopt.cost_models.task_graph import Task
    >>> send = Task("send", "link", 2.0)
    >>> two = TaskGraph((send, Task("work", "compute", 3.0)), contention={"link": 0.5})
    >>> run_order(two, (0, 1)).seconds
    4.0
    """
    sequence = np.array(order, np.int64)
    issued, begin, end, idle = _timed(graph, sequence)
    live = _held(graph, sequence)
    return Run(graph, tuple(sequence.tolist()), issued, begin, end, idle, live)


def seconds_of(graph: TaskGraph, order: np.ndarray) -> float:
    """The seconds of `run_order`, without the rest."""
    return float(_timed(graph, order)[2].max(initial=0.0))


def peak_of(graph: TaskGraph, order: np.ndarray) -> int:
    """The peak of `run_order` in bytes, without the rest."""
    return int(_held(graph, order).max(initial=0))


def _timed(graph: TaskGraph, order: np.ndarray) -> tuple[np.ndarray, ...]:
    a = graph.arrays
    found: tuple[np.ndarray, ...] = compiled(_times, on_disk=True)(
        order, a.channel, a.seconds, a.after_at, a.after, a.contention
    )
    return found


def _held(graph: TaskGraph, order: np.ndarray) -> np.ndarray:
    a = graph.arrays
    found: np.ndarray = compiled(_live, on_disk=True)(
        *(order, a.reads_at, a.reads, a.writes_at, a.writes, a.over_at, a.over),
        *(a.readers, a.nbytes, a.scratch, a.alive, a.base_bytes),
    )
    return found


# --- compiled ----------------------------------------------------------------------------------


def _times(order: Any, channel: Any, seconds: Any, after_at: Any, after: Any, contention: Any) -> Any:
    """When each task is issued, begins and ends, and how long computing stood still for it."""
    count, lanes = len(seconds), len(contention)
    issued, begin = np.zeros(count), np.zeros(count)
    end, idle = np.full(count, -1.0), np.zeros(count)
    queue = np.empty((lanes, count), np.int64)  # of each channel, first come, first served
    first, last = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)
    left = np.zeros(lanes)  # seconds that the first of each queue still needs; [0]: the computation
    now, place = 0.0, 0
    while True:
        while place < count and first[0] == last[0]:  # the host goes on while no time passes
            task = order[place]
            ready = True
            for k in range(after_at[task], after_at[task + 1]):
                ready = ready and end[after[k]] >= 0.0
            if not ready:
                break
            issued[task] = now
            place += 1
            lane = channel[task]
            if first[lane] == last[lane]:
                begin[task], left[lane] = now, seconds[task]
            if lane == 0 and seconds[task] == 0.0:
                end[task] = now
            else:
                queue[lane, last[lane]] = task
                last[lane] += 1
        computing = first[0] < last[0]
        slow, step = 1.0, np.inf
        for lane in range(1, lanes):
            if first[lane] < last[lane]:
                slow += contention[lane]
                step = min(step, left[lane] * (1.0 + contention[lane]) if computing else left[lane])
        if computing:
            step = min(step, left[0] * slow)
        if step == np.inf:
            return issued, begin, end, idle
        now += step
        if not computing and place < count:
            idle[order[place]] += step
        for lane in range(lanes):
            if first[lane] < last[lane]:
                rate = slow if lane == 0 else 1.0 + contention[lane] if computing else 1.0
                task = queue[lane, first[lane]]
                left[lane] -= step / rate
                if left[lane] <= 1e-12 * seconds[task]:
                    end[task] = now
                    first[lane] += 1
                    if first[lane] < last[lane]:
                        following = queue[lane, first[lane]]
                        begin[following], left[lane] = now, seconds[following]


def _live(
    order: Any,
    reads_at: Any,
    reads: Any,
    writes_at: Any,
    writes: Any,
    over_at: Any,
    over: Any,
    readers: Any,
    nbytes: Any,
    scratch: Any,
    alive: Any,
    base: Any,
) -> Any:
    """Bytes alive while each task is started, by task."""
    readers, found = readers.copy(), np.zeros(len(order), np.int64)
    live = base + nbytes[alive].sum()
    for buffer in alive:
        live -= nbytes[buffer] if readers[buffer] == 0 else 0
    for task in order:
        for buffer in writes[writes_at[task] : writes_at[task + 1]]:
            live += nbytes[buffer]
        found[task] = live + scratch[task]
        for buffer in over[over_at[task] : over_at[task + 1]]:
            if readers[buffer] == 1:  # this task
                found[task] -= nbytes[buffer]
                break
        for buffer in reads[reads_at[task] : reads_at[task + 1]]:
            readers[buffer] -= 1
            live -= nbytes[buffer] if readers[buffer] == 0 else 0
        for buffer in writes[writes_at[task] : writes_at[task + 1]]:
            live -= nbytes[buffer] if readers[buffer] == 0 else 0
    return found
