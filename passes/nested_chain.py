"""The step as a chain of stages that may be run more than once, and what its schedules mean for values.

The graph is cut at its narrow places, as for the search over spans. Each stage between two of them can
be treated in the ways that this search found for it; `graphopt.passes.rotor` finds the best schedule of
the chain, in which the forward from a stored place to another may run several times. Here a schedule
becomes a `Choice`: what the forward keeps, and what the backward forgets between its operators.

A chain knows only neighbours. So of two cuts that the same value crosses, one is left out and the stage
grows; where a value crosses many (a skip connection, the output of an encoder), it stays kept for as
long as it is read. A graph without narrow places is one stage, and gains nothing.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.cost_models.schedule import backward_steps
from graphopt.passes import rotor, span_options
from graphopt.passes.chain_solver import Chain, Choice, Run
from graphopt.passes.forgetting import forgotten
from graphopt.passes.local_problem import Surroundings
from graphopt.passes.segments import Spans, deep_reads

FAR = 6  # cuts: a value that crosses more of them is kept, instead of leaving out all but one of them
SHARED = 0.05  # of what crosses a cut: what may be kept as it crosses the cut before, too
MAX_STAGES = 96  # the time for a schedule grows with the third power of their number


@dataclass(frozen=True)
class Way:
    """One way to treat a stage, in numbers of the whole: what it costs, its labels, and its order."""

    cost: rotor.Option
    keep: frozenset[int]
    ephemeral: frozenset[int]
    order: tuple[int, ...]


@dataclass(frozen=True)
class NestedChain:
    """`flow` as a chain. Stage i makes the values `made[i - 1]`, and leaves `outputs[i]` to the next.

    The options of a stage of `chain` are the costs of its `ways`. Values of `always` are kept.
    """

    flow: Dataflow
    chain: rotor.StageChain
    ways: tuple[tuple[Way, ...], ...]
    made: tuple[frozenset[int], ...]
    outputs: tuple[frozenset[int], ...]
    always: frozenset[int]

    @staticmethod
    def of(flow: Dataflow, spans: Chain) -> "NestedChain":
        """The chain of `flow`, with the options that `spans` has for its stages."""
        cut = spans.spans
        places = _places(flow, cut)
        runs = [spans.run(a, b) for a, b in pairwise(places)]
        made = tuple(_made(flow, range(cut.cuts[r.first], cut.cuts[r.stop])) for r in runs)
        always = _always(flow, cut, places)
        crossing = (*(cut.crossing[p] for p in places[:-1]), frozenset[int]())
        outputs = tuple(values - always for values in crossing)
        builder = _Stages(flow, cut, runs, made, outputs, always)
        stages, ways = zip(*builder.all(), strict=True)
        chain = rotor.StageChain(tuple(stages), builder.gradients[0])
        return NestedChain(flow, chain, tuple(ways), made, outputs, always)

    def __len__(self) -> int:
        return len(self.chain)

    def choice(self, schedule: rotor.Schedule) -> Choice:
        """What `schedule` means: labels, the order of the backward, and what it forgets in between."""
        ways = {
            o.stage: self.ways[o.stage - 1][o.option] for o in schedule.operations if o.kind == "save"
        }
        kept, held = self._held(schedule, ways)
        keep = kept | self.always
        ephemeral = frozenset[int]().union(*(w.ephemeral for w in ways.values())) - keep
        order: list[int] = []
        wish: dict[int, frozenset[int]] = {}
        below = frozenset[int]().union(*self.made) - keep - ephemeral
        for stage in range(len(self), 0, -1):
            order += ways[stage].order
            below -= self.made[stage - 1]
            if order:
                wish[order[-1]] = below - held[stage]
        steps = backward_steps(self.flow, keep, ephemeral, order, wish)
        forget = forgotten(steps, wish)
        return Choice(keep, ephemeral, tuple(order), schedule.seconds, schedule.peak_bytes, forget)

    def _held(
        self, schedule: rotor.Schedule, ways: dict[int, Way]
    ) -> tuple[frozenset[int], dict[int, frozenset[int]]]:
        """What the forward keeps, and what is held after the backward of each stage."""
        stored, saved = set[int](), set[int]()
        kept: frozenset[int] | None = None
        after: dict[int, frozenset[int]] = {}
        pending = len(self)

        def alive() -> frozenset[int]:
            outputs = (self.outputs[i] for i in stored)
            return frozenset[int]().union(*outputs, *(ways[i].keep for i in saved))

        for operation in schedule.operations:
            if operation.kind == "backward":
                kept = alive() if kept is None else kept
                saved.discard(operation.stage)
                after[operation.stage] = alive()  # the stage's input included: the next one's output
                pending = operation.stage - 1
                stored.discard(pending)
            elif operation.kind != "forward":
                stored.add(operation.stage - 1)
                if operation.kind == "save":
                    saved.add(operation.stage)
                    stored.update({operation.stage} if pending > operation.stage else ())
        assert kept is not None  # a schedule has a backward
        return kept, after


# --- where to cut --------------------------------------------------------------------------------


def _places(flow: Dataflow, cut: Spans) -> list[int]:
    """The cuts between stages, as numbers of cuts, both ends included."""
    counts: dict[int, int] = {}
    for values in cut.crossing[1:]:
        for value in values:
            counts[value] = counts.get(value, 0) + 1
    far = {v for v, count in counts.items() if count > FAR}
    found = [0]
    for place in range(1, len(cut)):
        mine = cut.crossing[place] - far
        shared = _bytes(flow, mine & cut.crossing[found[-1]])
        if mine and shared <= SHARED * _bytes(flow, mine):
            found.append(place)
    stride = -(-len(found) // MAX_STAGES)
    return [*found[::stride], len(cut)]


def _always(flow: Dataflow, cut: Spans, places: Sequence[int]) -> frozenset[int]:
    """What is kept whatever the schedule: what crosses several places, or cannot be made again."""
    once, twice = set[int](), set[int]()
    for place in places[:-1]:
        twice |= once & cut.crossing[place]
        once |= cut.crossing[place]
    stuck = _made(flow, (i for i in flow.forward if not flow.operators[i].recomputable))
    return frozenset(cut.pinned | twice | stuck)


def _made(flow: Dataflow, operators: Iterable[int]) -> frozenset[int]:
    return frozenset(v for i in operators for v in flow.operators[i].writes)


def _bytes(flow: Dataflow, values: frozenset[int] | set[int]) -> int:
    return sum(flow.values[v].nbytes for v in values)


# --- what each stage costs -----------------------------------------------------------------------


class _Stages:
    """Translates what is known of each run into the terms of `rotor`.

    `beside[i]` are the bytes of `always` while the backward of stage i is next, `gradients[i]` those
    and what the backward has made. `returned[i]` are those of what stage i makes for the caller only: it
    stays until the forward ends, so for the last stage they count among the `gradients`.
    """

    def __init__(
        self,
        flow: Dataflow,
        cut: Spans,
        runs: Sequence[Run],
        made: Sequence[frozenset[int]],
        outputs: Sequence[frozenset[int]],
        always: frozenset[int],
    ) -> None:
        self.flow, self.cut, self.runs = flow, cut, runs
        self.made, self.outputs, self.always = made, outputs, always
        self.at_once: dict[int, tuple[span_options.Option, ...]] = {}
        self.beside = self._beside()
        alive = Surroundings.of(flow, cut).alive
        position, found = 0, [_bytes(flow, alive[0])]
        for run in reversed(runs):
            position += sum(len(cut.anchors[k]) for k in range(run.first, run.stop))
            found.append(_bytes(flow, alive[position]))
        self.gradients = [g + b for g, b in zip(reversed(found), self.beside, strict=True)]
        mine = [frozenset(flow.outputs) & m - always - o for m, o in zip(made, outputs[1:], strict=True)]
        self.returned = [0, *(_bytes(flow, values) for values in mine[:-1]), 0]
        self.gradients[-1] += sum(self.returned)

    def all(self) -> Iterator[tuple[rotor.Stage, tuple[Way, ...]]]:
        """Each stage and its ways."""
        solved: dict[object, tuple[span_options.Option, ...]] = {}
        for number, run in enumerate(self.runs, 1):
            problem = run.placed.problem
            if problem not in solved:
                solved[problem] = span_options.nothing_kept(problem, run.options)
            seconds = self._forward_seconds(number)
            height = solved[problem][0].forward_bytes - self._inside(number) - self.returned[number]
            ways = [self._saving(number, o, seconds) for o in run.options]
            ways += [self._making(number, o, seconds, height) for o in solved[problem]]
            output = _bytes(self.flow, self.outputs[number])
            costs = tuple(w.cost for w in ways)
            gradient = self.gradients[number]
            yield rotor.Stage(output, gradient, seconds, costs, height - output), tuple(ways)

    def _saving(self, number: int, option: span_options.Option, seconds: float) -> Way:
        """A forward that keeps what `option` does, and its backward."""
        values = self.runs[number - 1].placed.values
        keep = frozenset(values[v] for v in option.keep)
        kept = _bytes(self.flow, keep - self.outputs[number] - self.always)
        output = _bytes(self.flow, self.outputs[number])
        forward = option.forward_bytes - self._inside(number) - self.returned[number] - kept - output
        backward = self._backward_bytes(number, option) - kept
        cost = rotor.Option(kept, seconds, option.seconds, forward, backward)
        return self._way(number, cost, option, keep)

    def _making(self, number: int, option: span_options.Option, seconds: float, height: int) -> Way:
        """A backward that makes all it needs. Only the last stage's forward runs in any case."""
        last = number == len(self.runs)
        backward = self._backward_bytes(number, option)
        cost = rotor.Option(
            0, seconds if last else 0.0, option.seconds, height if last else 0, backward, at_once=True
        )
        return self._way(number, cost, option, frozenset())

    def _way(
        self, number: int, cost: rotor.Option, option: span_options.Option, keep: frozenset[int]
    ) -> Way:
        placed = self.runs[number - 1].placed
        ephemeral = frozenset(placed.values[v] for v in option.ephemeral)
        return Way(cost, keep, ephemeral, tuple(placed.operators[a] for a in option.order))

    def _backward_bytes(self, number: int, option: span_options.Option) -> int:
        """What the backward needs besides its input and the gradients, what is kept for it included."""
        placed = self.runs[number - 1].placed
        reads = {placed.values[v] for o in placed.problem.flow.operators for v in o.reads}
        unread = _bytes(self.flow, self.outputs[number] - reads)  # gone with the next stage's backward
        own = option.backward_bytes + placed.passing_bytes - unread - self._inside(number)
        return own + self.beside[number] - self.gradients[number] - self.gradients[number - 1]

    def _inside(self, number: int) -> int:
        """Bytes of what the stage makes and is always kept; they are counted for the whole chain."""
        return _bytes(self.flow, self.always & self.made[number - 1])

    def _forward_seconds(self, number: int) -> float:
        """Of what makes the stage's output."""
        run = self.runs[number - 1]
        wanted, seconds = set(self.outputs[number]), 0.0
        for index in range(self.cut.cuts[run.stop] - 1, self.cut.cuts[run.first] - 1, -1):
            operator = self.flow.operators[index]
            if not wanted.isdisjoint(operator.writes):
                seconds += operator.seconds
                wanted.update(v for v in operator.reads if v not in self.always)
        return seconds

    def _beside(self) -> list[int]:
        """For each stage, and before the first: what is always kept and still to be read."""
        first_use: dict[int, int] = {}
        for number, run in enumerate(self.runs, 1):
            late = [a for k in range(run.first, run.stop) for a in self.cut.anchors[k]]
            inside = range(self.cut.cuts[run.first], self.cut.cuts[run.stop])
            read = {v for values in deep_reads(self.flow, late) for v in values}
            read.update(v for i in inside for v in self.flow.operators[i].reads)
            for value in read & self.always:
                first_use.setdefault(value, number)
        sizes = [0] * (len(self.runs) + 1)
        for value, number in first_use.items():
            if self.flow.values[value].producer != NO_PRODUCER:
                sizes[number] += self.flow.values[value].nbytes
        return [sum(sizes[: n + 1]) for n in range(len(sizes))]
