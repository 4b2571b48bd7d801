"""The options of a span have the bytes and seconds that a naive interpreter finds, and are the best."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from programs import traced
from random_flows import blocks, naive_backward, naive_bytes, training_flows

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow, dataflow
from graphopt.cost_models.schedule import anchors
from graphopt.passes.local_problem import LocalProblem, Surroundings, place
from graphopt.passes.segments import spans
from graphopt.passes.span_options import Option, options, pareto


def problems(flow: Dataflow) -> list[LocalProblem]:
    """The local problem of every span."""
    cut = spans(flow)
    world = Surroundings.of(flow, cut)
    return [place(world, k, k + 1).problem for k in range(len(cut))]


def naive(problem: LocalProblem, option: Option) -> tuple[int, float]:
    """Peak of the backward above the borders, and seconds of recomputation."""
    flow = problem.flow
    kept = option.keep | problem.borders | problem.entering
    steps = naive_backward(flow, kept, option.ephemeral, option.order)
    made = {v for _, makes in steps for v in makes}
    end = problem.borders | problem.leaving
    border_bytes = sum(flow.values[v].nbytes for v in problem.borders)
    during, _, _ = naive_bytes(flow, steps, kept, end & (kept | made), problem.entering)
    start_bytes = sum(flow.values[v].nbytes for v in kept)
    runs = [flow.operators[i] for i, _ in steps]
    again = [o for o in runs if not (o.backward and o.anchored)]
    first = {o.writes: o.seconds for o in again if o.backward}
    seconds = sum(o.seconds for o in again) - sum(first.values())
    return max([*during, start_bytes]) - border_bytes, seconds


@settings(max_examples=60)
@given(training_flows(operators=7))
def test_the_figures_of_an_option(flow: Dataflow) -> None:
    for problem in problems(flow):
        found = options(problem)
        assert found
        for option in found:
            assert problem.must_keep <= option.keep
            assert option.kept_bytes == sum(problem.flow.values[v].nbytes for v in option.keep)
            peak, seconds = naive(problem, option)
            assert option.backward_bytes == peak
            assert option.seconds == pytest.approx(seconds, abs=1e-9)


@settings(max_examples=60)
@given(training_flows(operators=7))
def test_no_option_is_worse_in_everything_and_one_recomputes_nothing(flow: Dataflow) -> None:
    for problem in problems(flow):
        found = options(problem)
        assert min(o.seconds for o in found) == pytest.approx(0.0, abs=1e-9)
        for a in found:
            for b in found:
                assert a is b or not (
                    b.kept_bytes <= a.kept_bytes
                    and b.backward_bytes <= a.backward_bytes
                    and b.seconds <= a.seconds
                )


@settings(max_examples=40)
@given(training_flows(operators=5))
def test_the_lowest_peak_of_a_span_is_found(flow: Dataflow) -> None:
    """Against every labelling of a dataflow that is one span."""
    (problem, *more) = problems(flow)
    assume(not more)
    inner = [
        i
        for i, v in enumerate(problem.flow.values)
        if v.producer >= 0 and not problem.flow.operators[v.producer].backward
    ]
    best = min(
        naive(
            problem,
            Option(keep | problem.must_keep, ephemeral, tuple(anchors(problem.flow)), 0, 0, 0, 0.0, 0),
        )[0]
        for keep, ephemeral in labellings(inner)
    )
    assert min(o.backward_bytes for o in options(problem)) <= 1.2 * best


def labellings(values: list[int]) -> list[tuple[frozenset[int], frozenset[int]]]:
    """Every way to keep, hold or make again each of `values`."""
    found: list[tuple[frozenset[int], frozenset[int]]] = [(frozenset(), frozenset())]
    for value in values:
        found = [
            (keep | kept, ephemeral | again)
            for keep, ephemeral in found
            for kept, again in (({value}, set()), (set(), set()), (set(), {value}))
        ]
    return found


def test_equal_layers_are_equal_problems() -> None:
    flow = blocks(8)
    cut = spans(flow)
    world = Surroundings.of(flow, cut)
    placed = [place(world, k, k + 1) for k in range(len(cut))]
    assert len(placed) == 8
    assert len({p.problem for p in placed}) <= 3  # the first, the last, and those between
    assert len({p.values for p in placed}) == 8
    for p in placed:
        for number, value in enumerate(p.values):
            assert p.problem.flow.values[number].nbytes == flow.values[value].nbytes


def test_a_problem_holds_the_whole_span_and_nothing_that_was_there_before() -> None:
    flow = dataflow(traced("cross attention")[0])
    cut = spans(flow)
    world = Surroundings.of(flow, cut)
    for k in range(len(cut)):
        p = place(world, k, k + 1)
        assert all(flow.values[v].producer != NO_PRODUCER for v in p.values)
        made = {v for i in range(cut.cuts[k], cut.cuts[k + 1]) for v in flow.operators[i].writes}
        assert made <= set(p.values)
        borders = {p.values[n] for n in p.problem.borders}
        assert not borders & made


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_the_pareto_set(points: list[tuple[int, int, int]]) -> None:
    candidates = [Option(frozenset(), frozenset(), (), k, p, 0, float(s), 0) for k, p, s in points]
    chosen = pareto(candidates, slack=0.0)
    for c in candidates:
        beaten_or_chosen = [
            o
            for o in chosen
            if o.kept_bytes <= c.kept_bytes
            and o.backward_bytes <= c.backward_bytes
            and o.seconds <= c.seconds
        ]
        assert beaten_or_chosen
    assert len({(o.kept_bytes, o.backward_bytes, o.seconds) for o in chosen}) == len(chosen)
