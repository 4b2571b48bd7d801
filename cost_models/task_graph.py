"""Task graphs: what runs where and for how long, what it waits for, and which buffers it holds.

One channel computes; each of the others moves data beside it, one transfer at a time: a process group,
or one direction between host and device. A schedule is one order of all tasks. The host goes through
it: it runs a task of the compute channel, and starts a transfer without waiting for it. (So it is on a
GPU, too: there a collective waits for all kernels that were launched before it.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from graphopt.compiled import flat_rows
from graphopt.errors import PlanError

COMPUTE = "compute"
HOST_TO_DEVICE = "host-to-device"
DEVICE_TO_HOST = "device-to-host"


@dataclass(frozen=True, slots=True)
class Task:
    """A step of `seconds` on `channel` that begins after the tasks `after` (indices) have ended.

    `reads` and `writes` are buffers (indices): a buffer is there from the task that writes it to the last
    one that reads it. A transfer uses its buffers until it has ended, so the task that waits for it
    reads them, too. `scratch_bytes` are held while the task runs. It writes its result over the first of
    the buffers `over`, all of which it reads, that nobody reads later.
    """

    name: str
    channel: str
    seconds: float
    after: tuple[int, ...] = ()
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    scratch_bytes: int = 0
    over: tuple[int, ...] = ()


@dataclass(frozen=True)
class TaskGraph:
    """Tasks in an order in which they may run, and the bytes of the buffers that they use.

    The buffers `alive` are there before the first task, those of `kept` after the last one;
    `base_bytes` are there all the time. `contention` says for a channel by how much its transfers slow
    down what is computed beside them, and the other way round: 0.0, as it is for channels that are not
    named, for not at all, 1.0 for as much as taking turns would. PlanError for what is no such graph.

    >>> graph = TaskGraph((Task("a", "compute", 1.0), Task("send", "group 0", 2.0, (0,))))
    >>> graph.channels, graph.transfers
    (('compute', 'group 0'), (1,))
    """

    tasks: tuple[Task, ...]
    nbytes: tuple[int, ...] = ()
    alive: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    base_bytes: int = 0
    contention: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        made = set(self.alive)
        for index, task in enumerate(self.tasks):
            if not 0 <= task.seconds < float("inf"):
                raise PlanError(f"task {task.name} takes {task.seconds} seconds")
            if late := [i for i in task.after if not 0 <= i < index]:
                raise PlanError(f"task {task.name} comes after task {late[0]}, which is not before it")
            made.update(task.writes)
            if unmade := [b for b in task.reads if b not in made]:
                raise PlanError(f"task {task.name} reads buffer {unmade[0]} before it is written")
            if unread := set(task.over).difference(task.reads):
                raise PlanError(
                    f"task {task.name} writes over buffer {min(unread)}, which it does not read"
                )
        for channel, share in self.contention.items():
            if not 0 <= share < float("inf"):
                raise PlanError(f"contention of {channel} is {share}")

    @cached_property
    def channels(self) -> tuple[str, ...]:
        """The channels that the tasks use, the one that computes first."""
        return tuple(dict.fromkeys((COMPUTE, *(t.channel for t in self.tasks))))

    @cached_property
    def transfers(self) -> tuple[int, ...]:
        """The tasks that run beside the compute channel."""
        return tuple(i for i, t in enumerate(self.tasks) if t.channel != COMPUTE)

    @property
    def end_bytes(self) -> int:
        """What is alive after the last task, in any order."""
        return self.base_bytes + sum(self.nbytes[buffer] for buffer in set(self.kept))

    @cached_property
    def arrays(self) -> "TaskArrays":
        """The graph for compiled functions."""
        return TaskArrays(self)

    def check_order(self, order: Sequence[int]) -> None:
        """PlanError unless `order` has every task once, each after those that it waits for."""
        place = {task: position for position, task in enumerate(order)}
        if sorted(order) != list(range(len(self.tasks))):
            raise PlanError(f"an order of {len(order)} tasks is none of the {len(self.tasks)} tasks")
        for index, task in enumerate(self.tasks):
            if early := [i for i in task.after if place[i] > place[index]]:
                raise PlanError(f"task {task.name} is placed before {self.tasks[early[0]].name}")


class TaskArrays:
    """A task graph as arrays; those of task i in `after` begin at `after_at[i]`, and so on."""

    def __init__(self, graph: TaskGraph) -> None:
        tasks = graph.tasks
        number = {channel: i for i, channel in enumerate(graph.channels)}
        self.channel = np.array([number[t.channel] for t in tasks], np.int64)
        self.seconds = np.array([t.seconds for t in tasks], np.float64)
        self.contention = np.array([graph.contention.get(c, 0.0) for c in graph.channels], np.float64)
        self.after_at, self.after = flat_rows([t.after for t in tasks])
        self.users_at, self.users = flat_rows(_users(tasks))
        self.reads_at, self.reads = flat_rows([tuple(dict.fromkeys(t.reads)) for t in tasks])
        self.writes_at, self.writes = flat_rows([t.writes for t in tasks])
        self.over_at, self.over = flat_rows([t.over for t in tasks])
        self.scratch = np.array([t.scratch_bytes for t in tasks], np.int64)
        self.nbytes = np.array(graph.nbytes, np.int64)
        self.alive = np.array(graph.alive, np.int64)
        self.readers = np.bincount(self.reads, minlength=len(graph.nbytes)).astype(np.int64)
        self.readers[list(graph.kept)] += 1  # one that is never done reading
        self.base_bytes = graph.base_bytes


def _users(tasks: Sequence[Task]) -> list[list[int]]:
    users: list[list[int]] = [[] for _ in tasks]
    for index, task in enumerate(tasks):
        for before in task.after:
            users[before].append(index)
    return users
