"""A plan that was made before, in place of planning."""

from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.cost_models.costs import Costs
from graphopt.passes.base import Pass
from graphopt.plan import Plan
from graphopt.program import Program


@dataclass(frozen=True)
class HeldPlan(Pass):
    """Carry out `held`, a plan of the pass `of`: one from JSON, edited by hand, or found by `fit`.

    >>> from graphopt.passes.checkpoint import Checkpoint, CheckpointPlan
    >>> plan = CheckpointPlan((), (), (), None, 0, 0, 0.0, 0.0, 0, 0)
    >>> HeldPlan(Checkpoint(), plan).held.keep
    ()
    """

    name: ClassVar[str] = "held-plan"

    of: Pass
    held: Plan

    def plan(self, program: Program, costs: Costs) -> Plan:
        """The plan that is held."""
        return self.held

    def apply(self, program: Program, plan: Any) -> Program:
        """What the pass makes of it; PlanError for a plan of another program."""
        return self.of.apply(program, plan)

    def limit_bytes(self, program: Program, plan: Any) -> int | None:
        """None: the plan may be for other sizes than its peak."""
        return None
