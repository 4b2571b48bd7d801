"""The published chain solvers on real graphs: what they keep, and that it trains."""

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from programs import arguments, run_joint, run_split, traced
from random_flows import blocks, naive_step, training_flows

from graphopt import Checkpoint, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.memory import Dataflow
from graphopt.passes.checkpoint_choice import check_choice, everything, pruned, step_of
from graphopt.passes.subset_choice import SOLVERS, subset_choice

CPU = get_device("cpu-generic")


@settings(max_examples=40)
@drawn(training_flows(operators=8))
def test_every_solver_keeps_enough(flow: Dataflow) -> None:
    for solver in SOLVERS:
        choice = pruned(flow, subset_choice(flow, solver))
        check_choice(flow, choice.keep)
        peak, seconds = naive_step(flow, choice.keep, choice.ephemeral, choice.order)
        assert step_of(flow, choice).peak_bytes == peak
        assert step_of(flow, choice).recompute_seconds == pytest.approx(seconds)


def test_on_equal_blocks_the_revised_objective_beats_equal_segments() -> None:
    flow = blocks(36)
    peaks = {s: step_of(flow, pruned(flow, subset_choice(flow, s))).peak_bytes for s in SOLVERS}
    assert peaks["linear"] <= min(peaks.values())
    assert peaks["sqrt"] < step_of(flow, everything(flow)).peak_bytes / 2


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["residual", "u-net"])
def test_the_gradients_are_those_of_the_program(solver: str, name: str) -> None:
    program, model, inputs = traced(name)
    pass_ = Checkpoint(memory="min", solver=solver)
    planned = pass_.apply(program, pass_.plan(program, Costs.of(program, CPU)))
    given = arguments(program, model, inputs)
    for mine, theirs in zip(run_split(planned, given), run_joint(program, given), strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)


def test_a_budget_below_what_the_solver_finds_is_refused() -> None:
    program = traced("residual")[0]
    costs = Costs.of(program, CPU)
    least = Checkpoint(memory="min", solver="sqrt").plan(program, costs)
    assert Checkpoint(memory=least.peak_bytes, solver="sqrt").plan(program, costs).keep == least.keep
    with pytest.raises(PlanError, match="no plan keeps the step within") as caught:
        Checkpoint(memory=least.peak_bytes - 1, solver="sqrt").plan(program, costs)
    assert caught.value.reachable_bytes == least.peak_bytes


def test_an_unknown_solver_is_refused_by_name() -> None:
    with pytest.raises(PlanError, match="solver='best' is not a solver; there are graph, chain, ilp, dp"):
        Checkpoint(solver="best")
