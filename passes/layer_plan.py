"""What `StreamLayers` decides and measures, as plain data that prints."""

from dataclasses import dataclass

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.layer_pipeline import LayerCosts, Pipeline, simulated
from graphopt.cost_models.run_timeline import chrome_trace, spans_of, text_timeline
from graphopt.errors import PlanError
from graphopt.plan import Plan


@dataclass(frozen=True)
class StreamLayersPlan(Plan):
    """Which blocks of the list `path` stay in memory, and how many slots the others share.

    By block: bytes of the weights that it alone has, seconds of computing, and of loading (for the blocks
    that stay, too). `rest_seconds` are computed besides the blocks. `fixed_bytes` are held besides their
    weights, `step_bytes` is what a step allocates. `seconds` is a step of many in a row, `bound_seconds`
    what no choice is faster than. A row of `exposed` has for a loaded block the seconds that computing
    waits for it in a step, and the reason.
    """

    path: str
    blocks: int
    resident: tuple[int, ...]
    slots: int
    memory_bytes: int
    peak_bytes: int
    fixed_bytes: int
    step_bytes: int
    block_bytes: tuple[int, ...]
    compute_seconds: tuple[float, ...]
    rest_seconds: float
    load_seconds: tuple[float, ...]
    channel: str
    seconds: float
    bound_seconds: float
    exposed: tuple[tuple[float, str], ...] = ()

    @property
    def streamed(self) -> tuple[int, ...]:
        """The blocks that are loaded, in order."""
        return self.costs.streamed(frozenset(self.resident))

    @property
    def costs(self) -> LayerCosts:
        """What the plan was made from."""
        return LayerCosts(
            self.compute_seconds,
            self.rest_seconds,
            self.load_seconds,
            self.block_bytes,
            self.fixed_bytes,
            self.step_bytes,
        )

    @property
    def gap(self) -> float:
        """The predicted time as a multiple of the bound."""
        return self.seconds / self.bound_seconds if self.bound_seconds else 1.0

    def pipeline(self) -> Pipeline:
        """The plan, simulated: steps in a row, for timelines."""
        return simulated(self.costs, frozenset(self.resident), self.slots)

    def timeline(self) -> str:
        """Both channels over the simulated steps, as text."""
        return text_timeline(self.pipeline().run)

    def chrome_trace(self) -> str:
        """JSON for `chrome://tracing`: simulated steps with one slot and nothing resident, and these."""
        plain = simulated(self.costs, frozenset(), 1)
        planned = self.pipeline()
        return chrome_trace(
            {"one block at a time": spans_of(plain.run), "as planned": spans_of(planned.run)}
        )

    def check(self) -> None:
        """PlanError unless the blocks exist, ascend, and those that are loaded have a slot."""
        resident = list(self.resident)
        if sorted(set(resident)) != resident or any(not 0 <= i < self.blocks for i in resident):
            raise PlanError(f"resident={resident}: positions from 0 to {self.blocks - 1}, ascending")
        if not (1 if self.streamed else 0) <= self.slots <= self.blocks:
            raise PlanError(f"slots={self.slots}: 1 to {self.blocks} where blocks are loaded")
        if len(self.block_bytes) != self.blocks:
            raise PlanError(f"block_bytes has {len(self.block_bytes)} entries for {self.blocks} blocks")

    def __str__(self) -> str:
        streamed = self.streamed
        peak = f"peak {format_bytes(self.peak_bytes)} of {format_bytes(self.memory_bytes)}"
        if not streamed:
            return f"all {self.blocks} blocks of {self.path} stay in memory: {peak}"
        costs, one = self.costs, format_bytes(self.costs.slot_bytes(frozenset(self.resident)))
        loading = sum(self.load_seconds[i] for i in streamed)
        return "\n".join(
            [
                f"{len(streamed)} of {self.blocks} blocks of {self.path} are loaded as they run",
                f"  slots      {self.slots} of {one}: {self.slots - 1} ahead of the block that runs",
                f"  resident   {' '.join(map(str, self.resident)) or 'none'}",
                f"  channel    {self.channel}",
                f"  predicted  {_ms(self.seconds)} a step ({_ms(costs.step_seconds)} computing, "
                f"{_ms(loading)} loading), {self.gap:.2f} x the bound; {peak}",
            ]
        )

    def table(self) -> str:
        """Each loaded block that computing waits for, with the reason, as text."""
        rows = [("block", "bytes", "loads in", "exposed", "reason")]
        for block, (waited, reason) in zip(self.streamed, self.exposed, strict=True):
            if waited:
                size, takes = format_bytes(self.block_bytes[block]), _ms(self.load_seconds[block])
                rows.append((str(block), size, takes, _ms(waited), reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        padded = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in padded) if len(rows) > 1 else ""


@dataclass(frozen=True)
class StreamMeasurement:
    """A step of the changed model: bytes held at its peak, of `memory_bytes`, and median seconds."""

    peak_bytes: int
    memory_bytes: int
    seconds: float

    def __str__(self) -> str:
        peak = f"peak {format_bytes(self.peak_bytes)} of {format_bytes(self.memory_bytes)}"
        return f"  measured   {_ms(self.seconds)} a step; {peak}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
