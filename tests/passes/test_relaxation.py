"""Choices with less recomputation at the same peak: they fit, are no slower, and leave nothing free."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arguments, run_joint, run_split, traced
from random_flows import naive_step, training_flows

from graphopt import Checkpoint, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint_choice import check_choice, choose, everything, pruned, step_of
from graphopt.passes.relaxation import relaxed

CPU = get_device("cpu-generic")


@settings(max_examples=60)
@given(training_flows(operators=8), st.floats(0.0, 1.0))
def test_it_fits_is_no_slower_and_keeps_what_is_free(flow: Dataflow, share: float) -> None:
    before = choose(flow, True, None)
    low, high = step_of(flow, before).peak_bytes, step_of(flow, everything(flow)).peak_bytes
    limit = low + int(share * max(0, high - low))
    after = relaxed(flow, before, limit)
    check_choice(flow, after.keep)
    peak, seconds = naive_step(flow, after.keep, after.ephemeral, after.order, after.forget)
    assert peak <= limit
    assert seconds <= step_of(flow, before).recompute_seconds + 1e-9
    for value, facts in enumerate(flow.values):
        made_early = facts.producer != NO_PRODUCER and not flow.operators[facts.producer].backward
        if made_early and value not in after.keep:
            more = kept_too(flow, after, value)
            peak, faster = naive_step(flow, more.keep, more.ephemeral, more.order, more.forget)
            assert peak > limit or faster >= seconds - 1e-9


def kept_too(flow: Dataflow, choice: Choice, value: int) -> Choice:
    keep, ephemeral = choice.keep | {value}, choice.ephemeral - {value}
    return pruned(flow, replace(choice, keep=keep, ephemeral=ephemeral))


def test_a_nested_choice_stays() -> None:
    flow = Costs.of(traced("residual")[0], CPU).dataflow(traced("residual")[0])
    nested = replace(choose(flow, True, None), forget=((0, (1,)),))
    assert relaxed(flow, nested, 1 << 60) is nested


def test_the_least_peak_of_a_u_net_costs_less() -> None:
    program, model, inputs = traced("u-net")
    costs = Costs.of(program, CPU)
    flow = costs.dataflow(program)
    before = step_of(flow, choose(flow, True, None))
    plan = Checkpoint(memory="min").plan(program, costs)
    assert plan.peak_bytes - flow.static_bytes <= before.peak_bytes
    assert plan.recompute_seconds < before.recompute_seconds
    values = arguments(program, model, inputs)
    for ours, plain in zip(
        run_split(Checkpoint().apply(program, plan), values), run_joint(program, values), strict=True
    ):
        assert (ours is None and plain is None) or torch.equal(ours, plain)


@settings(max_examples=60)
@given(training_flows(operators=5), st.floats(0.0, 1.0))
def test_no_labels_of_a_small_graph_recompute_less(flow: Dataflow, share: float) -> None:
    before = choose(flow, True, None)
    low, high = step_of(flow, before).peak_bytes, step_of(flow, everything(flow)).peak_bytes
    limit = low + int(share * max(0, high - low))
    found = step_of(flow, relaxed(flow, before, limit)).recompute_seconds
    assert found <= least_seconds(flow, before, limit) * (1 + 1e-9) + 1e-12


def least_seconds(flow: Dataflow, choice: Choice, limit: int) -> float:
    """Of all labels with the order of `choice`, by trying each."""
    made = [v for i in flow.forward for v in flow.operators[i].writes]
    free = [v for v in made if flow.operators[flow.values[v].producer].recomputable]
    stuck = choice.keep - set(free)
    best = step_of(flow, choice).recompute_seconds
    for labels in product(["kept", "once", "each"], repeat=len(free)):
        keep = stuck | {v for v, label in zip(free, labels, strict=True) if label == "kept"}
        each = frozenset(v for v, label in zip(free, labels, strict=True) if label == "each")
        step = step_of(flow, pruned(flow, replace(choice, keep=frozenset(keep), ephemeral=each)))
        if step.peak_bytes <= limit:
            best = min(best, step.recompute_seconds)
    return best


@pytest.mark.parametrize("name", ["residual", "u-net"])
def test_the_peak_of_the_least_plan_is_a_budget_that_can_be_met(name: str) -> None:
    program = traced(name)[0]
    costs = Costs.of(program, CPU)
    least = Checkpoint(memory="min").plan(program, costs)
    assert Checkpoint(memory=least.peak_bytes).plan(program, costs).peak_bytes <= least.peak_bytes
    with pytest.raises(PlanError) as error:
        Checkpoint(memory=least.peak_bytes // 2).plan(program, costs)
    assert (error.value.reachable_bytes or 0) <= least.peak_bytes
