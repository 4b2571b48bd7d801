"""The front of memory against time: what is reached at some budgets, and nothing that another beats."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from graphopt import Checkpoint
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU
from graphopt.graph_report import Side
from graphopt.passes.checkpoint import CheckpointPlan
from graphopt.passes.checkpoint_front import front, undominated
from graphopt.passes.pipeline import PassStep
from graphopt.program import Program
from graphopt.runtime import GraphRecord
from graphopt.tracing import trace


def net() -> nn.Sequential:
    blocks = (nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(4))
    return nn.Sequential(*blocks)


@pytest.fixture(scope="module")
def program() -> Program:
    return trace(net(), torch.zeros(128, 16))


@pytest.fixture(scope="module")
def plans(program: Program) -> tuple[CheckpointPlan, ...]:
    return front(Checkpoint(), program, Costs.of(program, GENERIC_CPU), 5)


def test_it_falls_from_the_least_peak_to_the_plain_one(plans: tuple[CheckpointPlan, ...]) -> None:
    assert 3 <= len(plans) <= 5
    peaks, seconds = [p.peak_bytes for p in plans], [p.recompute_seconds for p in plans]
    assert peaks == sorted(set(peaks)) and seconds == sorted(set(seconds), reverse=True)
    assert peaks[-1] == plans[0].baseline_bytes and seconds[-1] == 0


def test_each_plan_keeps_what_it_promises_when_it_is_applied(
    program: Program, plans: tuple[CheckpointPlan, ...]
) -> None:
    costs = Costs.of(program, GENERIC_CPU)
    for plan in plans:
        step = PassStep(Checkpoint(), plan, 0.0)
        after = Side.after(GraphRecord(program, Checkpoint().apply(program, plan), (step,), costs, 0.0))
        assert after.timeline.peak_bytes == plan.peak_bytes <= (plan.budget_bytes or plan.peak_bytes)
        again = sum(o.seconds for o in after.flow.operators if o.name in after.again)
        assert again == pytest.approx(plan.recompute_seconds)


def test_its_ends_are_the_plans_of_the_pass(program: Program, plans: tuple[CheckpointPlan, ...]) -> None:
    costs = Costs.of(program, GENERIC_CPU)
    assert plans[0].peak_bytes == Checkpoint("min").plan(program, costs).peak_bytes
    middle = plans[len(plans) // 2]
    own = Checkpoint(middle.budget_bytes).plan(program, costs)
    assert (own.keep, own.peak_bytes) == (middle.keep, middle.peak_bytes)


def test_what_counts_is_what_the_pass_says(program: Program) -> None:
    costs = Costs.of(program, GENERIC_CPU)
    without = front(Checkpoint(activations="min"), program, costs, 3)
    assert without[-1].peak_bytes == Checkpoint(activations="min").plan(program, costs).baseline_bytes
    assert without[-1].peak_bytes < front(Checkpoint(), program, costs, 1)[0].peak_bytes


def test_there_is_none_of_a_forward() -> None:
    forward = trace(net(), torch.zeros(4, 16), training=False)
    assert front(Checkpoint(), forward, Costs.of(forward, GENERIC_CPU)) == ()


def test_plans_that_another_one_beats_are_left_out(plans: tuple[CheckpointPlan, ...]) -> None:
    first = plans[0]
    worse = replace(first, recompute_seconds=2 * first.recompute_seconds)
    larger = replace(first, peak_bytes=first.peak_bytes + 1)
    assert undominated([worse, larger, first, *plans]) == plans
