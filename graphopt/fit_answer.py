"""What fits into a memory: the answer of `graphopt.fit`, as data, text and a table."""

import dataclasses
import json
from dataclasses import dataclass

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.training_state import TrainingSetup
from graphopt.html_table import heading, table
from graphopt.origin import format_seconds
from graphopt.passes.checkpoint import CheckpointPlan
from graphopt.sized_model import MOST


@dataclass(frozen=True)
class FitRow:
    """What fits with some passes.

    `largest_batch` is for the sequence asked for, `largest_seq` for the batch; 0 where not even the
    smallest fits, None where it was not asked, or where `remark` says why there is none. `peak_bytes` is
    the peak at the former (or the latter), and `parts` say what it consists of; `operator` runs then, in
    the half `half`. `seconds` are of the step there, by the roofline, with what it recomputes. `formula`
    is the peak along the batch (or the sequence). `plan` is that of the `Checkpoint`, if there is one,
    which `HeldPlan` carries out; of repeated layers its names are not those of a captured step.
    """

    passes: tuple[str, ...]
    largest_batch: int | None = None
    largest_seq: int | None = None
    peak_bytes: int = 0
    parts: tuple[tuple[str, int], ...] = ()
    operator: str = ""
    half: str = ""
    seconds: float = 0.0
    formula: str = ""
    plan: CheckpointPlan | None = None
    remark: str = ""


@dataclass(frozen=True)
class Fit:
    """What fits into `memory_bytes` of a device, with and without passes; `rows` begin with none.

    `captures` are the sizes at which the step was captured; times are seconds of this machine: of the
    captures, and of all else.
    """

    model: str
    device: str
    memory_bytes: int
    batch: int | None
    seq: int | None
    setup: TrainingSetup
    rows: tuple[FitRow, ...]
    captures: int
    capture_seconds: float
    solve_seconds: float

    def to_json(self) -> str:
        """The answer as JSON text."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @property
    def question(self) -> str:
        """What was asked, as a line."""
        asked = [f", {k}={v}" for k, v in (("batch", self.batch), ("seq", self.seq)) if v is not None]
        return f"{self.model} in {format_bytes(self.memory_bytes)} on {self.device}{''.join(asked)}"

    def _repr_html_(self) -> str:
        """A table for a notebook."""
        rows = [
            (
                *(named(row), shown(row.largest_batch), shown(row.largest_seq)),
                *(format_bytes(row.peak_bytes), format_seconds(row.seconds)),
                *(row.remark or f"{row.half} {row.operator}", row.formula),
            )
            for row in self.rows
        ]
        head = ("passes", "batch", "sequence", "peak there", "step", "binds", "formula of the peak")
        return heading(self.question) + table(head, rows)

    def __str__(self) -> str:
        lines = [f"{self.question}:"]
        for row in self.rows:
            found = [f"batch {shown(row.largest_batch)}"] if row.largest_batch is not None else []
            found += [f"sequence {shown(row.largest_seq)}"] if row.largest_seq is not None else []
            why = row.remark or f"{row.half} {row.operator} binds"
            lines.append(f"  {named(row)}: {'; '.join([*([', '.join(found)] if found else []), why])}")
        return "\n".join(lines)


def shown(size: int | None) -> str:
    """A size that was found, as text."""
    if size is None:
        return "-"
    return f"{size} or more" if size >= MOST else str(size)


def named(row: FitRow) -> str:
    """The passes of a row as text."""
    return " + ".join(row.passes) or "as it is"
