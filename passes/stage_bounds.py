"""What no schedule of a pipeline's tasks is faster than."""

import itertools
from typing import Any

import numpy as np

from graphopt.compiled import compiled
from graphopt.cost_models.stage_tasks import StageTasks
from graphopt.passes.stage_routes import Routing

_MOST_WALKS = 2_000_000


def tasks_bound(step: StageTasks) -> tuple[float, str]:
    """Seconds that the tasks take in any order, each on its device, and the argument.

    For each device, Jackson's preemptive schedule of its tasks: none begins before all that leads to it
    could have run, and after it comes at least what depends on it (Carlier, EJOR 11, 1982).
    """
    a = step.arrays
    topological = _topological(a.waits, a.users_at, a.users)
    head, tail = a.ready.copy(), np.zeros(len(a.seconds))
    for task in topological:
        for k in range(a.users_at[task], a.users_at[task + 1]):
            head[a.users[k]] = max(head[a.users[k]], head[task] + a.seconds[task] + a.delays[k])
    for task in topological[::-1]:
        for k in range(a.users_at[task], a.users_at[task + 1]):
            user = a.users[k]
            tail[task] = max(tail[task], a.delays[k] + a.seconds[user] + tail[user])
    best = float((head + a.seconds + tail).max(initial=0.0)), "the longest chain of tasks"
    for device in range(step.devices):
        mine = np.flatnonzero(a.device == device)
        lengths = a.seconds[mine] + step.pause_s
        found = compiled(jackson, on_disk=True)(len(mine), head[mine], lengths, tail[mine] - step.pause_s)
        best = max(best, (float(found), f"the tasks of device {device}"))
    return best


def _topological(waits: np.ndarray, users_at: np.ndarray, users: np.ndarray) -> list[int]:
    left = waits.copy()
    found = np.flatnonzero(left == 0).tolist()
    for task in found:
        for user in users[users_at[task] : users_at[task + 1]].tolist():
            left[user] -= 1
            if left[user] == 0:
                found.append(user)
    return found


def routes_bound(routing: Routing) -> tuple[float, str]:
    """Seconds that any paths take, in any order; where devices may be exchanged, also at any place.

    A device of the first stage has up to `memory` microbatches under way, and each is for at least the
    shortest round trip: the last one ends when all rounds have. And it is busy with all its microbatches.
    """
    cost, pause = routing.costs[0], routing.pause_s
    trips = _round_trips(routing)
    sources = len(routing.stage_devices[0])
    counts = [routing.sources.count(k) for k in range(sources)]
    if not routing.is_placed:  # the best devices are the first stage's
        trips = sorted(trips)[:sources]
        counts = [min(counts)] * sources
    latest = 0.0
    for trip, count in zip(trips, counts, strict=True):
        begins: list[float] = []
        ends: list[float] = []
        for i in range(count):
            begin = begins[-1] + cost.forward_s + pause if begins else 0.0
            if i >= routing.memory:
                begin = max(begin, ends[i - routing.memory] + pause)
            begins.append(begin)
            ends.append(max(begin + trip, ends[-1] + cost.backward_s + pause if ends else 0.0))
        latest = max(latest, ends[-1])
    busy = max(counts) * (cost.seconds + routing.head_s + 3 * pause) - pause
    return max((latest, "the round trips of a first device"), (busy, "the work of a first device"))


def _round_trips(routing: Routing) -> list[float]:
    """The shortest round trip from each device of the first stage; where they may move, from any."""
    if routing.is_placed:
        return [
            min(routing.round_trip_s(path) for path in routing.all_paths(device))
            for device in routing.stage_devices[0]
        ]
    count, visited = routing.links.devices, routing.visited
    least = routing.delays.min(axis=0)
    both = least + least.T
    rest = sorted(cost.seconds for cost in routing.costs[1:])[: visited - 1]
    work = routing.costs[0].seconds + sum(rest) + routing.head_s
    if np.prod(np.arange(count, count - visited, -1.0)) > _MOST_WALKS:
        np.fill_diagonal(both, np.inf)
        return [work + float(visited * both.min())] * count
    walks = np.array(list(itertools.permutations(range(count), visited)))
    hops = both[walks, np.roll(walks, -1, axis=1)].sum(axis=1)
    return [work + float(hops[walks[:, 0] == device].min()) for device in range(count)]


# --- compiled ----------------------------------------------------------------------------------


def jackson(count: int, heads: Any, lengths: Any, tails: Any) -> float:
    """The end of Jackson's preemptive schedule of one device, tails included."""
    left = lengths[:count].copy()
    now, latest, done = 0.0, -np.inf, 0
    for i in range(count):
        if left[i] <= 0.0:
            done += 1
            latest = max(latest, heads[i] + tails[i])
    while done < count:
        best, following = -1, np.inf
        for i in range(count):
            if left[i] > 0.0:
                if heads[i] <= now + 1e-12:
                    if best < 0 or tails[i] > tails[best]:
                        best = i
                else:
                    following = min(following, heads[i])
        if best < 0:
            now = following
            continue
        step = min(left[best], following - now)
        now += step
        left[best] -= step
        if left[best] <= 1e-12:
            left[best] = 0.0
            done += 1
            latest = max(latest, now + tails[best])
    return latest
