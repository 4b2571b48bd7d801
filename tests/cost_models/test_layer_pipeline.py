"""Streamed layers in the cost model, against a simulation that shares no code with it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipelines import layer_costs, slow_seconds

from graphopt.cost_models.layer_pipeline import STEPS, LayerCosts, pipeline_graph, simulated
from graphopt.cost_models.overlap_run import run_order


@st.composite
def choices(draw: st.DrawFn) -> tuple[LayerCosts, frozenset[int], int]:
    costs = draw(layer_costs())
    blocks = range(len(costs.block_bytes))
    loaded = draw(st.lists(st.sampled_from(blocks), unique=True, min_size=1))
    return costs, frozenset(blocks) - set(loaded), draw(st.integers(1, len(loaded)))


@given(choices())
def test_seconds_of_steps_in_a_row(choice: tuple[LayerCosts, frozenset[int], int]) -> None:
    costs, resident, slots = choice
    expected = slow_seconds(costs, resident, slots, STEPS)
    assert simulated(costs, resident, slots).seconds == pytest.approx(float(expected), abs=1e-9)


@given(choices())
def test_the_peak_is_that_of_the_tasks(choice: tuple[LayerCosts, frozenset[int], int]) -> None:
    costs, resident, slots = choice
    graph = pipeline_graph(costs, resident, slots)
    assert run_order(graph, range(len(graph.tasks))).peak_bytes == costs.peak_bytes(resident, slots)


@given(choices())
def test_nothing_is_faster_than_the_bound(choice: tuple[LayerCosts, frozenset[int], int]) -> None:
    costs, resident, slots = choice
    memory = costs.peak_bytes(resident, slots)
    long = slow_seconds(costs, resident, slots, 24)
    assert float(long) >= costs.bound_seconds(memory, slots) - 1e-9
    assert costs.bound_seconds(memory) <= costs.bound_seconds(memory, slots)


@given(choices())
def test_exposed_seconds_are_what_the_step_loses(
    choice: tuple[LayerCosts, frozenset[int], int],
) -> None:
    pipeline = simulated(*choice)
    exposed = pipeline.exposed()
    lost = pipeline.seconds - pipeline.costs.step_seconds
    assert sum(seconds for seconds, _ in exposed) == pytest.approx(lost, abs=1e-9)
    assert all((reason == "") == (seconds < 1e-11) for seconds, reason in exposed)


def test_reasons() -> None:
    slow = LayerCosts((1.0,) * 4, 0.0, (3.0,) * 4, (8,) * 4, 0, 0)
    assert {reason for _, reason in simulated(slow, frozenset(), 3).exposed()} == {"channel busy"}
    assert {reason for _, reason in simulated(slow, frozenset(), 1).exposed()} == {"memory"}
    assert simulated(slow, frozenset(range(4)), 0).exposed() == ()


def test_bound_of_memory_that_holds_nothing() -> None:
    costs = LayerCosts((1.0,) * 2, 0.0, (3.0,) * 2, (8,) * 2, 5, 4)
    assert costs.bound_seconds(16) == float("inf")
    assert costs.bound_seconds(17) == 8.0
    assert costs.bound_seconds(25) == 2.0
