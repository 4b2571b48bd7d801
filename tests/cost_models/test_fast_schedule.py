"""The compiled backward is the plain one, on random dataflows, labels, orders and borders."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_flows import FlowBuilder, blocks, training_flows

from graphopt.cost_models.fast_schedule import FastBackward
from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.schedule import anchors, backward_steps, forward_steps, simulate


def assert_same(
    flow: Dataflow,
    held: set[int],
    ephemeral: set[int],
    order: list[int],
    fixed: set[int],
    must: set[int],
    end: set[int],
    owned: set[int],
) -> None:
    steps = backward_steps(flow, held | fixed, ephemeral, order)
    operators = [flow.operators[s.operator] for s in steps]
    kept = held & ({v for o in operators for v in o.reads} | must)
    timeline = simulate(flow, steps, kept | fixed, end, owned)
    profile = FastBackward(flow, fixed, must, end, owned).run(held, ephemeral, order)
    assert profile.operators.tolist() == [s.operator for s in steps]
    assert tuple(profile.during.tolist()) == timeline.during
    assert profile.peak_bytes == timeline.peak_bytes
    assert profile.kept == kept
    assert profile.kept_bytes == sum(flow.values[v].nbytes for v in kept)
    assert profile.start_bytes == sum(flow.values[v].nbytes for v in kept | fixed)
    again = [o for o in operators if not o.anchored]
    first = {o.name: o.seconds for o in again if o.backward}
    assert profile.seconds == pytest.approx(sum(o.seconds for o in again) - sum(first.values()))
    assert profile.flops == sum(o.flops for o in again if not o.backward)


@settings(max_examples=400)
@given(training_flows(operators=8), st.data())
def test_it_is_the_plain_backward(flow: Dataflow, data: st.DataObject) -> None:
    forward = [v for i in flow.forward for v in flow.operators[i].writes]
    every = list(range(len(flow.values)))
    subset = st.sets(st.sampled_from(forward))
    held = data.draw(subset, "held")
    fixed = data.draw(st.sets(st.sampled_from(every), max_size=3), "fixed") - held
    assert_same(
        flow,
        held,
        data.draw(subset, "ephemeral") - held,
        data.draw(st.permutations(anchors(flow)), "order") if data.draw(st.booleans()) else anchors(flow),
        fixed,
        data.draw(subset, "must") & held,
        {*flow.gradients, *data.draw(st.sets(st.sampled_from(every), max_size=3), "end")},
        data.draw(st.sets(st.sampled_from(sorted(fixed)))) if fixed else set(),
    )


def test_results_made_a_second_time_and_operands_written_over() -> None:
    build = FlowBuilder()
    (a,) = build.operator([build.static(10)], [100], flops=3)
    b, c = build.operator([a], [200, 50], workspace=30, flops=5)
    (d,) = build.operator([b], [200], reusable=[b], flops=7)
    (grad,) = build.operator([d, c], [200], backward=True)
    (late,) = build.operator([a], [80], backward=True, anchored=False, seconds=2.0)
    last = build.operator([grad, b, late], [200], backward=True, reusable=[grad])
    again = build.operator([*last, late], [10], backward=True)
    flow = build.flow([d], again)
    for held in ({a, b, c, d}, {c}, {b}, set()):
        for ephemeral in (set(), {b, late}, {a, b, c, d, late}):
            assert_same(flow, held, ephemeral - held, anchors(flow), set(), set(), {*again}, set())


def test_many_recomputations_and_none() -> None:
    flow = blocks(12)
    values = {v for i in flow.forward for v in flow.operators[i].writes}
    assert_same(flow, set(), values, anchors(flow), set(), set(), set(flow.gradients), set())
    assert_same(flow, values, set(), [], set(), set(), set(), set())


@settings(max_examples=200)
@given(training_flows(operators=8), st.data())
def test_the_forwards_peak_is_the_plain_ones(flow: Dataflow, data: st.DataObject) -> None:
    forward = [v for i in flow.forward for v in flow.operators[i].writes]
    keep = data.draw(st.sets(st.sampled_from(forward)), "keep")
    plain = simulate(flow, forward_steps(flow, keep), (), {*keep, *flow.outputs})
    assert FastBackward(flow, (), (), flow.gradients, ()).forward_peak(keep) == plain.peak_bytes
