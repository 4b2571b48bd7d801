"""A pipeline schedule as a chart in text: a row for each device, time from left to right."""

from collections.abc import Sequence

_BACKWARD = "abcdefghij"
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
    total = max((end for row in end_s for end in row), default=0.0)
    if not total:
        return ""
    label = len(str(len(orders) - 1))
    lines = []
    for device, texts in enumerate(orders):
        shares: list[dict[str, float]] = [{} for _ in range(width)]
        busy = 0.0
        for text, begin, end in zip(texts, begin_s[device], end_s[device], strict=True):
            busy += end - begin
            _add(shares, _glyph(text), begin / total * width, end / total * width)
        cells = "".join(_fullest(cell) for cell in shares)
        lines.append(f"device {device:>{label}} │{cells}│ {100 * busy / total:.0f} % busy")
    return "\n".join([*lines, f"{'':>{label + 8}} 0 s{total:>{width - 5}.4g} s", LEGEND])


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
