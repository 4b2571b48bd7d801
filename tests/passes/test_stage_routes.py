"""Paths keep the constraints, bounds hold, and the exact search finds what brute force finds."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.cost_models.stage_costs import StageCost, StageLinks
from graphopt.cost_models.stage_run import run_orders
from graphopt.errors import PlanError
from graphopt.passes.stage_bounds import routes_bound, tasks_bound
from graphopt.passes.stage_exact import fastest_routes
from graphopt.passes.stage_routes import Routing
from graphopt.passes.stage_search import search_routes


def routing(
    sizes: tuple[int, ...],
    microbatches: int,
    visited: int,
    seed: int = 0,
    memory: int = 3,
    is_placed: bool = True,
) -> Routing:
    """Devices with random links, and stages of random costs."""
    draw = random.Random(seed)
    count = sum(sizes)
    rows = [[draw.uniform(0.1, 3.0) for _ in range(count)] for _ in range(count)]
    links = StageLinks(tuple(map(tuple, rows)), ((float("inf"),) * count,) * count)
    devices, stages = iter(range(count)), []
    for size in sizes:
        stages.append(tuple(itertools.islice(devices, size)))
    costs = tuple(StageCost(draw.uniform(0.3, 0.6), 0.3, draw.uniform(0.2, 0.5)) for _ in sizes)
    return Routing(
        costs, links, tuple(stages), microbatches, visited, memory, 0.1, 0.1, is_placed=is_placed
    )


def brute_force(problem: Routing) -> float:
    """The least makespan over all paths and all orders of all devices."""
    best = float("inf")
    heads = [problem.stage_devices[0][s] for s in problem.sources]
    for paths in itertools.product(*(list(problem.all_paths(h)) for h in heads)):
        try:
            problem.check(paths)
        except PlanError:
            continue
        step = problem.step(paths)
        rows = [[i for i, t in enumerate(step.tasks) if t.device == d] for d in range(step.devices)]
        for orders in itertools.product(*(itertools.permutations(row) for row in rows)):
            try:
                best = min(best, run_orders(step, orders).seconds)
            except PlanError:
                continue
    return best


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_exact_search_finds_what_brute_force_finds(seed: int) -> None:
    problem = routing((2, 1, 1), 2, 2, seed)
    found = fastest_routes(problem, 2000)
    assert found.is_optimal
    assert found.routed.run.seconds == pytest.approx(brute_force(problem))


def test_the_exact_search_orders_one_device_of_each_stage() -> None:
    problem = routing((1, 1), 2, 2, 3)
    found = fastest_routes(problem, 1)
    assert found.is_optimal and found.routed.run.seconds == pytest.approx(brute_force(problem))


@settings(max_examples=6, deadline=None)
@given(
    st.integers(0, 1000), st.sampled_from([((2, 2, 2, 2), 4, 3), ((3, 2, 2, 2), 6, 3), ((2, 2, 2), 4, 2)])
)
def test_annealing_is_within_three_percent(seed: int, size: tuple[tuple[int, ...], int, int]) -> None:
    problem = routing(size[0], size[1], size[2], seed)
    exact, found = fastest_routes(problem, 5000), search_routes(problem, 40_000, seed)
    problem.check(found.paths)
    best, bound = exact.routed.run.seconds, routes_bound(problem)[0]
    assert exact.is_optimal
    assert bound <= best + 1e-6 <= found.run.seconds + 2e-6
    assert tasks_bound(found.run.step)[0] <= found.run.seconds + 1e-9
    assert found.run.seconds <= 1.03 * best
    assert max(found.run.peaks()[0]) <= problem.memory


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 1000))
def test_every_path_found_is_allowed(seed: int) -> None:
    problem = routing((3, 2, 2, 2, 2, 2), 12, 4, seed, memory=2, is_placed=False)
    found = search_routes(problem, 3000, seed)
    problem.check(found.paths, found.stage_devices)
    assert sorted(d for row in found.stage_devices for d in row) == list(range(13))
    assert [len(row) for row in found.stage_devices] == [3, 2, 2, 2, 2, 2]
    assert max(found.run.peaks()[0]) <= 2
    assert found.run.seconds >= routes_bound(problem)[0] - 1e-9


def test_places_help() -> None:
    fixed, free = (routing((2, 2, 2), 6, 2, 5, is_placed=p) for p in (True, False))
    assert search_routes(free, 40_000).run.seconds < search_routes(fixed, 40_000).run.seconds
    assert routes_bound(free)[0] <= routes_bound(fixed)[0]


def test_sequences_of_stages() -> None:
    problem = routing((5, 3, 3, 3, 3, 3), 30, 4)
    assert len(problem.sequences) == 22
    assert sum(1 for _ in problem.all_paths(0)) == 594  # as many paths as published code allows
    assert problem.stage_visits == (30, 18, 18, 18, 18, 18)
    assert not problem.is_allowed((0, 3, 2, 1))  # two stages back
    assert not problem.is_allowed((0, 5, 4, 3))
    near = Routing(problem.costs, problem.links, problem.stage_devices, 30, 4, 3, max_jump=1)
    assert near.sequences == ((0, 1, 2, 3),)


@pytest.mark.parametrize(
    ("paths", "fact"),
    [
        ([((0, 0), (1, 2)), ((0, 1), (2, 2))], "device 2 has no stage 2"),
        ([((0, 0), (1, 2)), ((0, 1), (1, 2))], "stage 1 has more than 1 visits"),
        ([((0, 0), (2, 3)), ((0, 0), (1, 2))], "a device of stage 0 has more than 1"),
        ([((0, 0), (1, 2), (2, 3)), ((0, 1), (1, 2))], "may not go through"),
    ],
)
def test_paths_that_are_refused(paths: list[tuple[tuple[int, int], ...]], fact: str) -> None:
    with pytest.raises(PlanError, match=fact):
        routing((2, 1, 1), 2, 2).check(paths)


def test_rejections() -> None:
    with pytest.raises(PlanError, match="memory is no bound"):
        fastest_routes(routing((1, 1, 1), 8, 2, memory=2))
    with pytest.raises(PlanError, match="from 2 to 3 stages"):
        routing((1, 1, 1), 2, 4)
    with pytest.raises(PlanError, match="holds one stage"):
        Routing((StageCost(1, 1, 1),) * 2, StageLinks.even(3), ((0,), (1,)), 2, 2, 1)
