"""The passes of the vocabulary run in the bubbles, with as many microbatches in flight as published."""

import pytest

from graphopt.cost_models.stage_costs import StageCost
from graphopt.cost_models.stage_run import run_greedy
from graphopt.errors import PlanError
from graphopt.passes.stage_orders import v_half_slots
from graphopt.passes.stage_schedule import plan_pipeline
from graphopt.passes.stage_vocab import (
    ALGORITHMS,
    VocabularyCost,
    barriers,
    vocabulary_run,
    vocabulary_step,
)

SPLIT = VocabularyCost(0.3, 0.5, 0.2, embedding_s=0.1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("scale", [0.2, 1.0, 3.0])
def test_each_barrier_costs_one_microbatch(algorithm: str, p: int, scale: float) -> None:
    split = VocabularyCost(0.3 * scale, 0.5 * scale, 0.2 * scale)
    run = vocabulary_run("1f1b", algorithm, [StageCost(1.0, 1.0, 1.0)] * p, split, 8 * p)
    assert max(run.peaks()[0]) == p + barriers(algorithm)
    used = 3 + sum(split.seconds(kind) for kind in ALGORITHMS[algorithm][0])
    # Every device is busy from the start to the end but for as much as 1F1B fills and drains in.
    assert run.seconds <= used * 8 * p + 3 * (p - 1) + barriers(algorithm) * used


@pytest.mark.parametrize("algorithm", ["vocab-1", "vocab-2"])
@pytest.mark.parametrize("p", [4, 8])
def test_v_half_holds_one_microbatch_more_for_each_barrier(algorithm: str, p: int) -> None:
    costs = [StageCost(1.0, 1.0, 1.0).part(2)] * (2 * p)
    run = vocabulary_run("v-half", algorithm, costs, VocabularyCost(0.2, 0.4), 6 * p)
    assert set(run.peaks()[0]) == {p / 2 + 1 + barriers(algorithm)}
    assert run.seconds <= 3.6 * 6 * p + 4 * p


def test_the_backward_waits_for_what_it_reads() -> None:
    run = vocabulary_run("1f1b", "vocab-1", [StageCost(1.0, 1.0, 1.0)] * 4, SPLIT, 12)
    number = run.step.number
    for j in range(12):
        logits = [run.begin[number[f"{d}S{j}"]] for d in range(4)]
        gradients = [number[f"{d}T{j}"] for d in range(4)]
        assert min(logits) >= run.end[number[f"3F{j}"]]
        assert min(run.begin[gradients]) >= max(run.end[[number[f"{d}S{j}"] for d in range(4)]])
        assert run.begin[number[f"3B{j}"]] >= max(run.end[gradients])


def test_with_one_barrier_the_weights_are_later_than_the_backward() -> None:
    run = vocabulary_run("1f1b", "vocab-2", [StageCost(1.0, 1.0, 1.0)] * 4, SPLIT, 12)
    number = run.step.number
    late = [run.begin[number[f"0T{j}"]] > run.begin[number[f"3B{j}"]] for j in range(2, 10)]
    assert all(late)


def test_a_static_order_is_better_than_what_comes_first() -> None:
    costs = [StageCost(11.24, 11.16, 11.17)] * 8
    split = VocabularyCost(0.47, 0.93, embedding_s=0.84)
    step = vocabulary_step("1f1b", "vocab-1", costs, split, 32)
    static = vocabulary_run("1f1b", "vocab-1", costs, split, 32).seconds
    last = [1e3 if task.name.lstrip("0123456789")[0] in "ST" else 0.0 for task in step.tasks]
    assert run_greedy(step, 10).seconds > 1.03 * static
    assert run_greedy(step, 10, last).seconds > 1.2 * static


def test_slots_of_v_half() -> None:
    for p in (2, 3, 4, 5, 8):
        for device, slots in enumerate(v_half_slots(p)):
            assert len({slot % 6 for slot in slots.values()}) == 6
            if p % 2 == 0:  # the published ones, I0 = 3
                assert slots[device, "F"] == 2 * device
                assert slots[2 * p - 1 - device, "F"] == 3 * p - device - 2
                assert slots[2 * p - 1 - device, "I"] == 3 * p + 3 + 2 * device - 1
                assert slots[device, "I"] == 6 * p + 3 - device - 2


def test_rejections() -> None:
    with pytest.raises(PlanError, match="none of vocab-naive"):
        barriers("vocab-3")
    with pytest.raises(PlanError, match="1f1b and v-half"):
        plan_pipeline([StageCost(1.0, 1.0, 1.0)] * 4, 8, schedule="gpipe", vocabulary=SPLIT)
