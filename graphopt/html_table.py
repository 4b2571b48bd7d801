"""Small tables in HTML, for what a notebook shows. Every text is escaped."""

import dataclasses
import html
from collections.abc import Iterable, Sequence
from typing import Any

INLINE = 4  # items of a tuple that are shown at once
MOST = 200  # items of a tuple, or rows of a folded table, that are written at all


def heading(text: str) -> str:
    """A line in bold."""
    return f"<p><b>{html.escape(text)}</b></p>"


def preformatted(text: str) -> str:
    """Lines of text as they are; "" for none."""
    return f'<pre style="line-height: 1.15">{html.escape(text)}</pre>' if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of texts under a head; "" without rows.

    >>> print(table(("name", "size"), [("<x>", "4 B")]))
    <table>
    <tr><th>name</th><th>size</th></tr>
    <tr><td>&lt;x&gt;</td><td>4 B</td></tr>
    </table>
    """
    return _table(head, ([html.escape(cell) for cell in row] for row in rows))


def folded(summary: str, inside: str) -> str:
    """`inside` (HTML) behind a line that opens it; "" where there is nothing inside."""
    if not inside:
        return ""
    return f"<details><summary>{html.escape(summary)}</summary>{inside}</details>"


def fields_table(record: Any) -> str:
    """The fields of a dataclass, one a row; long tuples are folded."""
    names = [field.name for field in dataclasses.fields(record)]
    return _table(("field", "value"), ([html.escape(n), _cell(getattr(record, n))] for n in names))


def cell_text(value: Any) -> str:
    """A number or a text as a cell shows it; None is a dash.

    >>> cell_text(1234567), cell_text(0.000123456), cell_text(None), cell_text(("a", 2))
    ('1,234,567', '0.0001235', '–', 'a, 2')
    """
    if value is None:
        return "–"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple):
        return ", ".join(map(cell_text, value))
    return str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """As `table`, of cells that are HTML."""
    lines = [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    if not lines:
        return ""
    first = f"<tr>{''.join(f'<th>{html.escape(cell)}</th>' for cell in head)}</tr>"
    return "\n".join(["<table>", first, *lines, "</table>"])


def _cell(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        return fields_table(value)
    if not isinstance(value, tuple) or (len(value) <= INLINE and not _has_rows(value)):
        return html.escape(cell_text(value))
    more = f"<p>and {len(value) - MOST} more</p>" if len(value) > MOST else ""
    first = value[:MOST]
    if dataclasses.is_dataclass(value[0]):
        names = [field.name for field in dataclasses.fields(value[0])]
        inside = table(names, ([cell_text(getattr(v, n)) for n in names] for v in first))
        return folded(f"{len(value)} of {type(value[0]).__name__}", inside + more)
    if _has_rows(value):
        inside = "<br>".join(html.escape(cell_text(v)) for v in first)
        return folded(f"{len(value)} rows", inside + more)
    shown = ", ".join(map(cell_text, value[:INLINE]))
    return folded(f"{len(value)}: {shown}, ..", html.escape(cell_text(first)) + more)


def _has_rows(value: tuple[Any, ...]) -> bool:
    return bool(value) and (isinstance(value[0], tuple) or dataclasses.is_dataclass(value[0]))
