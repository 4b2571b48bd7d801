"""A report as one HTML file that needs nothing else: tables, and figures drawn by plotly's script in it.

The page loads nothing from elsewhere; its Content-Security-Policy says so to the browser.
"""

import html
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graphopt import __version__
from graphopt.cost_models.devices import format_bytes
from graphopt.errors import GraphoptError
from graphopt.graph_report import GraphReport, Side, costs_of
from graphopt.html_figures import Figure, front_figure, roofline_figure, spans_figure
from graphopt.html_memory import lifetimes_figure, memory_figure
from graphopt.html_modules import modules_figure, own_costs, whole_costs
from graphopt.html_roofline import POINTS, roofline_points, roofs_of
from graphopt.html_tables import (
    Cell,
    kept_table,
    modules_table,
    passes_table,
    recomputed_table,
    table,
)
from graphopt.html_words import plural, summary_tiles, what_changed
from graphopt.passes.checkpoint import Checkpoint, CheckpointPlan
from graphopt.passes.checkpoint_front import front
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.report import Report
from graphopt.runtime import GraphRecord

BUDGETS = 8  # that are planned for a front
FRONT_SECONDS = 60.0  # which they may take in all, if each takes what the report's own plan took
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """A part of the page: its name, what to read in it, a figure, and HTML behind it."""

    title: str
    note: str
    figure: Figure | None = None
    content: str = ""


def report_html(report: Report, budgets: int | None = None) -> str:
    """The page; `budgets` as in `Report.to_html`."""
    script = plotly_script()
    sections: list[tuple[str, Section]] = []
    for number, (record, graph) in enumerate(zip(report.records, report.graphs, strict=True), start=1):
        prefix = f"Graph {number}: " if len(report.graphs) > 1 else ""
        found = _sections(report, record, graph, budgets)
        sections += [(f"{prefix}{s.title}", s) for s in found]
    sections += [(s.title, s) for s in _breaks(report)]
    figures = [s.figure for _, s in sections if s.figure is not None]
    links = " ".join(f'<a href="#s{i}">{html.escape(t)}</a>' for i, (t, _) in enumerate(sections))
    body = [
        "<header>",
        f"<h1>{html.escape(report.name)}</h1>",
        f'<p class="note">{html.escape(_made_for(report))}</p>',
        summary_tiles(report),
        f"<ul>{''.join(f'<li>{html.escape(line)}</li>' for line in what_changed(report))}</ul>",
        f"<nav>{links}</nav>",
        "</header>",
        *_bodies(sections),
    ]
    return _page(report.name, script, figures, "\n".join(body))


def plotly_script() -> str:
    """The JavaScript that draws; GraphoptError where plotly is not installed."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise GraphoptError("HTML reports are drawn by plotly: pip install graphopt[html]") from None
    return str(get_plotlyjs())


def _page(name: str, script: str, figures: list[Figure], body: str) -> str:
    data = json.dumps(figures, separators=(",", ":"), allow_nan=False)
    for sign in "<>&\u2028\u2029":  # which would end the script, or a line of it
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    style, code = ((_FOLDER / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="generator" content="graphopt {__version__}">
<title>graphopt report: {html.escape(name)}</title>
<style>
{style}</style>
</head>
<body>
{body}
<div id="readout" hidden></div>
<script>{script}</script>
<script type="application/json" id="figures">{data}</script>
<script>
{code}</script>
</body>
</html>"""


def _bodies(sections: list[tuple[str, Section]]) -> Iterator[str]:
    figure = 0
    for index, (title, section) in enumerate(sections):
        yield f'<section id="s{index}">\n<h2>{html.escape(title)}</h2>'
        if section.note:
            yield f'<p class="note">{html.escape(section.note)}</p>'
        if section.figure is not None:
            height = section.figure["layout"]["height"]
            label = html.escape(title)
            yield (
                f'<div class="figure" role="img" aria-label="{label}" data-figure="{figure}" '
                f'style="height:{height}px"></div>'
            )
            figure += 1
        yield f"{section.content}\n</section>"


def _made_for(report: Report) -> str:
    device = report.settings.device
    how = "" if report.settings.compiler == "eager" else f", compiled by {report.settings.compiler}"
    gigabytes = f"{format_bytes(device.memory_bytes)} of memory at {device.bytes_per_s / 1e9:.4g} GB/s"
    rate = f"{device.flops('float32') / 1e12:.3g} TFLOP/s of float32"
    return f"Predicted for {device.name}{how}: {gigabytes}, {rate}. Made by graphopt {__version__}."


def _sections(
    report: Report, record: GraphRecord, graph: GraphReport, budgets: int | None
) -> Iterator[Section]:
    before, after = Side.before(record), Side.after(record)
    note = (
        "Bytes alive at each step, by category; of many steps the fullest of each stretch is shown. "
        "Hover for what runs and what is alive; the diamond is the peak."
    )
    if record.compiled_peak_bytes is not None:
        note += f" In the compiler's own order the peak is {format_bytes(record.compiled_peak_bytes)}."
    yield Section("Memory while the step runs", note, memory_figure(graph, before, after))
    if after.timeline.lifetimes:
        yield Section(
            "The largest tensors",
            "When each is alive, in the step as planned. Hover for its source and why it is there.",
            lifetimes_figure(graph, after),
        )
    yield from _front(record, budgets)
    own = own_costs(record.before, before, after)
    yield Section(
        "Modules",
        "What each module costs in the planned step, with what is inside of it. Click to open one, "
        "and on the bar above to go back.",
        modules_figure(report.name, own),
        f"<details><summary>as a table</summary>{modules_table(whole_costs(own))}</details>",
    )
    yield from _roofline(after)
    yield from _transfers(record)
    if graph.passes:
        yield Section("Passes", "", content=passes_table(graph))
    if graph.kept:
        note = f"{plural(len(graph.kept), 'tensor')}, {format_bytes(sum(f.nbytes for f in graph.kept))}."
        yield Section(
            "Kept for the backward", f"{note} Click a heading to sort.", content=kept_table(graph.kept)
        )
    if graph.recomputed:
        note = f"{plural(len(graph.recomputed), 'operator')} of the forward. Click a heading to sort."
        yield Section("Recomputed in the backward", note, content=recomputed_table(graph.recomputed))


def _front(record: GraphRecord, budgets: int | None) -> Iterator[Section]:
    """What the `Checkpoint` among the passes reaches at other budgets; nothing where there is none."""
    program = record.before
    for step in record.steps:
        if isinstance(step.pass_, Checkpoint) and isinstance(step.plan, CheckpointPlan):
            break
        program = step.pass_.apply(program, step.plan)
    else:
        return
    if not program.is_joint:
        return
    count = min(BUDGETS, int(FRONT_SECONDS / max(step.seconds, 1e-3))) if budgets is None else budgets
    if count < 3:
        return
    plans = front(step.pass_, program, costs_of(record, program), count)
    yield Section(
        "Memory against time",
        f"What the planner reaches at {plural(count, 'budget')} from the least peak to that with "
        "everything kept, and this plan; what another plan beats is not on the curve.",
        front_figure(plans, step.plan),
    )


def _roofline(side: Side) -> Iterator[Section]:
    points = roofline_points(side)
    if not points:
        return
    device = side.costs.device
    times = "measured" if side.costs.timed else "predicted"
    rest = f" The {POINTS} kinds of most time are shown." if len(points) > POINTS else ""
    yield Section(
        "Roofline",
        f"Operators by the work they do per byte and the rate at which they do it ({times}), below "
        "what the device can do. Larger points take more of the step. Work is as the cost model "
        f"counts it: an element of a costly function, like tanh, is many operations.{rest}",
        roofline_figure(points[:POINTS], roofs_of(points, device), device.bytes_per_s),
    )


def _transfers(record: GraphRecord) -> Iterator[Section]:
    for step in record.steps:
        plan = step.plan
        if isinstance(plan, OverlapPlan) and plan.spans:
            yield Section(
                "Transfers",
                "When each channel is busy, in the order as captured and as planned.",
                spans_figure({"as captured": plan.spans_before, "as planned": plan.spans}),
            )


def _breaks(report: Report) -> Iterator[Section]:
    if report.breaks:
        rows = [[Cell(b.place), Cell(b.code), Cell(b.reason)] for b in report.breaks]
        yield Section("Graph breaks", "", content=table(("place", "code", "reason"), rows))
