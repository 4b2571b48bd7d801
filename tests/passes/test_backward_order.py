"""The order of the backward: what it must respect, and that moving operators lowers the peak."""

import itertools
import random

import pytest
from drawn_plans import drawn_order
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import traced
from random_flows import training_flows

from graphopt import Checkpoint, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.fast_schedule import FastBackward, Profile
from graphopt.cost_models.memory import NO_PRODUCER, Dataflow, Operator, Value
from graphopt.cost_models.schedule import anchors, backward_steps
from graphopt.passes.backward_order import Precedence, check_order, completed, lower_order
from graphopt.passes.checkpoint_choice import everything, order_named, order_names

CPU = get_device("h100")


def profile(flow: Dataflow, order: tuple[int, ...]) -> Profile:
    """The backward in `order` with everything kept."""
    keep = everything(flow).keep
    return FastBackward(flow, (), (), flow.gradients, ()).run(keep, (), order)


def late(
    name: str, reads: tuple[int, ...], writes: tuple[int, ...], recomputable: bool = True
) -> Operator:
    return Operator(name, reads, writes, (), 1.0, 1, 0, True, True, recomputable, None)


def two_arms() -> Dataflow:
    """A gradient with two arms: a wide one that ends in a small gradient, and a narrow one.

    Autograd's order opens the wide arm first and leaves its middle alive while the other runs.
    """
    nbytes = [4, 100, 1, 100, 1]  # parameter, wide middle, its gradient, second middle, its gradient
    producers = [NO_PRODUCER, 0, 2, 1, 3]
    values = tuple(Value(b, p, f"v{i}") for i, (b, p) in enumerate(zip(nbytes, producers, strict=True)))
    operators = (
        late("wide", (0,), (1,)),
        late("other", (0,), (3,)),
        late("wide_end", (1,), (2,)),
        late("other_end", (3,), (4,)),
    )
    return Dataflow(operators, values, {}, frozenset(), (), (2, 4), 0)


def test_an_arm_is_finished_before_the_next_is_opened() -> None:
    flow = two_arms()
    order = (0, 1, 2, 3)
    assert profile(flow, order).peak_bytes == 201
    better = lower_order(order, Precedence.of(flow), lambda o: profile(flow, o))
    assert better in {(0, 2, 1, 3), (1, 3, 0, 2)}
    assert profile(flow, better).peak_bytes == 102


def test_an_operator_with_effects_keeps_its_place() -> None:
    flow = two_arms()
    first, _, *rest = flow.operators
    changed = (first, late("other", (0,), (3,), recomputable=False), *rest)
    flow = Dataflow(changed, flow.values, {}, frozenset(), (), (2, 4), 0)
    assert check_order(flow, (0, 2, 1, 3)) == "wide_end comes before other, which it needs"
    assert lower_order((0, 1, 2, 3), Precedence.of(flow), lambda o: profile(flow, o)) == (0, 1, 2, 3)


@settings(max_examples=60)
@given(training_flows(operators=6))
def test_the_order_found_is_valid_and_never_worse(flow: Dataflow) -> None:
    order = tuple(anchors(flow))
    found = lower_order(order, Precedence.of(flow), lambda o: profile(flow, o))
    assert check_order(flow, found) is None
    assert profile(flow, found).peak_bytes <= profile(flow, order).peak_bytes


@settings(max_examples=30)
@given(training_flows(operators=4))
def test_no_order_is_much_better_than_the_one_found(flow: Dataflow) -> None:
    """Against every order of the backward, where there are few operators."""
    order = tuple(anchors(flow))[:7]
    trials = [o for o in itertools.permutations(order) if len(order) == len(anchors(flow))]
    valid = [o for o in trials if check_order(flow, o) is None]
    found = lower_order(order, Precedence.of(flow), lambda o: profile(flow, o)) if valid else ()
    for trial in valid:
        assert profile(flow, found).peak_bytes <= 1.1 * profile(flow, trial).peak_bytes


@settings(max_examples=60)
@given(training_flows(operators=7), st.integers(0, 10**6))
def test_every_valid_order_runs_what_the_program_runs(flow: Dataflow, seed: int) -> None:
    order = drawn_order(flow, random.Random(seed))
    assert check_order(flow, order) is None
    made: set[int] = set()
    for step in backward_steps(flow, everything(flow).keep, (), order):
        reads = {
            v for v in flow.own_reads[step.operator] if flow.operators[flow.values[v].producer].backward
        }
        assert reads <= made
        made.update(step.makes)


def test_the_search_stops_when_no_time_is_left() -> None:
    flow, left = two_arms(), [3]

    def run(order: tuple[int, ...]) -> Profile | None:
        left[0] -= 1
        return profile(flow, order) if left[0] > 0 else None

    assert sorted(lower_order((0, 1, 2, 3), Precedence.of(flow), run)) == [0, 1, 2, 3]
    assert left[0] >= -1


def test_an_order_travels_by_name() -> None:
    flow = two_arms()
    assert order_names(flow, (0, 1, 2, 3)) == ()
    assert order_named(flow, ()) == (0, 1, 2, 3)
    assert order_named(flow, order_names(flow, (1, 3, 0, 2))) == (1, 3, 0, 2)


def test_a_plan_with_an_impossible_order_is_refused() -> None:
    program = traced("residual")[0]
    pass_ = Checkpoint(memory="min")
    plan = pass_.plan(program, Costs.of(program, CPU))
    flow = Costs.of(program, CPU).dataflow(program)
    names = tuple(flow.operators[a].name for a in anchors(flow))
    with pytest.raises(PlanError, match="which it needs"):
        pass_.apply(program, type(plan)(**(vars(plan) | {"order": names[::-1]})))
    with pytest.raises(PlanError, match="names what is no operator"):
        pass_.apply(program, type(plan)(**(vars(plan) | {"order": ("nothing", *names[1:])})))


@settings(max_examples=40)
@given(training_flows(operators=6), st.integers(0, 10**6))
def test_what_an_order_leaves_out_runs_where_it_is_needed(flow: Dataflow, seed: int) -> None:
    draw = random.Random(seed)
    order = drawn_order(flow, draw)
    part = tuple(a for a in order if draw.random() < 0.6)
    whole = completed(flow, part)
    assert sorted(whole) == sorted(anchors(flow)) and check_order(flow, whole) is None
    assert completed(flow, order) == order
