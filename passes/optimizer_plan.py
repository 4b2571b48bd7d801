"""What `OffloadOptimizer` decides, as plain data that prints."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import accumulate

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.link_costs import Line
from graphopt.cost_models.optimizer_tasks import (
    DEVICE,
    DONE,
    FETCH,
    HOST,
    KINDS,
    PLACES,
    RESIDENT,
    Step,
    Subgroup,
    UpdateCosts,
    update_tasks,
)
from graphopt.cost_models.overlap_run import Run, run_order
from graphopt.cost_models.run_timeline import chrome_trace, spans_of, text_timeline
from graphopt.cost_models.task_graph import COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE, TaskGraph
from graphopt.errors import PlanError
from graphopt.passes.optimizer_choice import Cutting
from graphopt.passes.optimizer_layout import Cut
from graphopt.plan import Plan

_TIMES = ("device", "host", "move", "fetch", "put")


@dataclass(frozen=True)
class OffloadOptimizerPlan(Plan):
    """Where each subgroup of an optimizer's parameters is updated, and in what order.

    A subgroup is cuts: a parameter (of those with requires_grad, in the order of the groups), its first
    element, and the one behind its last. `elements` and bytes are by subgroup.
    `places` says for each whether its state is "resident", visits the "device" or stays on the "host".
    `order` is what is done in a step, and to which subgroup. Times are lines, seconds and seconds for
    each more: of updates on the device and the host, and of moves, by elements; of transfers by bytes.

    `scratch_bytes` is what updates on the device write over, `host_scratch_bytes` what those on the host
    do, where that is the same memory. `memory_bytes` bounds state and scratch; no order of these updates
    takes less than `bound_seconds`, and no step of these places less than its slowest channel.
    """

    optimizer: str
    subgroups: tuple[tuple[Cut, ...], ...]
    elements: tuple[int, ...]
    parameter_bytes: tuple[int, ...]
    state_bytes: tuple[int, ...]
    sent_bytes: tuple[int, ...]
    places: tuple[str, ...]
    order: tuple[Step, ...]
    scratch_bytes: int
    host_scratch_bytes: int
    memory_bytes: int
    device: tuple[float, float]
    host: tuple[float, float]
    move: tuple[float, float]
    fetch: tuple[float, float]
    put: tuple[float, float]
    contention: tuple[tuple[str, float], ...]
    peak_bytes: int
    seconds: float
    bound_seconds: float
    channel: str = ""

    @cached_property
    def costs(self) -> UpdateCosts:
        """What the plan was made from."""
        lines = {name: Line(*getattr(self, name)) for name in _TIMES}
        return UpdateCosts(**lines, contention=dict(self.contention))

    @cached_property
    def cutting(self) -> Cutting:
        """The subgroups in numbers."""
        columns = (self.elements, self.parameter_bytes, self.state_bytes, self.sent_bytes)
        found = tuple(Subgroup(*row) for row in zip(*columns, strict=True))
        return Cutting(found, self.scratch_bytes, self.host_scratch_bytes)

    @property
    def gap(self) -> float:
        """The predicted time as a multiple of the bound."""
        return self.seconds / self.bound_seconds if self.bound_seconds else 1.0

    @property
    def visitors(self) -> int:
        """The most subgroups whose state visits the device at the same time."""
        changes = {FETCH: 1, DONE: -1}
        return max(accumulate(changes.get(kind, 0) for kind, _ in self.order), default=0)

    def lane_seconds(self) -> dict[str, float]:
        """The seconds that each channel is busy in a step, contention left out."""
        return self.costs.lane_seconds(self.cutting.subgroups, self.places)

    def run(self) -> Run:
        """A step, simulated, for timelines."""
        graph, steps = self._tasks()
        numbers = {step: number for number, step in enumerate(steps)}
        return run_order(graph, [numbers[step] for step in self.order])

    def _tasks(self) -> tuple[TaskGraph, tuple[Step, ...]]:
        cutting = self.cutting
        base = cutting.base_bytes(self.places)
        return update_tasks(cutting.subgroups, self.places, self.costs, base)

    def timeline(self) -> str:
        """All channels over a step, as text."""
        return text_timeline(self.run())

    def chrome_trace(self) -> str:
        """JSON for `chrome://tracing`: the same updates one after the other, and as planned."""
        graph, _ = self._tasks()
        plain = run_order(graph, range(len(graph.tasks)))
        return chrome_trace({"one by one": spans_of(plain), "as planned": spans_of(self.run())})

    def check(self) -> None:
        """PlanError unless every subgroup has a place, and its tasks in order, within the memory."""
        columns = (self.elements, self.parameter_bytes, self.state_bytes, self.sent_bytes, self.places)
        if any(len(column) != len(self.subgroups) for column in columns):
            raise PlanError(f"the plan has {len(self.subgroups)} subgroups, and columns of other lengths")
        if unknown := [p for p in self.places if p not in PLACES]:
            raise PlanError(f"place {unknown[0]!r} is none of {', '.join(PLACES)}")
        for number, place in enumerate(self.places):
            found = tuple(kind for kind, of in self.order if of == number)
            if found != KINDS[place]:
                raise PlanError(
                    f"subgroup {number} is {place!r}: its order is {', '.join(KINDS[place])}, "
                    f"not {', '.join(found) or 'nothing'}"
                )
        if len(self.order) != sum(len(KINDS[place]) for place in self.places):
            raise PlanError("the order names subgroups that are not there")
        if (peak := self.run().peak_bytes) > self.memory_bytes:
            raise PlanError(
                f"the plan holds {format_bytes(peak)} of state and scratch, more than its memory of "
                f"{format_bytes(self.memory_bytes)}",
                reachable_bytes=peak,
            )

    def __str__(self) -> str:
        lanes = self.lane_seconds()
        names = {
            COMPUTE: "device",
            HOST: "host",
            HOST_TO_DEVICE: "to the device",
            DEVICE_TO_HOST: "to the host",
        }
        busy = ", ".join(f"{names[channel]} {_ms(seconds)}" for channel, seconds in lanes.items())
        counts = [self.places.count(place) for place in (RESIDENT, DEVICE, HOST)]
        return "\n".join(
            [
                f"{self.optimizer}: {format_bytes(sum(self.state_bytes))} of state in {len(self.places)} "
                f"subgroups: {counts[0]} stay, {counts[1]} visit the device, "
                f"{counts[2]} are updated on the host",
                f"  memory     peak {format_bytes(self.peak_bytes)} of {format_bytes(self.memory_bytes)}"
                f", up to {self.visitors} visit at once",
                f"  channel    {self.channel}",
                f"  busy       {busy}",
                f"  predicted  {_ms(self.seconds)} a step, {self.gap:.2f} x the bound",
            ]
        )


def plan_of(
    optimizer: str,
    subgroups: Sequence[Sequence[Cut]],
    cutting: Cutting,
    costs: UpdateCosts,
    memory_bytes: int,
    places: Sequence[str],
    order: Sequence[Step],
    bound_seconds: float,
    channel: str,
) -> OffloadOptimizerPlan:
    """The plan of these places and this order, as simulated."""
    elements, parameter_bytes, state_bytes, sent_bytes = zip(
        *map(astuple, cutting.subgroups), strict=True
    )
    lines = {n: (getattr(costs, n).alpha_s, getattr(costs, n).beta_s) for n in _TIMES}
    graph, steps = update_tasks(cutting.subgroups, places, costs, cutting.base_bytes(places))
    numbers = {step: number for number, step in enumerate(steps)}
    run = run_order(graph, [numbers[step] for step in order])
    return OffloadOptimizerPlan(
        optimizer=optimizer,
        subgroups=tuple(tuple(cuts) for cuts in subgroups),
        elements=elements,
        parameter_bytes=parameter_bytes,
        state_bytes=state_bytes,
        sent_bytes=sent_bytes,
        places=tuple(places),
        order=tuple(order),
        scratch_bytes=cutting.scratch_bytes,
        host_scratch_bytes=cutting.host_scratch_bytes,
        memory_bytes=memory_bytes,
        contention=tuple(costs.contention.items()),
        peak_bytes=run.peak_bytes,
        seconds=run.seconds,
        bound_seconds=min(bound_seconds, run.seconds),  # equal but for rounding
        channel=channel,
        **lines,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms"
