"""A training step of a pipeline as tasks: what runs on which device, after what, holding how much.

A task with no device is a collective: it begins when all that it waits for has ended, and keeps no
device busy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from graphopt.compiled import flat_rows
from graphopt.cost_models.stage_costs import StageCost, StageLinks
from graphopt.errors import PlanError

ANYWHERE = -1  # the device of a collective

Path = tuple[tuple[int, int], ...]  # (stage, device) pairs


@dataclass(frozen=True, slots=True)
class StageTask:
    """A task that begins `delay_s` after each of the tasks `after` (indices, seconds) has ended.

    It adds `activations` and `nbytes` when it begins, and takes `activations_freed` and `freed_bytes`
    away when it ends. It never begins before `ready_s`.
    """

    name: str
    device: int
    seconds: float
    after: tuple[tuple[int, float], ...] = ()
    activations: float = 0.0
    activations_freed: float = 0.0
    nbytes: int = 0
    freed_bytes: int = 0
    ready_s: float = 0.0


@dataclass(frozen=True)
class StageTasks:
    """The tasks of a step on `devices`; between two on one device lie at least `pause_s`.

    `fixed_bytes[d]` are held on device d all the time.
    """

    tasks: tuple[StageTask, ...]
    devices: int
    pause_s: float = 0.0
    fixed_bytes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for index, task in enumerate(self.tasks):
            if not 0 <= task.seconds < float("inf"):
                raise PlanError(f"task {task.name} takes {task.seconds} seconds")
            if not ANYWHERE <= task.device < self.devices:
                raise PlanError(f"task {task.name} is on device {task.device} of {self.devices}")
            for other, _ in task.after:
                if not 0 <= other < len(self.tasks) or other == index:
                    raise PlanError(f"task {task.name} comes after task {other}, which is not there")

    @cached_property
    def number(self) -> dict[str, int]:
        """The index of each task by its name."""
        return {task.name: i for i, task in enumerate(self.tasks)}

    @cached_property
    def arrays(self) -> "StageArrays":
        """The tasks for compiled functions."""
        return StageArrays(self)

    def indices(self, orders: Sequence[Sequence[str]]) -> list[list[int]]:
        """Orders by name as orders by index."""
        return [[self.number[name] for name in row] for row in orders]


class StageArrays:
    """Tasks as arrays; those that task i waits for begin at `after_at[i]`, those that wait for it at
    `users_at[i]`."""

    def __init__(self, step: StageTasks) -> None:
        tasks = step.tasks
        self.device = np.array([t.device for t in tasks], np.int64)
        self.seconds = np.array([t.seconds for t in tasks], np.float64)
        self.ready = np.array([t.ready_s for t in tasks], np.float64)
        self.holds = np.array([t.activations for t in tasks], np.float64)
        self.frees = np.array([t.activations_freed for t in tasks], np.float64)
        users: list[list[int]] = [[] for _ in tasks]
        delays: list[list[float]] = [[] for _ in tasks]
        for index, task in enumerate(tasks):
            for other, delay in task.after:
                users[other].append(index)
                delays[other].append(delay)
        self.waits = np.array([len(t.after) for t in tasks], np.int64)
        self.users_at, self.users = flat_rows(users)
        self.delays = np.array([delay for row in delays for delay in row], np.float64)


@dataclass
class StageStep:
    """Collects the tasks of a step in which microbatches run along paths.

    `split` splits the backward in I and W, `parts` is how many stages a device has. `head_s` is the loss
    on the first device of a path, after its last stage (SkipPipe); without it the last stage of a path
    has the loss.
    """

    costs: Sequence[StageCost]
    links: StageLinks
    split: bool = False
    parts: int = 1
    head_s: float | None = None
    tasks: list[StageTask] = field(default_factory=list)
    number: dict[str, int] = field(default_factory=dict)

    def add(self, task: StageTask) -> int:
        """Add one task; its index."""
        if task.name in self.number:
            raise PlanError(f"there are two tasks {task.name}")
        self.number[task.name] = len(self.tasks)
        self.tasks.append(task)
        return len(self.tasks) - 1

    def add_path(
        self, microbatch: int, path: Path, ready_s: float = 0.0, after: Sequence[str] = ()
    ) -> None:
        """All passes of a microbatch along `path`; its first forward also waits for the tasks `after`."""
        waits = tuple((self.number[name], 0.0) for name in after)
        last: tuple[int, int] | None = None
        for stage, device in path:
            name, cost = f"{stage}F{microbatch}", self.costs[stage]
            waits += self._sent(last, device)
            last = self._forward(name, device, cost, waits, ready_s), stage
            waits, ready_s = (), 0.0
        if self.head_s is not None and last is not None:
            stage, device = path[0]
            name = f"{stage}H{microbatch}"
            head = StageTask(name, device, self.head_s, self._sent(last, device))
            last = self.add(head), last[1]
        for place in reversed(range(len(path))):
            stage, device = path[place]
            waits = self._sent(last, device)
            if self.head_s is None and place == len(path) - 1:
                waits = ((self.number[f"{stage}F{microbatch}"], 0.0),)
            before = path[place - 1][0] if place else stage  # whose output the gradient is of
            last = self._backward(microbatch, stage, device, waits), before

    def _sent(self, last: tuple[int, int] | None, device: int) -> tuple[tuple[int, float], ...]:
        """Wait for the task, and for its transfer of as much as its stage sends."""
        if last is None:
            return ()
        task, stage = last
        source = self.tasks[task].device
        return ((task, self.links.seconds(source, device, self.costs[stage].output_bytes)),)

    def _forward(
        self,
        name: str,
        device: int,
        cost: StageCost,
        waits: tuple[tuple[int, float], ...],
        ready_s: float,
    ) -> int:
        return self.add(
            StageTask(
                name,
                device,
                cost.forward_s,
                waits,
                activations=1 / self.parts,
                nbytes=cost.saved_bytes,
                ready_s=ready_s,
            )
        )

    def _backward(
        self, microbatch: int, stage: int, device: int, waits: tuple[tuple[int, float], ...]
    ) -> int:
        cost, share = self.costs[stage], 1 / self.parts
        if not self.split:
            return self.add(
                StageTask(
                    f"{stage}B{microbatch}",
                    device,
                    cost.backward_s,
                    waits,
                    activations_freed=share,
                    freed_bytes=cost.saved_bytes,
                )
            )
        early = cost.saved_bytes - cost.waits_bytes
        name = f"{stage}I{microbatch}"
        first = self.add(StageTask(name, device, cost.input_s, waits, freed_bytes=early))
        self.add(
            StageTask(
                f"{stage}W{microbatch}",
                device,
                cost.weight_s,
                ((first, 0.0),),
                activations_freed=share,
                freed_bytes=cost.waits_bytes,
            )
        )
        return first

    def step(self, devices: int, held: Sequence[Sequence[int]], pause_s: float = 0.0) -> StageTasks:
        """The tasks; device d holds the weights of the stages `held[d]`."""
        fixed = tuple(sum(self.costs[s].weight_bytes for s in stages) for stages in held)
        return StageTasks(tuple(self.tasks), devices, pause_s, fixed)
