"""The schedules of chains are the fastest of all persistent ones that fit, found by search."""

import heapq
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from graphopt.errors import PlanError
from graphopt.passes.rotor import (
    Operation,
    Option,
    Stage,
    StageChain,
    least_budget,
    simulate,
    within,
)

# --- every persistent schedule, by search --------------------------------------------------------


@dataclass(frozen=True)
class Moment:
    """`pending`: the next backward; `stored` outputs, `saved` (stage, option), the `moving` output."""

    pending: int
    stored: frozenset[int]
    saved: frozenset[tuple[int, int]]
    moving: int


class Search:
    """All that may be done next, and what it takes; nothing stored or saved is ever dropped."""

    def __init__(self, chain: StageChain, budget: int) -> None:
        self.chain, self.budget = chain, budget
        self.outputs = [0, *(s.output_bytes for s in chain.stages)]
        self.gradients = [chain.input_gradient_bytes, *(s.gradient_bytes for s in chain.stages)]

    def fastest(self) -> float | None:
        """Dijkstra's search from nothing to the last backward."""
        ticket = itertools.count()
        heap = [(0.0, 0, Moment(len(self.chain), frozenset(), frozenset(), 0))]
        done = set()
        while heap:
            seconds, _, moment = heapq.heappop(heap)
            if not moment.pending:
                return seconds
            if moment not in done:
                done.add(moment)
                for more, nbytes, after in self.after(moment):
                    if nbytes <= self.budget:
                        heapq.heappush(heap, (seconds + more, next(ticket), after))
        return None

    def alive(self, moment: Moment) -> int:
        held = moment.stored | {moment.moving}
        kept = sum(self.chain.stages[s - 1].options[k].kept_bytes for s, k in moment.saved)
        return self.gradients[moment.pending] + kept + sum(self.outputs[i] for i in held)

    def after(self, moment: Moment) -> Iterator[tuple[float, int, Moment]]:
        if moment.moving:
            yield 0.0, 0, replace(moment, moving=0)
        alive = self.alive(moment)
        last = moment.pending
        for stage, k in moment.saved:
            if stage == last and (last == 1 or last - 1 in moment.stored):
                option = self.chain.stages[last - 1].options[k]
                nbytes = alive + self.gradients[last - 1] + option.backward_bytes
                stored, saved = moment.stored - {last - 1}, moment.saved - {(stage, k)}
                yield (
                    option.backward_seconds,
                    nbytes,
                    replace(moment, pending=last - 1, stored=stored, saved=saved),
                )
        for number in range(1, last + 1):
            source, stage = number - 1, self.chain.stages[number - 1]
            if source and source not in moment.stored and source != moment.moving:
                continue
            nbytes = alive + stage.output_bytes + stage.forward_bytes
            yield stage.forward_seconds, nbytes, replace(moment, moving=number)
            stored = moment.stored | ({source} if source else frozenset())
            yield stage.forward_seconds, nbytes, replace(moment, moving=number, stored=stored)
            if number not in {s for s, _ in moment.saved}:
                more = {number} if number < last else frozenset()
                for k, option in enumerate(stage.options):
                    if option.at_once and number < last:
                        continue
                    nbytes = alive + option.kept_bytes + option.forward_bytes
                    nbytes += 0 if option.at_once else stage.output_bytes
                    saved = moment.saved | {(number, k)}
                    yield option.forward_seconds, nbytes, Moment(last, stored | more, saved, 0)


def random_chain(draw: random.Random, stages: int) -> StageChain:
    found = []
    for _ in range(stages):
        forward = draw.randint(0, 5)
        options = tuple(
            Option(
                draw.randint(0, 6),
                forward + draw.randint(0, 2),
                draw.randint(0, 6),
                draw.randint(0, 3),
                draw.randint(0, 4),
            )
            for _ in range(draw.randint(1, 3))
        )
        if draw.random() < 0.5:
            options += (Option(0, 0.0, draw.randint(0, 9), draw.randint(0, 2), draw.randint(0, 9), True),)
        output, gradient = draw.randint(0, 5), draw.randint(0, 5)
        found.append(Stage(output, gradient, forward, options, draw.randint(0, 3)))
    return StageChain(tuple(found), draw.randint(0, 3))


@pytest.mark.parametrize(("stages", "chains"), [(1, 50), (2, 100), (3, 120), (4, 30), (5, 6)])
def test_no_persistent_schedule_is_faster(stages: int, chains: int) -> None:
    draw = random.Random(stages)
    for _ in range(chains):
        chain = random_chain(draw, stages)
        least = least_budget(chain)
        assert Search(chain, least - 1).fastest() is None
        assert within(chain, least - 1) is None
        for budget in (least, least + draw.randint(1, 10)):
            found = within(chain, budget)
            assert found is not None and found.peak_bytes <= budget
            assert found.seconds == pytest.approx(Search(chain, budget).fastest())


def test_coarse_slots_are_never_over_the_budget() -> None:
    draw = random.Random(0)
    for _ in range(200):
        chain = random_chain(draw, draw.randint(1, 8))
        budget = least_budget(chain) + draw.randint(0, 30)
        exact = within(chain, budget)
        assert exact is not None
        for slots in (1, 3, 7, 20):
            coarse = within(chain, budget, slots)
            assert coarse is not None  # what fits is found, however coarse
            assert coarse.peak_bytes <= budget and coarse.seconds >= exact.seconds - 1e-9


def uniform(count: int, *, inner: int = 3) -> StageChain:
    stage = Stage(1, 1, 1.0, (Option(inner, 1.0, 2.0), Option(0, 1.0, 3.0, backward_bytes=inner)))
    return StageChain((stage,) * count, 1)


def test_more_memory_is_never_slower_and_all_of_it_recomputes_nothing() -> None:
    chain = uniform(30)
    least = least_budget(chain)
    seconds = []
    for budget in range(least, 160, 7):
        found = within(chain, budget)
        assert found is not None
        seconds.append(found.seconds)
        kinds = [o.kind for o in found.operations]
        assert kinds.count("backward") == kinds.count("save") == 30
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[-1] == 30 * 3.0
    assert least < 12  # 30 outputs or gradients alone would be more


def test_nested_recomputation_is_written_out() -> None:
    stage = Stage(1, 1, 1.0, (Option(1, 1.0, 1.0),))
    chain = StageChain((stage,) * 4, 1)
    found = within(chain, least_budget(chain))
    assert found is not None
    text = [f"{o.kind} {o.stage}" for o in found.operations]
    assert text == [
        *("store 1", "forward 2", "forward 3", "save 4", "backward 4"),
        *("store 1", "forward 2", "save 3", "backward 3"),
        *("store 1", "save 2", "backward 2", "save 1", "backward 1"),
    ]


@pytest.mark.parametrize(
    ("operations", "fault"),
    [
        ([("forward", 2)], "its input is not there"),
        ([("store", 1), ("forward", 2), ("forward", 2)], "its input is not there"),
        ([("save", 1), ("backward", 1)], "the next backward is of stage 2"),
        ([("save", 1), ("save", 2), ("backward", 2)], "the backward of stage 1 is missing"),
        ([("forward", 1), ("save", 2), ("backward", 2), ("backward", 1)], "next backward is of stage 1"),
    ],
)
def test_what_is_no_schedule_is_refused(operations: list, fault: str) -> None:
    with pytest.raises(PlanError, match=fault):
        simulate(uniform(2), [Operation(kind, stage, 0) for kind, stage in operations])


def test_a_backward_that_makes_all_it_needs_follows_at_once() -> None:
    stage = Stage(1, 1, 1.0, (Option(2, 1.0, 0.0), Option(0, 0.0, 1.0, backward_bytes=2, at_once=True)))
    chain = StageChain((stage,) * 2)
    found = simulate(chain, [Operation("store", 1), *pairs(2, 1), *pairs(1, 1)])
    assert found.seconds == 1.0 + 1.0 + 1.0
    with pytest.raises(PlanError, match="its backward does not follow at once"):
        simulate(chain, [Operation("save", 1, 1), *pairs(2, 0), Operation("backward", 1)])
    with pytest.raises(PlanError, match="without a forward before its backward keeps nothing"):
        StageChain((Stage(1, 1, 1.0, (Option(1, 0.0, 1.0, at_once=True),)),))


def pairs(stage: int, option: int) -> list[Operation]:
    return [Operation("save", stage, option), Operation("backward", stage)]


def test_what_is_no_chain_is_refused() -> None:
    with pytest.raises(PlanError, match="at least one stage"):
        StageChain((Stage(1, 1, 1.0, ()),))
    assert within(uniform(2), -1) is None
