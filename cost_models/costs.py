"""What a pass is told about a program: what every node costs on one device, and its kernel scratch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from graphopt.cost_models.devices import Device
from graphopt.cost_models.measured import probe, probe_key
from graphopt.cost_models.memory import Dataflow, dataflow
from graphopt.cost_models.nodes import NodeCost, cost_table
from graphopt.cost_models.workspace import workspace_bytes
from graphopt.program import Program


@dataclass(frozen=True)
class Costs:
    """`nodes`: cost by node name. `workspace_bytes`: scratch that a kernel holds while it runs.

    Where the program is a part of the step, `reserved_bytes` is what the other parts hold meanwhile,
    and `followed` says that parts come after it whose needs are not known yet. `merges_repeats` says
    that the compiler behind the passes runs equal operators on equal inputs once (Inductor does).
    """

    device: Device
    nodes: Mapping[str, NodeCost]
    workspace_bytes: Mapping[str, int]
    reserved_bytes: int = 0
    followed: bool = False
    merges_repeats: bool = False

    @staticmethod
    def of(program: Program, device: Device) -> "Costs":
        """Roofline costs of `program` on `device`, and the scratch that follows from the shapes."""
        scratch = {n.name: workspace_bytes(n) for n in program.operators()}
        return Costs(device, cost_table(program.graph, device), scratch)

    @staticmethod
    def measured(program: Program, device: Device, *, seconds: bool = False) -> "Costs":
        """As `of`, with the scratch of each kernel measured here; with `seconds`, also its time.

        Every distinct operator runs alone once, or a few times where it is timed; what was found is
        kept on disk.
        """
        plain = Costs.of(program, device)
        nodes = list(program.operators())
        probes = probe(nodes, repeats=3 if seconds else 0)
        table = dict(plain.nodes)
        scratch = dict(plain.workspace_bytes)
        for node in nodes:
            found = probes.get(probe_key(node) or "")
            if found is None or found.seconds is None:
                continue
            scratch[node.name] = found.workspace_bytes
            if seconds:
                table[node.name] = replace(table[node.name], seconds=found.seconds)
        return Costs(device, table, scratch)

    def dataflow(self, program: Program) -> Dataflow:
        """`program` as storages and operators with these costs."""
        flow = dataflow(program, self.nodes, self.workspace_bytes)
        return replace(flow, static_bytes=flow.static_bytes + self.reserved_bytes)
