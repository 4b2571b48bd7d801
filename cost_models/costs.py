"""What a pass is told about a program: the cost of every node on one device, and its kernel scratch."""

from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.cost_models.devices import Device
from graphopt.cost_models.memory import Dataflow, dataflow
from graphopt.cost_models.nodes import NodeCost, cost_table
from graphopt.program import Program


@dataclass(frozen=True)
class Costs:
    """`nodes`: cost by node name. `workspace_bytes`: scratch that a kernel holds while it runs."""

    device: Device
    nodes: Mapping[str, NodeCost]
    workspace_bytes: Mapping[str, int]

    @staticmethod
    def of(
        program: Program, device: Device, workspace_bytes: Mapping[str, int] | None = None
    ) -> "Costs":
        """Roofline costs of `program` on `device`."""
        return Costs(device, cost_table(program.graph, device), dict(workspace_bytes or {}))

    def dataflow(self, program: Program) -> Dataflow:
        """`program` as storages and operators with these costs."""
        return dataflow(program, self.nodes, self.workspace_bytes)
