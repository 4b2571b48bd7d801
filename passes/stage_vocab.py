"""Vocabulary parallelism in a pipeline: every device computes its part of the logits, in the bubbles.

The output layer is split over all devices, and a microbatch's passes through it are (Yeung et al.,
"Balancing Pipeline Parallelism with Vocabulary Parallelism", MLSys 2025, arXiv 2411.05288, sections 4
and 5), with | for a collective of all devices:

    vocab-naive  S: logits, their maximum | U: sum of exponentials | T: gradients |, then the backward
    vocab-1      S: logits, local softmax | T: gradients |, then the backward (their algorithm 1)
    vocab-2      S: logits, softmax, gradient of the input |, then the backward; T: gradient of the
                 weights, later (their algorithm 2)

Each collective that the backward waits for costs one more microbatch in flight. The order is found by
laying out one microbatch, repeated with a fixed period in which nothing overlaps; a device's passes of
the vocabulary all fall in the one gap that its forward and its backward leave in a period.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from graphopt.cost_models.stage_costs import StageCost, StageLinks
from graphopt.cost_models.stage_run import StageRun, run_orders
from graphopt.cost_models.stage_tasks import ANYWHERE, StageStep, StageTask, StageTasks
from graphopt.errors import PlanError
from graphopt.passes.stage_orders import stages_of, v_half_slots

_EPSILON = 1e-9
# For each algorithm the passes, how many of them the backward waits for.
ALGORITHMS = {"vocab-naive": ("SUT", 3), "vocab-1": ("ST", 2), "vocab-2": ("ST", 1)}


@dataclass(frozen=True)
class VocabularyCost:
    """One microbatch of the vocabulary on one device: seconds of the passes S, U, T, and E.

    `embedding_s` is a device's part of the input embedding, forward and backward (E). A collective takes
    `collective_s`.
    """

    s_s: float
    t_s: float
    u_s: float = 0.0
    embedding_s: float = 0.0
    collective_s: float = 0.0

    def seconds(self, kind: str) -> float:
        """Of the pass `kind`."""
        return {"S": self.s_s, "U": self.u_s, "T": self.t_s, "E": self.embedding_s}[kind]


def barriers(algorithm: str) -> int:
    """How many collectives the backward waits for."""
    if algorithm not in ALGORITHMS:
        raise PlanError(f"algorithm {algorithm!r} is none of {', '.join(ALGORITHMS)}")
    return ALGORITHMS[algorithm][1]


def vocabulary_step(
    schedule: str,
    algorithm: str,
    costs: Sequence[StageCost],
    vocabulary: VocabularyCost,
    microbatches: int,
    links: StageLinks | None = None,
) -> StageTasks:
    """The tasks of a step with the passes of the vocabulary, `schedule` being "1f1b" or "v-half"."""
    kinds, waited = ALGORITHMS[algorithm][0], barriers(algorithm)
    held = stages_of(schedule, len(costs) if schedule == "1f1b" else len(costs) // 2)
    devices, last = len(held), len(costs) - 1
    place = {stage: d for d, row in enumerate(held) for stage in row}
    path = tuple((s, place[s]) for s in range(len(costs)))
    is_split = schedule == "v-half"
    step = StageStep(costs, links or StageLinks.even(devices), is_split, len(held[0]))
    for j in range(microbatches):
        step.add_path(j, path)
        before = step.add(_collective(f"0C{j}", vocabulary, [step.number[f"{last}F{j}"]]))
        for index, kind in enumerate(kinds):
            passes = [
                step.add(StageTask(f"{d}{kind}{j}", d, vocabulary.seconds(kind), ((before, 0.0),)))
                for d in range(devices)
            ]
            if index < waited:
                before = step.add(_collective(f"{index + 1}C{j}", vocabulary, passes))
        backward = step.number[f"{last}{'I' if is_split else 'B'}{j}"]
        step.tasks[backward] = replace(step.tasks[backward], after=((before, 0.0),))
        if vocabulary.embedding_s:
            for d in range(devices):
                step.add(StageTask(f"{d}E{j}", d, vocabulary.embedding_s))
    return step.step(devices, held)


def _collective(name: str, cost: VocabularyCost, after: Sequence[int]) -> StageTask:
    return StageTask(name, ANYWHERE, cost.collective_s, tuple((i, 0.0) for i in after))


def vocabulary_run(
    schedule: str,
    algorithm: str,
    costs: Sequence[StageCost],
    vocabulary: VocabularyCost,
    microbatches: int,
    links: StageLinks | None = None,
) -> StageRun:
    """The step in the best of the orders that keep the published number of microbatches in flight."""
    step = vocabulary_step(schedule, algorithm, costs, vocabulary, microbatches, links)
    runs: list[StageRun] = []
    for order in _orders(schedule, algorithm, costs, vocabulary, microbatches):
        try:
            runs.append(run_orders(step, step.indices(order)))
        except PlanError:
            continue  # of two passes at the same time, the wrong one came first
    if not runs:
        raise PlanError(f"{schedule} with {algorithm}: no order of the passes runs")
    most = len(costs) + barriers(algorithm)
    fits = [run for run in runs if schedule != "1f1b" or max(run.peaks()[0]) <= most]
    return min(fits or runs, key=lambda run: run.seconds)


def _orders(
    schedule: str,
    algorithm: str,
    costs: Sequence[StageCost],
    vocabulary: VocabularyCost,
    microbatches: int,
) -> list[list[list[str]]]:
    """Some orders to choose from: where the gap lies, and which pass is first in it."""
    kinds = ALGORITHMS[algorithm][0]
    found = []
    for is_reversed in (False, True):
        passes = (kinds[::-1] if is_reversed else kinds) + "E" * bool(vocabulary.embedding_s)
        if schedule == "v-half":
            found.append(_v_half(algorithm, len(costs) // 2, passes, microbatches))
            continue
        for share in range(5):
            layout = _OneFOneB(algorithm, costs, vocabulary, passes, share / 4)
            found.append(layout.orders(microbatches))
    return found


class _OneFOneB:
    """1F1B with a gap in each period, `share` of it between a forward and the next backward."""

    def __init__(
        self,
        algorithm: str,
        costs: Sequence[StageCost],
        vocabulary: VocabularyCost,
        passes: str,
        share: float,
    ) -> None:
        self.devices, self.passes = len(costs), passes
        self.kinds, self.waited = ALGORITHMS[algorithm]
        self.forward = max(c.forward_s for c in costs)
        backward = max(c.backward_s for c in costs)
        self.gap = sum(vocabulary.seconds(kind) for kind in passes)
        self.step_down = self.forward + share * self.gap
        self.period = self.forward + backward + self.gap
        self.is_before = share > 0.5  # the gap that counts: before the backward, or after it
        self.logits = self.devices * self.step_down  # when the last forward of microbatch 0 has ended

    def begins(self, device: int) -> tuple[float, float, float]:
        """When the forward, the backward and the first gap of microbatch 0 begin."""
        forward = device * self.step_down
        back = self.devices - 1 - device
        backward = self.logits + self.waited * self.period + back * (self.period - self.step_down)
        gap = forward + self.forward
        if not self.is_before:
            gap = backward + self.period - self.step_down - self.gap * (self.step_down == self.forward)
        return forward, backward, gap

    def orders(self, microbatches: int) -> list[list[str]]:
        rows = []
        for device in range(self.devices):
            forward, backward, gap = self.begins(device)
            first = math.ceil((self.logits - gap) / self.period - _EPSILON)
            timed = []
            for j in range(microbatches):
                timed.append((forward + j * self.period, 1, f"{device}F{j}"))
                timed.append((backward + j * self.period, 2, f"{device}B{j}"))
                for rank, kind in enumerate(self.passes):
                    late = max(0, self.kinds.find(kind))
                    when = gap + (first + late + j) * self.period
                    timed.append((when, 3 + rank, f"{device}{kind}{j}"))
            rows.append([name for *_, name in sorted(timed, key=_by_time)])
        return rows


def _v_half(algorithm: str, devices: int, passes: str, microbatches: int) -> list[list[str]]:
    """V-Half with a slot for the passes at the end of each period of six."""
    kinds, waited = ALGORITHMS[algorithm]
    rows = []
    for device, slots in enumerate(v_half_slots(devices, 6 * waited)):
        logits = 3 * devices - 1 + 3 * (devices % 2)  # when the last forward has ended, on device 0
        free = min(slots.values()) % 6 - 0.5  # between two periods of this device
        first = math.ceil((logits - free) / 6 - _EPSILON)
        timed = [
            (slot + 6.0 * j, 0, f"{stage}{kind}{j}")
            for (stage, kind), slot in slots.items()
            for j in range(microbatches)
        ]
        for j in range(microbatches):
            for rank, kind in enumerate(passes):
                late = max(0, kinds.find(kind))
                timed.append((free + 6.0 * (first + late + j), 1 + rank, f"{device}{kind}{j}"))
        rows.append([name for *_, name in sorted(timed, key=_by_time)])
    return rows


def _by_time(item: tuple[float, int, str]) -> tuple[float, int]:
    return round(item[0], 9), item[1]
