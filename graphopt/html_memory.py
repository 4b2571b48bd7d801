"""The figures of a report page about memory: the timelines by category, and when tensors are alive."""

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.cost_models.devices import format_bytes
from graphopt.graph_report import GraphReport, Side, TensorFact
from graphopt.html_figures import BYTES, Figure, add_bar, axis, bars, layout, place_of, shown
from graphopt.origin import operator_name, origin_of
from graphopt.timeline import CATEGORIES, MemoryTimeline

POINTS = 150  # of a memory timeline
ALIVE = 3  # tensors named at each point of it, and more of them at the peak
ALIVE_AT_PEAK = 6
TENSORS = 20  # whose lifetimes are shown


def memory_figure(graph: GraphReport, before: Side, after: Side) -> Figure:
    """Bytes by category while the step runs, as captured above and as planned below, on one scale.

    Where the passes changed nothing, there is one of them.
    """
    changed = graph.peak_bytes != graph.baseline_peak_bytes or bool(graph.recomputed)
    shares = [(0.57, 1.0), (0.0, 0.43)] if changed else [(0.0, 1.0)]
    captured = ("before: everything kept" if graph.is_training else "forward", before)
    sides = [captured, ("after: as planned", after)][: len(shares)]
    top = max(before.timeline.peak_bytes, after.timeline.peak_bytes, graph.budget_bytes or 0)
    traces: list[dict[str, Any]] = []
    found = layout(620 if changed else 360, hovermode="x", shapes=[], annotations=[])
    why = {f.name: f.why for f in graph.kept}
    whys = [{}, why] if changed else [why]
    for number, ((title, side), domain) in enumerate(zip(sides, shares, strict=True), start=1):
        suffix = "" if number == 1 else str(number)
        found[f"xaxis{suffix}"] = axis("steps of the run", anchor=f"y{suffix}", hoverformat="d")
        found[f"yaxis{suffix}"] = axis("", domain=domain, range=[0, 1.08 * top], **BYTES)
        places = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
        traces += [{**trace, **places} for trace in _areas(side, number == 1)]
        traces += [{**trace, **places} for trace in _hovers(side, whys[number - 1])]
        _mark(found, graph, side.timeline, suffix, title)
    return {"data": traces, "layout": found}


def _areas(side: Side, legend: bool) -> list[dict[str, Any]]:
    """A filled area for each category that occurs, stacked."""
    steps = side.timeline.sampled(POINTS)
    rows = zip(CATEGORIES, side.timeline.alive_bytes, strict=True)
    return [
        {
            "type": "scatter",
            "mode": "none",
            "stackgroup": "bytes",
            "name": category,
            "legendgroup": category,
            "showlegend": legend,
            "x": steps.tolist(),
            "y": row[steps].tolist(),
            "fillcolor": f"var(--{category})",
            "hoverinfo": "skip",
        }
        for category, row in rows
        if row.any() or legend
    ]


def _hovers(side: Side, why: Mapping[str, str]) -> list[dict[str, Any]]:
    """The sum, which tells on hovering what runs and what is alive, and a mark at the peak."""
    timeline = side.timeline
    steps, total = timeline.sampled(POINTS), timeline.total_bytes
    line = {
        "type": "scatter",
        "mode": "lines",
        "line": {"color": "var(--text)", "width": 1},
        "x": steps.tolist(),
        "y": total[steps].tolist(),
        "text": [_step_text(side, step, alive) for step, alive in _alive_at(side, steps.tolist())],
        "hovertemplate": "%{text}<extra></extra>",
        "showlegend": False,
    }
    facts = [side.fact(value, category) for value, category in timeline.alive_at_peak[:ALIVE_AT_PEAK]]
    rest = len(timeline.alive_at_peak) - len(facts)
    lines = [tensor_text(fact, why.get(fact.name, "")) for fact in facts]
    lines += [f"and {rest} smaller ones"] * (rest > 0)
    mark = {
        "type": "scatter",
        "mode": "markers",
        "marker": {"color": "var(--accent)", "size": 11, "symbol": "diamond"},
        "x": [timeline.peak],
        "y": [timeline.peak_bytes],
        "text": ["<br>".join([f"<b>peak {format_bytes(timeline.peak_bytes)}</b>", *lines])],
        "hovertemplate": "%{text}<extra></extra>",
        "showlegend": False,
    }
    return [line, mark]


def _alive_at(side: Side, steps: Sequence[int]) -> list[tuple[int, list[tuple[int, str]]]]:
    """For each of `steps`, in rising order, the largest values alive in it, with their categories."""
    values = side.flow.values
    lives = sorted(side.timeline.lifetimes, key=lambda life: (-values[life[0]].nbytes, life))
    found = []
    for step in steps:
        alive = ((v, category) for v, category, first, last in lives if first <= step <= last)
        found.append((step, [pair for pair, _ in zip(alive, range(ALIVE), strict=False)]))
    return found


def _step_text(side: Side, step: int, alive: Sequence[tuple[int, str]]) -> str:
    timeline = side.timeline
    node = side.nodes[side.flow.operators[timeline.operators[step]].name]
    half = "forward" if step < timeline.forward_steps else "backward"
    again = ", recomputing" if node.name in side.again else ""
    rows = zip(CATEGORIES, timeline.alive_bytes[:, step].tolist(), strict=True)
    sizes = ", ".join(f"{category} {format_bytes(size)}" for category, size in rows if size)
    lines = [
        f"<b>{format_bytes(int(timeline.total_bytes[step]))}</b>",
        shown(sizes),
        f"step {step}, {half}{again}: {shown(operator_name(node))}{place_of(origin_of(node))}",
        "largest of what is alive:",
    ]
    for value, category in alive:
        fact = side.fact(value, category)
        lines.append(shown(f"{_sized(fact)} {fact.name}, {fact.origin.place}"))
    return "<br>".join(lines)


def tensor_text(fact: TensorFact, why: str = "") -> str:
    """A tensor in lines: its size, its name, where it was made, and why it is there."""
    reason = f"<br>kept: {shown(why)}" if why else ""
    return f"<b>{shown(f'{_sized(fact)} {fact.name}')}</b>{place_of(fact.origin)}{reason}"


def _sized(fact: TensorFact) -> str:
    shape = ", ".join(map(str, fact.shape))
    return f"{format_bytes(fact.nbytes)} {fact.category} {fact.dtype}[{shape}]"


def _mark(found: Figure, graph: GraphReport, timeline: MemoryTimeline, suffix: str, title: str) -> None:
    """Into a layout: the title of one timeline, where its backward begins, and the budget."""
    across = {"xref": f"x{suffix} domain", "yref": f"y{suffix}"}
    down = {"xref": f"x{suffix}", "yref": f"y{suffix} domain"}
    text = {"showarrow": False, "font": {"size": 12, "color": "var(--muted)"}}
    head = {"xref": f"x{suffix} domain", "yref": f"y{suffix} domain", "x": 0, "y": 1}
    bold = f"<b>{title}</b>, peak {format_bytes(timeline.peak_bytes)}"
    found["annotations"].append({**text, **head, "yanchor": "bottom", "xanchor": "left", "text": bold})
    if 0 < timeline.forward_steps < len(timeline.operators):
        line = {"color": "var(--muted)", "width": 1, "dash": "dot"}
        at = {"x0": timeline.forward_steps, "x1": timeline.forward_steps, "y0": 0, "y1": 1}
        found["shapes"].append({"type": "line", "line": line, **down, **at})
        label = {"x": timeline.forward_steps, "y": 1, "yanchor": "top", "xanchor": "left"}
        found["annotations"].append({**text, **down, **label, "text": " backward"})
    if graph.budget_bytes is not None:
        line = {"color": "var(--accent)", "width": 1.5, "dash": "dash"}
        at = {"x0": 0, "x1": 1, "y0": graph.budget_bytes, "y1": graph.budget_bytes}
        found["shapes"].append({"type": "line", "line": line, **across, **at})
        label = {"x": 1, "y": graph.budget_bytes, "yanchor": "bottom", "xanchor": "right"}
        words = f"budget {format_bytes(graph.budget_bytes)}"
        found["annotations"].append({**text, **across, **label, "text": words})


def lifetimes_figure(graph: GraphReport, side: Side) -> Figure:
    """A bar for each stretch in which one of the largest tensors is alive, in steps of the run."""
    values = side.flow.values
    lives = side.timeline.lifetimes
    largest = _largest(side)
    why = {f.name: f.why for f in graph.kept}
    again = {f.name: f.why for f in graph.recomputed}
    rows = {v: shown(f"{values[v].label}, {format_bytes(values[v].nbytes)}") for v in largest}
    traces: dict[str, dict[str, Any]] = {}
    for value, category, first, last in sorted(lives, key=lambda life: (life[0], life[2])):
        if value not in rows:
            continue
        fact = side.fact(value, category)
        maker = side.flow.operators[values[value].producer].name if values[value].producer >= 0 else ""
        reason = why.get(fact.name, "") if category == "kept" else ""
        text = f"{tensor_text(fact, reason)}<br>alive in steps {first} to {last}"
        if category == "recomputed" and (known := again.get(str(side.original.get(maker)))):
            text += f"<br>recomputed: {shown(known)}"
        trace = traces.setdefault(category, bars(category, f"var(--{category})"))
        add_bar(trace, rows[value], first, last + 1 - first, text)
    names = [rows[v] for v in reversed(largest)]
    found = layout(
        90 + 20 * len(names),
        barmode="overlay",
        xaxis=axis("steps of the run", range=[0, len(side.timeline.operators)]),
        yaxis=axis(
            "", categoryorder="array", categoryarray=names, tickfont={"size": 10}, ticklabelstandoff=4
        ),
    )
    found["legend"]["y"] = -70 / (90 + 20 * len(names))
    return {"data": [traces[c] for c in CATEGORIES if c in traces], "layout": found}


def _largest(side: Side) -> list[int]:
    """The `TENSORS` largest values, of equal ones those that are alive longest."""
    steps: dict[int, int] = {}
    for value, _, first, last in side.timeline.lifetimes:
        steps[value] = steps.get(value, 0) + last + 1 - first
    values = side.flow.values
    return sorted(steps, key=lambda v: (-values[v].nbytes, -steps[v], v))[:TENSORS]
