"""A memory timeline drawn in text: one column per stretch of the step, stacked by category."""

import numpy as np

from graphopt.cost_models.devices import format_bytes
from graphopt.timeline import CATEGORIES, MemoryTimeline

Line = list[tuple[str, str]]  # pieces of a line, each with the name of its style ("" for none)

WIDTH = 70
ROWS = 12
GLYPHS = {"static": "·", "kept": "█", "recomputed": "▓", "gradients": "▒", "transients": "░"}
_LABEL = 9


def chart(timeline: MemoryTimeline, top_bytes: int, budget_bytes: int | None = None) -> list[Line]:
    """`ROWS` lines of bars up to `top_bytes`, with the axis and the two halves of the step below.

    Each column shows the fullest step of its stretch; the row that holds the budget is marked.
    """
    steps = timeline.sampled(WIDTH)
    steps = steps[np.arange(WIDTH) * len(steps) // WIDTH]
    columns = [timeline.alive_bytes[:, step].tolist() for step in steps]
    lines = []
    for row in reversed(range(ROWS)):
        low, high = top_bytes * row / ROWS, top_bytes * (row + 1) / ROWS
        cells = [_category(column, (low + high) / 2) for column in columns]
        label = format_bytes(top_bytes) if row == ROWS - 1 else "0 B" if row == 0 else ""
        mark = ""
        if budget_bytes is not None and low < budget_bytes <= high:
            label, mark = format_bytes(budget_bytes), " budget"
        lines.append([(f"{label:>{_LABEL}} ┤", "dim"), *_runs(cells), (mark, "bold")])
    forward = sum(1 for step in steps if step < timeline.forward_steps)
    lines.append([(" " * _LABEL + _halves(forward, len(columns) - forward), "dim")])
    return lines


def legend(*timelines: MemoryTimeline) -> Line:
    """What each glyph that occurs stands for."""
    pieces: Line = [(" " * (_LABEL + 2), "")]
    for row, category in enumerate(CATEGORIES):
        if any(timeline.alive_bytes[row].any() for timeline in timelines):
            pieces += [(GLYPHS[category], category), (f" {category}   ", "")]
    return pieces


def _category(column: list[int], height: float) -> str:
    """The category at this height of a stack; "" above it."""
    total = 0
    for category, nbytes in zip(CATEGORIES, column, strict=True):
        total += nbytes
        if height < total:
            return category
    return ""


def _runs(cells: list[str]) -> Line:
    """Neighbouring cells of one category as one piece."""
    pieces: Line = []
    for category in cells:
        glyph = GLYPHS.get(category, " ")
        if pieces and pieces[-1][1] == category:
            glyph = pieces.pop()[0] + glyph
        pieces.append((glyph, category))
    return pieces


def _halves(forward: int, backward: int) -> str:
    parts = ((" forward ", forward), (" backward ", backward))
    return " └" + "┴".join(
        text.center(n - 1, "─") if n > len(text) else "─" * (n - 1) for text, n in parts if n
    )
