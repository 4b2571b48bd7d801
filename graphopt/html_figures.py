"""The figures of a report page, as plain data that plotly draws: traces and a layout, no more.

Colours are written `var(--name)`, for the variables of the page's style sheet, so that one figure is for
a light and a dark page. Texts of the model are escaped here, because plotly reads a little HTML.
"""

import html
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.run_timeline import Span
from graphopt.cost_models.task_graph import COMPUTE
from graphopt.html_roofline import Point, ceilings
from graphopt.origin import Origin, format_seconds
from graphopt.passes.checkpoint import CheckpointPlan
from graphopt.passes.checkpoint_front import undominated

Figure = dict[str, Any]

SPANS = 400  # of each timeline of transfers
_WIDTH = 56  # characters of a line of a hover, for narrow windows
_LONGEST = 160  # of a text in it


def shown(text: str) -> str:
    """`text` as plotly shows it, whatever is in it; long ones on several lines.

    >>> shown("a < b")
    'a &lt; b'
    """
    short = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return "<br>".join(html.escape(line, quote=False) for line in textwrap.wrap(short, _WIDTH))


def place_of(origin: Origin) -> str:
    """Module, place and code, each from a new line on, for a hover."""
    lines = origin.module, origin.place, origin.code
    return "".join(f"<br>{shown(line)}" for line in lines if line)


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title, in the page's colours."""
    return {
        "title": {"text": title, "font": {"size": 12}, "standoff": 6},
        "gridcolor": "var(--grid)",
        "zerolinecolor": "var(--grid)",
        "linecolor": "var(--grid)",
        "automargin": True,
        **more,
    }


BYTES = {"tickformat": "~s", "ticksuffix": "B", "rangemode": "tozero"}
SECONDS = {"tickformat": "~s", "ticksuffix": "s"}


def layout(height: int, **more: Any) -> dict[str, Any]:
    """What all figures look like; `height` in pixels."""
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 28, "b": 8},
        "paper_bgcolor": "var(--panel)",
        "plot_bgcolor": "var(--panel)",
        "font": {"color": "var(--text)", "family": "system-ui, sans-serif", "size": 12},
        "hoverlabel": {
            "bgcolor": "var(--hover)",
            "bordercolor": "var(--grid)",
            "font": {"color": "var(--text)", "size": 12},
            "align": "left",
        },
        "legend": {"orientation": "h", "x": 0, "y": -0.16, "yanchor": "top"},
        **more,
    }


def bars(name: str, colour: str) -> dict[str, Any]:
    """A trace of horizontal bars, none yet."""
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "marker": {"color": colour},
        "x": [],
        "y": [],
        "base": [],
        "text": [],
        "textposition": "none",
        "hovertemplate": "%{text}<extra></extra>",
    }


def add_bar(trace: dict[str, Any], row: str, begin: float, length: float, text: str) -> None:
    """A bar more, from `begin` on, in the row of that name; `text` is shown on hovering."""
    for key, item in (("y", row), ("base", begin), ("x", length), ("text", text)):
        trace[key].append(item)


def front_figure(plans: Sequence[CheckpointPlan], chosen: CheckpointPlan) -> Figure:
    """Predicted seconds of a step over peak bytes: the front of `plans` and `chosen`, which is marked."""

    def trace(name: str, shown_plans: Sequence[CheckpointPlan], **more: Any) -> dict[str, Any]:
        return {
            "type": "scatter",
            "name": name,
            "x": [p.peak_bytes for p in shown_plans],
            "y": [p.step_seconds + p.recompute_seconds for p in shown_plans],
            "text": [_plan_text(p) for p in shown_plans],
            "hovertemplate": "%{text}<extra></extra>",
            **more,
        }

    line = {"color": "var(--kept)", "width": 2}
    star = {"color": "var(--accent)", "size": 16, "symbol": "star"}
    traces = [
        trace(
            "reachable",
            undominated([*plans, chosen]),
            mode="lines+markers",
            line=line,
            marker={"size": 8},
        ),
        trace("this plan", [chosen], mode="markers", marker=star),
    ]
    found = layout(
        360,
        xaxis=axis("predicted peak", **{**BYTES, "rangemode": "normal"}),
        yaxis=axis("predicted step time", **SECONDS),
    )
    found["legend"] = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"}
    if chosen.budget_bytes is not None:
        down = {"type": "line", "xref": "x", "yref": "y domain", "y0": 0, "y1": 1}
        at = {"x0": chosen.budget_bytes, "x1": chosen.budget_bytes}
        found["shapes"] = [
            {**down, **at, "line": {"color": "var(--accent)", "width": 1.5, "dash": "dash"}}
        ]
        label = {"x": chosen.budget_bytes, "xref": "x", "y": 1, "yref": "y domain", "text": "budget"}
        found["annotations"] = [{**label, "showarrow": False, "xanchor": "left", "yanchor": "top"}]
    return {"data": traces, "layout": found}


def _plan_text(plan: CheckpointPlan) -> str:
    seconds = plan.step_seconds + plan.recompute_seconds
    more = plan.recompute_seconds / plan.step_seconds if plan.step_seconds else 0.0
    return (
        f"<b>peak {format_bytes(plan.peak_bytes)}</b><br>step {format_seconds(seconds)}, "
        f"{more:+.1%} for recomputation<br>keeps {len(plan.keep)} tensors"
    )


def roofline_figure(points: Sequence[Point], roofs: Mapping[str, float], bytes_per_s: float) -> Figure:
    """Operators by what they do per byte and per second, and the `roofs` of the device, per second."""
    traces: list[dict[str, Any]] = []
    for bound in ("arithmetic", "memory", "overhead"):
        group = [p for p in points if p.bound == bound]
        if group:
            traces.append(_points(group, f"bound by {bound}", f"var(--{bound})", points))
    low, high = (f(p.intensity for p in points) for f in (min, max)) if points else (1.0, 1.0)
    for name, line in ceilings(roofs, bytes_per_s, low / 2, high * 2).items():
        at = {"x": [x for x, _ in line], "y": [y for _, y in line], "name": shown(name)}
        style = {"mode": "lines", "line": {"color": "var(--muted)", "width": 1.5}, "hoverinfo": "name"}
        traces.append({"type": "scatter", **at, **style, "showlegend": False})
        x, y = line[0] if name not in roofs else line[-1]
        end = {"x": [x], "y": [y], "text": [shown(name)], "mode": "text"}
        font = {"color": "var(--muted)", "size": 11}
        more = {"textfont": font, "showlegend": False, "hoverinfo": "skip"}
        more["textposition"] = "bottom right" if name not in roofs else "top left"
        traces.append({"type": "scatter", **end, **more})
    logarithmic = {"type": "log", "tickformat": "~s", "dtick": 1}
    found = layout(
        440,
        hovermode="closest",
        xaxis=axis("operations per byte moved", **{**logarithmic, "tickformat": "~g"}),
        yaxis=axis("operations per second", **logarithmic),
    )
    return {"data": traces, "layout": found}


def _points(group: Sequence[Point], name: str, colour: str, every: Sequence[Point]) -> dict[str, Any]:
    whole = sum(p.seconds * p.count for p in every) or 1.0
    sizes = [6 + 40 * (p.seconds * p.count / whole) ** 0.5 for p in group]
    texts = []
    for p in group:
        times = f"{p.count} like it, {format_seconds(p.count * p.seconds)} in all" if p.count > 1 else ""
        head = f"<b>{shown(p.operator)}</b>{place_of(p.origin)}<br>{format_seconds(p.seconds)}"
        rates = f"{p.intensity:.3g} per byte, {p.operations / p.seconds / 1e9:.3g} G/s"
        texts.append("<br>".join(filter(None, (head, times, rates, f"bound by {p.bound}"))))
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [p.intensity for p in group],
        "y": [p.operations / p.seconds for p in group],
        "text": texts,
        "marker": {"color": colour, "size": sizes, "opacity": 0.75, "line": {"width": 0.5}},
        "hovertemplate": "%{text}<extra></extra>",
    }


def spans_figure(timelines: Mapping[str, Sequence[Span]]) -> Figure:
    """When each channel is busy: a row for each channel of each timeline, seconds to the right.

    Of a timeline with more than `SPANS` spans the longest are shown.
    """
    traces: dict[str, dict[str, Any]] = {}
    rows: list[str] = []
    for title, spans in timelines.items():
        channels = dict.fromkeys((COMPUTE, *(span[1] for span in spans)))
        rows += [f"{shown(title)}<br>{shown(channel)}" for channel in channels]
        longest = sorted(spans, key=lambda span: (span[2] - span[3], span))[:SPANS]
        for name, channel, begin, end in sorted(longest, key=lambda span: (span[2], span)):
            kind = "computing" if channel == COMPUTE else "transfers"
            colour = "var(--kept)" if channel == COMPUTE else "var(--transients)"
            text = f"<b>{shown(name)}</b><br>{shown(channel)}, {format_seconds(end - begin)}"
            trace = traces.setdefault(kind, bars(kind, colour))
            add_bar(trace, f"{shown(title)}<br>{shown(channel)}", begin, end - begin, text)
    found = layout(
        110 + 50 * len(rows),
        barmode="overlay",
        xaxis=axis("time in the step", **SECONDS),
        yaxis=axis("", categoryorder="array", categoryarray=rows[::-1], ticklabelstandoff=4),
    )
    found["legend"]["y"] = -70 / (110 + 50 * len(rows))
    return {"data": list(traces.values()), "layout": found}
