"""Verification: an optimised step beside eager and float64, and where it goes wrong if it does."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

from graphopt.api import optimize
from graphopt.bisection import Fault, find_fault
from graphopt.deviation import Deviation, deviations
from graphopt.models import LoadedModel
from graphopt.report_text import pass_text

_NAMED = 3  # wrong tensors that the message names


@dataclass(frozen=True)
class Verification:
    """What was compared: each tensor of the step, and the fault behind those that are wrong.

    `remark` says why there is no float64 to compare with; "" where there is.
    """

    model: str
    passes: tuple[str, ...]
    deviations: tuple[Deviation, ...]
    fault: Fault | None
    remark: str = ""

    @property
    def is_right(self) -> bool:
        """True where every tensor is within what is allowed."""
        return all(deviation.is_allowed for deviation in self.deviations)

    @property
    def message(self) -> str:
        """What is wrong, and where it comes from; "" where nothing is."""
        wrong = [d for d in self.deviations if not d.is_allowed]
        if not wrong:
            return ""
        names = ", ".join(d.kind if d.name == d.kind else f"{d.kind} {d.name}" for d in wrong[:_NAMED])
        more = f" and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        return f"{len(wrong)} of {len(self.deviations)} tensors are wrong: {names}{more}; {self.fault}"

    def groups(self) -> Iterator[tuple[str, str, list[Deviation]]]:
        """The deviations of each kind and module together, in the order of the step."""
        order = {kind: n for n, kind in enumerate(("loss", "output", "gradient", "buffer"))}
        rows = sorted(self.deviations, key=lambda d: (order[d.kind], d.module))
        for (kind, module), group in groupby(rows, key=lambda d: (d.kind, d.module)):
            yield kind, module, list(group)

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON; errors are absolute, and null where a tensor is missing."""
        rows = [{**asdict(d), "module": d.module, "is_allowed": d.is_allowed} for d in self.deviations]
        for row in rows:
            row["error"] = None if row["error"] == float("inf") else row["error"]
        fault = None if self.fault is None else asdict(self.fault)
        return {
            "model": self.model,
            "passes": self.passes,
            "right": self.is_right,
            "remark": self.remark,
            "fault": fault,
            "deviations": rows,
        }


def verify_model(loaded: LoadedModel, *, training: bool = True, **wanted: Any) -> Verification:
    """Compare a step of `loaded` on its example inputs with one by `optimize(model, **wanted)`.

    Loss, outputs, buffers and gradients are held against float64, and may be off by `numerics.FACTOR`
    times what eager is off by. Without `training` a step is a forward alone.
    """
    model = optimize(loaded.model, **wanted)
    drops = any(getattr(p, "drops_gradients", False) for p in model.report.settings.passes)
    rows, remark = deviations(loaded, model, training=training, may_drop=drops)
    records = model.report.records
    passes = tuple(pass_text(step.pass_) for record in records for step in record.steps)
    wrong = [row for row in rows if not row.is_allowed]
    fault = find_fault(records, loaded, wrong) if wrong else None
    return Verification(loaded.name, passes, rows, fault, remark)
