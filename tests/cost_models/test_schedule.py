"""The simulated schedule equals a naive interpretation, on random dataflows and by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_flows import (
    FlowBuilder,
    naive_backward,
    naive_bytes,
    naive_forward,
    naive_step,
    schedules,
    training_flows,
)

from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.schedule import (
    Step,
    anchors,
    backward_steps,
    forward_steps,
    simulate,
)


def drawn(data: st.DataObject, flow: Dataflow) -> tuple[set[int], set[int]]:
    """Random kept and ephemeral values of the forward."""
    values = [v for i in flow.forward for v in flow.operators[i].writes]
    keep = data.draw(st.sets(st.sampled_from(values)), "keep")
    return keep, data.draw(st.sets(st.sampled_from(values)), "ephemeral") - keep


def forgetting(data: st.DataObject, flow: Dataflow, keep: set[int]) -> dict[int, set[int]]:
    """Random values for operators of the backward to forget."""
    values = [v for i in flow.forward for v in flow.operators[i].writes if v not in keep]
    given_up = st.sets(st.sampled_from(values)) if values else st.just(set[int]())
    return data.draw(st.dictionaries(st.sampled_from(anchors(flow)), given_up), "forget")


@settings(max_examples=300)
@given(schedules())
def test_any_order_with_repeats_takes_the_memory_of_its_instances(scheme: tuple) -> None:
    flow, steps, start, end, owned = scheme
    timeline = simulate(flow, steps, start, end, owned)
    plain = [(s.operator, s.makes) for s in steps]
    during, after, reused = naive_bytes(flow, plain, start, end, owned)
    assert list(timeline.during) == during
    assert list(timeline.after) == after
    assert list(timeline.reused) == reused
    assert timeline.peak_bytes == max(during)


@settings(max_examples=200)
@given(training_flows(operators=7), st.data())
def test_the_backward_recomputes_what_plain_recursion_does(flow: Dataflow, data: st.DataObject) -> None:
    keep, ephemeral = drawn(data, flow)
    forget = forgetting(data, flow, keep)
    steps = backward_steps(flow, keep, ephemeral, anchors(flow), forget)
    naive = naive_backward(flow, keep, ephemeral, None, forget.items())
    assert [(s.operator, s.makes) for s in steps] == naive
    live = set(keep)
    for s in steps:  # an order in which every value exists when it is read
        reads = flow.operators[s.operator].reads
        assert all(r in live or flow.values[r].producer < 0 for r in reads)
        live.update(flow.operators[s.operator].writes)


@settings(max_examples=200)
@given(training_flows(operators=7), st.data())
def test_the_forward_runs_what_outputs_and_kept_values_need(flow: Dataflow, data: st.DataObject) -> None:
    keep, _ = drawn(data, flow)
    steps = forward_steps(flow, keep)
    assert [(s.operator, s.makes) for s in steps] == naive_forward(flow, keep)


# --- by hand -----------------------------------------------------------------------------------


def sigmoids(count: int, nbytes: int = 100) -> Dataflow:
    """A chain whose backwards read each its own output; all of one size."""
    build = FlowBuilder()
    made = [build.static(nbytes)]
    for _ in range(count):
        made += build.operator([made[-1]], [nbytes])
    gradient: list[int] = []
    for value in reversed(made[1:]):
        reads = [*gradient, value]
        reusable = tuple(gradient)
        gradient = list(build.operator(reads, [nbytes], reusable=reusable, backward=True))
    return build.flow(made[-1:], gradient)


def peak(flow: Dataflow, keep: set[int], ephemeral: set[int]) -> int:
    steps = backward_steps(flow, keep, ephemeral, anchors(flow))
    return simulate(flow, steps, keep, flow.gradients).peak_bytes


def test_six_sigmoids_all_kept() -> None:
    flow = sigmoids(6)
    keep = set(range(1, 7))
    forward = simulate(flow, forward_steps(flow, keep), (), keep)
    assert forward.during == (100, 200, 300, 400, 500, 600)
    # The first gradient has no gradient to write over; the others have.
    backward = simulate(flow, backward_steps(flow, keep, (), anchors(flow)), keep, flow.gradients)
    assert backward.during == (700, 600, 500, 400, 300, 200)
    assert backward.reused == (None, 7, 8, 9, 10, 11)


def test_six_sigmoids_with_the_third_kept() -> None:
    flow = sigmoids(6)
    # 3 is alive, 4 5 6 are made again, then the gradient: 5 values; later 3 1 2 and the gradient.
    assert peak(flow, {3}, set()) == 500
    steps = backward_steps(flow, {3}, (), anchors(flow))
    assert [s.operator for s in steps] == [3, 4, 5, 6, 7, 8, 9, 0, 1, 10, 11]


def test_six_sigmoids_made_again_for_each_use() -> None:
    flow = sigmoids(6)
    # Each is made from the input up, and its predecessors are dropped on the way.
    steps = backward_steps(flow, set(), set(range(1, 7)), anchors(flow))
    assert [s.operator for s in steps][:7] == [0, 1, 2, 3, 4, 5, 6]
    assert len(steps) == 6 + (6 + 5 + 4 + 3 + 2 + 1)
    assert peak(flow, set(), set(range(1, 7))) == 300  # two of the chain beside the gradient


def test_a_result_made_again_for_its_sibling_is_freed_at_once() -> None:
    build = FlowBuilder()
    x = build.static(10)
    first, second = build.operator([x], [100, 1000])
    late = build.operator([first], [1], backward=True)
    last = build.operator([second, *late], [1], backward=True)
    flow = build.flow([first], last)
    steps = [Step(0, (first,)), Step(1, late)]
    timeline = simulate(flow, steps, (), late)
    assert timeline.during == (1100, 101)
    assert timeline.after == (100, 1)


def test_scratch_counts_while_the_kernel_runs() -> None:
    build = FlowBuilder()
    x = build.static(10)
    (y,) = build.operator([x], [100], workspace=7)
    (z,) = build.operator([y], [100], workspace=9, reusable=[y])
    flow = build.flow([z], [])
    timeline = simulate(flow, forward_steps(flow, ()), (), {z})
    assert timeline.during == (107, 109)
    assert timeline.reused == (None, y)


def test_what_is_not_owned_is_not_written_over() -> None:
    build = FlowBuilder()
    (y,) = build.operator([build.static(10)], [100])
    (z,) = build.operator([y], [100], reusable=[y])
    flow = build.flow([z], [])
    steps = [Step(1, (z,))]
    assert simulate(flow, steps, {y}, {z}).during == (200,)
    assert simulate(flow, steps, {y}, {z}, {y}).during == (100,)
    assert simulate(flow, steps, {y}, {y, z}, {y}).during == (200,)


def test_a_forward_that_cannot_be_repeated_always_runs() -> None:
    build = FlowBuilder()
    x = build.static(10)
    (dead,) = build.operator([x], [100])
    (stuck,) = build.operator([dead], [100], recomputable=False)
    (out,) = build.operator([x], [100])
    unused = build.operator([x], [100])
    flow = build.flow([out], [])
    assert [s.operator for s in forward_steps(flow, ())] == [0, 1, 2]
    assert unused and stuck
    assert naive_step(flow, (), ())[0] == 200


@pytest.mark.parametrize("count", [1, 4])
def test_the_empty_step(count: int) -> None:
    flow = sigmoids(count)
    assert simulate(flow, [], (), ()).peak_bytes == 0
