"""The passes that change a module itself, as they ran, and their report."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from graphopt.errors import GraphoptError, TraceError
from graphopt.html_table import heading, preformatted
from graphopt.passes.module_pass import ModulePass
from graphopt.plan import Plan
from graphopt.report_text import pass_text


@dataclass(frozen=True)
class ModuleStep:
    """One pass: what it was, as text, what it decided, what was measured of the result."""

    pass_: str
    plan: Plan
    measured: Any


@dataclass(frozen=True)
class ModuleReport:
    """What was planned and measured of a changed module; prints, and writes JSON."""

    name: str
    steps: tuple[ModuleStep, ...]

    def __str__(self) -> str:
        lines = [f"graphopt report: {self.name}"]
        for step in self.steps:
            lines += [f"  pass {step.pass_}", *str(step.plan).splitlines(), str(step.measured)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """The report for a notebook: each pass, its plan, and what was measured."""
        parts = [heading(f"graphopt report: {self.name}")]
        for step in self.steps:
            parts += [preformatted(f"pass {step.pass_}"), step.plan._repr_html_()]
            parts.append(preformatted(str(step.measured)))
        return "\n".join(parts)

    def to_json(self) -> str:
        """The report as JSON text: `model`, and `steps` with `pass`, `plan` and `measured`."""
        steps = [
            {"pass": s.pass_, "plan": asdict(s.plan), "measured": asdict(s.measured)} for s in self.steps
        ]
        return json.dumps({"model": self.name, "steps": steps}, indent=1)


def run_module_passes(model: Any, passes: Sequence[ModulePass]) -> Any:
    """Plan, apply and measure each pass in turn; the result has their report as its `report`.

    Without passes it is `model` itself.
    """
    if not passes:
        return model
    if not isinstance(model, nn.Module):
        raise TraceError(f"{passes[0].name} takes a module, not {type(model).__name__}")
    name, steps = type(model).__name__, []
    for pass_ in passes:
        try:
            plan = pass_.plan(model)
            changed = pass_.apply(model, plan)
            measured = pass_.measure(model, plan, changed)
        except GraphoptError as error:
            error.args = (f"{name}: {error.args[0]}", *error.args[1:])
            raise
        steps.append(ModuleStep(pass_text(pass_), plan, measured))
        model = changed
    model.report = ModuleReport(name, tuple(steps))
    return model
