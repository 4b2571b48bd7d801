"""What a plan of overlap says: the order of the operators, and each transfer in it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from graphopt import ops
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.link_costs import Timing, put_in_bytes
from graphopt.cost_models.overlap_run import Run
from graphopt.cost_models.run_timeline import Span, chrome_trace, joined, spans_of, svg_timelines
from graphopt.passes.exposure import exposures
from graphopt.passes.gathered_parameters import GatherRow, gather_rows
from graphopt.passes.overlap_search import Schedule
from graphopt.plan import Plan
from graphopt.program import Program

_TOP = 12  # transfers that the table shows
Row = tuple[str, str, int, float, str, float, float, str]


@dataclass(frozen=True)
class OverlapPlan(Plan):
    """The operators in order, the forward before the backward, and what the cost model says of it.

    A row of `transfers` has: name of the operator that starts it; what it does; bytes that a rank puts
    in; seconds; their source ("measured", "fitted", "given", "roofline"); seconds that computing waits
    for it in the captured order, and in this one; the reason for the latter. No order takes less than
    `bound_seconds`. Peaks are of the step; `memory_bytes` bounds that of this order.

    With `parts` > 1 the operators named by `cut` run on so many parts of the `batch` of samples, or of
    tokens where it is cut `along` the "sequence", and `order` and `transfers` are those of the program
    that this makes. `remark` says why it is cut or not. A span of either timeline has a name, a channel,
    and when it begins and ends in seconds; operators that compute without a wait between them are one.

    What the all-gathers `again` of the forward gather, the backward gathers once more. A row of `gathers`
    has, for an all-gather of a parameter: its name; the parameter; bytes of the whole of it; "forward",
    "kept" (for the backward) or "again" (in the backward); and how many others are first used between
    its start and its use. `gathered_bytes` are the most bytes of them at once.

    The all-reduces `shared` leave their sums in shares of the tokens, gathered behind the norms; with
    `partial`, what sums over tokens adds up each rank's own first. Experts behind an all-to-all work on
    `chunks` chunks of their capacity.
    """

    order: tuple[str, ...]
    transfers: tuple[Row, ...]
    seconds_before: float
    seconds: float
    bound_seconds: float
    peak_bytes_before: int
    peak_bytes: int
    memory_bytes: int | None
    contention: float
    found_by: tuple[str, ...]
    batch: int = 1
    parts: int = 1
    cut: tuple[str, ...] = ()
    remark: str = ""
    spans_before: tuple[Span, ...] = ()
    spans: tuple[Span, ...] = ()
    again: tuple[str, ...] = ()
    gathers: tuple[GatherRow, ...] = ()
    gathered_bytes_before: int = 0
    gathered_bytes: int = 0
    shared: tuple[str, ...] = ()
    chunks: int = 1
    along: Literal["batch", "sequence"] = "batch"
    partial: bool = False

    @property
    def gap(self) -> float:
        """The predicted time as a multiple of the bound."""
        return self.seconds / self.bound_seconds if self.bound_seconds else 1.0

    def __str__(self) -> str:
        if not self.transfers:
            return "no transfers: the order stays"
        exposed = [sum(row[i] for row in self.transfers) for i in (5, 6)]  # type: ignore[misc]
        split = f" of {self.parts} parts of the {self.along}" if self.parts > 1 else ""
        return (
            f"{len(self.transfers)} transfers{split}, exposed {in_ms(exposed[1])} instead of "
            f"{in_ms(exposed[0])}; step {in_ms(self.seconds)} instead of {in_ms(self.seconds_before)}, "
            f"{self.gap:.2f} x the bound; peak {format_bytes(self.peak_bytes)} instead of "
            f"{format_bytes(self.peak_bytes_before)}"
        )

    def chrome_trace(self) -> str:
        """JSON for `chrome://tracing`: the step as captured, and as planned."""
        return chrome_trace({"as captured": self.spans_before, "as planned": self.spans})

    def svg(self) -> str:
        """A picture of the step as captured, and as planned, on one scale of time."""
        timelines = {"as captured": self.spans_before, "as planned": self.spans}
        return svg_timelines(timelines, "overlap-comm")

    def table(self) -> str:
        """The transfers that computing waits for, the longest first, as text."""
        rows = sorted(self.transfers, key=lambda row: (-row[6], -row[5]))
        lines = [("transfer", "what", "bytes", "takes", "exposed", "before", "reason")]
        for name, kind, nbytes, seconds, source, before, after, reason in rows[:_TOP]:
            takes = f"{in_ms(seconds)} {source}"
            lines.append((name, kind, format_bytes(nbytes), takes, in_ms(after), in_ms(before), reason))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
        more = [f"and {len(rows) - _TOP} more"] if len(rows) > _TOP else []
        more += [self._gathered()] if self.gathers else []
        more += [self.remark] if self.remark else []
        return "\n".join([*(line.rstrip() for line in padded), *more]) if rows else ""

    def _gathered(self) -> str:
        """What becomes of the parameters that are gathered from shards."""
        uses = [use for _, _, _, use, _ in self.gathers]
        ahead = max(row[4] for row in self.gathers)
        return (
            f"{uses.count('forward') + uses.count('kept')} parameters are gathered in the forward, "
            f"{uses.count('kept')} kept for the backward, {uses.count('again')} gathered again; up to "
            f"{ahead} ahead of the one in use, {format_bytes(self.gathered_bytes)} of them at once "
            f"instead of {format_bytes(self.gathered_bytes_before)}"
        )


def in_ms(seconds: float) -> str:
    """As the report writes it.

    >>> in_ms(0.0123)
    '12.300 ms'
    """
    return f"{seconds * 1e3:.3f} ms"


def plan_of(
    before: Sequence[Run],
    found: Sequence[Schedule],
    limit: int,
    timings: Mapping[str, Timing],
    program: Program,
) -> OverlapPlan:
    """The plan of the orders `found` of the halves of `program`, which `before` ran as it is."""
    nodes = {node.name: node for node in program.operators()}
    rows: list[Row] = []
    for plain, planned in zip(before, found, strict=True):
        pairs = zip(exposures(plain), exposures(planned.run, limit), strict=True)
        for first, then in pairs:
            name = plain.graph.tasks[first.task].name
            transfer, timing = ops.transfer_of(nodes[name]), timings[name]
            kind = "" if transfer is None else transfer.kind
            facts = (name, kind, put_in_bytes(nodes[name]), timing.seconds, timing.source)
            rows.append((*facts, first.seconds, then.seconds, then.reason))
    order = tuple(s.run.graph.tasks[i].name for s in found for i in s.order)
    gathers, gathered_bytes = gather_rows(program, order)
    return OverlapPlan(
        order=order,
        transfers=tuple(rows),
        seconds_before=sum(run.seconds for run in before),
        seconds=sum(s.run.seconds for s in found),
        bound_seconds=sum(min(s.bound.seconds, s.run.seconds) for s in found),  # equal but for rounding
        peak_bytes_before=max(run.peak_bytes for run in before),
        peak_bytes=max(s.run.peak_bytes for s in found),
        memory_bytes=limit,
        contention=max((k for s in found for k in s.run.graph.contention.values()), default=0.0),
        found_by=tuple(s.found_by for s in found),
        spans_before=spans_of_step(before),
        spans=spans_of_step([s.run for s in found]),
        gathers=gathers,
        gathered_bytes=gathered_bytes,
    )


def spans_of_step(runs: Sequence[Run]) -> tuple[Span, ...]:
    """One run after the other."""
    found: list[Span] = []
    begin = 0.0
    for run in runs:
        found += joined(spans_of(run, begin))
        begin += run.seconds
    return tuple(found)
