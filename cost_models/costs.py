"""What a pass is told about a program: what every node costs on one device, and its kernel scratch."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from torch import fx

from graphopt.cost_models.devices import Device
from graphopt.cost_models.measured import probe, probe_key
from graphopt.cost_models.memory import Dataflow, dataflow
from graphopt.cost_models.nodes import NodeCost, cost_table
from graphopt.cost_models.streamed import is_streamed, scratch_bytes
from graphopt.cost_models.workspace import workspace_bytes
from graphopt.ops import is_elementwise
from graphopt.program import Program


@dataclass(frozen=True)
class Costs:
    """`nodes`: cost by node name. `workspace_bytes`: scratch that a kernel holds while it runs.

    Where the program is a part of the step, `reserved_bytes` is what the other parts hold meanwhile,
    and `followed` says that parts come after it whose needs are not known yet. `margin_bytes` are what a
    plan leaves free of its budget, for what a compiler holds beside the plan. `limit_bytes` is what a
    pass before promised that the step stays within, if one did. `fused` says that Inductor runs it: it
    merges equal operators on equal inputs, does not always write over operands
    that die, gives convolutions images in the channels-last layout, and runs elementwise operators in
    kernels of its own, which need no scratch.
    `probed` and `timed` say that scratch and seconds were measured here.
    """

    device: Device
    nodes: Mapping[str, NodeCost]
    workspace_bytes: Mapping[str, int]
    reserved_bytes: int = 0
    margin_bytes: int = 0
    limit_bytes: int | None = None
    followed: bool = False
    fused: bool = False
    probed: bool = False
    timed: bool = False

    @staticmethod
    def of(program: Program, device: Device) -> "Costs":
        """Roofline costs of `program` on `device`, and the scratch that follows from the shapes."""
        return Costs(device, {}, {}).with_nodes(program.graph.nodes)

    @staticmethod
    def measured(
        program: Program, device: Device, *, seconds: bool = False, fused: bool = False
    ) -> "Costs":
        """As `of`, with the scratch of each kernel measured here; with `seconds`, also its time.

        Every distinct operator runs alone once, or a few times where it is timed; what was found is
        kept on disk.
        """
        costs = Costs(device, {}, {}, fused=fused, probed=True, timed=seconds)
        return costs.with_nodes(program.graph.nodes)

    def with_nodes(self, nodes: Iterable[fx.Node]) -> "Costs":
        """These costs with those of more nodes, found in the same way."""
        new = list(nodes)
        operators = (n for n in new if n.op not in ("placeholder", "output", "get_attr"))
        table = {**self.nodes, **cost_table(new, self.device)}
        scratch = {**self.workspace_bytes, **{n.name: workspace_bytes(n) for n in operators}}
        probes = probe(new, repeats=3 if self.timed else 0) if self.probed else {}
        last = probe(new, repeats=0, channels_last=True) if self.probed and self.fused else {}
        for node in new:
            if self.fused and is_elementwise(node):
                scratch[node.name] = 0
                continue
            if self.probed and is_streamed(node):
                scratch[node.name] = scratch_bytes(node, probed=True)
            found = probes.get(probe_key(node) or "")
            if found is None or found.seconds is None:
                continue
            other = last.get(probe_key(node, channels_last=True) or "", found)
            scratch[node.name] = max(found.workspace_bytes, other.workspace_bytes)
            if self.timed:
                table[node.name] = replace(table[node.name], seconds=found.seconds)
        return replace(self, nodes=table, workspace_bytes=scratch)

    def dataflow(self, program: Program) -> Dataflow:
        """`program` as storages and operators with these costs."""
        flow = dataflow(program, self.nodes, self.workspace_bytes)
        if self.fused:
            flow = replace(flow, operators=tuple(replace(o, reusable=()) for o in flow.operators))
        return replace(flow, static_bytes=flow.static_bytes + self.reserved_bytes)
