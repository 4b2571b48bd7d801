"""A pipeline schedule as a chart, in text or as an SVG: a row for each device, time to the right."""

from collections.abc import Sequence

from graphopt.cost_models.run_timeline import svg_of

_BACKWARD = "abcdefghij"
_FORWARD, _BACK = "bright_blue", "green"
_COLOURS = {"▒": "yellow", "◆": "magenta", "░": "cyan", "·": "bright_black"}
_OTHER = {"W": "▒", "H": "◆", "S": "░", "U": "░", "T": "░", "E": "░"}
LEGEND = (
    "0-9 forward, a-j backward (of its input), by the last digit of the microbatch; ▒ weights, ◆ head, "
    "░ vocabulary, · idle"
)


def gantt(
    orders: Sequence[Sequence[str]],
    begin_s: Sequence[Sequence[float]],
    end_s: Sequence[Sequence[float]],
    width: int = 100,
) -> str:
    """A row of `width` cells for each device; each cell shows what takes most of its time.

    Actions are written `<stage><kind><microbatch>`, as in `PipelinePlan`.

    >>> orders = [["0F0", "0B0"], ["1F0", "1B0"]]
    >>> print(gantt(orders, [[0, 3], [1, 2]], [[1, 4], [2, 3]], 8).splitlines()[1])
    device 1 │··00aa··│ 50 % busy
    """
    rows, total = _rows(orders, begin_s, end_s, width)
    if not total:
        return ""
    lines = [f"{name} │{cells}│ {busy}" for name, cells, busy in rows]
    return "\n".join([*lines, f"{'':>{len(rows[0][0]) + 1}} 0 s{total:>{width - 5}.4g} s", LEGEND])


def gantt_svg(
    orders: Sequence[Sequence[str]],
    begin_s: Sequence[Sequence[float]],
    end_s: Sequence[Sequence[float]],
    title: str,
    width: int = 120,
) -> str:
    """The chart of `gantt` as an SVG, with a colour for each kind of action.

    >>> gantt_svg([["0F0", "0B0"]], [[0, 1]], [[1, 3]], "one device")[:4]
    '<svg'
    """
    from rich.text import Text

    rows, total = _rows(orders, begin_s, end_s, width)
    lines = []
    for name, cells, busy in rows:
        line = Text(f"{name} │")
        for cell in cells:
            line.append(cell, _COLOURS.get(cell, _FORWARD if cell.isdigit() else _BACK))
        lines.append(line.append(f"│ {busy}"))
    lines += (
        [Text(f"{'':>{len(rows[0][0]) + 1}} 0 s{total:>{width - 5}.4g} s"), Text(LEGEND)] if rows else []
    )
    return svg_of(lines, title, width + 40)


def _rows(
    orders: Sequence[Sequence[str]],
    begin_s: Sequence[Sequence[float]],
    end_s: Sequence[Sequence[float]],
    width: int,
) -> tuple[list[tuple[str, str, str]], float]:
    """For each device its name, its cells, and how busy it is; and the seconds of all."""
    total = max((end for row in end_s for end in row), default=0.0)
    label = len(str(len(orders) - 1))
    rows = []
    for device, texts in enumerate(orders) if total else ():
        shares: list[dict[str, float]] = [{} for _ in range(width)]
        busy = 0.0
        for text, begin, end in zip(texts, begin_s[device], end_s[device], strict=True):
            busy += end - begin
            _add(shares, _glyph(text), begin / total * width, end / total * width)
        cells = "".join(_fullest(cell) for cell in shares)
        rows.append((f"device {device:>{label}}", cells, f"{100 * busy / total:.0f} % busy"))
    return rows, total


def _glyph(text: str) -> str:
    kind = text.lstrip("0123456789")[0]
    microbatch = int(text[-1])
    return str(microbatch) if kind == "F" else _OTHER.get(kind, _BACKWARD[microbatch])


def _add(shares: list[dict[str, float]], glyph: str, begin: float, end: float) -> None:
    for cell in range(int(begin), min(len(shares), int(end) + 1)):
        part = min(end, cell + 1) - max(begin, cell)
        if part > 0:
            shares[cell][glyph] = shares[cell].get(glyph, 0.0) + part


def _fullest(cell: dict[str, float]) -> str:
    """What has the largest part of a cell; "·" where idle time has it."""
    idle = 1 - sum(cell.values())
    best = max(cell, key=lambda glyph: cell[glyph], default="·")
    return best if cell and cell[best] >= idle - 1e-9 else "·"
