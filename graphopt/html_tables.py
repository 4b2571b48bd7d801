"""Tables of a report page: text is escaped, a click on a heading sorts, long ones are cut and say so."""

import html
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.cost_models.devices import format_bytes
from graphopt.graph_report import GraphReport, RecomputeFact, TensorFact
from graphopt.html_modules import ModuleCost
from graphopt.origin import Origin, format_seconds

ROWS = 300
_LONG = 44  # characters of a text that may go on in the next line


@dataclass(frozen=True)
class Cell:
    """A text, and the number that it is sorted by; a text without one is sorted as text."""

    text: str
    number: float | None = None

    @staticmethod
    def bytes(nbytes: int) -> "Cell":
        """A size."""
        return Cell(format_bytes(nbytes), nbytes)

    @staticmethod
    def seconds(seconds: float) -> "Cell":
        """A time."""
        return Cell(format_seconds(seconds), seconds)

    @staticmethod
    def count(number: int) -> "Cell":
        """A number of things."""
        return Cell(str(number), number)


def table(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table of the first `ROWS` of `rows`, whose first says which columns are of numbers."""
    if not rows:
        return ""
    numeric = [cell.number is not None for cell in rows[0]]
    names = "".join(
        f'<th scope="col" class="{"n" if number else ""}"><button type="button">'
        f"{html.escape(name)}</button></th>"
        for name, number in zip(head, numeric, strict=True)
    )
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows[:ROWS])
    rest = len(rows) - ROWS
    more = f'<p class="note">and {rest} more rows, left out here</p>' if rest > 0 else ""
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{names}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>{more}"
    )


def _cell(cell: Cell) -> str:
    text = html.escape(cell.text)
    if cell.number is not None:
        return f'<td class="n" data-v="{cell.number:.7g}">{text}</td>'
    return f'<td class="long">{text}</td>' if len(cell.text) > _LONG else f"<td>{text}</td>"


def passes_table(graph: GraphReport) -> str:
    """The passes in the order in which they ran, and what else their plans have to say."""
    rows = [
        [Cell(str(number), number), Cell(p.options), Cell(p.plan), Cell.seconds(p.seconds)]
        for number, p in enumerate(graph.passes, start=1)
    ]
    more = [
        f"<details><summary>{html.escape(p.name)}: more about the plan</summary>"
        f'<div class="scroll"><pre>{html.escape(p.table)}</pre></div></details>'
        for p in graph.passes
        if p.table
    ]
    return table(("no.", "pass and options", "plan", "planning took"), rows) + "".join(more)


def kept_table(facts: Sequence[TensorFact]) -> str:
    """The tensors that the forward leaves for the backward."""
    rows = [
        [
            Cell.bytes(f.nbytes),
            Cell(f.name),
            Cell(f"{f.dtype}[{', '.join(map(str, f.shape))}]"),
            *_origin(f.origin),
            Cell(f.why),
        ]
        for f in facts
    ]
    return table(("size", "tensor", "type", "module", "made at", "why it is kept"), rows)


def recomputed_table(facts: Sequence[RecomputeFact]) -> str:
    """The operators that the backward runs again."""
    rows = [
        [
            Cell.seconds(f.seconds),
            Cell(f.operator),
            Cell(f.name),
            Cell.count(f.count),
            Cell.bytes(f.freed_bytes),
            Cell.bytes(f.kept_bytes),
            *_origin(f.origin),
            Cell(f.why),
        ]
        for f in facts
    ]
    head = ("time", "operator", "node", "runs", "freed at the peak", "no longer kept")
    return table((*head, "module", "made at", "why it is recomputed"), rows)


def modules_table(whole: dict[str, ModuleCost]) -> str:
    """What each module costs, those inside of it included; the model itself first."""
    rows = [
        [
            Cell(path or "(the model)"),
            Cell.seconds(c.seconds),
            Cell.seconds(c.forward_seconds),
            Cell.seconds(c.backward_seconds),
            Cell.seconds(c.recompute_seconds),
            Cell.bytes(c.parameter_bytes),
            Cell.bytes(c.plain_kept_bytes),
            Cell.bytes(c.kept_bytes),
        ]
        for path, c in whole.items()
    ]
    head = ("module", "step", "forward", "backward", "recomputing", "parameters", "kept before")
    return table((*head, "kept as planned"), rows)


def _origin(origin: Origin) -> tuple[Cell, Cell]:
    code = f": {origin.code}" if origin.code else ""
    return Cell(origin.module), Cell(f"{origin.place}{code}")
