"""Which subgroups of an optimizer stay, visit the device, or are updated on the host, and in what order.

Candidates have as many subgroups resident as fit beside a few slots, and as many on the host as balance
the channels, or a few more or fewer. Each gets the order that `graphopt.passes.overlap_search` finds
within the memory; the search ends when no lower bound is below the best time. The host takes part only
where that is clearly quicker: what it does slows down what is beside it in ways that no plan foresees.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.optimizer_tasks import (
    HOST,
    RESIDENT,
    Step,
    Subgroup,
    UpdateCosts,
    balanced,
    spread,
    update_tasks,
)
from graphopt.cost_models.overlap_bound import bound
from graphopt.cost_models.task_graph import TaskGraph
from graphopt.errors import PlanError
from graphopt.passes.overlap_search import Schedule, schedule

_SLOTS = (2, 3, 4, 6, 1)  # that are tried, on the device and for what comes from the host
_LANDINGS = 2  # at most, for what comes from the host, beside those slots
_NEAR = 2  # subgroups more or fewer on the host than balance the channels
NUMBERS_BYTES = 64  # what operators make of numbers, such as factors
_TRIALS, _LAST_TRIALS = 8, 200  # orders that are searched for a candidate, and for the best one
_GAIN = 1e-3  # of the time: less does not count
_FINER_GAIN = 0.03  # for less, subgroups are not cut finer: there would be more to hand over
_HOST_GAIN = 0.1  # of the time: for less nothing is updated on the host


@dataclass(frozen=True, eq=False)
class Cutting:
    """One way to cut the parameters: the subgroups, and what an update writes over.

    `host_scratch_bytes` is the scratch of updates on the host where that is the device's memory, too.
    """

    subgroups: tuple[Subgroup, ...]
    scratch_bytes: int
    host_scratch_bytes: int

    def base_bytes(self, places: Sequence[str]) -> int:
        """What a step holds all the time: resident state, and scratch."""
        pairs = zip(self.subgroups, places, strict=True)
        kept = sum(subgroup.state_bytes for subgroup, place in pairs if place == RESIDENT)
        here = self.scratch_bytes if any(place != HOST for place in places) else 0
        return kept + here + (self.host_scratch_bytes if HOST in places else 0) + NUMBERS_BYTES

    def residents(self, room_bytes: int) -> int:
        """How many of the first subgroups there is room for."""
        held = accumulate(s.state_bytes for s in self.subgroups)
        return sum(nbytes <= room_bytes for nbytes in held)


@dataclass(frozen=True, eq=False)
class Choice:
    """The places of the subgroups of cutting number `cutting`, and the order of what is done."""

    cutting: int
    places: tuple[str, ...]
    schedule: Schedule
    steps: tuple[Step, ...]

    @property
    def order(self) -> tuple[Step, ...]:
        """What is done, in order."""
        return tuple(self.steps[task] for task in self.schedule.order)


def choose_updates(
    cuttings: Sequence[Cutting],
    costs: UpdateCosts,
    memory_bytes: int,
    host_share: float | None = None,
) -> Choice:
    """The choice of least seconds within `memory_bytes`; the same for the same arguments.

    `host_share` of the subgroups that do not stay are updated on the host; None: as many as is best.
    PlanError with `reachable_bytes` where nothing fits.
    """
    best: dict[bool, Choice] = {}  # with something on the host, and without
    for number, cutting in enumerate(cuttings):
        for places in dict.fromkeys(_candidates(cutting, costs, memory_bytes, host_share)):
            graph, steps = _graph(cutting, places, costs)
            hosted = HOST in places
            limit = _most_seconds(best, hosted, number)
            if bound(graph).seconds >= limit:
                continue
            try:
                found = schedule(graph, memory_bytes=memory_bytes, trials=_TRIALS)
            except PlanError:  # no order was found that fits; others have more room
                continue
            if found.run.seconds < limit:
                best[hosted] = Choice(number, places, found, steps)
    if not best:
        least = least_bytes(cuttings, host_share)
        raise PlanError(
            f"no plan keeps the optimizer within {format_bytes(memory_bytes)}; the least that it can "
            f"hold is {format_bytes(least)} ({least} bytes)",
            reachable_bytes=least,
            budget_bytes=memory_bytes,
        )
    return _searched(_preferred(best), cuttings, costs, memory_bytes)


def _most_seconds(best: dict[bool, Choice], hosted: bool, number: int) -> float:
    """What a choice that is `hosted` or not, of cutting `number`, has to be quicker than."""
    found = [float("inf")]
    if hosted in best:
        gain = _GAIN if best[hosted].cutting == number else _FINER_GAIN
        found.append(best[hosted].schedule.run.seconds * (1 - gain))
    if (not hosted) in best:
        gain = 1 - _HOST_GAIN if hosted else 1 / (1 - _HOST_GAIN)
        found.append(best[not hosted].schedule.run.seconds * gain)
    return min(found)


def _preferred(best: dict[bool, Choice]) -> Choice:
    """The one without the host, unless the other is clearly quicker."""
    if len(best) == 1:
        return next(iter(best.values()))
    device, host = (best[hosted].schedule.run.seconds for hosted in (False, True))
    return best[host < (1 - _HOST_GAIN) * device]


def _searched(
    choice: Choice, cuttings: Sequence[Cutting], costs: UpdateCosts, memory_bytes: int
) -> Choice:
    """`choice`, in a better order where a longer search finds one."""
    graph, steps = _graph(cuttings[choice.cutting], choice.places, costs)
    last = schedule(graph, memory_bytes=memory_bytes, trials=_LAST_TRIALS)
    if choice.schedule.run.seconds <= last.run.seconds:
        return choice
    return Choice(choice.cutting, choice.places, last, steps)


def _graph(
    cutting: Cutting, places: Sequence[str], costs: UpdateCosts
) -> tuple[TaskGraph, tuple[Step, ...]]:
    return update_tasks(cutting.subgroups, places, costs, cutting.base_bytes(places))


def _candidates(
    cutting: Cutting, costs: UpdateCosts, memory_bytes: int, host_share: float | None
) -> Iterator[tuple[str, ...]]:
    """Places that leave room for some slots; those with nothing on the device last."""
    subgroups, count = cutting.subgroups, len(cutting.subgroups)
    slot, landing = _rooms(cutting)
    here = cutting.scratch_bytes + NUMBERS_BYTES
    both = here + cutting.host_scratch_bytes
    if host_share is None and cutting.residents(memory_bytes - here) == count:
        yield spread(count, 0, count)
        return
    for slots in _SLOTS:
        left = memory_bytes - here - slots * slot
        if host_share in (None, 0) and left >= 0:
            yield spread(min(count - 1, cutting.residents(left)), 0, count)
        left = memory_bytes - both - slots * slot - min(slots, _LANDINGS) * landing
        if host_share not in (0, 1) and left >= 0:
            resident = min(count - 1, cutting.residents(left))
            rest = count - resident
            if host_share is None:
                middle = balanced(subgroups, costs, resident)
                near = range(middle - _NEAR, middle + _NEAR + 1)
            else:
                near = range(middle := round(host_share * rest), middle + 1)
            for hosted in sorted(near, key=lambda h: (abs(h - near[len(near) // 2]), h)):
                if 0 < hosted < rest:
                    yield spread(resident, hosted, count)
        left = memory_bytes - both - slots * landing
        if host_share in (None, 1) and left >= 0:
            resident = min(count - 1, cutting.residents(left))
            yield spread(resident, count - resident, count)
    if host_share in (None, 1):
        yield spread(0, count, count)


def _rooms(cutting: Cutting) -> tuple[int, int]:
    """Room for the state of any subgroup, and for what comes from the host for it."""
    return (
        max(subgroup.state_bytes for subgroup in cutting.subgroups),
        max(subgroup.parameter_bytes for subgroup in cutting.subgroups),
    )


def least_bytes(cuttings: Sequence[Cutting], host_share: float | None) -> int:
    """The least that a step can hold: one slot on either side that updates."""
    found = []
    for cutting in cuttings:
        slot, landing = _rooms(cutting)
        if host_share in (None, 1):
            found.append(landing + cutting.host_scratch_bytes)
        if host_share in (None, 0):
            found.append(slot + cutting.scratch_bytes)
        elif host_share != 1:
            found.append(slot + landing + cutting.scratch_bytes + cutting.host_scratch_bytes)
    return min(found) + NUMBERS_BYTES
