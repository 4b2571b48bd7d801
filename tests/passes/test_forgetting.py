"""What may be forgotten: named, refused by name, and only where it changes something."""

from dataclasses import replace

import pytest
from drawn_plans import Drawn, forward_values, plan_of, stuck
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arguments, run_joint, traced
from random_flows import naive_backward, training_flows

from graphopt import Checkpoint, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.memory import Dataflow, dataflow
from graphopt.cost_models.schedule import anchors, backward_steps
from graphopt.passes.checkpoint import CheckpointPlan
from graphopt.passes.forgetting import forgotten


@settings(max_examples=100)
@given(training_flows(operators=7), st.data())
def test_what_is_left_out_changes_nothing(flow: Dataflow, data: st.DataObject) -> None:
    values = forward_values(flow)
    keep = data.draw(st.sets(st.sampled_from(values)), "keep")
    again = sorted(set(values) - stuck(flow))
    given_up = st.sets(st.sampled_from(again)).map(frozenset) if again else st.just(frozenset[int]())
    wish = data.draw(st.dictionaries(st.sampled_from(anchors(flow)), given_up), "wish")
    steps = backward_steps(flow, keep, (), anchors(flow), wish)
    useful = forgotten(steps, wish, keep)
    naive = naive_backward(flow, keep, (), None, useful)
    assert naive == [(s.operator, s.makes) for s in steps]
    for index, (operator, mine) in enumerate(useful):  # and nothing that is left in is idle
        assert mine and set(mine) <= wish[operator]
        for value in mine:
            less = [(o, tuple(v for v in vs if v != value)) for o, vs in useful[index : index + 1]]
            without = (*useful[:index], *less, *useful[index + 1 :])
            assert naive_backward(flow, keep, (), None, without) != naive


def test_a_plan_that_forgets_survives_json_and_drawing() -> None:
    program, model, inputs = traced("residual")
    pass_ = Drawn(seed=1, keep=0.2, ephemeral=0.2, forget=0.4)
    plan = pass_.plan(program, Costs.of(program, get_device("cpu-generic")))
    assert plan.forget
    again = CheckpointPlan.from_json(plan.to_json())
    assert again == plan
    given_ = arguments(program, model, inputs)
    for mine, theirs in zip(
        run_joint(pass_.apply(program, again), given_), run_joint(program, given_), strict=True
    ):
        assert mine is theirs is None or mine.equal(theirs)


def test_a_plan_stored_before_forgetting_was_possible_is_read() -> None:
    program = traced("residual")[0]
    plan = plan_of(dataflow(program), set(), set())
    text = plan.to_json().replace(',\n "forget": []', "")
    assert "forget" not in text
    assert CheckpointPlan.from_json(text) == plan


def edited(name: str, values: tuple[str, ...]) -> CheckpointPlan:
    """A plan of the residual model that forgets `values` after the operator `name`."""
    flow = dataflow(traced("residual")[0])
    kept = {v for v in forward_values(flow) if flow.values[v].label.startswith("tanh")} | stuck(flow)
    return replace(plan_of(flow, kept, set()), forget=((name, values),))


def test_what_cannot_be_forgotten_is_refused_by_name() -> None:
    program = traced("residual")[0]
    flow = dataflow(program)
    first, last = (flow.operators[a].name for a in (anchors(flow)[0], anchors(flow)[-1]))
    gradient = flow.values[flow.operators[anchors(flow)[0]].writes[0]].label
    parameter = next(v.label for v in flow.values if v.producer < 0)
    Checkpoint().apply(program, edited(first, ("addmm_1",)))
    for name, value, fault in (
        (last, gradient, "is made only once and cannot be forgotten"),
        (first, parameter, "is there all through the step and cannot be forgotten"),
        (first, "nothing", "made for another program: it forgets 'nothing'"),
        ("addmm", "addmm_1", "forgets after 'addmm', which the backward does not run once"),
    ):
        with pytest.raises(PlanError, match=fault):
            Checkpoint().apply(program, edited(name, (value,)))
