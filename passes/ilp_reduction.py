"""A step reduced to what a lower bound of its recomputation needs: fewer values, operators and moments.

Every reduction only makes the problem easier to satisfy, or keeps a best solution, so that the least
recomputation of the reduced problem is never above that of a real schedule:

- values that are tiny together take no memory; they are kept, and nobody makes them again;
- a value that only one operator reads, which makes nothing larger from it alone, need not be held:
  what is made from it is held instead. The two operators become one task;
- anchors that ask for nothing that could be made again, and the next one that does, are one stage, which
  leaves open when within it things are made and dropped; where there are too many, stages are joined.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow


@dataclass(frozen=True)
class Item:
    """A value that may be held from one stage to the next.

    `task` makes it; nothing after the stage `last` needs it. `late`: the backward makes it first.
    """

    value: int
    nbytes: int
    task: int
    last: int
    late: bool


@dataclass(frozen=True)
class Task:
    """An operator, or several in a row, that may run before any anchor; `reads`, `writes` are items.

    `running_bytes` are surely alive at some moment of its run. `once`: its first run is no repetition.
    """

    seconds: float
    running_bytes: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    once: bool
    recomputable: bool


@dataclass(frozen=True)
class Stage:
    """Successive anchors, by their places in the order, and the items that each reads."""

    places: range
    reads: tuple[frozenset[int], ...]

    def all_reads(self) -> frozenset[int]:
        """The items that one of the anchors reads."""
        return frozenset().union(*self.reads)


@dataclass(frozen=True)
class Reduced:
    """Items, tasks and stages; `order` are the anchors, as indices of operators.

    `ignored` are the values that take no memory here.
    """

    order: tuple[int, ...]
    ignored: frozenset[int]
    items: tuple[Item, ...]
    tasks: tuple[Task, ...]
    stages: tuple[Stage, ...]

    @property
    def variables(self) -> int:
        """How many decisions there are: to hold an item into a stage, to run a task in one."""
        return sum(i.last + 1 for i in self.items) + sum(
            1 + max(self.items[w].last for w in t.writes) for t in self.tasks if t.recomputable
        )


def reduced(flow: Dataflow, order: Sequence[int], ignored_bytes: int, max_variables: int) -> Reduced:
    """The problem of `flow` with the anchors in `order`.

    The smallest values, `ignored_bytes` together, are left out; stages are joined until at most
    `max_variables` decisions remain.
    """
    free = _tiny(flow, order, ignored_bytes)
    stages = _stages([_demands(flow, a, free) for a in order])
    problem = _numbered(flow, order, stages, free)
    while problem.variables > max_variables and len(stages) > 1:
        pairs = range(0, len(stages), 2)
        stages = [range(stages[k].start, stages[k : k + 2][-1].stop) for k in pairs]
        problem = _numbered(flow, order, stages, free)
    return problem


def on_demand(flow: Dataflow, value: int) -> bool:
    """True where `value` may be made before any anchor: by the forward, or by the backward for others."""
    producer = flow.values[value].producer
    return producer != NO_PRODUCER and not flow.operators[producer].anchored


def _demands(flow: Dataflow, anchor: int, free: Collection[int]) -> frozenset[int]:
    return frozenset(v for v in flow.operators[anchor].reads if on_demand(flow, v) and v not in free)


def _needed(flow: Dataflow, values: Collection[int], free: Collection[int]) -> Iterator[int]:
    """`values` and all that they can be made from."""
    seen = {v for v in values if on_demand(flow, v) and v not in free}
    stack = list(seen)
    while stack:
        value = stack.pop()
        yield value
        operator = flow.operators[flow.values[value].producer]
        if not operator.recomputable:
            continue
        for read in operator.reads:
            if read not in seen and read not in free and on_demand(flow, read):
                seen.add(read)
                stack.append(read)


def _tiny(flow: Dataflow, order: Sequence[int], ignored_bytes: int) -> frozenset[int]:
    reads = {v for a in order for v in flow.operators[a].reads}
    found, total = set(), 0
    for value in sorted(_needed(flow, reads, ()), key=lambda v: (flow.values[v].nbytes, v)):
        total += flow.values[value].nbytes
        if total > ignored_bytes:
            break
        found.add(value)
    return frozenset(found)


def _stages(demands: Sequence[frozenset[int]]) -> list[range]:
    """Ranges of places, each but the last ending with an anchor that asks for something new."""
    found: list[range] = []
    begin = 0
    for place, wanted in enumerate(demands):
        if wanted and found and begin == place and wanted <= demands[found[-1].stop - 1]:
            found[-1] = range(found[-1].start, place + 1)
        elif wanted:
            found.append(range(begin, place + 1))
        else:
            continue
        begin = place + 1
    if begin < len(demands):
        found.append(range(begin, len(demands)))
    return found


def _numbered(
    flow: Dataflow, order: Sequence[int], stages: Sequence[range], free: frozenset[int]
) -> Reduced:
    last: dict[int, int] = {}
    for number in range(len(stages) - 1, -1, -1):
        wanted = {v for p in stages[number] for v in flow.operators[order[p]].reads}
        for value in _needed(flow, wanted, {*free, *last}):
            last[value] = number
    tasks, replaced = _merged(flow, order, last)
    values = [v for v in sorted(last) if v not in replaced]
    number_of = {v: i for i, v in enumerate(values)}
    task_of = {v: k for k, t in enumerate(tasks) for v in t.writes}
    items = tuple(
        Item(
            v,
            flow.values[v].nbytes,
            task_of[v],
            last[v],
            flow.operators[flow.values[v].producer].backward,
        )
        for v in values
    )
    numbered = tuple(
        replace(
            t,
            reads=tuple(number_of[v] for v in t.reads),
            writes=tuple(number_of[v] for v in t.writes),
        )
        for t in tasks
    )
    found = [
        Stage(
            s,
            tuple(
                frozenset(number_of[v] for v in flow.operators[order[p]].reads if v in last) for p in s
            ),
        )
        for s in stages
    ]
    return Reduced(tuple(order), free, items, numbered, tuple(found))


def _merged(
    flow: Dataflow, order: Sequence[int], last: dict[int, int]
) -> tuple[list[Task], frozenset[int]]:
    """The tasks, with values for numbers of items, and the values inside of tasks."""
    producers = sorted({flow.values[v].producer for v in last})
    tasks = {p: _task(flow, p, last) for p in producers}
    task_of = {p: p for p in producers}
    readers: dict[int, list[int]] = {}
    for index, operator in enumerate(flow.operators):
        for value in operator.reads:
            readers.setdefault(value, []).append(index)
    stays = {*flow.gradients, *flow.outputs}
    inside: set[int] = set()
    for index in producers:  # in the order of the program: a chain is joined from its begin
        after = tasks[index]
        if len(after.reads) != 1 or len(after.writes) != 1 or not after.recomputable:
            continue
        (value,), (made,) = after.reads, after.writes
        home = task_of[flow.values[value].producer]
        before = tasks[home]
        if (
            readers[value] == [index]
            and value not in stays
            and before.writes == (value,)
            and before.once == after.once
            and flow.values[value].nbytes >= flow.values[made].nbytes
        ):
            tasks[home] = replace(before, seconds=before.seconds + after.seconds, writes=(made,))
            task_of[index] = home
            del tasks[index]
            inside.add(value)
    return list(tasks.values()), frozenset(inside)


def _task(flow: Dataflow, index: int, wanted: Collection[int]) -> Task:
    operator = flow.operators[index]
    nbytes = operator.workspace_bytes
    # The result may be written over an operand that dies.
    if not operator.reusable or len(operator.writes) != 1:
        nbytes += sum(flow.values[v].nbytes for v in operator.writes)
    nbytes += sum(flow.values[v].nbytes for v in operator.reads if on_demand(flow, v))
    return Task(
        operator.seconds,
        nbytes,
        tuple(v for v in operator.reads if v in wanted) if operator.recomputable else (),
        tuple(v for v in operator.writes if v in wanted),
        operator.backward,
        operator.recomputable,
    )
