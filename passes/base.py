"""What every pass is: a frozen dataclass that plans without touching the program, then applies."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.cost_models.costs import Costs
from graphopt.plan import Plan
from graphopt.program import Program


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of programs. Options are the fields of the subclass.

    `plan` decides from the program and its costs, and raises PlanError where a bound cannot be met;
    `apply` carries a plan out on a copy. Only a pass that says `drops_gradients` may return None for
    a gradient that was there before.
    """

    name: ClassVar[str]
    drops_gradients: ClassVar[bool] = False

    @abstractmethod
    def plan(self, program: Program, costs: Costs) -> Plan:
        """Decide; changes nothing."""

    @abstractmethod
    def apply(self, program: Program, plan: Any) -> Program:
        """A new program with `plan` carried out."""

    def limit_bytes(self, program: Program, plan: Any) -> int | None:
        """The peak of the step that `plan` promises for `program`, if it promises one.

        Bytes, parameters and inputs included. A compiler that runs the result stays within it.
        """
        return None
