"""In how many parts blocks are streamed: the step is simulated, or planned, with each number of them."""

from collections.abc import Iterator
from dataclasses import dataclass

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.schedule import anchors
from graphopt.errors import PlanError
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.checkpoint_choice import step_of
from graphopt.passes.segments import spans
from graphopt.passes.token_regions import Region
from graphopt.passes.token_rewrite import in_parts
from graphopt.program import Program

NUMBERS = (1, 2, 4, 8, 16)  # of parts that are tried
LESS = 0.02  # of the peak above parameters and inputs: what more parts have to save to be worth it


@dataclass(frozen=True)
class Parts:
    """The step with its blocks in so many parts.

    `peak_bytes` is that of the step that keeps what crosses its narrow places, and recomputes all else;
    `seconds` is of its operators, without those recomputations.
    """

    number: int
    program: Program
    costs: Costs
    peak_bytes: int
    seconds: float


def parts_of(program: Program, regions: tuple[Region, ...], costs: Costs, number: int) -> Parts:
    """`program` with its `regions` in `number` parts; 1 leaves it as it is."""
    if number > 1 and regions:
        program = in_parts(program, regions, number)
        costs = costs.with_nodes([n for n in program.operators() if n.name not in costs.nodes])
    flow = costs.dataflow(program)
    peak = flow.static_bytes + step_of(flow, _narrow_places(flow)).peak_bytes
    return Parts(number, program, costs, peak, sum(o.seconds for o in flow.operators))


def _narrow_places(flow: Dataflow) -> Choice:
    cut = spans(flow)
    crossing = frozenset(v for values in cut.crossing for v in values)
    return Choice(crossing | cut.pinned, frozenset(), tuple(anchors(flow)), 0.0, 0)


def of_least_peak(program: Program, regions: tuple[Region, ...], costs: Costs) -> Parts:
    """The first of NUMBERS after which the next hardly lowers the peak."""
    first, *others = _numbers(regions)
    chosen = parts_of(program, regions, costs, first)
    static = costs.dataflow(program).static_bytes
    for number in others:
        following = parts_of(program, regions, costs, number)
        if following.peak_bytes - static > (1 - LESS) * (chosen.peak_bytes - static):
            break
        chosen = following
    return chosen


def within(program: Program, regions: tuple[Region, ...], costs: Costs, budget_bytes: int) -> Parts:
    """The parts with which `Checkpoint` meets the budget in the least time; PlanError where it cannot."""
    best: tuple[float, Parts] | None = None
    reachable = []
    for number in _numbers(regions):
        tried = parts_of(program, regions, costs, number)
        try:
            plan = Checkpoint(memory=budget_bytes).plan(tried.program, tried.costs)
        except PlanError as error:
            reachable += [] if error.reachable_bytes is None else [error.reachable_bytes]
            continue
        seconds = plan.step_seconds + plan.recompute_seconds
        if best is not None and seconds >= best[0]:
            break
        best = seconds, tried
        if not plan.recompute_seconds:
            break
    if best is None:
        least = min(reachable)
        raise PlanError(
            f"no plan keeps the step within {format_bytes(budget_bytes)}, streamed blocks or not; the "
            f"smallest reachable peak is {format_bytes(least)} ({least} bytes)",
            reachable_bytes=least,
            budget_bytes=budget_bytes,
        )
    return best[1]


def _numbers(regions: tuple[Region, ...]) -> Iterator[int]:
    most = max((r.tokens for r in regions), default=1)
    return (number for number in NUMBERS if number <= most)
