"""Microbatches that skip stages: which stages and devices each goes through (SkipPipe, arXiv 2502.19913).

Several devices hold a stage. A microbatch begins on a device of the first stage, goes through some of the
others, comes back to the first for the head and the loss, and goes back the way it came. What is
allowed is as in SkipPipe's code: the first stage is never skipped; a path has a fixed number of
stages, none of them twice, the next at most `max_jump` behind the furthest so far, and at most one stage
before it, by `max_back` in all; every stage, and every device of a stage, has as many visits as the
others; a device holds at most `memory` microbatches.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from graphopt.cost_models.stage_costs import StageCost, StageLinks
from graphopt.cost_models.stage_tasks import Path, StageStep, StageTasks
from graphopt.errors import PlanError


@dataclass(frozen=True)
class Routing:
    """A pipeline whose microbatches visit `visited` of the stages.

    `stage_devices[s]` are the devices of stage s; where `is_placed` is False they may be exchanged, only
    how many each stage has is given. The cost of a stage holds on each of its devices. `head_s` is the
    loss on the device that a microbatch began on, `pause_s` what a device does nothing between tasks.
    """

    costs: tuple[StageCost, ...]
    links: StageLinks
    stage_devices: tuple[tuple[int, ...], ...]
    microbatches: int
    visited: int
    memory: int
    head_s: float = 0.0
    pause_s: float = 0.0
    max_jump: int = 4
    max_back: int = 2
    is_placed: bool = True

    def __post_init__(self) -> None:
        placed = sorted(d for row in self.stage_devices for d in row)
        if placed != list(range(self.links.devices)) or not all(self.stage_devices):
            raise PlanError(
                f"each of the {self.links.devices} devices holds one stage, and each stage has one"
            )
        if len(self.costs) != len(self.stage_devices):
            raise PlanError(f"{len(self.costs)} costs of {len(self.stage_devices)} stages")
        if not 2 <= self.visited <= len(self.costs):
            raise PlanError(f"a path has from 2 to {len(self.costs)} stages, not {self.visited}")
        if self.microbatches < 1 or self.memory < 1:
            raise PlanError(f"{self.microbatches} microbatches, room for {self.memory} on a device")

    @cached_property
    def sequences(self) -> tuple[tuple[int, ...], ...]:
        """The stages that a path may go through, in their orders."""
        rest = range(1, len(self.costs))
        every = ((0, *row) for row in itertools.permutations(rest, self.visited - 1))
        return tuple(row for row in every if self.is_allowed(row))

    def is_allowed(self, stages: Sequence[int]) -> bool:
        """Whether a path may go through `stages` in this order.

        >>> devices = tuple((d,) for d in range(6))
        >>> routing = Routing((StageCost(1, 1, 1),) * 6, StageLinks.even(6), devices, 6, 4, 3)
        >>> len(routing.sequences), routing.is_allowed((0, 2, 1, 4)), routing.is_allowed((0, 3, 1, 4))
        (22, True, False)
        """
        return bool(stages[0] == 0 and allowed(np.array(stages), self.max_jump, self.max_back))

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """For each microbatch the place, among the first stage's devices, of the one it begins on."""
        return tuple(m % len(self.stage_devices[0]) for m in range(self.microbatches))

    @cached_property
    def stage_visits(self) -> tuple[int, ...]:
        """How many microbatches each stage may have."""
        others = len(self.costs) - 1
        each = -(-self.microbatches * (self.visited - 1) // others)
        return (self.microbatches, *(each,) * others)

    @cached_property
    def device_visits(self) -> tuple[int, ...]:
        """How many microbatches each device of a stage may have, by stage."""
        pairs = zip(self.stage_visits, self.stage_devices, strict=True)
        return tuple(-(-visits // len(devices)) for visits, devices in pairs)

    def first_paths(self) -> list[Path]:
        """Some paths that are allowed: every microbatch takes the stages and devices used least.

        PlanError where that leads to no even use.
        """
        used = [[0] * len(row) for row in self.stage_devices]
        paths = []
        for source in self.sources:
            stages = min(
                (row for row in self.sequences if self._has_room(row, used)),
                key=lambda row: (max(sum(used[s]) for s in row[1:]), sum(sum(used[s]) for s in row[1:])),
                default=None,
            )
            if stages is None:
                raise PlanError("no even use of the stages found")
            path = [(0, self.stage_devices[0][source])]
            for stage in stages[1:]:
                place = used[stage].index(min(used[stage]))
                used[stage][place] += 1
                path.append((stage, self.stage_devices[stage][place]))
            paths.append(tuple(path))
        return paths

    def _has_room(self, stages: Sequence[int], used: Sequence[Sequence[int]]) -> bool:
        return all(sum(used[s]) < self.stage_visits[s] for s in stages[1:])

    def check(self, paths: Sequence[Path], stage_devices: Sequence[Sequence[int]] | None = None) -> None:
        """PlanError, naming the constraint, unless all `paths` are allowed."""
        held = stage_devices or self.stage_devices
        visits: dict[int, int] = {}
        for microbatch, path in enumerate(paths):
            stages = tuple(s for s, _ in path)
            if len(stages) != self.visited or not self.is_allowed(stages):
                raise PlanError(f"microbatch {microbatch} may not go through the stages {stages}")
            for stage, device in path:
                if device not in held[stage]:
                    raise PlanError(f"microbatch {microbatch}: device {device} has no stage {stage}")
                visits[device] = visits.get(device, 0) + 1
        for stage, devices in enumerate(held):
            if sum(visits.get(d, 0) for d in devices) > self.stage_visits[stage]:
                raise PlanError(f"stage {stage} has more than {self.stage_visits[stage]} visits")
            if any(visits.get(d, 0) > self.device_visits[stage] for d in devices):
                raise PlanError(
                    f"a device of stage {stage} has more than {self.device_visits[stage]} visits"
                )

    def step(
        self, paths: Sequence[Path], stage_devices: Sequence[Sequence[int]] | None = None
    ) -> StageTasks:
        """The tasks of a step along `paths`."""
        step = StageStep(self.costs, self.links, head_s=self.head_s)
        for microbatch, path in enumerate(paths):
            step.add_path(microbatch, path)
        held: list[tuple[int, ...]] = [()] * self.links.devices
        for stage, devices in enumerate(stage_devices or self.stage_devices):
            for device in devices:
                held[device] = (stage,)
        return step.step(self.links.devices, held, self.pause_s)

    @cached_property
    def delays(self) -> np.ndarray:
        """Seconds of a transfer of what a stage sends, float64[stage, from, to]."""
        count = self.links.devices
        found = np.empty((len(self.costs), count, count))
        for stage, cost in enumerate(self.costs):
            for a, b in itertools.product(range(count), repeat=2):
                found[stage, a, b] = self.links.seconds(a, b, cost.output_bytes)
        return found

    def round_trip_s(self, path: Path) -> float:
        """Seconds of a microbatch that is alone."""
        links, total = self.delays, self.head_s
        for stage, _ in path:
            total += self.costs[stage].seconds
        for (stage, device), (_, target) in itertools.pairwise(path):
            total += links[stage, device, target] + links[stage, target, device]
        home, (last, end) = path[0][1], path[-1]
        return float(total + links[last, end, home] + links[last, home, end])

    def all_paths(self, source: int) -> Iterator[Path]:
        """Every path that begins on the device `source`."""
        for stages in self.sequences:
            rest = [[(s, d) for d in self.stage_devices[s]] for s in stages[1:]]
            for tail in itertools.product(*rest):
                yield ((0, source), *tail)


def allowed(stages: np.ndarray, max_jump: int, max_back: int) -> bool:
    """Whether the order of int64[visited] is allowed; compiled by the search."""
    furthest = back = 0
    for place in range(1, len(stages)):
        stage = stages[place]
        for before in range(place):
            if stages[before] == stage:
                return False
        if stage > furthest + max_jump or furthest - stage > 1:
            return False
        back += max(0, furthest - stage)
        furthest = max(furthest, stage)
    return back <= max_back
