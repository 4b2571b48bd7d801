"""Passes that change the module itself, before it is captured."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from graphopt.plan import Plan


@dataclass(frozen=True)
class ModulePass(ABC):
    """A change of a module's structure. Options are the fields of the subclass.

    As of a `Pass`: `plan` decides, and raises PlanError where a bound cannot be met; `apply` carries
    a plan out on a copy and checks the result. `measure` says what the result is worth.
    """

    name: ClassVar[str]

    @abstractmethod
    def plan(self, model: nn.Module) -> Plan:
        """Decide; changes nothing."""

    @abstractmethod
    def apply(self, model: nn.Module, plan: Any) -> nn.Module:
        """A new module with `plan` carried out."""

    @abstractmethod
    def measure(self, model: nn.Module, plan: Any, changed: nn.Module) -> Any:
        """What was measured of the `changed` module beside `model`: a frozen dataclass that prints.

        PlanError where a bound that the user gave is not met.
        """
