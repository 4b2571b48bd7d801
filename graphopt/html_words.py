"""The head of a report page: the numbers of the step before and after, and what changed, in words."""

import html

from graphopt.cost_models.devices import format_bytes
from graphopt.graph_report import GraphReport, Side
from graphopt.origin import format_seconds
from graphopt.report import Report
from graphopt.timeline import CATEGORIES

KEPT = CATEGORIES.index("kept")
Tile = tuple[str, str, str]  # what it is, the number, what to compare it with


def plural(count: int, noun: str) -> str:
    """A number of things.

    >>> plural(1, "tensor"), plural(2, "tensor")
    ('1 tensor', '2 tensors')
    """
    return f"{count} {noun}{'' if count == 1 else 's'}"


def summary_tiles(report: Report) -> str:
    """The numbers that matter, with those of the step as it was beside them."""
    tiles = [*_predicted(report), *_measured(report)]
    boxes = (
        f'<div class="tile"><div class="what">{html.escape(what)}</div>'
        f'<div class="value">{html.escape(value)}</div>'
        f'<div class="note">{html.escape(than)}</div></div>'
        for what, value, than in tiles
    )
    return f'<div class="tiles">{"".join(boxes)}</div>'


def step_seconds(report: Report) -> tuple[float, float]:
    """The predicted seconds of the step as captured, and as planned, of all graphs."""
    sides = [(Side.before(r).flow, Side.after(r).flow) for r in report.records]
    before, after = (sum(o.seconds for s in sides for o in s[i].operators) for i in (0, 1))
    return before, after


def _predicted(report: Report) -> list[Tile]:
    peak, baseline = report.predicted_peak_bytes, report.baseline_peak_bytes
    if peak is None or baseline is None:
        return [("predicted peak", "–", "the first call captures the model")]
    before, after = step_seconds(report)
    kept = sum(f.nbytes for g in report.graphs for f in g.kept)
    plain = sum(int(g.before.alive_bytes[KEPT].max()) for g in report.graphs)
    found: list[Tile] = [
        ("predicted peak", format_bytes(peak), _than(format_bytes(baseline), peak, baseline)),
        ("predicted step", format_seconds(after), _than(format_seconds(before), after, before)),
    ]
    if any(g.is_training for g in report.graphs):
        found.append(
            ("kept for the backward", format_bytes(kept), _than(format_bytes(plain), kept, plain))
        )
    static = sum(g.parameter_bytes + g.buffer_bytes for g in report.graphs)
    inputs = sum(g.input_bytes for g in report.graphs)
    found.append(
        ("parameters and buffers", format_bytes(static), f"and {format_bytes(inputs)} of inputs")
    )
    return found


def _measured(report: Report) -> list[Tile]:
    found, peak, plain = report.measured, report.measured_peak_bytes, report.measured_baseline_bytes
    if found is None or peak is None or plain is None:
        return []
    times = found.optimized.seconds, found.plain.seconds
    return [
        ("measured peak", format_bytes(peak), _than(format_bytes(plain), peak, plain)),
        ("measured step", format_seconds(times[0]), _than(format_seconds(times[1]), *times)),
    ]


def _than(text: str, after: float, before: float) -> str:
    """What it was before, and by how much it changed."""
    if after == before or not before:
        return "unchanged"
    return f"instead of {text} ({(after - before) / before:+.1%})"


def what_changed(report: Report) -> list[str]:
    """What is to be said of each graph, a sentence or two in each line, and of what is not shown."""
    lines = []
    for number, graph in enumerate(report.graphs, start=1):
        prefix = f"Graph {number}: " if len(report.graphs) > 1 else ""
        lines += [f"{prefix}{sentence}" for sentence in _sentences(graph)]
    if report.measured is None and report.graphs:
        lines.append("Nothing was measured: all numbers are predictions.")
    if report.other_graphs:
        lines.append(f"{plural(report.other_graphs, 'more graph')} compiled for calls with other inputs.")
    return lines


def _sentences(graph: GraphReport) -> list[str]:
    kind = "forward and backward" if graph.is_training else "forward only"
    inputs = ", ".join(f"{i.name} {i.dtype}[{', '.join(map(str, i.shape))}]" for i in graph.inputs[:4])
    more = f" and {len(graph.inputs) - 4} more" if len(graph.inputs) > 4 else ""
    found = [
        f"A step of {plural(graph.operators, 'operator')}, {kind}, on {inputs or 'no inputs'}{more}."
    ]
    if graph.peak is not None and graph.peak.origin.place:
        found.append(f"Its peak is in the {graph.peak.half}, at {graph.peak.origin.place}.")
    if not graph.passes:
        return [*found, "No pass changed it."]
    if graph.recomputed:
        runs = plural(sum(f.count for f in graph.recomputed), "operator")
        share = graph.recompute_seconds / graph.step_seconds if graph.step_seconds else 0.0
        time = f"{format_seconds(graph.recompute_seconds)} ({share:+.1%})"
        saved = max(graph.recomputed, key=lambda f: f.freed_bytes)
        found.append(f"To make room, the backward runs {runs} of the forward again, for {time}.")
        if saved.freed_bytes:
            where = f" of {saved.origin.place}" if saved.origin.place else ""
            found.append(f"The single one that frees most is {saved.operator}{where}: {saved.why}.")
    elif graph.is_training:
        found.append("Nothing is recomputed.")
    if graph.budget_bytes is not None:
        room = graph.budget_bytes - graph.peak_bytes
        fits = f"leaves {format_bytes(room)} of it" if room >= 0 else f"is {format_bytes(-room)} over it"
        found.append(f"The budget is {format_bytes(graph.budget_bytes)}; the peak {fits}.")
    return found
