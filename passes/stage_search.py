"""Paths of microbatches, and the order at each device, by simulated annealing in machine code.

First the paths, and where they may be chosen the places of the devices: two microbatches exchange devices
of a stage, or stages, so that every use stays even; a path changes its order; a task counts as having
come later at its device (`bias`); two devices exchange their stages. Each candidate is run as
`run_greedy` runs it. Then the orders at the devices that came out of that are changed themselves, one
pair of neighbours at a time, which also finds those in which a device waits for a better task.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.compiled import compiled, flat_rows
from graphopt.cost_models.stage_run import StageRun, greedy, in_order, run_greedy, run_orders
from graphopt.cost_models.stage_tasks import Path
from graphopt.errors import PlanError
from graphopt.passes.stage_routes import Routing, allowed

_WARM, _COLD = 0.03, 0.0003  # temperatures at the start and the end, as shares of the makespan
_MEAN = 0.05  # the weight of the mean end of a microbatch beside the last one
_TASKS = 2000  # of all restarts together
_BIAS_S = 0.5  # as a share of the mean transfer


@dataclass(frozen=True, eq=False)
class Routed:
    """Paths, where the devices are, and the run."""

    paths: tuple[Path, ...]
    stage_devices: tuple[tuple[int, ...], ...]
    run: StageRun


def search_routes(
    routing: Routing,
    trials: int = 800_000,
    seed: int = 0,
    start: Sequence[Path] | None = None,
    restarts: int | None = None,
) -> Routed:
    """The best of `trials` changes in all, from `start` or from an even use of all devices.

    Where `restarts` is not given, there are more of them the fewer tasks there are. In turns they tie
    microbatches of the same source together, by twos, threes and so on: paths that several share are
    hard to reach by changing one at a time. The second half of each is untied. The same arguments give
    the same result. PlanError where no paths run without waiting for ever.
    """
    paths = list(start or routing.first_paths())
    routing.check(paths)
    restarts = restarts or max(8, _TASKS // (routing.microbatches * (2 * routing.visited + 1)))
    each = max(1, trials // (2 * restarts))
    most = routing.microbatches // len(routing.stage_devices[0])
    sizes = [size for size in range(1, most + 1) if most % size == 0] or [1]
    best: Routed | None = None
    for turn in range(restarts):
        state = _State(routing, paths)
        size = sizes[turn % len(sizes)]
        random = 1000 * seed + turn
        if size > 1:
            state = state.annealed(routing, each, random, _WARM, state.leaders(routing, size))
        state = state.annealed(
            routing, each * (1 if size > 1 else 2), random, _WARM / (3 if size > 1 else 1)
        )
        if not np.isfinite(state.seconds):
            continue
        found, held = _paths(state.stages, state.nodes), _held(state.at)
        run = run_greedy(routing.step(found, held), routing.memory, state.bias.ravel())
        run = improved(run, routing.memory, each, random)
        if best is None or run.seconds < best.run.seconds:
            best = Routed(tuple(found), held, run)
    if best is None:
        raise PlanError(
            f"no paths found in which devices with room for {routing.memory} do not wait for ever"
        )
    return best


def improved(run: StageRun, memory: float, trials: int, seed: int = 0) -> StageRun:
    """`run` with orders at the devices that take less time, of `trials` exchanges of neighbours."""
    a = run.step.arrays
    at, order = flat_rows(run.orders)
    step = a.seconds, a.ready, a.holds, a.frees, a.waits, a.users_at, a.users, a.delays, run.step.pause_s
    heat = trials, seed, _WARM / 3, _COLD
    in_time = compiled(in_order, on_disk=True)
    found = compiled(_reordered)(at, order, float(memory), step, heat, in_time)
    rows = [found[at[d] : at[d + 1]].tolist() for d in range(len(at) - 1)]
    better = run_orders(run.step, rows)
    return better if better.seconds < run.seconds else run


class _State:
    """Paths as arrays: int64[microbatch, place] of stages and devices, int64[device] of their stages."""

    def __init__(self, routing: Routing, paths: Sequence[Path]) -> None:
        self.stages = np.array([[s for s, _ in path] for path in paths], np.int64)
        self.nodes = np.array([[d for _, d in path] for path in paths], np.int64)
        self.bias = np.zeros((len(paths), 2 * routing.visited + 1))
        self.at = np.zeros(routing.links.devices, np.int64)
        for stage, devices in enumerate(routing.stage_devices):
            self.at[list(devices)] = stage
        self.seconds = np.inf

    def leaders(self, routing: Routing, size: int) -> np.ndarray:
        """For each microbatch the one whose path it shares, `size` of a source together."""
        first: dict[tuple[int, int], int] = {}
        count: dict[int, int] = {}
        found = []
        for microbatch, source in enumerate(routing.sources):
            group = source, count.get(source, 0) // size
            count[source] = count.get(source, 0) + 1
            found.append(first.setdefault(group, microbatch))
        return np.array(found, np.int64)

    def annealed(
        self, routing: Routing, trials: int, seed: int, warm: float, leaders: np.ndarray | None = None
    ) -> "_State":
        """The best state found from here."""
        tied = np.arange(len(self.stages)) if leaders is None else leaders
        forward = np.array([c.forward_s for c in routing.costs])
        backward = np.array([c.backward_s for c in routing.costs])
        state = self.stages.copy(), self.nodes.copy(), self.bias, self.at
        visits = np.array(routing.stage_visits), np.array(routing.device_visits)
        costs = forward, backward, float(routing.head_s), routing.delays
        limits = float(routing.memory), float(routing.pause_s), routing.max_jump, routing.max_back
        heat = trials, seed, warm, _COLD, _BIAS_S * routing.delays.mean(), _MEAN
        own = (allowed, _filled, _changed, _moved, _has_room, _chains, _value)
        helpers = [compiled(greedy, on_disk=True), *map(compiled, own)]
        self.stages, self.nodes, self.bias, self.at, self.seconds = compiled(_anneal)(
            *(state, (tied, np.unique(tied)), visits, costs, (*limits, not routing.is_placed)),
            *(heat, *helpers),
        )
        return self


def _paths(stages: np.ndarray, nodes: np.ndarray) -> list[Path]:
    rows = zip(stages.tolist(), nodes.tolist(), strict=True)
    return [tuple(zip(stage, node, strict=True)) for stage, node in rows]


def _held(at: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(np.flatnonzero(at == s).tolist()) for s in range(int(at.max()) + 1))


# --- compiled ----------------------------------------------------------------------------------


def _filled(stages: Any, nodes: Any, costs: Any, device: Any, seconds: Any, delays: Any) -> None:
    """The device, the seconds, and the transfer after each task of each microbatch."""
    forward, backward, head, links = costs
    count, visited = stages.shape
    length = 2 * visited + 1
    for m in range(count):
        base = m * length
        for k in range(visited):
            out, back = base + k, base + 2 * visited - k
            device[out] = device[back] = nodes[m, k]
            seconds[out], seconds[back] = forward[stages[m, k]], backward[stages[m, k]]
            after = nodes[m, k + 1] if k + 1 < visited else nodes[m, 0]
            link = links[stages[m, k]]
            delays[out - m] = link[nodes[m, k], after]  # each microbatch has one task that none follows
            delays[back - 1 - m] = link[after, nodes[m, k]]
        device[base + visited], seconds[base + visited] = nodes[m, 0], head


def _changed(
    stages: Any,
    nodes: Any,
    bias: Any,
    at: Any,
    leaders: Any,
    may_move: bool,
    most_bias: float,
    jump: int,
    back: int,
    is_allowed: Any,
    move: Any,
) -> bool:
    """Make one change; False where it turns out to be none, or not allowed."""
    count, visited = stages.shape
    kind = np.random.randint(0, 12)
    a, b = leaders[np.random.randint(0, len(leaders))], leaders[np.random.randint(0, len(leaders))]
    if kind < 3:  # two microbatches exchange devices of a stage
        i = np.random.randint(0, visited)
        for j in range(visited):
            if stages[b, j] == stages[a, i] and nodes[b, j] != nodes[a, i]:
                nodes[a, i], nodes[b, j] = nodes[b, j], nodes[a, i]
                return True
        return False
    if kind < 5:  # two microbatches exchange stages
        i, j = np.random.randint(1, visited), np.random.randint(1, visited)
        stages[a, i], stages[b, j] = stages[b, j], stages[a, i]
        nodes[a, i], nodes[b, j] = nodes[b, j], nodes[a, i]
        return bool(a != b and is_allowed(stages[a], jump, back) and is_allowed(stages[b], jump, back))
    if kind < 6:  # a visit of another stage or device, where there is room
        if not move(stages, nodes, at, a, b):
            return False
        return bool(is_allowed(stages[a], jump, back) and is_allowed(stages[b], jump, back))
    if kind < 7:  # a path in another order
        i, j = np.random.randint(1, visited), np.random.randint(1, visited)
        stages[a, i], stages[a, j] = stages[a, j], stages[a, i]
        nodes[a, i], nodes[a, j] = nodes[a, j], nodes[a, i]
        return bool(i != j and is_allowed(stages[a], jump, back))
    if kind < 8:  # two microbatches exchange what follows a place of their paths
        for k in range(np.random.randint(1, visited), visited):
            stages[a, k], stages[b, k] = stages[b, k], stages[a, k]
            nodes[a, k], nodes[b, k] = nodes[b, k], nodes[a, k]
        return bool(a != b and is_allowed(stages[a], jump, back) and is_allowed(stages[b], jump, back))
    if kind < 11 or not may_move:
        k = np.random.randint(0, bias.shape[1])
        m = np.random.randint(0, count)
        bias[m, k] = 0.0 if np.random.random() < 0.3 else most_bias * np.random.normal()
        return True
    u, v = np.random.randint(0, len(at)), np.random.randint(0, len(at))
    at[u], at[v] = at[v], at[u]
    for m in range(count):
        for k in range(visited):
            if nodes[m, k] == u:
                nodes[m, k] = v
            elif nodes[m, k] == v:
                nodes[m, k] = u
    return u != v


def _moved(stages: Any, nodes: Any, at: Any, a: int, b: int) -> bool:
    """Lead a path, or two, through other devices, at one place or all; False for the first stage's."""
    visited = stages.shape[1]
    one = np.random.randint(1, visited) if np.random.random() < 0.5 else 0
    for m in (a, b):
        for i in range(1, visited):
            if one == 0 or i == one:
                nodes[m, i] = np.random.randint(0, len(at))
                stages[m, i] = at[nodes[m, i]]
                if stages[m, i] == 0:
                    return False
        if np.random.random() < 0.5:
            break
    return True


def _has_room(stages: Any, nodes: Any, at: Any, stage_visits: Any, device_visits: Any) -> bool:
    """Whether no stage and no device has more visits than it may."""
    by_stage, by_device = np.zeros(len(stage_visits), np.int64), np.zeros(len(at), np.int64)
    for m in range(stages.shape[0]):
        for k in range(stages.shape[1]):
            by_stage[stages[m, k]] += 1
            by_device[nodes[m, k]] += 1
    for node in range(len(at)):
        if by_stage[at[node]] > stage_visits[at[node]] or by_device[node] > device_visits[at[node]]:
            return False
    return True


def _chains(count: int, visited: int) -> Any:
    """What `greedy` is told of the tasks that stays the same: each microbatch is a chain of them."""
    length = 2 * visited + 1
    total = count * length
    holds, frees, ready = np.zeros(total), np.zeros(total), np.zeros(total)
    waits, users = np.ones(total, np.int64), np.empty(total - count, np.int64)
    users_at = np.zeros(total + 1, np.int64)
    for m in range(count):
        waits[m * length] = 0
        for k in range(length):
            task = m * length + k
            users_at[task + 1] = users_at[task] + (k + 1 < length)
            if k + 1 < length:
                users[task - m] = task + 1
            holds[task], frees[task] = 1.0 * (k < visited), 1.0 * (k > visited)
    return ready, holds, frees, waits, users_at, users


def _value(begin: Any, seconds: Any, count: int) -> Any:
    """The last end of a microbatch, and the mean one."""
    latest, total, length = 0.0, 0.0, len(seconds) // count
    for m in range(count):
        end = begin[(m + 1) * length - 1] + seconds[(m + 1) * length - 1]
        latest, total = max(latest, end), total + end
    return latest, total / count


def _anneal(
    state: Any,
    ties: Any,
    visits: Any,
    costs: Any,
    rules: Any,
    heat: Any,
    run: Any,
    is_allowed: Any,
    fill: Any,
    change: Any,
    move: Any,
    has_room: Any,
    chains: Any,
    evaluate: Any,
) -> Any:
    """The best paths, biases and places, and the makespan of them."""
    stages, nodes, bias, at = state
    tied, leaders = ties
    memory, pause, jump, back, may_move = rules
    trials, seed, warm, cold, most_bias, mean_weight = heat
    np.random.seed(seed)
    count, visited = stages.shape
    total = count * (2 * visited + 1)
    device, seconds, delays = np.empty(total, np.int64), np.empty(total), np.empty(total - count)
    ready, holds, frees, waits, users_at, users = chains(count, visited)
    now, best_value = np.inf, np.inf
    best = (stages.copy(), nodes.copy(), bias.copy(), at.copy())
    old = (stages.copy(), nodes.copy(), bias.copy(), at.copy())
    for trial in range(trials + 1):
        fits = trial == 0 or change(
            stages, nodes, bias, at, leaders, may_move, most_bias, jump, back, is_allowed, move
        )
        if fits:
            for m in range(count):
                for k in range(visited):
                    stages[m, k], nodes[m, k] = stages[tied[m], k], nodes[tied[m], k]
            fits = has_room(stages, nodes, at, visits[0], visits[1])
        value = np.inf
        if fits:
            fill(stages, nodes, costs, device, seconds, delays)
            begin, done = run(
                *(len(at), memory, bias.ravel(), device, seconds, ready, holds, frees, waits, users_at),
                *(users, delays, pause),
            )
            if done == total:
                value, mean = evaluate(begin, seconds, count)
                if value < best_value:
                    best_value = value
                    best = (stages.copy(), nodes.copy(), bias.copy(), at.copy())
                value += (
                    mean_weight * mean
                )  # of two that are as long, the one that ends sooner in the mean
        warmth = best_value * warm * (cold / warm) ** (trial / max(1, trials))
        if value <= now or (now < np.inf and np.random.random() < np.exp((now - value) / warmth)):
            now = value
            old[0][:], old[1][:], old[2][:], old[3][:] = stages, nodes, bias, at
        else:
            stages[:], nodes[:], bias[:], at[:] = old
    return best[0], best[1], best[2], best[3], best_value


def _reordered(order_at: Any, order: Any, memory: float, step: Any, heat: Any, run: Any) -> Any:
    """The best order of all devices, one after the other in an array."""
    seconds, ready, holds, frees, waits, users_at, users, delays, pause = step
    trials, seed, warm, cold = heat
    np.random.seed(seed)
    order, best, count = order.copy(), order.copy(), len(seconds)
    begin, _ = run(order_at, order, seconds, ready, waits, users_at, users, delays, pause)
    now = best_value = (begin + seconds).max()
    for trial in range(trials):
        lane = np.random.randint(0, len(order_at) - 1)
        if order_at[lane + 1] - order_at[lane] < 2:
            continue
        k = np.random.randint(order_at[lane], order_at[lane + 1] - 1)
        level = holds[order[k + 1]]
        for place in range(order_at[lane], k):
            level += holds[order[place]] - frees[order[place]]
        if level > memory + 1e-9:
            continue
        order[k], order[k + 1] = order[k + 1], order[k]
        begin, done = run(order_at, order, seconds, ready, waits, users_at, users, delays, pause)
        value = (begin + seconds).max() if done == count else np.inf
        heat = best_value * warm * (cold / warm) ** (trial / trials)
        if value <= now or np.random.random() < np.exp((now - value) / heat):
            now = value
            if now < best_value:
                best_value, best = now, order.copy()
        else:
            order[k], order[k + 1] = order[k + 1], order[k]
    return best
