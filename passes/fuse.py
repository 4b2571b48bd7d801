"""Chains of cheap operators as one kernel each: what lies between them is never written to memory.

A step of a transformer spends much of its time outside of matrix products on reading and writing the
same tensors again: norms, activations, residuals, rotary embeddings, and their gradients. Here regions of
such operators, with reductions over the last dimension among them, become one generated kernel each
(`graphopt.codegen`), by the bytes that this saves. After Chen et al., "TVM", OSDI 2018, section 3, and
Ansel et al., "PyTorch 2", ASPLOS 2024, section 4.4, whose unit is the loop; here it is a row of a grid.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.nodes import NodeCost
from graphopt.cost_models.schedule import Step, Timeline, simulate
from graphopt.errors import PlanError
from graphopt.fused_ops import is_fused
from graphopt.passes.base import Pass
from graphopt.passes.fuse_apply import fused_program, with_kernels
from graphopt.passes.fuse_copies import with_copies
from graphopt.passes.fuse_kernel import Kernel
from graphopt.passes.fuse_regions import Missed, regions_of
from graphopt.passes.fuse_tune import TunedKernel, tuned_kernels
from graphopt.plan import Plan
from graphopt.program import Program

_SHOWN = 5  # kernels in a report


@dataclass(frozen=True)
class FusedRegion:
    """One kernel: the names of its nodes in order, of what it reads and of what it makes.

    Bytes are those read and written, seconds those predicted, of the nodes apart and of the kernel.
    """

    nodes: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    seconds_before: float
    seconds_after: float


@dataclass(frozen=True)
class FusePlan(Plan):
    """The kernels of a program, and every fusion that was looked at and not done.

    `peak_bytes` is that of the program as it stands in its order, parameters included, `baseline_bytes`
    that without the kernels. The nodes of `regions` are all that counts when the plan is applied; `tuned`
    says what measurement chose, which launches find in the folder of kernels.
    """

    regions: tuple[FusedRegion, ...]
    missed: tuple[Missed, ...]
    peak_bytes: int
    baseline_bytes: int
    tuned: tuple[TunedKernel, ...] = ()

    def __post_init__(self) -> None:
        for name, kind in (("regions", FusedRegion), ("missed", Missed), ("tuned", TunedKernel)):
            rows: Any = getattr(self, name)
            made = tuple(_from_json(kind, row) if isinstance(row, dict) else row for row in rows)
            object.__setattr__(self, name, made)

    @property
    def saved_bytes(self) -> int:
        """Bytes that are neither written nor read any more."""
        return sum(r.bytes_before - r.bytes_after for r in self.regions)

    @property
    def saved_seconds(self) -> float:
        """Predicted seconds that the step is shorter."""
        return sum(r.seconds_before - r.seconds_after for r in self.regions)

    def __str__(self) -> str:
        if not self.regions:
            return "nothing is fused"
        count = sum(len(r.nodes) for r in self.regions)
        before = sum(r.bytes_before for r in self.regions)
        text = (
            f"{count} operators in {len(self.regions)} kernels, which move "
            f"{format_bytes(before - self.saved_bytes)} instead of {format_bytes(before)}"
        )
        if not self.tuned:
            return text
        before_s = sum(t.count * t.seconds_before for t in self.tuned)
        after_s = sum(t.count * t.seconds_after for t in self.tuned)
        if before_s == after_s:
            return f"{text}; no other launches were measured to be faster"
        return f"{text}; tuned, they take {after_s * 1e3:.3g} ms instead of {before_s * 1e3:.3g}"

    def table(self) -> str:
        """The kernels that save most, and how many fusions are missed by which rule."""
        first = sorted(self.regions, key=lambda r: r.bytes_after - r.bytes_before)[:_SHOWN]
        rows = [
            f"{r.nodes[0]} .. {r.nodes[-1]}: {len(r.nodes)} operators, "
            f"{format_bytes(r.bytes_after)} instead of {format_bytes(r.bytes_before)}"
            for r in first
        ]
        rules = Counter(m.rule for m in self.missed)
        missed = ", ".join(f"{rule} {count}" for rule, count in rules.most_common())
        slowest = sorted(self.tuned, key=lambda t: -t.count * t.seconds_before)[:_SHOWN]
        rows += [
            f"{t.output}{f' and {t.count - 1} equal to it' if t.count > 1 else ''}: {t.choice}, "
            f"{t.seconds_after * 1e6:.1f} us instead of {t.seconds_before * 1e6:.1f}"
            for t in slowest
        ]
        return "\n".join([*rows, *([f"missed fusions by rule: {missed}"] if missed else [])])


def _from_json(kind: type, row: dict[str, Any]) -> Any:
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    except TypeError as error:
        raise PlanError(f"not a {kind.__name__}: {error}") from None


@dataclass(frozen=True)
class Fuse(Pass):
    """Run chains of cheap operators and reductions over rows as one generated kernel each.

    Put it last: what other passes keep is made as before, what they recompute may become part of a
    kernel, and the peak does not rise. Results differ from those of separate operators by rounding only.
    `min_bytes`: a kernel that saves fewer bytes of memory traffic is not made. `tune`: each distinct
    kernel is measured here, with launches as the rules choose them and with others near these, and the
    best are kept for this and every later process; that takes some seconds for each, once.
    """

    name: ClassVar[str] = "fuse"

    min_bytes: int = 0
    tune: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.min_bytes, int) or self.min_bytes < 0:
            raise PlanError(f"min_bytes={self.min_bytes!r} is not a number of bytes")
        if not isinstance(self.tune, bool):
            raise PlanError(f"tune={self.tune!r} is neither True nor False")

    def plan(self, program: Program, costs: Costs) -> FusePlan:
        """The kernels that are predicted to be faster and do not raise the peak."""
        kernels, missed = regions_of(program)
        remarks = list(missed)
        before, dropped, copying = _timeline(program, costs)[0].peak_bytes, 1, True
        while True:
            made = with_copies(program, kernels) if copying else kernels
            after = with_kernels(program, made)
            costs_after = _costs_with(after, costs)
            regions = _described(after, made, costs, costs_after)
            poor = {r.nodes: why for r in regions if (why := self._against(r)) is not None}
            if not poor:
                timeline, flow = _timeline(after, costs_after)
                peak = timeline.peak_bytes
                if peak <= before:
                    break
                if copying and _peak(program, kernels, costs) < peak:
                    copying = False
                    continue
                at_peak = _at_peak(timeline, flow, after, regions)[:dropped]
                poor, dropped = {r.nodes: "the peak would rise" for r in at_peak}, 2 * dropped
            remarks += [Missed(nodes[-1], "gain", why) for nodes, why in poor.items()]
            last = {nodes[-1] for nodes in poor}
            kernels = [k for k in kernels if k[0][-1].name not in last]
        static = costs.dataflow(program).static_bytes
        tuned = tuned_kernels(after) if self.tune else ()
        peaks = static + timeline.peak_bytes, static + before
        return FusePlan(tuple(regions), tuple(remarks), *peaks, tuned)

    def _against(self, region: FusedRegion) -> str | None:
        saved = region.bytes_before - region.bytes_after
        if saved < max(self.min_bytes, 1):
            return f"a kernel would save {saved} bytes"
        if region.seconds_after >= region.seconds_before:
            return (
                f"a kernel would take {region.seconds_after:.2e} s instead of {region.seconds_before:.2e}"
            )
        return None

    def apply(self, program: Program, plan: FusePlan) -> Program:
        """The program with the kernels of `plan`; PlanError for nodes or a region that it cannot have."""
        return fused_program(program, [region.nodes for region in plan.regions])


def _described(
    after: Program,
    kernels: Sequence[tuple[Sequence[fx.Node], Kernel]],
    costs: Costs,
    costs_after: Costs,
) -> list[FusedRegion]:
    """What each region reads, makes and costs."""
    made: dict[str, fx.Node] = {}
    for node in after.operators():
        if is_fused(node):
            made.update({user.name: node for user in node.users})
    found = []
    seen: set[fx.Node] = set()  # what is made again later saves nothing
    for nodes, kernel in kernels:
        outputs = tuple(n.name for n in kernel.outputs)
        parts = [costs.nodes[n.name] for n in nodes if n not in seen]
        cost = costs_after.nodes[made[outputs[0]].name]
        seen |= {*nodes}
        found.append(
            FusedRegion(
                tuple(n.name for n in nodes),
                tuple(n.name for n in kernel.inputs),
                outputs,
                sum(map(_moved, parts)),
                _moved(cost),
                sum(part.seconds for part in parts),
                cost.seconds,
            )
        )
    return found


def _moved(cost: NodeCost) -> int:
    return cost.read_bytes + cost.write_bytes


def _costs_with(after: Program, costs: Costs) -> Costs:
    """`costs` with those of the kernels of `after`."""
    return costs.with_nodes(n for n in after.operators() if n.name not in costs.nodes)


def _peak(program: Program, kernels: Sequence[tuple[Sequence[fx.Node], Kernel]], costs: Costs) -> int:
    after = with_kernels(program, kernels)
    return _timeline(after, _costs_with(after, costs))[0].peak_bytes


def _timeline(program: Program, costs: Costs) -> tuple[Timeline, Dataflow]:
    """The bytes that are alive while `program` runs in its order."""
    flow = costs.dataflow(program)
    steps = [Step(number, operator.writes) for number, operator in enumerate(flow.operators)]
    return simulate(flow, steps, (), {*flow.outputs, *flow.gradients}), flow


def _at_peak(
    timeline: Timeline, flow: Dataflow, after: Program, regions: Sequence[FusedRegion]
) -> list[FusedRegion]:
    """The region that runs at the peak, those before it, from the last, and then those after it."""
    place = timeline.during.index(timeline.peak_bytes)
    of_output = {name: region for region in regions for name in region.outputs}
    kernels = {n.name: n for n in after.operators() if is_fused(n)}
    rows = [flow.operators[step.operator].name for step in timeline.steps]
    order = (rows[n] for n in (*range(place, -1, -1), *range(place + 1, len(rows))))
    return [of_output[next(iter(kernels[name].users)).name] for name in order if name in kernels]
