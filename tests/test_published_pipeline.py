"""Published pipelines come out of the simulator and the planner."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from graphopt.passes.stage_bounds import routes_bound
from graphopt.passes.stage_search import search_routes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def published() -> ModuleType:
    path = ROOT / "benchmarks" / "published_pipeline.py"
    spec = importlib.util.spec_from_file_location("published_pipeline", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_skippipe_instance(published: ModuleType) -> None:
    rows = published.skippipe()
    assert [r["microbatches"] for r in rows] == [27, 30, 30, 30]
    assert [round(r["seconds"][0], 2) for r in rows] == [79.94, 48.92, 35.43, 33.31]
    assert max(abs(r["error"]) for r in rows) <= published.BAR_SKIPPIPE


def test_our_plan_of_the_instance_is_no_slower(published: ModuleType) -> None:
    data = published.read("skippipe")
    problem = published.skippipe_routing(data, 4, is_placed=False)
    found = search_routes(problem, 60_000, restarts=2)
    problem.check(found.paths, found.stage_devices)
    assert routes_bound(problem)[0] <= found.run.seconds <= 33.3
    assert len(found.paths) == 30 and max(found.run.peaks()[0]) <= 3


@pytest.mark.slow
def test_our_paths_on_the_published_places(published: ModuleType) -> None:
    problem = published.skippipe_routing(published.read("skippipe"), 4)
    found = search_routes(problem, 4_000_000, restarts=8)
    assert routes_bound(problem)[0] <= found.run.seconds <= 33.3


def test_iteration_times_and_live_microbatches(published: ModuleType) -> None:
    rows = published.vocabulary_times()
    assert max(abs(r["error"]) for r in rows) <= published.BAR_TIME
    live = {"baseline": 8, "redis": 8, "vocab-2": 9, "vocab-1": 10}
    assert all(r["live"] == live[r["method"]] for r in rows) and len(rows) == 7
    # The planner's own order takes no longer than the published one.
    assert all(r["planner_ms"] <= 1.001 * r["iteration_ms"][1] for r in rows if "planner_ms" in r)


def test_memory(published: ModuleType) -> None:
    rows = published.memory_rows()
    assert len(rows) == 24 and max(abs(r["error"]) for r in rows) <= published.BAR_MEMORY


def test_greedy_is_far_off(published: ModuleType) -> None:
    rows = published.greedy_times()
    assert max(r[rule] for r in rows for rule in published.RULES) >= 0.4
    assert min(r[rule] for r in rows for rule in published.RULES) > 0


def test_the_order_of_the_methods(published: ModuleType) -> None:
    rows = published.orderings(32, 8)
    assert len(rows) == 8 and not [r for r in rows if r["inversions"]]


@pytest.mark.slow
def test_the_order_of_the_methods_in_all_cells(published: ModuleType) -> None:
    rows = published.orderings()
    assert len(rows) == 48 and not [r for r in rows if r["inversions"]]
