"""The fastest schedule of microbatches that skip stages, proven, on small instances: branch and bound.

First the paths, one microbatch after the other; those of one source are alike, so that their paths come
in ascending order. Then, for each choice of all paths that may still be faster, the orders at the
devices: a job shop, whose active schedules are enumerated as Giffler and Thompson do (Operations
Research 8, 1960). Both cut off what a device alone shows to be too slow: what it has to do with
preemption, between the least time before and after each task (Jackson's schedule; Carlier, EJOR 11,
1982).

For the memory not to change which schedules are active, no device may have more visits than its memory
holds; on small instances, where use is even, none has.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.compiled import compiled
from graphopt.cost_models.stage_run import run_orders
from graphopt.errors import PlanError
from graphopt.passes.stage_bounds import jackson
from graphopt.passes.stage_routes import Routing
from graphopt.passes.stage_search import Routed, search_routes

_SAME_S = 1e-7


@dataclass(frozen=True, eq=False)
class Exact:
    """The best schedule, whether it is proven to be, and how many nodes of the tree were looked at."""

    routed: Routed
    is_optimal: bool
    nodes: int


def fastest_routes(routing: Routing, trials: int = 400_000, most_nodes: int = 1_000_000_000) -> Exact:
    """The fastest schedule with the devices where they are, if `most_nodes` are enough to prove it."""
    if max(routing.device_visits) > routing.memory:
        raise PlanError(
            f"a device has up to {max(routing.device_visits)} visits and room for {routing.memory}: the "
            "exact search is for instances in which memory is no bound"
        )
    known = search_routes(routing, trials)
    table = _Table(routing)
    own = _machines, _options, _shop, _counted
    helpers = [compiled(jackson, on_disk=True), *map(compiled, own)]
    visits = np.array(routing.stage_visits), np.array(routing.device_visits)
    lanes = np.arange(routing.links.devices)
    limits = lanes, float(routing.pause_s), known.run.seconds - _SAME_S, most_nodes
    rows = table.device, table.stage, table.seconds, table.gap, table.head, table.tail
    least = compiled(_relaxed)(rows, table.first, table.last)
    chosen, begin, nodes, is_done = compiled(_choose)(
        rows, (table.first, table.last, table.sources), visits, limits, least, *helpers
    )
    if chosen[0] < 0:  # nothing faster than what is known
        return Exact(known, bool(is_done), int(nodes))
    paths = tuple(table.paths[i] for i in table.sorted_back(chosen))
    step = routing.step(paths)
    flat = begin[np.argsort(table.order)].ravel()
    by_device = [np.flatnonzero(step.arrays.device == d).tolist() for d in range(step.devices)]
    run = run_orders(step, [sorted(row, key=flat.__getitem__) for row in by_device])
    return Exact(Routed(paths, routing.stage_devices, run), bool(is_done), int(nodes))


class _Table:
    """All paths as arrays; microbatches are in the order of their sources, `order`.

    The paths of microbatch i are those from `first[i]` to `last[i]`. By path and place, int64[path,
    place] and float64[path, place]: `device`, `stage`, `seconds`, `gap` (the transfer after it), and the
    least time from the start (`head`) and to the end (`tail`, without its own seconds).
    """

    def __init__(self, routing: Routing) -> None:
        by_source = [list(routing.all_paths(device)) for device in routing.stage_devices[0]]
        for rows in by_source:
            rows.sort(key=routing.round_trip_s)
        self.paths = [path for rows in by_source for path in rows]
        begins = np.cumsum([0, *map(len, by_source)])
        self.order = np.argsort(np.array(routing.sources), kind="stable")
        self.sources = np.array(routing.sources, np.int64)[self.order]
        self.first, self.last = begins[self.sources], begins[self.sources + 1]
        there = np.array([[d for _, d in path] for path in self.paths])
        stage = np.array([[s for s, _ in path] for path in self.paths])
        forward = np.array([c.forward_s for c in routing.costs])
        backward = np.array([c.backward_s for c in routing.costs])
        self.stage = stage
        self.device = np.concatenate([there, there[:, :1], there[:, ::-1]], axis=1)
        head = np.full((len(stage), 1), routing.head_s)
        self.seconds = np.concatenate([forward[stage], head, backward[stage[:, ::-1]]], axis=1)
        sent = np.concatenate([stage, stage[:, ::-1]], axis=1)
        self.gap = routing.delays[sent, self.device[:, :-1], self.device[:, 1:]]
        both = np.cumsum(self.seconds, axis=1)
        moved = np.concatenate([np.zeros_like(head), np.cumsum(self.gap, axis=1)], axis=1)
        self.head = both - self.seconds + moved
        self.tail = (both + moved)[:, -1:] - both - moved

    def sorted_back(self, chosen: np.ndarray) -> list[int]:
        """The paths of the microbatches in their own order."""
        found = [0] * len(chosen)
        for place, microbatch in enumerate(self.order.tolist()):
            found[microbatch] = int(chosen[place])
        return found


# --- compiled ----------------------------------------------------------------------------------


def _machines(tasks: Any, following: Any, lanes: Any, pause: float, enough: float, bound: Any) -> bool:
    """Whether one of the devices `lanes` takes `enough` or longer, with the tasks from `following` on.

    `tasks` are the device, seconds, head and tail of each task, by microbatch and place.
    """
    device, seconds, heads, tails = tasks
    count, length = seconds.shape
    h, p, q = np.empty(count * length), np.empty(count * length), np.empty(count * length)
    for lane in lanes:
        size = 0
        for m in range(count):
            for k in range(following[m], length):
                if device[m, k] == lane:
                    h[size], p[size] = heads[m, k], seconds[m, k] + pause
                    q[size] = tails[m, k] - pause
                    size += 1
        if size > 1 and bound(size, h, p, q) >= enough:
            return True
    return False


def _options(
    tasks: Any, done: Any, come: Any, idle: Any, alike: Any, pause: float, enough: float, found: Any
) -> Any:
    """The microbatches whose next task may be the next on the device that is done first; fills `heads`.

    Their number; -1 where all tasks are placed, -2 where a microbatch ends too late.
    """
    device, seconds, heads, tail, gap = tasks
    count, length = seconds.shape
    first, lane, is_late = np.inf, -1, False
    for m in range(count):
        now = come[m]
        for k in range(done[m], length):
            now = max(now, idle[device[m, k]])
            heads[m, k] = now
            now += seconds[m, k] + (gap[m, k] if k + 1 < length else 0.0)
        is_late = is_late or (done[m] < length and now >= enough)
        if done[m] < length:
            end = heads[m, done[m]] + seconds[m, done[m]] + pause
            if end < first:
                first, lane = end, device[m, done[m]]
    if is_late or lane < 0:
        return -2 if is_late else -1
    size = 0
    for m in range(count):
        k = done[m]
        if k == length or device[m, k] != lane or heads[m, k] >= first:
            continue
        if k == 0 and alike[m] >= 0 and done[alike[m]] == 0:
            continue  # the one before it is the same, and has not begun
        j = size
        while j > 0 and tail[found[j - 1], done[found[j - 1]]] > tail[m, k]:
            found[j] = found[j - 1]
            j -= 1
        found[j] = m  # the one with the longest way to go is last, and tried first
        size += 1
    return size


def _shop(
    tasks: Any,
    alike: Any,
    lanes: Any,
    pause: float,
    enough: float,
    most: int,
    bound: Any,
    machines: Any,
    options_of: Any,
) -> Any:
    """The best begin of each task that ends before `enough`, that end (or inf), and the nodes."""
    device, seconds, heads, tail, gap = tasks
    count, length = seconds.shape
    total = count * length
    best, best_end, nodes = np.empty((count, length)), np.inf, 0
    begin = np.zeros((count, length))
    following = np.zeros((total + 1, count), np.int64)
    arrival, free = np.zeros((total + 1, count)), np.zeros((total + 1, len(lanes)))
    options, sizes = np.empty((total + 1, count), np.int64), np.full(total + 1, -1)
    depth = 0
    while depth >= 0:
        done, come, idle = following[depth], arrival[depth], free[depth]
        if sizes[depth] < 0:  # a new node: cut it off, or find the tasks that may be next
            nodes += 1
            size = options_of(tasks, done, come, idle, alike, pause, enough, options[depth])
            if size == -1:
                best_end = (begin[:, length - 1] + seconds[:, length - 1]).max()
                enough = best_end - 1e-7
                best[:] = begin
            elif size > 0 and (
                nodes > most
                or machines((device, seconds, heads, tail), done, lanes, pause, enough, bound)
            ):
                size = 0
            sizes[depth] = max(0, size)
        if sizes[depth] == 0:
            sizes[depth] = -1
            depth -= 1
            continue
        sizes[depth] -= 1
        m = options[depth, sizes[depth]]
        k = done[m]
        lane = device[m, k]
        begin[m, k] = max(come[m], idle[lane])
        end = begin[m, k] + seconds[m, k]
        following[depth + 1], arrival[depth + 1], free[depth + 1] = done, come, idle
        following[depth + 1, m] += 1
        arrival[depth + 1, m] = end + (gap[m, k] if k + 1 < length else 0.0)
        free[depth + 1, lane] = end + pause
        depth += 1
    return best, best_end, nodes


def _relaxed(table: Any, first: Any, last: Any) -> Any:
    """For each microbatch before its path is chosen: the devices that it surely uses, the least times."""
    device, stage, _, _, head, tail = table
    count, length, visited = len(first), device.shape[1], stage.shape[1]
    devices = np.full((count, length), -1)
    heads, tails = np.full((count, length), np.inf), np.full((count, length), np.inf)
    for m in range(count):
        for k in range(length):
            if k == 0 or k == visited or k == length - 1:
                devices[m, k] = device[first[m], 0]
            for i in range(first[m], last[m]):
                heads[m, k] = min(heads[m, k], head[i, k])
                tails[m, k] = min(tails[m, k], tail[i, k])
    return devices, heads, tails


def _counted(stages: Any, devices: Any, by_stage: Any, by_device: Any, visits: Any, change: int) -> bool:
    """Count the visits of one path, or with -1, take them back; whether they are not too many."""
    fits = True
    for k in range(len(stages)):
        by_stage[stages[k]] += change
        by_device[devices[k]] += change
        fits = fits and by_stage[stages[k]] <= visits[0][stages[k]]
        fits = fits and by_device[devices[k]] <= visits[1][stages[k]]
    return fits


def _choose(
    table: Any,
    ranges: Any,
    visits: Any,
    limits: Any,
    least: Any,
    bound: Any,
    machines: Any,
    options_of: Any,
    shop: Any,
    counted: Any,
) -> Any:
    """The paths and begins of the best schedule below `enough` (-1: there is none), and the nodes."""
    device, stage, seconds, gap, head, tail = table
    first, last, sources = ranges
    lanes, pause, enough, most = limits
    count, length, visited = len(first), device.shape[1], stage.shape[1]
    row, best, alike = np.full(count, -1), np.full(count, -1), np.full(count, -1)
    best_begin, following = np.zeros((count, length)), np.zeros(count, np.int64)
    by_stage, by_device = np.zeros(len(visits[0]), np.int64), np.zeros(len(lanes), np.int64)
    devices, heads, tails = least[0].copy(), least[1].copy(), least[2].copy()
    times, gaps, scratch = seconds[first], gap[first], np.empty((count, length))
    depth, nodes = 0, 0
    while depth >= 0 and nodes < most:
        m = depth
        same = m > 0 and sources[m] == sources[m - 1]
        if row[m] >= 0:  # take back what was chosen here
            counted(stage[row[m]], device[row[m], :visited], by_stage, by_device, visits, -1)
            devices[m], heads[m], tails[m] = least[0][m], least[1][m], least[2][m]
            row[m] += 1
        else:
            row[m] = row[m - 1] if same else first[m]
        i = row[m]
        # The paths of a source ascend by their round trips: behind one that is too long, all are.
        if i >= last[m] or head[i, length - 1] + seconds[i, length - 1] >= enough:
            row[m] = -1
            depth -= 1
            continue
        nodes += 1
        used = device[i, :visited]
        fits = counted(stage[i], used, by_stage, by_device, visits, 1)
        devices[m], times[m], gaps[m] = device[i], seconds[i], gap[i]
        heads[m], tails[m] = head[i], tail[i]
        alike[m] = m - 1 if same and row[m - 1] == i else -1
        if not fits or machines((devices, times, heads, tails), following, used, pause, enough, bound):
            continue
        if depth + 1 < count:
            depth += 1
            continue
        tasks = devices, times, scratch, tails, gaps
        begin, end, more = shop(
            tasks, alike, lanes, pause, enough, most - nodes, bound, machines, options_of
        )
        nodes += more
        if end < enough:
            enough, best[:] = end - 1e-7, row
            best_begin[:] = begin
    return best, best_begin, nodes, nodes < most
