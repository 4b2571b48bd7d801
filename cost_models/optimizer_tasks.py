"""An optimizer's step as a task graph: subgroups of parameters that are updated here or on the host.

The state of a subgroup stays on the device ("resident"), or is fetched for the update and put back
("device"), or never leaves the host, which gets the gradients and gives back what the parameters are
moved by ("host"). Two directions of a channel, the device and the host all work at the same time. Deep
Optimizer States (Maurya et al., Middleware 2024, arXiv 2410.21316) interleaves updates on host and
device so, after every few on the host one on the device, by a model of what updates and transfers take.
Here the shares are those by which the slowest channel is busy for the least time, and the order is
searched.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.cost_models.link_costs import Line
from graphopt.cost_models.task_graph import COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE, Task, TaskGraph

HOST = "host"  # the channel of what the host computes, and the place of what is updated there
RESIDENT, DEVICE = "resident", "device"
PLACES = (RESIDENT, DEVICE, HOST)

UPDATE, FETCH, PUT = "update", "fetch", "put"  # on the device, and its transfers
DONE = "done"  # the device waits for a put
SEND, WORK, BACK, MOVE = "send", "work", "back", "move"  # to the host, there, and what comes of it
KINDS = {
    RESIDENT: (UPDATE,),
    DEVICE: (FETCH, UPDATE, PUT, DONE),
    HOST: (SEND, WORK, BACK, MOVE),
}
_CHANNELS = {
    FETCH: HOST_TO_DEVICE,
    BACK: HOST_TO_DEVICE,
    PUT: DEVICE_TO_HOST,
    SEND: DEVICE_TO_HOST,
    WORK: HOST,
}

Step = tuple[str, int]  # what is done, and the subgroup


@dataclass(frozen=True)
class Subgroup:
    """Parameters that are updated together: elements, and bytes of them and of their state.

    `sent_bytes` is what the host needs: gradients, and parameters where these are part of an update.
    """

    elements: int
    parameter_bytes: int
    state_bytes: int
    sent_bytes: int


@dataclass(frozen=True)
class UpdateCosts:
    """What updates on either side and moves of parameters take by elements, and transfers by bytes.

    `contention` is by channel, as in a `TaskGraph`.
    """

    device: Line
    host: Line
    move: Line
    fetch: Line
    put: Line
    contention: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, kind: str, subgroup: Subgroup) -> float:
        """What one task takes.

        >>> costs, subgroup = UpdateCosts(*[Line(0.0, 0.5)] * 5), Subgroup(100, 400, 800, 400)
        >>> costs.seconds(PUT, subgroup), costs.seconds(SEND, subgroup), costs.seconds(MOVE, subgroup)
        (400.0, 200.0, 50.0)
        """
        if kind == DONE:
            return 0.0
        computed = {UPDATE: self.device, WORK: self.host, MOVE: self.move}
        if kind in computed:
            return computed[kind].seconds(subgroup.elements)
        moved = {FETCH: subgroup.state_bytes, PUT: subgroup.state_bytes}
        moved |= {SEND: subgroup.sent_bytes, BACK: subgroup.parameter_bytes}
        return (self.fetch if kind in (FETCH, BACK) else self.put).seconds(moved[kind])

    def lane_seconds(self, subgroups: Sequence[Subgroup], places: Sequence[str]) -> dict[str, float]:
        """The seconds that each channel is busy; the slowest of them is what a step takes at least.

        >>> costs = UpdateCosts(*[Line(0.0, 1.0)] * 5)
        >>> costs.lane_seconds([Subgroup(1, 4, 8, 4)] * 2, ["device", "host"])
        {'compute': 2.0, 'host': 1.0, 'host-to-device': 12.0, 'device-to-host': 12.0}
        """
        found = dict.fromkeys((COMPUTE, HOST, HOST_TO_DEVICE, DEVICE_TO_HOST), 0.0)
        for subgroup, place in zip(subgroups, places, strict=True):
            for kind in KINDS[place]:
                found[_CHANNELS.get(kind, COMPUTE)] += self.seconds(kind, subgroup)
        return found


def spread(resident: int, hosted: int, count: int) -> tuple[str, ...]:
    """Places of `count` subgroups: the first ones resident, those on the host evenly among the others.

    >>> spread(1, 2, 7)
    ('resident', 'device', 'device', 'host', 'device', 'device', 'host')
    """
    rest = count - resident
    hosts = [(i + 1) * hosted // rest > i * hosted // rest for i in range(rest)]
    return (*[RESIDENT] * resident, *(HOST if is_host else DEVICE for is_host in hosts))


def balanced(subgroups: Sequence[Subgroup], costs: UpdateCosts, resident: int) -> int:
    """How many subgroups the host updates where the slowest channel is busy for the least time.

    >>> costs = UpdateCosts(*(Line(0.0, s) for s in (1.0, 3.0, 0.0, 0.01, 0.01)))
    >>> balanced([Subgroup(1, 4, 8, 4)] * 8, costs, 0)
    2
    """
    count = len(subgroups)

    def slowest(hosted: int) -> float:
        return max(costs.lane_seconds(subgroups, spread(resident, hosted, count)).values())

    return min(range(count - resident + 1), key=slowest)


def update_tasks(
    subgroups: Sequence[Subgroup],
    places: Sequence[str],
    costs: UpdateCosts,
    base_bytes: int = 0,
) -> tuple[TaskGraph, tuple[Step, ...]]:
    """The tasks, one subgroup after the other, and what each of them is.

    The state of a subgroup that visits the device is there from its fetch until it is put back, and what
    comes back from the host until the parameters are moved.
    """
    tasks: list[Task] = []
    steps: list[Step] = []
    sizes: list[int] = []
    for number, (subgroup, place) in enumerate(zip(subgroups, places, strict=True)):
        for kind in KINDS[place]:
            after = () if kind == KINDS[place][0] else (len(tasks) - 1,)
            reads = (
                (len(sizes) - 1,)
                if kind in (PUT, DONE, MOVE) or (kind, place) == (UPDATE, DEVICE)
                else ()
            )
            writes = (len(sizes),) if kind in (FETCH, BACK) else ()
            sizes += [subgroup.state_bytes if kind == FETCH else subgroup.parameter_bytes for _ in writes]
            channel, seconds = _CHANNELS.get(kind, COMPUTE), costs.seconds(kind, subgroup)
            tasks.append(Task(f"{kind} {number}", channel, seconds, after, reads, writes))
            steps.append((kind, number))
    contention = dict(costs.contention)
    return TaskGraph(tuple(tasks), tuple(sizes), base_bytes=base_bytes, contention=contention), tuple(
        steps
    )
