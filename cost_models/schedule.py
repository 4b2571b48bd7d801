"""Orders of execution and the memory they take: forward, backward with recomputation, and its peak.

Every forward value has one of three labels. A *kept* value stays from the forward to its last use. A
*held* value is recomputed once, just before its first use in the backward, and stays to its last. An
*ephemeral* value is recomputed again for each operator of the backward that asks for it. A held value
that is *forgotten* after some operator of the backward is recomputed again where it is asked for later.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from graphopt.cost_models.memory import Dataflow, Operator

NOTHING: Mapping[int, Collection[int]] = MappingProxyType({})


@dataclass(frozen=True)
class Step:
    """One run of an operator (an index) and the values that exist afterwards because of it.

    An operator that is run again for one of its results makes the others a second time; those are
    freed at once and are not in `makes`.
    """

    operator: int
    makes: tuple[int, ...]


@dataclass(frozen=True)
class Timeline:
    """Bytes alive while each step runs (`during`), and after it (`after`); static bytes excluded.

    `reused` says for each step which value it writes its result over (None: none).
    """

    steps: tuple[Step, ...]
    during: tuple[int, ...]
    after: tuple[int, ...]
    reused: tuple[int | None, ...]
    last_read: tuple[tuple[int, ...], ...]

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return max(self.during, default=0)


def forward_steps(flow: Dataflow, keep: Collection[int]) -> list[Step]:
    """The operators that the outputs and the kept values need, in program order."""
    wanted = set(flow.outputs) | set(keep)
    needed: set[int] = set()
    for index in reversed(flow.forward):
        operator = flow.operators[index]
        states = () if operator.state is None else (operator.state,)
        if not operator.recomputable or any(w in wanted for w in (*operator.writes, *states)):
            needed.add(index)
            wanted.update(operator.reads)
    steps = []
    for index in sorted(needed):
        operator = flow.operators[index]
        state = () if operator.state is None or operator.state not in keep else (operator.state,)
        steps.append(Step(index, operator.writes + state))
    return steps


def anchors(flow: Dataflow) -> list[int]:
    """The operators of the backward that run once, in program order."""
    return [i for i, o in enumerate(flow.operators) if o.backward and o.anchored]


def backward_steps(
    flow: Dataflow,
    keep: Collection[int],
    ephemeral: Collection[int],
    order: Iterable[int],
    forget: Mapping[int, Collection[int]] = NOTHING,
) -> list[Step]:
    """The backward: the anchored operators of `order`, each preceded by what it needs recomputed.

    After each operator that `forget` names, its values there count as not made; they take memory no
    longer than to their last use before they are made again.
    """
    live = set(keep)
    steps: list[Step] = []
    for anchor in order:
        writes = flow.operators[anchor].writes
        dropped: list[int] = []
        for value in flow.own_reads[anchor]:
            if value not in live:
                _recompute(flow, value, live, ephemeral, steps, dropped)
        steps.append(Step(anchor, writes))
        live.update(writes)
        live.difference_update(dropped)
        live.difference_update(forget.get(anchor, ()))
    return steps


def _recompute(
    flow: Dataflow,
    value: int,
    live: set[int],
    ephemeral: Collection[int],
    steps: list[Step],
    dropped: list[int],
) -> None:
    """Append the steps that make `value` from live values, depth first."""
    producer = flow.values[value].producer
    stack: list[tuple[int, Iterator[int]]] = [(producer, iter(flow.own_reads[producer]))]
    while stack:
        index, reads = stack[-1]
        for source in reads:
            if source not in live:
                below = flow.values[source].producer
                stack.append((below, iter(flow.own_reads[below])))
                break
        else:
            stack.pop()
            made = tuple([w for w in flow.operators[index].writes if w not in live])
            if made:
                steps.append(Step(index, made))
                live.update(made)
                dropped.extend([w for w in made if w in ephemeral])


def simulate(
    flow: Dataflow,
    steps: Sequence[Step],
    start: Collection[int],
    end: Collection[int],
    owned: Collection[int] = (),
) -> Timeline:
    """Live bytes of `steps`, run with `start` alive before them and `end` alive after them.

    Values are freed after their last read; an operator that is the last to read a value of its own
    result's layout, made by one of the steps or in `owned`, writes over it.
    """
    begin = frozenset(start)
    deaths = _deaths(flow, steps, begin, end)
    sizes, operators = flow.sizes, flow.operators
    mine = set(owned)
    replayed = flow.states & begin
    live = sum([sizes[v] for v in begin])
    during, after, reused = [], [], []
    for step, (dying, unused) in zip(steps, deaths, strict=True):
        operator = operators[step.operator]
        height = live + operator.workspace_bytes
        if operator.state in replayed:  # a replay puts the generator's present state aside
            height += sizes[operator.state]
        made = sum([sizes[v] for v in step.makes])
        over = _written_over(operator, step, dying, mine)
        if over is None:
            height += made
            if step.makes != operator.writes:  # other results are made a second time
                height += sum([sizes[v] for v in operator.writes if v not in step.makes])
        live += made
        for value in dying:
            live -= sizes[value]
        for value in unused:
            live -= sizes[value]
        mine.update(step.makes)
        mine.difference_update(dying)
        during.append(height)
        after.append(live)
        reused.append(over)
    reads = tuple([dying for dying, _ in deaths])
    return Timeline(tuple(steps), tuple(during), tuple(after), tuple(reused), reads)


def _written_over(
    operator: Operator, step: Step, dying: Collection[int], mine: Collection[int]
) -> int | None:
    """The value that the operator writes its one result over, if it may."""
    if not operator.reusable or len(operator.writes) != 1 or not step.makes:
        return None
    for value in operator.reusable:
        if value in dying and value in mine:
            return value
    return None


def _deaths(
    flow: Dataflow, steps: Sequence[Step], start: frozenset[int], end: Collection[int]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each step: the values it is the last to read, and those it makes that nobody reads."""
    needed = set(end)
    replayed = flow.states & start
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for step in reversed(steps):
        makes = step.makes
        unused = () if needed.issuperset(makes) else tuple([v for v in makes if v not in needed])
        needed.difference_update(makes)
        reads = flow.own_reads[step.operator]
        if replayed:  # a replay reads the saved state
            state = flow.operators[step.operator].state
            reads = (*reads, state) if state in replayed else reads
        dying = tuple([v for v in reads if v not in needed])
        needed.update(reads)
        found.append((dying, unused))
    found.reverse()
    return found
