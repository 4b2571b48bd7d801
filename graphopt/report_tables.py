"""A report as HTML for a notebook: head figures, timelines in text, and tables behind a line each."""

from collections.abc import Sequence

from graphopt.chart import chart, legend
from graphopt.cost_models.devices import format_bytes
from graphopt.graph_report import GraphReport, TensorFact
from graphopt.html_table import folded, heading, preformatted, table
from graphopt.origin import format_seconds
from graphopt.report import Report
from graphopt.report_text import pass_text

TOP = 20  # rows of a table


def report_html(report: Report) -> str:
    """The whole report; every text in it is escaped."""
    passes = ", ".join(map(pass_text, report.passes))
    device = report.settings.device.name
    parts = [heading(f"{report.name}: {passes or 'no passes'}; times predicted for {device}")]
    parts.append(table(("", "optimized", "plain", "change"), _figures(report)))
    for graph in report.graphs:
        parts += _graph(graph)
    breaks = [(b.place, b.code, b.reason) for b in report.breaks]
    if breaks:
        parts.append(table(("graph break at", "code", "reason"), breaks))
    return "\n".join(part for part in parts if part)


def _figures(report: Report) -> list[tuple[str, ...]]:
    """Rows of a name, the optimised figure, the plain one, and the change of it."""
    peaks = ("predicted peak", report.predicted_peak_bytes, report.baseline_peak_bytes)
    found = ("measured peak", report.measured_peak_bytes, report.measured_baseline_bytes)
    rows: list[tuple[str, ...]] = []
    for name, after, before in (peaks, found):
        if after is None or before is None:
            rows.append((name, "–", "–", ""))
        else:
            rows.append((name, format_bytes(after), format_bytes(before), _change(after, before)))
    step = sum(g.step_seconds for g in report.graphs)
    if step:
        longer = step + sum(g.recompute_seconds for g in report.graphs)
        times = format_seconds(longer), format_seconds(step), _change(longer, step)
        rows.append(("predicted time", *times))
    if (measured := report.measured) is not None:
        seconds = measured.optimized.seconds, measured.plain.seconds
        rows.append(("measured time", *map(format_seconds, seconds), _change(*seconds)))
    return rows


def _change(after: float, before: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def _graph(graph: GraphReport) -> list[str]:
    top = max(graph.baseline_peak_bytes, graph.peak_bytes)
    lines = [*chart(graph.before, top, graph.budget_bytes), *chart(graph.after, top, graph.budget_bytes)]
    lines.append(legend(graph.before, graph.after))
    text = "\n".join("".join(piece for piece, _ in line).rstrip() for line in lines)
    plans = [(p.name, p.plan, format_seconds(p.seconds)) for p in graph.passes]
    again = [
        (f.name, f.operator, format_seconds(f.seconds), f.origin.module, f.origin.place, f.why)
        for f in graph.recomputed[:TOP]
    ]
    head = ("recomputed", "operator", "takes", "module", "made at", "why")
    alive = [] if graph.peak is None else graph.peak.tensors
    at_peak = "" if graph.peak is None else f", in the {graph.peak.half} at {graph.peak.operator}"
    return [
        table(("pass", "plan", "planned in"), plans),
        folded("memory over the step, plain and with the passes", preformatted(text)),
        folded(f"{len(alive)} tensors alive at the peak{at_peak}", _tensors("alive", alive)),
        folded(f"{len(graph.kept)} tensors kept for the backward", _tensors("kept", graph.kept)),
        folded(f"{len(graph.recomputed)} operators recomputed", table(head, again)),
    ]


def _tensors(what: str, facts: Sequence[TensorFact]) -> str:
    rows = [
        (
            *(f.name, format_bytes(f.nbytes), f"{f.dtype}{list(f.shape)}", f.category),
            *(f.origin.module, f.origin.place, f.why),
        )
        for f in facts[:TOP]
    ]
    return table((what, "size", "shape", "category", "module", "made at", "why"), rows)
