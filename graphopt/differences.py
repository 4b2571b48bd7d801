"""In what two plans, or two reports, of a model differ, as rows: what it is, here and there."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import GraphoptError
from graphopt.pass_syntax import pass_syntax
from graphopt.plan_file import GraphPlan, PlanFile

# What the names in a field of a plan are, where the field does not say so.
_WORDS = {"keep": "kept", "offloads": "offloaded", "regions": "fused", "heads": "streamed"}
_WORDS |= {"update": "updated"}
# Of a report, what takes time on this machine, and what has its own comparison.
_UNSTABLE = ("trace_seconds", "seconds")
_LISTS = ("kept", "recomputed", "passes", "inputs", "before", "after", "peak")
_TEXTS = ("model", "device", "compiler", "passes", "other_graphs", "graphopt")
_PEAKS = ("predicted_peak_bytes", "baseline_peak_bytes")


@dataclass(frozen=True)
class Difference:
    """One thing that differs: `a` and `b` are its values, names that only one has, or None for none."""

    what: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Comparison:
    """Two files of one `kind` ("plan" or "report"): what differs, and what was measured.

    Measured figures differ from run to run, and so do the times of tracing and planning: they are no
    differences.
    """

    kind: str
    rows: tuple[Difference, ...]
    measured: tuple[Difference, ...] = ()

    def as_data(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "kind": self.kind,
            "equal": not self.rows,
            "differences": [asdict(row) for row in self.rows],
            "measured": [asdict(row) for row in self.measured],
        }


def compare_files(a: str, b: str) -> Comparison:
    """What differs between two files; GraphoptError where they are not of one kind."""
    (kind, first), (other, second) = _read(a), _read(b)
    if kind != other:
        raise GraphoptError(f"{a} is a {kind} and {b} a {other}: compare two of one kind")
    if isinstance(first, PlanFile) and isinstance(second, PlanFile):
        return compare_plans(first, second)
    return compare_reports(first, second)


def compare_plans(a: PlanFile, b: PlanFile) -> Comparison:
    """What differs between two plan files, for graphs in the same place of both."""
    names = ("model", "options", "compiler", "device", "torch_version", "graphopt_version")
    rows = [*_values({n: getattr(a, n) for n in names}, {n: getattr(b, n) for n in names})]
    rows += _values({"graphs": len(a.graphs)}, {"graphs": len(b.graphs)})
    for number, (first, second) in enumerate(zip(a.graphs, b.graphs, strict=False), start=1):
        where = f"graph {number} " if len(a.graphs) > 1 else ""
        rows += _graph_plans(where, first, second)
    return Comparison("plan", tuple(rows))


def compare_reports(a: Mapping[str, Any], b: Mapping[str, Any]) -> Comparison:
    """What differs between two reports, as `Report.to_json` writes them; timelines are left out."""
    rows = [*_values({n: a.get(n) for n in _TEXTS}, {n: b.get(n) for n in _TEXTS})]
    rows += _values({n: a.get(n) for n in _PEAKS}, {n: b.get(n) for n in _PEAKS})
    rows += _values({"graphs": len(a["graphs"])}, {"graphs": len(b["graphs"])})
    for number, (first, second) in enumerate(zip(a["graphs"], b["graphs"], strict=False), start=1):
        where = f"graph {number} " if len(a["graphs"]) > 1 else ""
        rows += _graph_reports(where, first, second)
    measured = _values(_measured(a), _measured(b))
    return Comparison("report", tuple(rows), tuple(measured))


def _read(path: str) -> tuple[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
        data = json.loads(text)
    except OSError as error:
        raise GraphoptError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise GraphoptError(f"{path} is no JSON: {error}") from None
    if isinstance(data, dict) and data.get("kind") == "graphopt plan":
        return "plan", PlanFile.from_json(text, path)
    if isinstance(data, dict) and {"schema", "graphs", *_PEAKS} <= set(data):
        return "report", data
    raise GraphoptError(f"{path} is neither a plan file nor a report as --json writes it")


def _values(a: Mapping[str, Any], b: Mapping[str, Any], where: str = "") -> Iterator[Difference]:
    """A row for each name whose values differ."""
    for name in dict.fromkeys((*a, *b)):
        if a.get(name) != b.get(name):
            yield Difference(f"{where}{name.replace('_', ' ')}", a.get(name), b.get(name))


def _graph_plans(where: str, a: GraphPlan, b: GraphPlan) -> Iterator[Difference]:
    if a.fingerprint != b.fingerprint:
        yield Difference(f"{where}graph", f"{a.fingerprint[:12]}", f"{b.fingerprint[:12]}")
        yield Difference(f"{where}is not the same", a.difference(b), b.difference(a))
    for number in range(max(len(a.steps), len(b.steps))):
        first, second = (g.steps[number] if number < len(g.steps) else None for g in (a, b))
        texts = [None if step is None else pass_syntax(step[0]) for step in (first, second)]
        if texts[0] != texts[1]:
            yield Difference(f"{where}pass {number + 1}", *texts)
        if first is None or second is None:
            continue
        if type(first[1]) is type(second[1]):
            yield from _plans(f"{where}{first[0].name}: ", *(asdict(step[1]) for step in (first, second)))


def _plans(where: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    """The fields of two plans of one kind; of lists of names, those that only one has."""
    for name, value in a.items():
        other, what = b[name], f"{where}{_WORDS.get(name, name.replace('_', ' '))}"
        if value == other:
            continue
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _plans(where, value, other)
        elif isinstance(value, tuple) and isinstance(other, tuple):
            yield _names(what, [*map(_name, value)], [*map(_name, other)])
        else:
            yield Difference(what, value, other)


def _name(entry: Any) -> str:
    """What an entry of a plan is called: a name, the first of a row, or the nodes of a region."""
    if isinstance(entry, dict):
        entry = next(iter(entry.values()))
    if isinstance(entry, tuple):
        return str(entry[0]) if not isinstance(entry[0], tuple) else str(entry)
    return str(entry)


def _names(what: str, a: Sequence[str], b: Sequence[str]) -> Difference:
    only = [n for n in a if n not in set(b)], [n for n in b if n not in set(a)]
    if any(only):
        return Difference(f"{what}, here only", *only)
    return Difference(f"{what}, arranged otherwise", list(a), list(b))


def _graph_reports(where: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[Difference]:
    plain = [{n: v for n, v in g.items() if n not in (*_LISTS, *_UNSTABLE)} for g in (a, b)]
    yield from _values(plain[0], plain[1], where)
    yield from _values({"inputs": a["inputs"]}, {"inputs": b["inputs"]}, where)
    for name in ("plan", "table"):
        texts = [{p["name"]: p.get(name, "") for p in g["passes"]} for g in (a, b)]
        yield from _values(texts[0], texts[1], where)
    for name, amount in (("kept", "nbytes"), ("recomputed", "seconds")):
        rows = [{fact["name"]: fact for fact in g[name]} for g in (a, b)]
        only = [[row[n] for n in row if n not in other] for row, other in (rows, rows[::-1])]
        if any(only):
            yield Difference(f"{where}{name}, here only", *([f["name"] for f in part] for part in only))
            unit = "bytes" if amount == "nbytes" else amount
            sums = (sum(fact[amount] for fact in part) for part in only)
            yield Difference(f"{where}{name}, here only, {unit}", *sums)
    peaks = [(g["peak"] or {}).get("operator") for g in (a, b)]
    yield from _values({"peak at": peaks[0]}, {"peak at": peaks[1]}, where)


def _measured(report: Mapping[str, Any]) -> dict[str, Any]:
    found = report.get("measured") or {}
    names = [(kind, name) for kind in ("plain", "optimized") for name in ("peak_bytes", "seconds")]
    return {f"{kind}_{name}": found.get(kind, {}).get(name) for kind, name in names}
