"""Resident blocks and slots, against all that there are."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipelines import layer_costs, slow_seconds

from graphopt import PlanError
from graphopt.cost_models.layer_pipeline import STEPS, LayerCosts
from graphopt.passes.pipeline_choice import choose_pipeline


def brute_force(costs: LayerCosts, memory_bytes: int) -> float:
    """The least seconds of every set of resident blocks with every number of slots that fits."""
    blocks, found = range(len(costs.block_bytes)), float("inf")
    for size in range(len(blocks) + 1):
        for kept in itertools.combinations(blocks, size):
            loaded = [costs.block_bytes[i] for i in blocks if i not in kept]
            held = costs.fixed_bytes + costs.step_bytes + sum(costs.block_bytes[i] for i in kept)
            for slots in range(1 if loaded else 0, len(loaded) + 1):
                if held + slots * max(loaded, default=0) <= memory_bytes:
                    found = min(found, float(slow_seconds(costs, frozenset(kept), slots, STEPS)))
    return found


def memory_for(costs: LayerCosts, share: float) -> int:
    """Between the least that works and all in memory."""
    whole = costs.peak_bytes(frozenset(range(len(costs.block_bytes))), 0)
    least = costs.peak_bytes(frozenset(), 1)
    return least + int(share * max(0, whole - least))


@given(layer_costs(equal=True), st.floats(0, 1))
def test_equal_blocks_take_the_least_time(costs: LayerCosts, share: float) -> None:
    memory = memory_for(costs, share)
    found = choose_pipeline(costs, memory)
    assert found.pipeline.run.peak_bytes <= memory
    assert found.pipeline.seconds == pytest.approx(brute_force(costs, memory), rel=1e-5)


@given(layer_costs(equal=False), st.floats(0, 1))
def test_unequal_blocks_take_little_more(costs: LayerCosts, share: float) -> None:
    """A set that no exchange of two blocks improves may not be the best: within a tenth."""
    memory = memory_for(costs, share)
    found = choose_pipeline(costs, memory)
    assert found.pipeline.run.peak_bytes <= memory
    assert found.pipeline.seconds <= 1.1 * brute_force(costs, memory) + 1e-9


def test_the_same_twice() -> None:
    costs = LayerCosts((1.0, 2.0) * 6, 0.5, (2.0,) * 12, (7,) * 12, 3, 4)
    first, second = (choose_pipeline(costs, 50) for _ in range(2))
    assert (first.pipeline.resident, first.pipeline.slots) == (
        second.pipeline.resident,
        second.pipeline.slots,
    )


def test_all_resident_where_that_fits() -> None:
    costs = LayerCosts((1.0,) * 3, 0.5, (2.0,) * 3, (7,) * 3, 3, 4)
    pipeline = choose_pipeline(costs, 28).pipeline
    assert (pipeline.resident, pipeline.slots, pipeline.seconds) == (frozenset(range(3)), 0, 3.5)


def test_too_little_memory() -> None:
    costs = LayerCosts((1.0,) * 3, 0.5, (2.0,) * 3, (7,) * 3, 3, 4)
    with pytest.raises(PlanError, match=r"one block in memory at a time the peak is 14 B") as error:
        choose_pipeline(costs, 13)
    assert error.value.reachable_bytes == 14
    assert choose_pipeline(costs, 14).pipeline.slots == 1
