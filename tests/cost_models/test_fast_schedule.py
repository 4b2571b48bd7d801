"""The compiled backward is the plain one, on random dataflows, labels, orders and borders."""

import itertools
from collections.abc import Collection

import numpy as np
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
    forget: Collection[tuple[int, int]] = (),
) -> None:
    wish = {a: [v for place, v in forget if place == p] for p, a in enumerate(order)}
    steps = backward_steps(flow, held | fixed, ephemeral, order, wish)
    operators = [flow.operators[s.operator] for s in steps]
    made, first = set[int](), set(must)
    for step in steps:
        first.update(set(flow.operators[step.operator].reads) - made)
        made.update(step.makes)
    kept = held & first
    timeline = simulate(flow, steps, kept | fixed, end, owned)
    pairs = np.array(sorted(forget), np.int64).reshape(-1, 2).T
    profile = FastBackward(flow, fixed, must, end, owned).run(held, ephemeral, order, pairs)
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
    order = (
        data.draw(st.permutations(anchors(flow)), "order") if data.draw(st.booleans()) else anchors(flow)
    )
    places = st.integers(0, len(order) - 1)
    forget = st.sets(st.tuples(places, st.sampled_from(forward)), max_size=4)
    assert_same(
        flow,
        held,
        data.draw(subset, "ephemeral") - held,
        order,
        fixed,
        data.draw(subset, "must") & held,
        {*flow.gradients, *data.draw(st.sets(st.sampled_from(every), max_size=3), "end")},
        data.draw(st.sets(st.sampled_from(sorted(fixed)))) if fixed else set(),
        data.draw(forget, "forget") if order else (),
    )


@settings(max_examples=200)
@given(training_flows(operators=8), st.data())
def test_what_only_waits_and_since_when(flow: Dataflow, data: st.DataObject) -> None:
    forward = [v for i in flow.forward for v in flow.operators[i].writes]
    fast = FastBackward(flow, (), (), flow.gradients, ())
    profile = fast.run(data.draw(st.sets(st.sampled_from(forward))), (), anchors(flow))
    bounds = profile.makes_at.tolist()
    makes = [set(profile.makes[a:b].tolist()) for a, b in itertools.pairwise(bounds)]
    reads = [set(flow.own_reads[i]) for i in profile.operators.tolist()]
    places = list(
        itertools.accumulate((flow.operators[i].anchored for i in profile.operators), initial=0)
    )
    now = data.draw(st.integers(0, len(makes) - 1), "step")
    for value, since in enumerate(fast.idle(profile, now).tolist()):
        touched = [k for k in range(now) if value in reads[k] | makes[k]]
        there = value in profile.kept or any(value in makes[k] for k in range(now))
        later = [k for k in range(now + 1, len(makes)) if value in reads[k] | makes[k]]
        waits = there and value not in reads[now] | makes[now] and later and value in reads[later[0]]
        assert since == ((places[touched[-1]] if touched else -1) if waits else -2)


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
