"""Random small dataflows, and a naive interpreter of their schedules and allocations.

The interpreter shares no code with `graphopt.cost_models.schedule`: it makes an object for every
value that comes to exist, notes when it is read for the last time, and adds up what is alive.
"""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow, Operator, Value
from graphopt.cost_models.schedule import Step

# --- the naive interpreter ---------------------------------------------------------------------


@dataclass
class _Instance:
    """One stay of a value in memory: from the step that made it to the last that reads it."""

    value: int
    nbytes: int
    born: int
    owned: bool
    died: float | None = None  # the last step that reads it; None: nobody does


def naive_backward(
    flow: Dataflow,
    keep: Collection[int],
    ephemeral: Collection[int],
    order: Collection[int] | None = None,
    forget: Iterable[tuple[int, Collection[int]]] = (),
) -> list[tuple[int, tuple[int, ...]]]:
    """(operator, values it makes) of the backward with recomputation, by plain recursion."""
    forgets = dict(forget)
    live = set(keep)
    found: list[tuple[int, tuple[int, ...]]] = []

    def need(value: int) -> list[int]:
        producer = flow.values[value].producer
        if value in live or producer == NO_PRODUCER:
            return []
        dropped = [d for read in flow.operators[producer].reads for d in need(read)]
        made = tuple(w for w in flow.operators[producer].writes if w not in live)
        found.append((producer, made))
        live.update(made)
        return dropped + [w for w in made if w in ephemeral]

    anchored = [i for i, o in enumerate(flow.operators) if o.backward and o.anchored]
    for index in anchored if order is None else order:
        operator = flow.operators[index]
        dropped = [d for read in operator.reads for d in need(read)]
        found.append((index, operator.writes))
        live.update(operator.writes)
        live.difference_update(dropped, forgets.get(index, ()))
    return found


def naive_forward(flow: Dataflow, keep: Collection[int]) -> list[tuple[int, tuple[int, ...]]]:
    """(operator, values it makes) of the forward: what outputs and kept values depend on."""
    needed: set[int] = set()

    def need(value: int) -> None:
        producer = flow.values[value].producer
        if producer != NO_PRODUCER and producer not in needed:
            needed.add(producer)
            for read in flow.operators[producer].reads:
                need(read)

    for value in (*flow.outputs, *keep):
        need(value)
    for index in flow.forward:
        if not flow.operators[index].recomputable:
            for value in flow.operators[index].writes:
                need(value)
    return [(i, flow.operators[i].writes) for i in sorted(needed)]


def naive_bytes(
    flow: Dataflow,
    steps: Sequence[tuple[int, tuple[int, ...]]],
    start: Collection[int],
    end: Collection[int],
    owned: Collection[int] = (),
) -> tuple[list[int], list[int], list[int | None]]:
    """Bytes alive while each step runs and after it, and the value each writes its result over."""
    instances = _instances(flow, steps, start, end, owned)
    during, after, reused = [], [], []
    for time, (index, made) in enumerate(steps):
        operator = flow.operators[index]
        before = sum(_alive(i, time - 1) * i.nbytes for i in instances)
        over = _overwritten(operator, made, instances, time)
        fresh = 0 if over is not None else sum(flow.values[v].nbytes for v in operator.writes)
        during.append(before + fresh + operator.workspace_bytes)
        after.append(sum(_alive(i, time) * i.nbytes for i in instances))
        reused.append(over)
    return during, after, reused


def _instances(
    flow: Dataflow,
    steps: Sequence[tuple[int, tuple[int, ...]]],
    start: Collection[int],
    end: Collection[int],
    owned: Collection[int],
) -> list[_Instance]:
    current = {v: _Instance(v, flow.values[v].nbytes, -1, v in owned) for v in start}
    everything = list(current.values())
    for time, (index, made) in enumerate(steps):
        for value in flow.operators[index].reads:
            if value in current:
                current[value].died = time
        for value in made:
            current[value] = _Instance(value, flow.values[value].nbytes, time, True)
            everything.append(current[value])
    for value in end:
        if value in current:
            current[value].died = float("inf")
    for instance in everything:
        if instance.died is None:  # what was there from the start is not this program's to free
            instance.died = float("inf") if instance.born < 0 else instance.born
    return everything


def _alive(instance: _Instance, time: int) -> bool:
    """Alive after step `time`."""
    return instance.born <= time and instance.died is not None and instance.died > time


def _overwritten(
    operator: Operator, made: tuple[int, ...], instances: list[_Instance], time: int
) -> int | None:
    if len(operator.writes) != 1 or not made:
        return None
    dying = {i.value for i in instances if i.died == time and i.born < time and i.owned}
    return next((v for v in operator.reusable if v in dying), None)


def naive_step(
    flow: Dataflow,
    keep: Collection[int],
    ephemeral: Collection[int],
    order: Collection[int] | None = None,
    forget: Iterable[tuple[int, Collection[int]]] = (),
) -> tuple[int, float]:
    """Peak bytes (static ones excluded) and seconds of recomputation of a whole step."""
    forward, _, _ = naive_bytes(flow, naive_forward(flow, keep), (), {*keep, *flow.outputs})
    steps = naive_backward(flow, keep, ephemeral, order, forget)
    backward, _, _ = naive_bytes(flow, steps, keep, flow.gradients)
    runs = [flow.operators[index] for index, _ in steps]
    once = {o.name: o.seconds for o in runs if o.backward}
    seconds = sum(o.seconds for o in runs) - sum(once.values())
    return max([*forward, *backward], default=0), seconds


def brute_force(
    flow: Dataflow, labels: int = 3, order: Collection[int] | None = None
) -> Iterator[tuple[int, float]]:
    """(peak bytes, seconds) of every labelling of the forward's values: kept, held, ephemeral."""
    values = [v for i in flow.forward for v in flow.operators[i].writes]
    for given in itertools.product(range(labels), repeat=len(values)):
        keep = {v for v, label in zip(values, given, strict=True) if label == 0}
        ephemeral = {v for v, label in zip(values, given, strict=True) if label == 2}
        yield naive_step(flow, keep, ephemeral, order)


# --- random dataflows --------------------------------------------------------------------------


@dataclass
class FlowBuilder:
    """Puts a Dataflow together, operator by operator."""

    values: list[Value] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)

    def static(self, nbytes: int) -> int:
        """A value that exists before the step."""
        self.values.append(Value(nbytes, NO_PRODUCER, f"v{len(self.values)}"))
        return len(self.values) - 1

    def operator(
        self,
        reads: Sequence[int],
        sizes: Sequence[int],
        *,
        seconds: float = 1.0,
        flops: int = 0,
        workspace: int = 0,
        reusable: Sequence[int] = (),
        backward: bool = False,
        anchored: bool = True,
        recomputable: bool = True,
    ) -> tuple[int, ...]:
        """An operator that makes values of `sizes` bytes; their numbers."""
        index, first = len(self.operators), len(self.values)
        self.values += [Value(n, index, f"v{first + i}") for i, n in enumerate(sizes)]
        writes = tuple(range(first, first + len(sizes)))
        self.operators.append(
            Operator(
                f"op{index}",
                tuple(dict.fromkeys(reads)),
                writes,
                tuple(reusable),
                seconds,
                flops,
                workspace,
                backward,
                backward and anchored,
                recomputable,
                None,
            )
        )
        return writes

    def flow(self, outputs: Sequence[int], gradients: Sequence[int]) -> Dataflow:
        """The Dataflow."""
        return Dataflow(
            tuple(self.operators),
            tuple(self.values),
            {o.name: o.writes for o in self.operators},
            frozenset(o.name for o in self.operators if o.backward),
            tuple(outputs),
            tuple(gradients),
            sum(v.nbytes for v in self.values if v.producer == NO_PRODUCER),
        )


def blocks(count: int, inner: int = 5) -> Dataflow:
    """Equal blocks, narrow where they meet, `inner` times wider inside; backwards read the inputs."""
    build = FlowBuilder()
    made = [build.static(100)]
    for _ in range(count):
        (wide,) = build.operator([made[-1]], [100 * inner], seconds=3.0)
        (wide2,) = build.operator([wide], [100 * inner], seconds=1.0)
        made += [wide, wide2, *build.operator([wide2], [100], seconds=2.0)]
    gradient: tuple[int, ...] = ()
    for value in reversed(made[:-1]):
        gradient = build.operator(
            [*gradient, value], [build.values[value].nbytes], backward=True, seconds=2.0
        )
    return build.flow([made[-1]], gradient)


SIZES = st.integers(1, 8).map(lambda n: n * 100)
SECONDS = st.integers(1, 10).map(lambda n: n / 10)
SCRATCH = st.sampled_from([0, 0, 0, 250])


@st.composite
def training_flows(
    draw: st.DrawFn, *, operators: int = 6, chain: bool = False, scratch: bool = True
) -> Dataflow:
    """A forward of up to `operators` operators and its backward in reversed order.

    Each operator of the backward reads the gradients of what its operator made and some of its
    inputs and outputs; it makes a gradient for each input, and some a gradient to return.
    """
    build = FlowBuilder()
    made = [build.static(draw(SIZES))]
    reads_of: list[tuple[int, ...]] = []
    count = draw(st.integers(2, operators))
    for number in range(count):
        reads = {made[-1]}
        if not chain and len(made) > 1:
            reads |= draw(st.sets(st.sampled_from(made[:-1]), max_size=2))
            if len(reads) > 1 and draw(st.integers(0, 5)) == 0:
                reads.discard(made[-1])
        if number == count - 1:  # nothing is made for nobody
            reads |= set(made[1:]).difference(*reads_of) if reads_of else set()
        reads_of.append(tuple(sorted(reads)))
        size = draw(SIZES)
        same = [v for v in reads if v != made[0] and build.values[v].nbytes == size]
        reusable = same[:1] if draw(st.booleans()) else []
        seconds, flops = draw(SECONDS), draw(st.sampled_from([0, 0, 100]))
        workspace = draw(SCRATCH) if scratch else 0
        made += build.operator(
            reads_of[-1],
            [size],
            seconds=seconds,
            flops=flops,
            workspace=workspace,
            reusable=reusable,
        )
    return _with_backward(draw, build, made, reads_of, scratch)


def _with_backward(
    draw: st.DrawFn,
    build: FlowBuilder,
    made: list[int],
    reads_of: list[tuple[int, ...]],
    scratch: bool,
) -> Dataflow:
    gradients: dict[int, list[int]] = {}
    returned: list[int] = []
    for output, reads in zip(reversed(made[1:]), reversed(reads_of), strict=True):
        wanted = [v for v in (*reads, output) if v != made[0] and draw(st.booleans())]
        inner = [v for v in reads if v != made[0]]
        sizes = [build.values[v].nbytes for v in inner]
        if draw(st.booleans()) or not sizes:
            sizes.append(draw(st.sampled_from([0, 50, 300])))
        new = build.operator(
            [*gradients.get(output, []), *wanted],
            sizes,
            seconds=0.1,
            workspace=draw(SCRATCH) if scratch else 0,
            backward=True,
        )
        for value, gradient in zip(inner, new, strict=False):
            gradients.setdefault(value, []).append(gradient)
        returned += new[len(inner) :]
    return build.flow([made[-1]], returned)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[Dataflow, list[Step], set[int], set[int], set[int]]:
    """A random program of operators with several results, run in a random order, with repeats.

    The dataflow, the steps, what is alive at the start, what must be at the end, what is owned.
    """
    build = FlowBuilder()
    values = [build.static(draw(SIZES)), *build.operator([], [draw(SIZES)])]
    for _ in range(draw(st.integers(1, 7))):
        reads = draw(st.lists(st.sampled_from(values), max_size=3, unique=True))
        sizes = draw(st.lists(SIZES, min_size=1, max_size=3))
        reusable = draw(st.sets(st.sampled_from(reads))) if reads else set()
        reusable = {v for v in reusable if build.values[v].producer != NO_PRODUCER}
        values += build.operator(
            reads, sizes, workspace=draw(SCRATCH), reusable=sorted(reusable), backward=True
        )
    flow = build.flow([], [])
    inner = [v for v in values if flow.values[v].producer != NO_PRODUCER]
    start = draw(st.sets(st.sampled_from(inner)))
    live, steps = set(start), []
    for _ in range(draw(st.integers(1, 12))):
        ready = [
            i
            for i, o in enumerate(flow.operators)
            if all(r in live or flow.values[r].producer == NO_PRODUCER for r in o.reads)
        ]
        index = draw(st.sampled_from(ready))
        makes = tuple(w for w in flow.operators[index].writes if w not in live)
        steps.append(Step(index, makes))
        live.update(makes)
        live.difference_update(draw(st.sets(st.sampled_from(sorted(live)), max_size=2)))
    end = draw(st.sets(st.sampled_from(sorted(live)))) if live else set()
    owned = draw(st.sets(st.sampled_from(sorted(start)))) if start else set()
    return flow, steps, start, end, owned
