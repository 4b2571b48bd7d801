"""List schedules of a task graph: of what can run, always the task of highest priority.

Transfers are started when their channel would otherwise run dry before the next computation ends, or as
soon as they can be (the captured order with transfers started early and waited for late is what
Inductor's scheduler makes of it, torch/_inductor/fx_passes/overlap_scheduling.py); a task that would
exceed the memory waits for others.
"""

import heapq
from typing import Any

import numpy as np

from graphopt.compiled import compiled
from graphopt.cost_models.overlap_bound import heads, tails
from graphopt.cost_models.task_graph import TaskGraph

NO_LIMIT = 2**62


def priorities(graph: TaskGraph) -> dict[str, np.ndarray]:
    """The priority of each task under the rules that we know, by the rule's name; high goes first.

    critical path: longest chain of tasks behind it. transfers: longest chain of transfers behind it. next
    transfer: least computing left until a transfer can start. breadth: least that had to come before it.
    captured order: as the program has it.
    """
    a, number = graph.arrays, np.arange(len(graph.tasks))
    tail = tails(graph) + a.seconds
    near = compiled(_to_next_transfer, on_disk=True)(a.channel, a.seconds, a.users_at, a.users)
    sent = compiled(_transfer_tails, on_disk=True)(a.channel, a.seconds, a.users_at, a.users)
    return {
        "critical path": tail,
        "next transfer": _ranked(near, -tail),
        "transfers": _ranked(-sent, -tail),
        "breadth": _ranked(heads(graph), number),
        "captured order": -number.astype(np.float64),
    }


def _ranked(*keys: np.ndarray) -> np.ndarray:
    """A priority for each task by the first of `keys`, ties by the next; least key, highest priority."""
    rank = np.empty(len(keys[0]), np.float64)
    rank[np.lexsort(keys[::-1])] = np.arange(len(rank), 0, -1)
    return rank


def list_order(
    graph: TaskGraph,
    priority: np.ndarray,
    *,
    early: bool,
    memory_bytes: int | None = None,
    reserve_bytes: int = 0,
) -> np.ndarray:
    """The order in which the list schedule of `priority` runs all tasks.

    `early` starts transfers as soon as they can be. A transfer leaves `reserve_bytes` of `memory_bytes`
    to what computes. Where nothing fits, the first task of the program's order that can run goes next:
    the peak of the order is to be checked.
    """
    a = graph.arrays
    order: np.ndarray = compiled(_list_order, on_disk=True)(
        (a.channel, a.seconds, len(graph.channels), a.after_at, a.users_at, a.users),
        (
            *(a.reads_at, a.reads, a.writes_at, a.writes, a.readers, a.nbytes, a.scratch, a.alive),
            *(a.over_at, a.over),
        ),
        priority,
        np.inf if early else 0.0,
        (NO_LIMIT if memory_bytes is None else memory_bytes) - a.base_bytes,
        reserve_bytes,
    )
    return order


# --- compiled ----------------------------------------------------------------------------------


def _to_next_transfer(channel: Any, seconds: Any, users_at: Any, users: Any) -> Any:
    """For each task, the least seconds of computing from its start to that of a transfer behind it."""
    found = np.full(len(seconds), np.inf)
    for task in range(len(seconds) - 1, -1, -1):
        if channel[task] != 0:
            found[task] = 0.0
            continue
        for user in users[users_at[task] : users_at[task + 1]]:
            found[task] = min(found[task], found[user] + seconds[task])
    return found


def _transfer_tails(channel: Any, seconds: Any, users_at: Any, users: Any) -> Any:
    """For each task, the longest chain of transfers from it on."""
    found = np.zeros(len(seconds))
    for task in range(len(seconds) - 1, -1, -1):
        for user in users[users_at[task] : users_at[task + 1]]:
            found[task] = max(found[task], found[user])
        if channel[task] != 0:
            found[task] += seconds[task]
    return found


def _list_order(tasks: Any, buffers: Any, priority: Any, ahead: float, limit: int, reserve: int) -> Any:
    channel, seconds, lanes, after_at, users_at, users = tasks
    reads_at, reads, writes_at, writes, readers, nbytes, scratch, alive, over_at, over = buffers
    count, placed, now = len(seconds), 0, 0.0
    order, readers = np.empty(count, np.int64), readers.copy()
    waiting, released = after_at[1:] - after_at[:-1], np.zeros(count)
    live, free = nbytes[alive].sum(), np.zeros(lanes)
    need = scratch.copy()  # bytes that the start of a task takes
    for task in range(count):
        need[task] += nbytes[writes[writes_at[task] : writes_at[task + 1]]].sum()
    ready = [[(0.0, 0) for _ in range(0)] for _ in range(lanes)]  # per channel, by priority
    later = [(0.0, task) for task in range(count) if waiting[task] == 0]  # by when they can begin
    while placed < count:
        while len(later) > 0 and later[0][0] <= now:
            task = heapq.heappop(later)[1]
            heapq.heappush(ready[channel[task]], (-priority[task], task))
        best, aside = -1, [(0.0, 0) for _ in range(0)]
        while len(ready[0]) > 0 and best < 0:  # the first computation that fits
            item = heapq.heappop(ready[0])
            fits = live + need[item[1]] <= limit
            for buffer in over[over_at[item[1]] : over_at[item[1] + 1]]:  # that it writes over
                fits = fits or (readers[buffer] == 1 and live + need[item[1]] - nbytes[buffer] <= limit)
            if fits:
                best = item[1]
            else:
                aside.append(item)
        for item in aside:
            heapq.heappush(ready[0], item)
        task, until = best, now + ahead + (seconds[best] if best >= 0 else 0.0)
        for lane in range(1, lanes):  # before it, a transfer for a channel that has none by then
            if task != best or len(ready[lane]) == 0 or free[lane] > until:
                continue
            if live + need[ready[lane][0][1]] <= limit - reserve:
                task = heapq.heappop(ready[lane])[1]
        if best >= 0 and task != best:
            heapq.heappush(ready[0], (-priority[best], best))
        if task < 0 and len(later) > 0:
            now = later[0][0]
            continue
        if task < 0:  # nothing fits
            task = min([item[1] for lane in range(lanes) for item in ready[lane]])
            others = [item for item in ready[channel[task]] if item[1] != task]
            heapq.heapify(others)
            ready[channel[task]] = others
        lane, order[placed] = channel[task], task
        placed += 1
        free[lane] = max(now, free[lane]) + seconds[task]
        now = free[0] if lane == 0 else now
        live += need[task] - scratch[task]
        for buffer in reads[reads_at[task] : reads_at[task + 1]]:
            readers[buffer] -= 1
            live -= nbytes[buffer] if readers[buffer] == 0 else 0
        for buffer in writes[writes_at[task] : writes_at[task + 1]]:
            live -= nbytes[buffer] if readers[buffer] == 0 else 0
        for user in users[users_at[task] : users_at[task + 1]]:
            waiting[user] -= 1
            released[user] = max(released[user], free[lane])
            if waiting[user] == 0:
                heapq.heappush(later, (released[user], user))
    return order
