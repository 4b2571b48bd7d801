"""From a budget to a choice of kept values: what must be kept, the search, and its last refinements."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.fast_schedule import FastBackward
from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.cost_models.schedule import (
    Step,
    Timeline,
    anchors,
    backward_steps,
    forward_steps,
    simulate,
)
from graphopt.errors import PlanError
from graphopt.passes.backward_order import check_order, completed
from graphopt.passes.chain_solver import Chain, Choice
from graphopt.passes.segments import deep_reads
from graphopt.passes.span_options import ANY, Freedom

LIGHT_SHARE = 0.01  # of the step's time: what recomputation may cost where no budget is given
BISECTIONS = 10
NARROW = 0.002  # of the budget: where a bisection of limits ends
LOWERINGS = 6  # kept values given up one by one, each the best of some candidates
PRICE = 5.0  # the most time, as a share of the step's, that giving one up costs for a share of the peak
CANDIDATES = 12


@dataclass(frozen=True)
class StepMemory:
    """The forward and the backward of one choice, simulated. Static bytes are excluded."""

    forward: Timeline
    backward: Timeline
    recompute_seconds: float
    recompute_flops: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once, static ones excluded."""
        return max(self.forward.peak_bytes, self.backward.peak_bytes)


def step_of(flow: Dataflow, choice: Choice) -> StepMemory:
    """Simulate the step under `choice`, with the generators' states that replays need."""
    keep = choice.keep | states_needed(flow, choice)
    forward = simulate(flow, forward_steps(flow, keep), (), keep | frozenset(flow.outputs))
    steps = steps_of(flow, replace(choice, keep=keep))
    backward = simulate(flow, steps, keep, flow.gradients)
    seen: set[int] = set()
    seconds, flops = 0.0, 0
    for step in steps:
        operator = flow.operators[step.operator]
        if not operator.backward or step.operator in seen:
            seconds, flops = seconds + operator.seconds, flops + operator.flops
        seen.add(step.operator)
    return StepMemory(forward, backward, seconds, flops)


def steps_of(flow: Dataflow, choice: Choice) -> list[Step]:
    """What the backward runs under `choice`."""
    return backward_steps(flow, choice.keep, choice.ephemeral, choice.order, dict(choice.forget))


def states_needed(flow: Dataflow, choice: Choice) -> frozenset[int]:
    """The states of the generator before the random operators that the backward replays."""
    if all(o.state is None for o in flow.operators):
        return frozenset()
    states = (flow.operators[s.operator].state for s in steps_of(flow, choice))
    return frozenset(s for s in states if s is not None)


def everything(flow: Dataflow) -> Choice:
    """Keep every forward value that the backward reads."""
    order = anchors(flow)
    reads = deep_reads(flow, order)
    return Choice(frozenset(v for values in reads for v in values), frozenset(), tuple(order), 0.0, 0)


@dataclass(frozen=True)
class Search:
    """What the search may do.

    With `leave_room`, half of what the budget leaves above the static bytes stays free for parts of
    the step that follow, where that can be met. `freedom` is that of the search over spans.
    """

    leave_room: bool = False
    freedom: Freedom = ANY


ANYTHING = Search()


def choose(
    flow: Dataflow,
    least: bool,
    budget_bytes: int | None,
    search: Search = ANYTHING,
    chain: Callable[[], Chain] | None = None,
) -> Choice:
    """The choice of least recomputation under the budget, of least peak (`least`), or a light one.

    Nothing is forgotten in it. `chain`: what makes the chain of `flow` and the search's freedom.
    """
    if search.leave_room and budget_bytes is not None:
        half = (budget_bytes + flow.static_bytes) // 2
        try:
            return choose(flow, least, half, replace(search, leave_room=False), chain)
        except PlanError as error:
            budget_bytes = min(budget_bytes, error.reachable_bytes or budget_bytes)
    plain = everything(flow)
    peak = flow.static_bytes + step_of(flow, plain).peak_bytes
    if budget_bytes is not None and peak <= budget_bytes:
        return plain
    if budget_bytes is None and not least:
        return pruned(flow, _light(flow, Chain.of(flow, replace(search.freedom, reorder=False))))
    spans = Chain.of(flow, search.freedom) if chain is None else chain()
    if budget_bytes is None:
        return lowered(flow, pruned(flow, spans.least_peak()), search.freedom)
    return pruned(flow, _within(flow, spans, budget_bytes, search.freedom))


def _within(flow: Dataflow, chain: Chain, budget_bytes: int, freedom: Freedom) -> Choice:
    """The fastest choice whose true peak fits; where the sum over spans misses it, by bisection."""
    least = chain.least_peak()
    low, limit = least.peak_bytes, budget_bytes - flow.static_bytes
    high = limit
    fastest: Choice | None = None
    for _ in range(BISECTIONS):
        found = chain.within(limit)
        choice = None if found is None else pruned(flow, found)
        if choice is not None and _fits(flow, choice, budget_bytes):
            if fastest is None or choice.seconds < fastest.seconds:
                fastest = choice
            low = limit
        else:
            high = limit
        if high - low <= NARROW * budget_bytes or low >= budget_bytes - flow.static_bytes:
            break
        limit = (low + high) // 2
    if fastest is not None:
        return fastest
    return fitting(flow, lowered(flow, pruned(flow, least), freedom), budget_bytes)


def fitting(flow: Dataflow, best: Choice, budget_bytes: int | None) -> Choice:
    """`best`, the choice of the least peak that was found; PlanError where it is above the budget."""
    best = pruned(flow, best)
    reachable = flow.static_bytes + step_of(flow, best).peak_bytes
    if budget_bytes is None or reachable <= budget_bytes:
        return best
    raise PlanError(
        f"no plan keeps the step within {format_bytes(budget_bytes)} ({budget_bytes} bytes); the "
        f"smallest reachable peak is {format_bytes(reachable)} ({reachable} bytes), of which "
        f"{format_bytes(flow.static_bytes)} are parameters, buffers and inputs",
        reachable_bytes=reachable,
        budget_bytes=budget_bytes,
    )


def _fits(flow: Dataflow, choice: Choice, budget_bytes: int) -> bool:
    return flow.static_bytes + step_of(flow, choice).peak_bytes <= budget_bytes


def _light(flow: Dataflow, chain: Chain) -> Choice:
    """The lowest peak for a hundredth of the step's time, with no product or convolution repeated."""
    light = chain.light()
    allowed = LIGHT_SHARE * sum(o.seconds for o in flow.operators)
    low = light.least_peak()
    if low.seconds <= allowed:
        return low
    high = everything(flow)
    bottom, top = low.peak_bytes, step_of(flow, high).peak_bytes
    for _ in range(BISECTIONS):
        middle = (bottom + top) // 2
        choice = light.within(middle)
        if choice is not None and choice.seconds <= allowed:
            high, top = choice, middle
        else:
            bottom = middle
    return high


def lowered(flow: Dataflow, choice: Choice, freedom: Freedom) -> Choice:
    """`choice` with fewer kept values, where one that is alive at the peak is better recomputed.

    This reaches values that cross every cut, which the search over spans keeps. Each one given up must
    be worth its time (`PRICE`).
    """
    now = step_of(flow, choice)
    whole = sum(o.seconds for o in flow.operators)
    fast = FastBackward(flow, (), (), flow.gradients, ())

    def pays(peak_bytes: int, seconds: float) -> bool:
        saved = (now.peak_bytes - peak_bytes) / max(1, now.peak_bytes)
        return saved > 0 and seconds - now.recompute_seconds <= PRICE * saved * whole

    for _ in range(LOWERINGS):
        for value in _kept_at_peak(flow, choice, now):
            keep, ephemeral = choice.keep - {value}, choice.ephemeral
            made = made_for(flow, value, keep)
            if not all(flow.operators[flow.values[v].producer].recomputable for v in made):
                continue
            if freedom.repeat:
                ephemeral = ephemeral | made
            trial = replace(choice, keep=keep, ephemeral=ephemeral)
            found = fast.run(keep, ephemeral, choice.order)
            if not pays(found.peak_bytes, found.seconds):
                continue  # the true peak is no lower: it has the states of generators, too
            then = step_of(flow, trial)
            if pays(then.peak_bytes, then.recompute_seconds):
                choice = pruned(flow, trial)
                now = step_of(flow, choice)
                break
        else:
            break
    return choice


def _kept_at_peak(flow: Dataflow, choice: Choice, step: StepMemory) -> list[int]:
    """The largest kept values alive when `step`, that of `choice`, is at its peak."""
    timeline = max(step.forward, step.backward, key=lambda t: t.peak_bytes)
    place = timeline.during.index(timeline.peak_bytes)
    if timeline is step.forward:
        gone = set(choice.keep) - {v for s in timeline.steps[: place + 1] for v in s.makes}
    else:
        gone = {v for dying in timeline.last_read[:place] for v in dying}
    alive = sorted(choice.keep - gone, key=lambda v: (-flow.values[v].nbytes, v))
    return alive[:CANDIDATES]


def made_for(flow: Dataflow, value: int, keep: frozenset[int]) -> frozenset[int]:
    """`value` and all that must be recomputed on the way to it."""
    found, stack = {value}, [value]
    while stack:
        producer = flow.values[stack.pop()].producer
        for read in flow.operators[producer].reads:
            if flow.values[read].producer != NO_PRODUCER and read not in found and read not in keep:
                found.add(read)
                stack.append(read)
    return frozenset(found)


def is_complete(flow: Dataflow, keep: Collection[int]) -> bool:
    """True where all that the backward needs is in `keep` or can be recomputed."""
    try:
        check_choice(flow, keep)
    except PlanError:
        return False
    return True


def pruned(flow: Dataflow, choice: Choice) -> Choice:
    """`choice` without the kept values that the backward does not read, or not before it made them."""
    read, made = set[int](), set[int]()
    first = set[int]()  # read before any step made it
    for step in steps_of(flow, choice):
        reads = flow.operators[step.operator].reads
        read.update(reads)
        first.update(v for v in reads if v not in made)
        made.update(step.makes)
    return replace(choice, keep=choice.keep & first, ephemeral=choice.ephemeral & read)


def check_choice(flow: Dataflow, keep: Collection[int]) -> None:
    """Raise PlanError where the backward needs a value that is neither kept nor recomputable."""
    needed = [v for values in deep_reads(flow, anchors(flow)) for v in values if v not in keep]
    seen = set(needed)
    while needed:
        value = needed.pop()
        operator = flow.operators[flow.values[value].producer]
        if not operator.recomputable:
            raise PlanError(f"{flow.values[value].label} cannot be recomputed and must be kept")
        for read in operator.reads:
            if flow.values[read].producer != NO_PRODUCER and read not in seen and read not in keep:
                seen.add(read)
                needed.append(read)


def names_of(flow: Dataflow, values: Iterable[int]) -> tuple[str, ...]:
    """The labels of `values`, in the order of the program."""
    return tuple(flow.values[v].label for v in sorted(values))


def order_names(flow: Dataflow, order: tuple[int, ...]) -> tuple[str, ...]:
    """The names of the operators of `order`; nothing where it is the program's own."""
    if order == tuple(anchors(flow)):
        return ()
    return tuple(flow.operators[a].name for a in order)


def order_named(flow: Dataflow, names: Collection[str]) -> tuple[int, ...]:
    """The order that `names` give the backward of `flow`; PlanError where it cannot have it."""
    by_name = {o.name: i for i, o in enumerate(flow.operators)}
    order = tuple(by_name.get(n, -1) for n in names)
    wrong = check_order(flow, order)
    if wrong is not None:
        raise PlanError(f"the plan's order cannot be that of this backward: {wrong}")
    return completed(flow, order)


def values_named(flow: Dataflow, names: Collection[str]) -> frozenset[int]:
    """The values labelled `names`; PlanError for a name that this program does not have."""
    by_label = {v.label: i for i, v in enumerate(flow.values)}
    unknown = [n for n in names if n not in by_label]
    if unknown:
        raise PlanError(f"the plan was made for another program: it keeps {unknown[0]!r}")
    return frozenset(by_label[n] for n in names)


def without_gradient_bytes(flow: Dataflow) -> Dataflow:
    """`flow` in which the gradients that the backward returns take no memory."""
    returned = set(flow.gradients)
    values = tuple(
        replace(v, nbytes=0) if i in returned and v.producer != NO_PRODUCER else v
        for i, v in enumerate(flow.values)
    )
    return replace(flow, values=values)


def holding_outputs(flow: Dataflow) -> Dataflow:
    """`flow` with room for the outputs of the forward all through the step."""
    return replace(flow, static_bytes=flow.static_bytes + bytes_made(flow, flow.outputs))


def bytes_made(flow: Dataflow, values: Iterable[int]) -> int:
    """Bytes of those of `values` that the step makes."""
    return sum(flow.values[v].nbytes for v in values if flow.values[v].producer != NO_PRODUCER)
