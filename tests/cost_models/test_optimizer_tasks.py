"""Steps of an optimizer as task graphs, against sums by hand."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cost_models.link_costs import Line
from graphopt.cost_models.optimizer_tasks import (
    KINDS,
    PLACES,
    Subgroup,
    UpdateCosts,
    balanced,
    spread,
    update_tasks,
)
from graphopt.cost_models.overlap_bound import bound
from graphopt.cost_models.overlap_run import run_order
from graphopt.cost_models.task_graph import COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE

LINES = st.builds(Line, st.integers(0, 3).map(float), st.integers(0, 5).map(lambda n: n / 4))
COSTS = st.builds(UpdateCosts, LINES, LINES, LINES, LINES, LINES)
SUBGROUPS = st.lists(
    st.integers(1, 9).map(lambda n: Subgroup(n, 4 * n, 8 * n, 4 * n)), min_size=1, max_size=7
)


@given(st.data(), COSTS, SUBGROUPS)
def test_tasks_one_after_the_other(data: Any, costs: UpdateCosts, subgroups: list[Subgroup]) -> None:
    places = data.draw(st.tuples(*[st.sampled_from(PLACES) for _ in subgroups]))
    graph, steps = update_tasks(subgroups, places, costs, base_bytes=3)
    assert steps == tuple((kind, i) for i, place in enumerate(places) for kind in KINDS[place])
    run = run_order(graph, range(len(graph.tasks)))
    lanes = costs.lane_seconds(subgroups, places)
    assert sum(lanes.values()) == pytest.approx(sum(t.seconds for t in graph.tasks))
    assert max(lanes.values()) <= bound(graph).seconds + 1e-9 <= run.seconds + 2e-9
    assert run.seconds <= sum(lanes.values()) + 1e-9
    visits = [s.state_bytes for s, p in zip(subgroups, places, strict=True) if p == "device"]
    results = [s.parameter_bytes for s, p in zip(subgroups, places, strict=True) if p == "host"]
    assert run.peak_bytes == 3 + max([0, *visits, *results])


def test_lanes_by_hand() -> None:
    costs = UpdateCosts(Line(1, 2), Line(0, 5), Line(0, 1), Line(0, 0.5), Line(3, 0.25))
    subgroups = [Subgroup(10, 40, 80, 40), Subgroup(20, 80, 160, 160), Subgroup(30, 120, 240, 120)]
    assert costs.lane_seconds(subgroups, ("resident", "host", "device")) == {
        COMPUTE: (1 + 20) + 20 + (1 + 60),
        "host": 100,
        HOST_TO_DEVICE: 0.5 * 80 + 0.5 * 240,
        DEVICE_TO_HOST: (3 + 0.25 * 160) + (3 + 0.25 * 240),
    }


@given(COSTS, st.integers(1, 12), st.data())
def test_shares_balance_the_channels(costs: UpdateCosts, count: int, data: Any) -> None:
    resident = data.draw(st.integers(0, count - 1))
    subgroups = [Subgroup(4, 16, 32, 16)] * count
    found = balanced(subgroups, costs, resident)
    slowest = [
        max(costs.lane_seconds(subgroups, spread(resident, hosted, count)).values())
        for hosted in range(count - resident + 1)
    ]
    assert slowest[found] == min(slowest)
    places = spread(resident, found, count)
    assert (places.count("resident"), places.count("host")) == (resident, found)
    gaps = [i for i, place in enumerate(places[resident:]) if place == "host"]
    steps = [b - a for a, b in itertools.pairwise(gaps)]
    assert not steps or max(steps) - min(steps) <= 1
