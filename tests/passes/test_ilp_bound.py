"""The bound is never above the best of all schedules, found by a search that shares no code with it."""

import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_flows import (
    FlowBuilder,
    blocks,
    naive_bytes,
    naive_forward,
    naive_step,
    training_flows,
)

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow, Operator
from graphopt.cost_models.schedule import anchors
from graphopt.passes.ilp_bound import Bound, gap, recompute_lower_bound
from graphopt.passes.ilp_reduction import reduced

SECONDS = 20.0


# --- the least recomputation of any schedule, by search -----------------------------------------


@dataclass(frozen=True)
class Moment:
    """What is alive before the anchor at `place`: `kept` by the forward, `owned` by the backward."""

    place: int
    kept: frozenset[int]
    owned: frozenset[int]
    ran: frozenset[int]  # operators of the backward that ran on demand


def least_recomputation(flow: Dataflow, budget_bytes: int) -> float:
    """Dijkstra's search over everything that may be alive, where any value may be dropped at any time."""
    search = _Search(flow, budget_bytes - flow.static_bytes)
    ticket = itertools.count()
    heap = [(0.0, next(ticket), moment) for moment in search.starts()]
    done = set()
    while heap:
        seconds, _, moment = heapq.heappop(heap)
        if moment.place == len(search.order):
            return seconds
        if moment not in done:
            done.add(moment)
            for more, after in search.after(moment):
                heapq.heappush(heap, (seconds + more, next(ticket), after))
    return math.inf


class _Search:
    def __init__(self, flow: Dataflow, limit: int) -> None:
        self.flow, self.limit, self.order = flow, limit, anchors(flow)
        self.run = [i for i, o in enumerate(flow.operators) if not o.anchored and o.recomputable]
        self.read_by = {}  # place of the last anchor that reads a value; demands may come at any time
        for index, operator in enumerate(flow.operators):
            place = self.order.index(index) if operator.anchored else len(self.order)
            for value in operator.reads if operator.backward else ():
                self.read_by[value] = max(place, self.read_by.get(value, 0))

    def bytes_of(self, values: frozenset[int]) -> int:
        return sum(self.flow.values[v].nbytes for v in values)

    def starts(self) -> Iterator[Moment]:
        values = [v for i in self.flow.forward for v in self.flow.operators[i].writes]
        for count in range(len(values) + 1):
            for keep in itertools.combinations(values, count):
                steps = naive_forward(self.flow, keep)
                during, _, _ = naive_bytes(self.flow, steps, (), {*keep, *self.flow.outputs})
                if max(during, default=0) <= self.limit and self.bytes_of(frozenset(keep)) <= self.limit:
                    yield Moment(0, frozenset(keep), frozenset(), frozenset())

    def after(self, moment: Moment) -> Iterator[tuple[float, Moment]]:
        alive = moment.kept | moment.owned
        for value in alive - set(self.flow.gradients):
            yield 0.0, replace(moment, kept=moment.kept - {value}, owned=moment.owned - {value})
        for index in self.run:
            operator = self.flow.operators[index]
            made = frozenset(operator.writes) - alive
            if made and self.is_there(operator.reads, alive):
                free = operator.backward and index not in moment.ran
                ran = moment.ran | ({index} if operator.backward else set())
                for dying in self.runs(index, alive, moment.owned):
                    owned = (moment.owned | made) - dying
                    yield (0.0 if free else operator.seconds), replace(moment, owned=owned, ran=ran)
        index = self.order[moment.place]
        operator = self.flow.operators[index]
        if self.is_there(operator.reads, alive):
            for dying in self.runs(index, alive, moment.owned):
                owned = moment.owned | frozenset(operator.writes)
                owned = frozenset(v for v in owned - dying if self.is_wanted(v, moment.place))
                yield 0.0, replace(moment, place=moment.place + 1, owned=owned)

    def is_there(self, reads: tuple[int, ...], alive: frozenset[int]) -> bool:
        return all(v in alive or self.flow.values[v].producer == NO_PRODUCER for v in reads)

    def is_wanted(self, value: int, place: int) -> bool:
        return value in self.flow.gradients or self.read_by.get(value, -1) > place

    def runs(self, index: int, alive: frozenset[int], owned: frozenset[int]) -> Iterator[frozenset[int]]:
        """Ways to run an operator: over nothing, or over an operand that dies."""
        operator = self.flow.operators[index]
        over = [v for v in operator.reusable if v in owned and len(operator.writes) == 1]
        for value in [None, *over]:
            fresh = 0 if value is not None else self.bytes_of(frozenset(operator.writes) - alive)
            if value is not None and operator.anchored and self.is_wanted(value, self.order.index(index)):
                continue
            if self.bytes_of(alive) + fresh + operator.workspace_bytes <= self.limit:
                yield frozenset() if value is None else frozenset({value})


# --- the bound ---------------------------------------------------------------------------------


@st.composite
def varied_flows(draw: st.DrawFn) -> Dataflow:
    """Training flows with operators of several results, some that cannot be repeated, and others of
    the backward that may be."""
    flow = draw(st.one_of(training_flows(operators=4), training_flows(operators=5, chain=True)))
    made = {v for o in flow.operators if o.backward for v in o.writes}
    operators = []
    for operator in flow.operators:
        if not operator.backward:
            operators.append(replace(operator, recomputable=draw(st.integers(0, 7)) > 0))
        elif made.isdisjoint(operator.reads) and set(flow.gradients).isdisjoint(operator.writes):
            operators.append(replace(operator, anchored=draw(st.booleans())))
        else:
            operators.append(operator)
    flow = replace(flow, operators=tuple(operators))
    pairs = [i for i in flow.forward[:-1] if _are_apart(*flow.operators[i : i + 2])]
    return fused(flow, draw(st.sampled_from(pairs))) if pairs and draw(st.booleans()) else flow


def _are_apart(first: Operator, second: Operator) -> bool:
    return set(first.writes).isdisjoint(second.reads) and not (first.reusable or second.reusable)


def fused(flow: Dataflow, index: int) -> Dataflow:
    """`flow` with the operator at `index` and the next as one with the results of both."""
    first, second = flow.operators[index : index + 2]
    both = replace(
        first,
        reads=tuple(dict.fromkeys(first.reads + second.reads)),
        writes=first.writes + second.writes,
        seconds=first.seconds + second.seconds,
        recomputable=first.recomputable and second.recomputable,
    )
    operators = (*flow.operators[:index], both, *flow.operators[index + 2 :])
    values = tuple(replace(v, producer=v.producer - (v.producer > index)) for v in flow.values)
    return replace(flow, operators=operators, values=values)


@st.composite
def labels(draw: st.DrawFn, flow: Dataflow) -> tuple[set[int], set[int]]:
    """Random values kept, and made again for each use; what cannot be made again is kept."""
    operators = [flow.operators[i] for i in flow.forward]
    values = st.sets(st.sampled_from([v for o in operators for v in o.writes]))
    keep = draw(values) | {v for o in operators if not o.recomputable for v in o.writes}
    return keep, draw(values) - keep


def bound_of(
    flow: Dataflow, budget: int, order: Sequence[int] | None = None, most: int = 20_000
) -> Bound:
    return recompute_lower_bound(flow, order or anchors(flow), budget, SECONDS, most)


@settings(max_examples=150)
@given(varied_flows(), st.data())
def test_no_schedule_recomputes_less(flow: Dataflow, data: st.DataObject) -> None:
    keep, ephemeral = data.draw(labels(flow), "labels")
    peak, seconds = naive_step(flow, keep, ephemeral)
    less = data.draw(st.sampled_from([0, 0, 50, 200]), "less")
    budget = flow.static_bytes + peak - less
    least = least_recomputation(flow, budget)
    assert least <= seconds + 1e-9 or less
    bound = bound_of(flow, budget)
    assert bound.closed and bound.gap == 0
    assert bound.seconds <= least + 1e-9
    joined = bound_of(flow, budget, most=8)
    assert joined.seconds <= least + 1e-9


@pytest.mark.parametrize(("count", "budgets"), [(2, (2100, 1900, 1600)), (3, (1700,))])
def test_on_blocks_it_is_the_optimum(count: int, budgets: tuple[int, ...]) -> None:
    flow = blocks(count)
    plain = bound_of(flow, 10**9)
    assert (plain.seconds, plain.status) == (0.0, "optimal")
    for budget in budgets:
        assert bound_of(flow, budget).seconds == pytest.approx(
            least_recomputation(flow, budget), rel=1e-4
        )


def test_its_solution_is_labels_to_start_from() -> None:
    flow = blocks(4)
    bound = bound_of(flow, 2100)
    peak, seconds = naive_step(flow, bound.keep, bound.repeated)
    assert seconds == pytest.approx(bound.seconds, rel=1e-4)
    assert peak <= 1.1 * 2000


def test_too_small_a_budget_is_found_infeasible() -> None:
    flow = blocks(2)
    for budget in (0, flow.static_bytes, 1200):
        bound = bound_of(flow, budget)
        assert (bound.seconds, bound.status, bound.closed) == (math.inf, "infeasible", True)


def test_what_cannot_be_made_again_is_held() -> None:
    build = FlowBuilder()
    (a,) = build.operator([build.static(10)], [100], recomputable=False)
    (b,) = build.operator([a], [100])
    (c,) = build.operator([b], [100])
    (grad,) = build.operator([c], [100], backward=True)
    last = build.operator([grad, a], [100], backward=True)
    flow = build.flow([c], last)
    assert bound_of(flow, 10 + 300).keep >= {a}
    assert bound_of(flow, 10 + 299).status == "infeasible"  # a, c and the gradient of c


def test_a_value_made_for_one_reader_only_is_no_decision() -> None:
    build = FlowBuilder()
    made = [build.static(100)]
    for size in (80, 60, 60, 40):  # none but the last is read by the backward
        made += build.operator([made[-1]], [size], seconds=2.0)
    first = build.operator([made[0]], [900], workspace=300, backward=True)
    last = build.operator([*first, made[-1]], [100], backward=True)
    flow = build.flow([made[-1]], last)
    problem = reduced(flow, anchors(flow), 0, 1000)
    assert [(i.value, i.nbytes) for i in problem.items] == [(made[-1], 40)]
    assert [t.seconds for t in problem.tasks] == [8.0]
    assert bound_of(flow, 1300).seconds == pytest.approx(8.0, rel=1e-5)
    assert least_recomputation(flow, 1300) == 8.0
    assert bound_of(flow, 1340).seconds == least_recomputation(flow, 1340) == 0.0


def test_anchors_that_ask_for_nothing_wait_and_tiny_values_are_ignored() -> None:
    build = FlowBuilder()
    (a,) = build.operator([build.static(10)], [100])
    (b,) = build.operator([a], [3])
    grad = build.operator([b], [100], backward=True)
    for reads in ((), (), (a,), (a, b), ()):
        grad = build.operator([*grad, *reads], [100], backward=True)
    flow = build.flow([b], grad)
    stages = reduced(flow, anchors(flow), 0, 1000).stages
    assert [list(s.places) for s in stages] == [[0], [1, 2, 3], [4], [5]]
    problem = reduced(flow, anchors(flow), 10, 1000)
    assert problem.ignored == {b}
    assert [list(s.places) for s in problem.stages] == [[0, 1, 2, 3, 4], [5]]


def test_with_no_time_the_bound_is_still_one() -> None:
    flow = blocks(6)
    bound = recompute_lower_bound(flow, anchors(flow), 2000, 0.0)
    assert 0 <= bound.seconds <= bound_of(flow, 2000).seconds + 1e-9


def test_gap() -> None:
    bound = Bound(1.5, True, 0.0, "optimal", 10)
    assert gap(2.0, bound) == pytest.approx(0.25)
    assert gap(0.0, bound) == gap(1.5, bound) == gap(1.4, bound) == 0.0
