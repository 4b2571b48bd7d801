"""A report as lines of text, each a list of pieces with a style; without the styles it is plain."""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

from graphopt.chart import Line, chart, legend
from graphopt.cost_models.devices import format_bytes
from graphopt.graph_report import GraphReport, RecomputeFact, TensorFact, why_recomputed
from graphopt.mesh_facts import mesh_lines
from graphopt.origin import Origin, format_seconds
from graphopt.passes.base import Pass
from graphopt.passes.module_pass import ModulePass
from graphopt.report import Report

TOP = 10
_CODE = 60  # characters of a line of code
_INDENT = " " * 12
Fact = TypeVar("Fact", TensorFact, RecomputeFact)


def report_lines(report: Report, top: int = TOP) -> list[Line]:
    """The whole report; of tensors and recomputations the `top` groups, alike ones together."""
    lines = [_title(f"graphopt report: {report.name}")]
    how = "" if report.settings.compiler == "eager" else f", compiled by {report.settings.compiler}"
    lines.append(_plain(f"  times are predicted for {report.settings.device.name}{how}"))
    for pass_ in report.passes:
        lines.append(_plain(f"  pass {pass_text(pass_)}"))
    if not report.graphs:
        lines.append(_plain("  no graph yet: the first call captures the model"))
    for number, graph in enumerate(report.graphs, start=1):
        heading = f"Graph {number} of {len(report.graphs)}" if len(report.graphs) > 1 else "Graph"
        kind = "forward and backward" if graph.is_training else "forward only"
        lines += [[], _title(f"{heading}: {kind}, {graph.operators} operators")]
        lines += _summary(report, graph)
        lines += _timelines(graph)
        lines += _kept(graph, top)
        lines += _recomputed(graph, top)
        lines += _peak(graph, top)
    if report.mesh is not None:
        lines += mesh_lines(report.mesh)
    lines += _breaks(report)
    if report.other_graphs:
        lines += [[], _plain(f"{report.other_graphs} more compiled for calls with other inputs.")]
    return lines


def report_text(report: Report, top: int = TOP) -> str:
    """The report as plain text."""
    lines = ("".join(text for text, _ in line).rstrip() for line in report_lines(report, top))
    return "\n".join(lines)


def pass_text(pass_: Pass | ModulePass) -> str:
    """A pass and the options that are not at their default: `checkpoint(memory='6GiB')`."""
    options = (
        f"{field.name}={getattr(pass_, field.name)!r}"
        for field in dataclasses.fields(pass_)
        if field.repr and getattr(pass_, field.name) != field.default
    )
    return f"{pass_.name}({', '.join(options)})"


def _title(text: str) -> Line:
    return [(text, "bold")]


def _plain(text: str) -> Line:
    return [(text, "")]


def _summary(report: Report, graph: GraphReport) -> list[Line]:
    inputs = ", ".join(f"{i.name} {_shaped(i.dtype, i.shape)}" for i in graph.inputs[:4])
    more = f" and {len(graph.inputs) - 4} more" if len(graph.inputs) > 4 else ""
    static = [f"parameters {format_bytes(graph.parameter_bytes)}"]
    static.append(f"buffers {format_bytes(graph.buffer_bytes)}")
    static.append(f"inputs {format_bytes(graph.input_bytes)}")
    if graph.reserved_bytes:
        static.append(f"outside this graph {format_bytes(graph.reserved_bytes)}")
    rows = [
        ("inputs", (inputs or "none") + more),
        ("static", f"{format_bytes(graph.static_bytes)}: {', '.join(static)}"),
        ("predicted peak", _change(graph.peak_bytes, graph.baseline_peak_bytes)),
        *_measured(report),
        ("predicted time", _predicted_time(graph)),
    ]
    for step in graph.passes:
        rows.append((step.name, f"{step.plan} (in {format_seconds(step.seconds)})"))
        rows += [("", line) for line in step.table.splitlines()]
    return [[(f"  {name:<16}", "dim"), (text, "")] for name, text in rows]


def _measured(report: Report) -> list[tuple[str, str]]:
    found = report.measured
    if found is None:
        how = "not measured; model.measure(...), called as the model is, runs both steps"
        return [("measured peak", how)]
    peaks = [f.peak_bytes + found.static_bytes for f in (found.optimized, found.plain)]
    seconds = f"{format_seconds(found.optimized.seconds)} instead of "
    return [
        ("measured peak", _change(*peaks)),
        ("measured time", seconds + format_seconds(found.plain.seconds)),
    ]


def _change(after: int, before: int) -> str:
    if after == before:
        return format_bytes(after)
    share = (after - before) / before if before else 0.0
    return f"{format_bytes(after)} instead of {format_bytes(before)} ({share:+.1%})"


def _predicted_time(graph: GraphReport) -> str:
    text = format_seconds(graph.step_seconds)
    if not graph.recompute_seconds:
        return f"{text}, nothing is recomputed"
    more = graph.recompute_seconds / graph.step_seconds
    flops = graph.recompute_flops / graph.step_flops if graph.step_flops else 0.0
    again = format_seconds(graph.recompute_seconds)
    return f"{text} and {again} of recomputation: {more:+.1%} time, {flops:+.1%} FLOPs"


def _timelines(graph: GraphReport) -> list[Line]:
    top = max(graph.baseline_peak_bytes, graph.peak_bytes)
    changed = bool(graph.recomputed) or graph.peak_bytes != graph.baseline_peak_bytes
    kind = "everything kept" if graph.is_training else "forward only"
    lines = [[], _title(f"Memory, {kind}")]
    lines += chart(graph.before, top, graph.budget_bytes)
    if changed:
        lines += [[], _title("Memory, with the passes")]
        lines += chart(graph.after, top, graph.budget_bytes)
    return [*lines, legend(graph.before, graph.after)]


def _kept(graph: GraphReport, top: int) -> list[Line]:
    if not graph.is_training:
        return []
    total = format_bytes(sum(fact.nbytes for fact in graph.kept))
    lines = [[], _title(f"Kept for the backward: {_count(graph.kept, 'tensor')}, {total}")]
    return lines + _tensor_groups(graph.kept, top, lambda fact: f"kept: {fact.why}")


def _recomputed(graph: GraphReport, top: int) -> list[Line]:
    if not graph.recomputed:
        return []
    total = format_seconds(sum(fact.seconds for fact in graph.recomputed))
    title = f"Recomputed in the backward: {_count(graph.recomputed, 'operator')}, {total}"
    groups = _grouped(graph.recomputed, lambda f: (f.operator, f.origin.place))
    groups.sort(key=lambda group: -sum(f.seconds for f in group))
    lines = [[], _title(title)]
    for group in groups[:top]:
        first, runs = group[0], sum(f.count for f in group)
        seconds = sum(f.seconds for f in group)
        freed, kept = sum(f.freed_bytes for f in group), sum(f.kept_bytes for f in group)
        why = why_recomputed(seconds, freed, kept, first.leads_to)
        head = f"{format_seconds(seconds):>10}  {_times(runs)}{first.operator}"
        lines += _entry(head, group, f"recomputed: {why}")
    return lines + _rest(len(groups) - top)


def _peak(graph: GraphReport, top: int) -> list[Line]:
    peak = graph.peak
    if peak is None:
        return []
    title = f"Alive at the peak, in the {peak.half} at {peak.operator}, beside what is static"
    lines = [[], _title(title)]
    if peak.origin.place:
        lines.append([(f"  {_place(peak.origin)}", "dim")])
    return lines + _tensor_groups(peak.tensors, top, lambda fact: "")


def _tensor_groups(facts: Sequence[TensorFact], top: int, why: Callable[[TensorFact], str]) -> list[Line]:
    groups = _grouped(facts, lambda f: (f.category, f.shape, f.dtype, f.nbytes, f.origin.place))
    groups.sort(key=lambda group: -sum(f.nbytes for f in group))
    lines: list[Line] = []
    for group in groups[:top]:
        size = format_bytes(sum(f.nbytes for f in group))
        kind = "" if why(group[0]) else f"{group[0].category} "
        shape = _shaped(group[0].dtype, group[0].shape)
        lines += _entry(f"{size:>10}  {_times(len(group))}{kind}{shape}", group, why(group[0]))
    return lines + _rest(len(groups) - top)


def _entry(head: str, group: Sequence[Fact], why: str) -> list[Line]:
    names = group[0].name if len(group) == 1 else f"{group[0].name}, ..."
    module = _common([f.origin.module for f in group])
    lines = [[(head, ""), (f"  {names}  {module}", "dim")]]
    if group[0].origin.place:
        lines.append([(_INDENT + _place(group[0].origin), "dim")])
    if why:
        lines.append([(_INDENT + why, "")])
    return lines


def _breaks(report: Report) -> list[Line]:
    if not report.breaks:
        return [[], _title("Graph breaks: none")]
    lines = [[], _title(f"Graph breaks: {len(report.breaks)}")]
    for found in report.breaks:
        lines.append(_plain(f"  {_place(Origin(found.place, found.code, ''))}"))
        lines.append([(f"    {found.reason}", "dim")])
    return lines


def _grouped(facts: Iterable[Fact], key: Callable[[Fact], Hashable]) -> list[list[Fact]]:
    """Facts of equal `key` together, in the order of the first of each."""
    groups: dict[Hashable, list[Fact]] = {}
    for fact in facts:
        groups.setdefault(key(fact), []).append(fact)
    return list(groups.values())


def _common(modules: Sequence[str]) -> str:
    """One path for several submodules: parts that differ become `*`.

    >>> _common(["h.0.mlp", "h.1.mlp"]), _common(["a.b", "c"])
    ('h.*.mlp', '')
    """
    parts = [module.split(".") for module in modules]
    if len({len(p) for p in parts}) != 1:
        return ""
    return ".".join(p[0] if len(set(p)) == 1 else "*" for p in zip(*parts, strict=True))


def _rest(count: int) -> list[Line]:
    return [[(f"{_INDENT}and {count} more kinds", "dim")]] if count > 0 else []


def _count(facts: Sequence[object], noun: str) -> str:
    return f"{len(facts)} {noun}{'' if len(facts) == 1 else 's'}"


def _times(count: int) -> str:
    return f"{count} × " if count > 1 else ""


def _shaped(dtype: str, shape: Sequence[int]) -> str:
    return f"{dtype}[{', '.join(map(str, shape))}]"


def _place(origin: Origin) -> str:
    code = origin.code if len(origin.code) <= _CODE else origin.code[: _CODE - 3] + "..."
    return f"{origin.place}: {code}" if code else origin.place
