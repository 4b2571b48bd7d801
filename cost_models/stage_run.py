"""A step of a pipeline, run: with an order for each device, or with a rule that picks the next task.

`run_orders` takes the orders as they are: a task begins when its device is done with the one before it
and all that it waits for has arrived. `run_greedy` lets a device that is free begin whichever task has
arrived and fits in its memory, whichever came first (a `bias` in seconds lets a task count as having
come later); a device never waits for a better one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.compiled import compiled, flat_rows
from graphopt.cost_models.stage_tasks import ANYWHERE, StageTasks
from graphopt.errors import PlanError


@dataclass(frozen=True, eq=False)
class StageRun:
    """When each task begins and ends, float64[task], and what each device runs, in that order."""

    step: StageTasks
    orders: tuple[tuple[int, ...], ...]
    begin: np.ndarray
    end: np.ndarray

    @property
    def seconds(self) -> float:
        """From the start to the end of the last task on a device."""
        on_device = self.step.arrays.device != ANYWHERE
        return float(self.end[on_device].max(initial=0.0))

    def names(self) -> tuple[tuple[str, ...], ...]:
        """The orders by name."""
        return tuple(tuple(self.step.tasks[i].name for i in row) for row in self.orders)

    def peaks(self) -> tuple[tuple[float, ...], tuple[int, ...]]:
        """The most activations and the most bytes of each device, `fixed_bytes` included."""
        activations, sizes = [], []
        for device, row in enumerate(self.orders):
            count = most = 0.0
            fixed = self.step.fixed_bytes[device] if self.step.fixed_bytes else 0
            held, largest = fixed, fixed
            for task in (self.step.tasks[i] for i in row):
                count, held = count + task.activations, held + task.nbytes
                most, largest = max(most, count), max(largest, held)
                count, held = count - task.activations_freed, held - task.freed_bytes
            activations.append(round(most, 6))
            sizes.append(largest)
        return tuple(activations), tuple(sizes)


def run_orders(step: StageTasks, orders: Sequence[Sequence[int]]) -> StageRun:
    """Run each device's tasks in its order; PlanError where the orders wait for each other.

    >>> from graphopt.cost_models.stage_tasks import StageTask
    >>> step = StageTasks((StageTask("a", 0, 1.0), StageTask("b", 1, 2.0, ((0, 0.5),))), 2)
    >>> run_orders(step, [[0], [1]]).seconds
    3.5
    """
    a = step.arrays
    placed = sorted(i for row in orders for i in row)
    if placed != np.flatnonzero(a.device != ANYWHERE).tolist():
        raise PlanError("the orders do not have each task once")
    if any(step.tasks[i].device != device for device, row in enumerate(orders) for i in row):
        raise PlanError("a task is in the order of another device")
    begin, done = compiled(in_order, on_disk=True)(
        *flat_rows(orders), a.seconds, a.ready, a.waits, a.users_at, a.users, a.delays, step.pause_s
    )
    if done < len(step.tasks):
        raise PlanError("the orders of the devices wait for each other: no task can run")
    return StageRun(step, tuple(map(tuple, orders)), begin, begin + a.seconds)


def run_greedy(
    step: StageTasks,
    memory: float | None = None,
    bias: Sequence[float] | np.ndarray | None = None,
) -> StageRun:
    """Run what has arrived, with at most `memory` activations on each device.

    PlanError where devices that are full wait for each other.
    """
    a = step.arrays
    later = np.zeros(len(a.seconds)) if bias is None else np.array(bias, np.float64)
    begin, done = compiled(greedy, on_disk=True)(
        *(step.devices, np.inf if memory is None else float(memory), later, a.device, a.seconds),
        *(a.ready, a.holds, a.frees, a.waits, a.users_at, a.users, a.delays, step.pause_s),
    )
    if done < len(step.tasks):
        raise PlanError(f"devices with room for {memory} activations wait for each other")
    by_device: list[list[int]] = [[] for _ in range(step.devices)]
    for task in np.lexsort((np.arange(len(begin)), begin + a.seconds, begin)).tolist():
        if a.device[task] != ANYWHERE:
            by_device[a.device[task]].append(task)
    return StageRun(step, tuple(map(tuple, by_device)), begin, begin + a.seconds)


# --- compiled ----------------------------------------------------------------------------------


def in_order(
    order_at: Any,
    order: Any,
    seconds: Any,
    ready: Any,
    waits: Any,
    users_at: Any,
    users: Any,
    delays: Any,
    pause: float,
) -> Any:
    """When each task begins, and how many could run."""
    count = len(seconds)
    left, begin = waits.copy(), ready.copy()
    follower = np.full(count, -1)
    for device in range(len(order_at) - 1):
        for place in range(order_at[device] + 1, order_at[device + 1]):
            follower[order[place - 1]] = order[place]
            left[order[place]] += 1
    stack = np.empty(count, np.int64)
    depth = done = 0
    for task in range(count):
        if left[task] == 0:
            stack[depth] = task
            depth += 1
    while depth:
        depth -= 1
        task = stack[depth]
        done += 1
        end = begin[task] + seconds[task]
        for k in range(users_at[task], users_at[task + 1] + 1):
            if k < users_at[task + 1]:
                user, arrival = users[k], end + delays[k]
            else:
                user, arrival = follower[task], end + pause
            if user >= 0:
                begin[user] = max(begin[user], arrival)
                left[user] -= 1
                if left[user] == 0:
                    stack[depth] = user
                    depth += 1
    return begin, done


def greedy(
    devices: int,
    memory: float,
    bias: Any,
    device: Any,
    seconds: Any,
    ready: Any,
    holds: Any,
    frees: Any,
    waits: Any,
    users_at: Any,
    users: Any,
    delays: Any,
    pause: float,
) -> Any:
    """When each task begins, and how many could run."""
    count = len(seconds)
    left, arrival = waits.copy(), ready.copy()
    begin, free, level = np.full(count, np.inf), np.zeros(devices), np.zeros(devices)
    waiting = np.empty(count, np.int64)  # what has arrived, or will at a time that is known
    size = done = 0
    for task in range(count):
        if left[task] == 0:
            waiting[size] = task
            size += 1
    while size:
        chosen, when = -1, np.inf
        for k in range(size):
            task = waiting[k]
            lane, start = device[task], arrival[task]
            if lane >= 0:
                if level[lane] + holds[task] > memory + 1e-9:
                    continue
                start = max(start, free[lane])
            other = waiting[chosen] if chosen >= 0 else -1
            if start < when or (
                start == when
                and (lane >= 0, arrival[task] + bias[task], task)
                < (device[other] >= 0, arrival[other] + bias[other], other)
            ):
                chosen, when = k, start
        if chosen < 0:
            break  # nothing fits any more
        task = waiting[chosen]
        size -= 1
        waiting[chosen] = waiting[size]
        begin[task] = when
        done += 1
        end, lane = when + seconds[task], device[task]
        if lane >= 0:
            free[lane] = end + pause
            level[lane] += holds[task] - frees[task]
        for k in range(users_at[task], users_at[task + 1]):
            user = users[k]
            arrival[user] = max(arrival[user], end + delays[k])
            left[user] -= 1
            if left[user] == 0:
                waiting[size] = user
                size += 1
    return begin, done
