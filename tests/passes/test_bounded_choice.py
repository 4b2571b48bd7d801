"""Plans with a lower bound beside them: the bound holds, and the plan is no slower for it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arguments, run_joint, run_split, traced
from random_flows import blocks, naive_step, training_flows

from graphopt import Checkpoint
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.memory import Dataflow
from graphopt.errors import PlanError
from graphopt.passes.bounded_choice import bounded
from graphopt.passes.checkpoint_choice import check_choice, choose, everything, step_of

CPU = get_device("cpu-generic")
SECONDS = 20.0


@settings(max_examples=30)
@given(training_flows(operators=8), st.floats(0.3, 1.0))
def test_the_choice_fits_and_is_between_the_bound_and_the_search(flow: Dataflow, share: float) -> None:
    plain = flow.static_bytes + step_of(flow, everything(flow)).peak_bytes
    budget = int(share * plain)
    try:
        found = choose(flow, False, budget)
    except PlanError:
        return
    choice, bound = bounded(flow, found, budget, SECONDS)
    check_choice(flow, choice.keep)
    peak, seconds = naive_step(flow, choice.keep, choice.ephemeral, choice.order)
    assert flow.static_bytes + peak <= budget
    assert bound.seconds - 1e-9 <= seconds <= step_of(flow, found).recompute_seconds + 1e-9


def test_it_is_faster_where_the_solution_is() -> None:
    flow = blocks(4)
    budget = flow.static_bytes + 2100
    slow = choose(flow, True, None)
    choice, bound = bounded(flow, slow, budget, SECONDS)
    seconds, before = (step_of(flow, c).recompute_seconds for c in (choice, slow))
    assert bound.seconds <= seconds <= before


def test_without_a_budget_the_bound_is_for_the_peak_of_the_choice() -> None:
    flow = blocks(3)
    least = choose(flow, True, None)
    choice, bound = bounded(flow, least, None, SECONDS)
    assert step_of(flow, choice).peak_bytes <= step_of(flow, least).peak_bytes
    assert 0 < bound.seconds <= step_of(flow, choice).recompute_seconds


@pytest.mark.parametrize("name", ["residual", "u-net"])
def test_the_plan_prints_the_bound_and_keeps_the_gradients(name: str) -> None:
    program, model, inputs = traced(name)
    pass_ = Checkpoint(memory="min", solver="ilp", time_limit_s=SECONDS)
    plan = pass_.plan(program, Costs.of(program, CPU))
    assert plan.least_recompute_seconds is not None
    assert plan.least_recompute_seconds <= plan.recompute_seconds
    assert str(plan).endswith("by any plan")
    given_ = arguments(program, model, inputs)
    planned = run_split(pass_.apply(program, plan), given_)
    for mine, theirs in zip(planned, run_joint(program, given_), strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def test_the_bound_is_not_printed_where_nobody_asked() -> None:
    program, _, _ = traced("residual")
    assert "any plan" not in str(Checkpoint(memory="min").plan(program, Costs.of(program, CPU)))
