"""What a report says about a mesh: collectives, links and times, as plain data and as lines of text."""

from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.chart import Line
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.overlap_run import Run
from graphopt.cost_models.run_timeline import text_timeline
from graphopt.origin import format_seconds

_ROUNDING_S = 1e-12


@dataclass(frozen=True)
class LinkFact:
    """What connects the `ranks` of an axis: bytes a second each way, the latency of a hop, the source."""

    axis: str
    ranks: int
    bytes_per_s: float
    latency_s: float
    source: str


@dataclass(frozen=True)
class CollectiveFact:
    """`count` collectives of one kind, into each of which a rank puts `nbytes`, in one half of the step.

    `sent_bytes` are those that one rank sends for all of them, on a ring. `seconds` are of all of them,
    of which computing waits `exposed_seconds`; `source` says where they are from ("measured", "fitted",
    "roofline": link and ring).
    """

    axis: str
    kind: str
    half: str
    count: int
    nbytes: int
    sent_bytes: int
    seconds: float
    exposed_seconds: float
    source: str


@dataclass(frozen=True)
class MeshFacts:
    """The mesh that a report is on a rank of, and the communication of that rank.

    Where not all of the `layers` were captured, `captured_layers` were, and the others repeated; both are
    None otherwise. A step takes `step_seconds`: `compute_seconds`, and the `exposed_seconds` that
    computing waits. The rest of `communication_seconds` is hidden. `runs` are forward and backward.
    """

    mesh: str
    dp: int
    tp: int
    ranks: int
    layers: int | None
    captured_layers: int | None
    links: tuple[LinkFact, ...]
    collectives: tuple[CollectiveFact, ...]
    compute_seconds: float
    communication_seconds: float
    exposed_seconds: float
    step_seconds: float
    runs: tuple[Run, ...] = field(default=(), repr=False, compare=False)

    @property
    def hidden_seconds(self) -> float:
        """The seconds of communication during which something is computed."""
        return max(0.0, self.communication_seconds - self.exposed_seconds)

    def to_dict(self) -> dict[str, Any]:
        """The facts without the runs, ready for JSON; with `hidden_seconds`."""
        kept = {k: v for k, v in self.__dict__.items() if k not in ("runs", "links", "collectives")}
        return {
            **kept,
            "hidden_seconds": self.hidden_seconds,
            "links": [asdict(link) for link in self.links],
            "collectives": [asdict(row) for row in self.collectives],
        }


def mesh_lines(facts: MeshFacts) -> list[Line]:
    """The section of the report on a mesh."""
    title = f"Communication of each of the {facts.ranks} ranks of {facts.mesh}"
    lines: list[Line] = [[], [(title, "bold")]]
    for row in facts.collectives:
        what = f"{row.count} × {row.kind} ({row.axis})"
        seconds, exposed = format_seconds(row.seconds), format_seconds(row.exposed_seconds)
        text = f"{seconds:>10}  {what} of {format_bytes(row.nbytes)} in the {row.half}"
        lines.append([(text, ""), (f"  {row.source}; {exposed} exposed", "dim")])
        lines.append([(f"            a rank sends {format_bytes(row.sent_bytes)}", "dim")])
    if not facts.collectives:
        lines.append([("  none", "")])
    for link in facts.links:
        rate = f"{link.bytes_per_s / 1e9:.4g} GB/s each way, {format_seconds(link.latency_s)} a hop"
        lines.append([(f"  {link.axis}: {link.ranks} ranks, {rate} ({link.source})", "dim")])
    lines.append([(f"  {_summary(facts)}", "")])
    for half, run in zip(("forward", "backward"), facts.runs, strict=False):
        for line in text_timeline(run).splitlines():
            lines.append([(f"  {half:<9}{line}", "")])
    if facts.dp > 1:
        how = "gradients are averaged in place, in buckets of 25 MiB; each dp rank has its own batch"
        lines.append([(f"  {how}", "dim")])
    if facts.captured_layers is not None:
        rest = f"{facts.captured_layers - 1} and {facts.captured_layers} of the {facts.layers} layers"
        lines.append([(f"  captured with {rest}, and the layers repeated", "dim")])
    return lines


def _summary(facts: MeshFacts) -> str:
    times = [format_seconds(s) for s in (facts.step_seconds, facts.compute_seconds)]
    hidden = facts.hidden_seconds
    beside = f"{format_seconds(hidden)} are hidden" if hidden > _ROUNDING_S else "none is hidden"
    return (
        f"a step takes {times[0]}: {times[1]} of computing, and {format_seconds(facts.exposed_seconds)} "
        f"of communication that it waits for; {beside}"
    )
