"""Cuts part the forward, the backward follows, and what is read elsewhere is pinned."""

import pytest
from hypothesis import given, settings
from programs import traced
from random_flows import FlowBuilder, blocks, training_flows

from graphopt.cost_models.memory import Dataflow, dataflow
from graphopt.cost_models.schedule import anchors
from graphopt.passes.segments import Spans, deep_reads, spans


def naive_crossing(flow: Dataflow, position: int) -> set[int]:
    """Values made before the operator at `position` and read by the forward at or after it."""
    forward = list(flow.forward)
    return {
        v
        for i in forward[position:]
        for v in flow.operators[i].reads
        if 0 <= flow.values[v].producer < position
    }


def naive_needs(flow: Dataflow, operator: int) -> set[int]:
    """Forward values that an operator of the backward reads, itself or by what runs for it."""
    found: set[int] = set()
    for value in flow.operators[operator].reads:
        producer = flow.values[value].producer
        if producer < 0:
            continue
        if not flow.operators[producer].backward:
            found.add(value)
        elif not flow.operators[producer].anchored:
            found |= naive_needs(flow, producer)
    return found


def check(flow: Dataflow, cut: Spans) -> None:
    count = len(flow.forward)
    assert cut.cuts[0] == 0 and cut.cuts[-1] == count
    assert list(cut.cuts) == sorted(set(cut.cuts))
    assert len(cut) == len(cut.anchors) == len(cut.cuts) - 1
    for position, crossing in zip(cut.cuts, cut.crossing, strict=True):
        assert set(crossing) == naive_crossing(flow, position)
    # The backward goes through the spans from last to first, each operator once.
    assert [a for part in reversed(cut.anchors) for a in part] == anchors(flow)
    pinned = set()
    for number, part in enumerate(cut.anchors):
        first, last = cut.cuts[number], cut.cuts[number + 1] - 1
        for anchor in part:
            for value in naive_needs(flow, anchor):
                made = flow.values[value].producer
                reads = [i for i in flow.forward if value in flow.operators[i].reads]
                at_hand = made <= last and max(reads, default=made) >= first
                if not at_hand:
                    pinned.add(value)
    assert set(cut.pinned) == pinned


@settings(max_examples=150)
@given(training_flows(operators=8))
def test_spans_of_random_dataflows(flow: Dataflow) -> None:
    check(flow, spans(flow))
    order = anchors(flow)
    for anchor, reads in zip(order, deep_reads(flow, order), strict=True):
        assert set(reads) == naive_needs(flow, anchor)
        assert len(set(reads)) == len(reads)


@pytest.mark.parametrize("name", ["residual", "u-net", "cross attention", "dense", "convolutions"])
def test_spans_of_models(name: str) -> None:
    flow = dataflow(traced(name)[0])
    check(flow, spans(flow))


def test_repeated_blocks_are_cut_where_they_meet() -> None:
    cut = spans(blocks(4))
    assert cut.cuts == (0, 3, 6, 9, 12)
    assert [len(c) for c in cut.crossing] == [0, 1, 1, 1, 0]
    assert all(2 <= len(a) <= 4 for a in cut.anchors)  # a border is at hand on both sides
    assert not cut.pinned


def test_a_chain_of_equal_values_is_one_span() -> None:
    assert spans(blocks(4, inner=1)).cuts == (0, 12)


def test_a_value_that_the_backward_reads_far_away_is_pinned() -> None:
    build = FlowBuilder()
    x = build.static(10)
    (narrow,) = build.operator([x], [10])
    (wide,) = build.operator([narrow], [100])
    (out,) = build.operator([wide], [10])
    (wide2,) = build.operator([out], [100])
    (last,) = build.operator([wide2], [10])
    (g,) = build.operator([wide2], [100], backward=True)
    (g2,) = build.operator([g, wide], [10], backward=True)  # still in the second span's part
    (g3,) = build.operator([g2, wide2], [10], backward=True)
    flow = build.flow([last], [g3])
    cut = spans(flow)
    assert cut.cuts == (0, 3, 5)
    check(flow, cut)
    assert cut.pinned in ({wide}, {wide2})


def test_a_forward_without_operators() -> None:
    build = FlowBuilder()
    x = build.static(10)
    gradient = build.operator([x], [10], backward=True)
    flow = build.flow([x], gradient)
    cut = spans(flow)
    assert cut.cuts == (0, 0) and cut.anchors == ((0,),) and not cut.pinned
