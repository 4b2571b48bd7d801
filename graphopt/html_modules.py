"""What each module of a model costs in a step: seconds, and bytes kept for the backward."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.memory import NO_PRODUCER
from graphopt.graph_report import Side
from graphopt.html_figures import Figure, layout, shown
from graphopt.origin import format_seconds, origin_of
from graphopt.program import Program, Role

AREAS = 24  # at least so many are seen at once, if there are: levels of modules are shown until then
MOST = 400  # modules in the figure


@dataclass(frozen=True)
class ModuleCost:
    """What a module costs with all inside of it, or (of `own_costs`) without."""

    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    recompute_seconds: float = 0.0
    parameter_bytes: int = 0
    plain_kept_bytes: int = 0
    kept_bytes: int = 0

    @property
    def seconds(self) -> float:
        """The whole step, recomputation included."""
        return self.forward_seconds + self.backward_seconds + self.recompute_seconds

    def __add__(self, other: "ModuleCost") -> "ModuleCost":
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return ModuleCost(*(a + b for a, b in pairs))


def own_costs(program: Program, before: Side, after: Side) -> dict[str, ModuleCost]:
    """By path, what the operators of a module itself cost; "" is the model, and what is in no module.

    Times are those of the planned step. An operator of the backward belongs to the module of the
    forward operator that it differentiates, and a kept tensor to the module that makes it.
    """
    found: dict[str, ModuleCost] = {}

    def add(path: str, cost: ModuleCost) -> None:
        found[path] = found.get(path, ModuleCost()) + cost

    for operator in after.flow.operators:
        node, seconds = after.nodes[operator.name], operator.seconds
        if operator.name in after.again:
            add(origin_of(node).module, ModuleCost(recompute_seconds=seconds))
        elif operator.backward:
            add(origin_of(node).module, ModuleCost(backward_seconds=seconds))
        else:
            add(origin_of(node).module, ModuleCost(forward_seconds=seconds))
    for path, nbytes in _kept(before):
        add(path, ModuleCost(plain_kept_bytes=nbytes))
    for path, nbytes in _kept(after):
        add(path, ModuleCost(kept_bytes=nbytes))
    for item in program.inputs:
        if item.role is Role.PARAMETER:
            nbytes = sum(before.flow.values[v].nbytes for v in before.flow.value_of[item.name])
            add(item.label.rpartition(".")[0], ModuleCost(parameter_bytes=nbytes))
    return found


def _kept(side: Side) -> list[tuple[str, int]]:
    """Module and bytes of each tensor that the forward leaves for the backward."""
    found = []
    for value in sorted(side.choice.keep):
        known = side.flow.values[value]
        if known.producer != NO_PRODUCER:
            node = side.nodes[side.flow.operators[known.producer].name]
            found.append((origin_of(node).module, known.nbytes))
    return found


def whole_costs(own: dict[str, ModuleCost]) -> dict[str, ModuleCost]:
    """By path, what each module costs with all inside of it, every module before those inside of it.

    >>> own = {"": ModuleCost(1.0), "a.b": ModuleCost(2.0), "a": ModuleCost(4.0)}
    >>> [(path, cost.seconds) for path, cost in whole_costs(own).items()]
    [('', 7.0), ('a', 6.0), ('a.b', 2.0)]
    """
    found = {"": ModuleCost()}
    for path in own:
        parts = path.split(".") if path else []
        for length in range(len(parts) + 1):
            found.setdefault(".".join(parts[:length]), ModuleCost())
    for path, cost in own.items():
        while True:
            found[path] = found[path] + cost
            if not path:
                break
            path = parent_of(path)
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def parent_of(path: str) -> str:
    """The path of the module around the one at `path`."""
    return path.rpartition(".")[0]


def _order(path: str) -> list[tuple[bool, int, str]]:
    """Numbers by their size, so that layer 10 follows layer 9."""
    parts = path.split(".") if path else []
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


@dataclass(frozen=True)
class Measure:
    """A number of each module that areas can stand for."""

    name: str
    of: Callable[[ModuleCost], float]
    text: Callable[[float], str]


MEASURES = (
    Measure("seconds of the step", lambda c: c.seconds, format_seconds),
    Measure("bytes kept, as planned", lambda c: c.kept_bytes, lambda n: format_bytes(int(n))),
    Measure("bytes kept, before", lambda c: c.plain_kept_bytes, lambda n: format_bytes(int(n))),
    Measure("bytes of parameters", lambda c: c.parameter_bytes, lambda n: format_bytes(int(n))),
)


def modules_figure(name: str, own: dict[str, ModuleCost]) -> Figure:
    """A treemap of the modules, in which a click opens one; a menu chooses what areas stand for.

    A module that has others inside of it has a part "own operators" for what is in none of them. Of
    models with more than `MOST` modules the outer levels are shown.
    """
    own = _folded(own)
    whole = whole_costs(own)
    parents = {parent_of(path) for path in whole if path}
    leaves = [path for path in parents if path in own]
    paths = [*whole, *(f"{path}\n" for path in sorted(leaves, key=_order))]
    costs = [*whole.values(), *(own[path[:-1]] for path in paths[len(whole) :])]
    labels = [shown(path.rpartition(".")[2]) for path in paths]
    labels[0] = shown(name)
    labels[len(whole) :] = ["own operators"] * len(leaves)
    above = ["", *(f"m:{parent_of(path)}" for path in paths[1 : len(whole)])]
    above += [f"m:{path[:-1]}" for path in paths[len(whole) :]]
    measures = [m for m in MEASURES if m.of(whole[""])]
    columns = [[m.of(cost) for cost in costs] for m in measures]
    hovers = [_hover(path.strip() or name, cost) for path, cost in zip(paths, costs, strict=True)]
    trace = {
        "type": "treemap",
        "ids": [f"m:{path}" for path in paths],
        "labels": labels,
        "parents": above,
        "values": columns[0] if columns else [],
        "text": _texts(measures[0], columns[0]) if columns else [],
        "branchvalues": "total",
        "maxdepth": _depth(whole),
        "texttemplate": "%{label}<br>%{text}",
        "customdata": hovers,
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {"colors": _colours(paths), "line": {"width": 1, "color": "var(--panel)"}},
        "pathbar": {"thickness": 22},
        "tiling": {"pad": 2},
        "root": {"color": "var(--grid)"},
    }
    found = layout(460, margin={"l": 4, "r": 4, "t": 40, "b": 4})
    if len(measures) > 1:
        found["updatemenus"] = [_menu(measures, columns)]
    return {"data": [trace], "layout": found}


def _folded(own: dict[str, ModuleCost]) -> dict[str, ModuleCost]:
    """Costs of as many outer levels as have `MOST` modules at most, with what is inside of those."""
    levels = Counter(_level(path) for path in whole_costs(own))
    seen, deepest = 0, max(levels)
    for level in sorted(levels):
        seen += levels[level]
        if seen > MOST and level > 1:
            deepest = level - 1
            break
    found: dict[str, ModuleCost] = {}
    for path, cost in own.items():
        outer = ".".join(path.split(".")[:deepest])
        found[outer] = found.get(outer, ModuleCost()) + cost
    return found


def _level(path: str) -> int:
    return len(path.split(".")) if path else 0


def _depth(paths: Iterable[str]) -> int:
    """The levels to show, the model's included: those that together have `AREAS` modules."""
    levels = Counter(map(_level, paths))
    seen = 0
    for level in sorted(levels):
        seen += levels[level]
        if seen >= AREAS:
            return level + 1
    return max(levels) + 1


def _menu(measures: Sequence[Measure], columns: Sequence[Sequence[float]]) -> dict[str, Any]:
    buttons = [
        {
            "label": f"area: {m.name}",
            "method": "restyle",
            "args": [{"values": [column], "text": [_texts(m, column)]}],
        }
        for m, column in zip(measures, columns, strict=True)
    ]
    place = {"x": 0, "xanchor": "left", "y": 1.0, "yanchor": "bottom", "pad": {"b": 6}}
    colours = {"bgcolor": "var(--panel)", "bordercolor": "var(--grid)", "font": {"color": "var(--text)"}}
    return {"type": "dropdown", "buttons": buttons, **place, **colours}


def _texts(measure: Measure, column: Sequence[float]) -> list[str]:
    whole = column[0] or 1.0
    return [f"{measure.text(value)}, {value / whole:.1%}" for value in column]


def _hover(path: str, cost: ModuleCost) -> str:
    times = f"forward {format_seconds(cost.forward_seconds)}"
    if cost.backward_seconds:
        times += f", backward {format_seconds(cost.backward_seconds)}"
    if cost.recompute_seconds:
        times += f", recomputing {format_seconds(cost.recompute_seconds)}"
    kept = format_bytes(cost.kept_bytes), format_bytes(cost.plain_kept_bytes)
    lines = [f"<b>{shown(path)}</b>", times, f"parameters {format_bytes(cost.parameter_bytes)}"]
    if cost.plain_kept_bytes or cost.kept_bytes:
        lines.append(f"kept {kept[0]} instead of {kept[1]}")
    return "<br>".join(lines)


def _colours(paths: Sequence[str]) -> list[str]:
    """One colour for modules of one kind: of the same name, or numbered in the same list."""
    kinds: dict[str, str] = {"": "var(--grid)"}
    for path in paths:
        kind = _kind(path.strip())
        kinds.setdefault(kind, f"var(--area-{len(kinds) % 6})")
    return [kinds[_kind(path.strip())] for path in paths]


def _kind(path: str) -> str:
    parts = [p for p in path.split(".") if p and not p.isdigit()]
    return parts[-1] if parts else ""
