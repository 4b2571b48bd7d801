"""The peak of a training step in which only some parameters get a gradient, without rewriting it.

The dataflow of the whole step is pruned as `graphopt.passes.frozen_gradients` prunes the program, and
simulated as `graphopt.cost_models.schedule.simulate` does it, in plain loops, so that a search can ask
for thousands of choices. Only the scratch of an operator that makes fewer gradients than before is
taken as it was.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from torch import fx

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.passes.frozen_gradients import INPUT, MASKS, bias_alone, reads_input
from graphopt.program import Program


@dataclass(frozen=True, slots=True)
class _Run:
    """One operator of the step: what it reads and makes, its scratch, what it may write over."""

    reads: tuple[int, ...]
    writes: tuple[int, ...]
    scratch_bytes: int
    reusable: tuple[int, ...]


@dataclass(frozen=True)
class _Masked:
    """An operator that makes several gradients: its node, the value of each result, its input."""

    node: fx.Node
    results: tuple[int, ...]
    input: int


class UpdateMemory:
    """Peaks of `program`, whose dataflow is `flow`, by which gradients it returns."""

    def __init__(self, program: Program, flow: Dataflow) -> None:
        self.flow = flow
        self.nbytes = [v.nbytes for v in flow.values]
        static = {i for i, v in enumerate(flow.values) if v.producer == NO_PRODUCER}
        late = {w for o in flow.operators if o.backward for w in o.writes}
        self.runs = [
            _Run(
                tuple(v for v in o.reads if v not in static),
                o.writes,
                o.workspace_bytes,
                # a half of the step writes over what it made itself
                tuple(v for v in o.reusable if v not in static and (v in late) is o.backward),
            )
            for o in flow.operators
        ]
        self.forced = [not o.recomputable for o in flow.operators]
        self.first_late = len(flow.forward)
        nodes = {n.name: n for n in program.graph.nodes}
        self.masked: dict[int, _Masked] = {}
        for index, operator in enumerate(flow.operators):
            node = nodes[operator.name]
            source = node.args[INPUT] if node.target in MASKS else None
            if isinstance(source, fx.Node):
                results = flow.value_of[node.name]
                self.masked[index] = _Masked(node, results, flow.value_of[source.name][0])

    def peak_bytes(self, gradients: Iterable[int]) -> int:
        """The peak of the step that returns only the values `gradients`, static bytes included."""
        wanted = frozenset(gradients)
        late = self._backward(wanted)
        made = {w for run in late for w in run.writes}
        keep = {v for run in late for v in run.reads if v not in made}
        keep |= {v for v in wanted if v not in made and self.flow.values[v].producer != NO_PRODUCER}
        early = self._forward(keep)
        forward = self._peak(early, 0, keep | self._outputs())
        backward = self._peak(late, sum(self.nbytes[v] for v in keep), wanted)
        return self.flow.static_bytes + max(forward, backward)

    def _outputs(self) -> set[int]:
        return {v for v in self.flow.outputs if self.flow.values[v].producer != NO_PRODUCER}

    def _forward(self, keep: Collection[int]) -> list[_Run]:
        """The forward's operators that the outputs and the kept values need."""
        needed = {*self.flow.outputs, *keep}
        runs = []
        for index in range(self.first_late - 1, -1, -1):
            run = self.runs[index]
            if self.forced[index] or not needed.isdisjoint(run.writes):
                needed.update(run.reads)
                runs.append(run)
        return runs[::-1]

    def _backward(self, wanted: Collection[int]) -> list[_Run]:
        """The backward's operators, each with what is left of it."""
        needed = set(wanted)
        runs: list[tuple[_Run, int | None]] = []  # with the input that is asked for its shape
        for index in range(len(self.runs) - 1, self.first_late - 1, -1):
            run = self.runs[index]
            if run.writes and needed.isdisjoint(run.writes):
                continue
            masked, shape = self.masked.get(index), None
            if masked is not None:
                run, shape = self._narrowed(run, masked, needed)
            needed.update(run.reads)
            runs.append((run, shape))
        read = {v for run, _ in runs for v in run.reads}
        return [run if shape is None else self._shaped(run, shape, read) for run, shape in runs[::-1]]

    def _narrowed(self, run: _Run, masked: _Masked, needed: Collection[int]) -> tuple[_Run, int | None]:
        """The operator that makes only what is needed, and the input that it asks for its shape."""
        mask = [v in needed for v in masked.results]
        makes = tuple(v for v in run.writes if v in needed)
        if reads_input(masked.node, mask):
            return replace(run, writes=makes), None
        reads = tuple(v for v in run.reads if v != masked.input)
        if bias_alone(masked.node, mask) and not mask[0]:
            return _Run(reads, makes, 0, ()), None
        is_made = self.flow.values[masked.input].producer != NO_PRODUCER
        return replace(run, reads=reads, writes=makes), masked.input if is_made else None

    def _shaped(self, run: _Run, shape: int, read: Collection[int]) -> _Run:
        """An input that nothing reads is an empty tensor; else it stays, and is there anyway."""
        if shape in read:
            return replace(run, reads=(*run.reads, shape))
        return replace(run, scratch_bytes=run.scratch_bytes + self.nbytes[shape])

    def _peak(self, runs: list[_Run], live: int, end: Collection[int]) -> int:
        """The most bytes alive while `runs` are run, with `live` bytes there before them."""
        needed = set(end)
        deaths: list[tuple[set[int], int]] = []
        nbytes = self.nbytes
        for run in reversed(runs):
            unread = sum(nbytes[w] for w in run.writes if w not in needed)
            needed.difference_update(run.writes)
            dying = {v for v in run.reads if v not in needed}
            needed.update(run.reads)
            deaths.append((dying, unread))
        peak = 0
        for run, (dying, unread) in zip(runs, reversed(deaths), strict=True):
            made = sum(nbytes[w] for w in run.writes)
            over = len(run.writes) == 1 and any(v in dying for v in run.reusable)
            peak = max(peak, live + run.scratch_bytes + (0 if over else made))
            live += made - unread - sum(nbytes[v] for v in dying)
        return peak
