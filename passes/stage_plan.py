"""What `plan_pipeline` decides: which device runs which stage of which microbatch, in which order.

Actions are written as `torch.distributed.pipelining` writes them, `<stage><kind><microbatch>`: "0F1" is
the forward of microbatch 1 on stage 0. The kinds that exist there, too:

    F  forward                  I  backward, gradient of the input
    B  the whole backward       W  backward, gradient of the weights

and those that do not:

    H  head and loss, where the first stage holds them (SkipPipe's paths come back to it)
    S  a device's part of a microbatch's logits (vocabulary parallelism), U and T what follows barriers
    E  a device's part of a microbatch's embedding and of its gradient

The number before S, U, T and E is that of the device, as each has a part of the vocabulary.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.run_timeline import chrome_trace
from graphopt.cost_models.stage_chart import gantt, gantt_svg
from graphopt.errors import PlanError
from graphopt.plan import Plan

KINDS = "FIBWHSUTE"
TORCH_KINDS = "FIBW"  # of which torch.distributed.pipelining has an action
_ACTION = re.compile(rf"(\d+)([{KINDS}])(\d+)")


class Action(NamedTuple):
    """One computation of a microbatch on a stage (for S, U, T and E: on a device)."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"

    @staticmethod
    def read(text: str) -> "Action":
        """The action that is written so; PlanError where none is.

        >>> Action.read("3I12")
        Action(stage=3, kind='I', microbatch=12)
        """
        if (found := _ACTION.fullmatch(text)) is None:
            raise PlanError(f"{text!r} is no action: <stage><{'|'.join(KINDS)}><microbatch>")
        return Action(int(found[1]), found[2], int(found[3]))


@dataclass(frozen=True)
class PipelinePlan(Plan):
    """A pipeline schedule, with the times of the cost model.

    `stage_devices[s]` are the devices that hold stage s: one, or several that share the microbatches
    between them. `paths[m]` are the stages that microbatch m goes through, in that order, and the device
    of each, as pairs. `orders[d]` is what device d runs, in that order, as action texts; `begin_s[d]` and
    `end_s[d]` are when, in seconds from the start of the step.

    `peak_activations[d]` is the largest number of forwards on device d whose backward has not ended, a
    device's share of the layers being 1 (a stage of v on a device counts 1/v); `peak_bytes[d]` are its
    bytes at the peak, weights included (0 where sizes were not given). No order of these actions on their
    devices takes less than `bound_s`, by the argument named in `bound`; where the paths were searched, no
    paths under the constraints do. `is_optimal` where nothing takes less than this plan.
    """

    schedule: str
    stage_devices: tuple[tuple[int, ...], ...]
    paths: tuple[tuple[tuple[int, int], ...], ...]
    orders: tuple[tuple[str, ...], ...]
    begin_s: tuple[tuple[float, ...], ...]
    end_s: tuple[tuple[float, ...], ...]
    peak_activations: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    bound_s: float = 0.0
    bound: str = ""
    is_optimal: bool = False

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return len(self.orders)

    @property
    def stages(self) -> int:
        """How many stages the model is cut into."""
        return len(self.stage_devices)

    @property
    def microbatches(self) -> int:
        """How many microbatches a step has."""
        return len(self.paths)

    @property
    def makespan_s(self) -> float:
        """Seconds from the start to the end of the last action."""
        return max((end for row in self.end_s for end in row), default=0.0)

    @property
    def gap(self) -> float:
        """How much longer it takes than the bound, as a share of the bound."""
        return self.makespan_s / self.bound_s - 1 if self.bound_s else 0.0

    @property
    def bubble_share(self) -> float:
        """The share of all devices' time in which they do nothing."""
        busy = sum(
            end - begin
            for begins, ends in zip(self.begin_s, self.end_s, strict=True)
            for begin, end in zip(begins, ends, strict=True)
        )
        total = self.makespan_s * self.devices
        return 1 - busy / total if total else 0.0

    def actions(self, device: int) -> tuple[Action, ...]:
        """What `device` runs, in its order."""
        return tuple(map(Action.read, self.orders[device]))

    def table(self) -> str:
        """The chart, for the report."""
        return self.gantt()

    def gantt(self, width: int = 100) -> str:
        """A chart in text: a row of `width` cells for each device."""
        return gantt(self.orders, self.begin_s, self.end_s, width)

    def svg(self, width: int = 120) -> str:
        """The chart as an SVG."""
        return gantt_svg(self.orders, self.begin_s, self.end_s, self.schedule, width)

    def chrome_trace(self) -> str:
        """JSON for `chrome://tracing` or Perfetto, with a lane for each device."""
        spans = [
            (text, f"device {device}", begin, end)
            for device, row in enumerate(self.orders)
            for text, begin, end in zip(row, self.begin_s[device], self.end_s[device], strict=True)
        ]
        return chrome_trace({self.schedule: spans})

    def check(self) -> None:
        """PlanError unless every microbatch runs through its path, each action once, on its device."""
        wanted = self._wanted()
        for device, texts in enumerate(self.orders):
            if not len(texts) == len(self.begin_s[device]) == len(self.end_s[device]):
                raise PlanError(f"device {device} has {len(texts)} actions, and not as many times")
            found: set[Action] = set()
            for action in self.actions(device):
                if action in found:
                    raise PlanError(f"device {device} runs {action} twice")
                if action.kind in TORCH_KINDS and action[::2] not in wanted[device]:
                    raise PlanError(f"device {device} runs {action}, which is on no path of it")
                found.add(action)
            for stage, microbatch in sorted(wanted[device]):
                self._check_visit(device, stage, microbatch, found)

    def _wanted(self) -> list[set[tuple[int, int]]]:
        """For each device the (stage, microbatch) pairs that the paths lead to it."""
        wanted: list[set[tuple[int, int]]] = [set() for _ in range(self.devices)]
        for microbatch, path in enumerate(self.paths):
            for stage, device in path:
                if not 0 <= stage < self.stages or device not in self.stage_devices[stage]:
                    raise PlanError(f"microbatch {microbatch}: device {device} has no stage {stage}")
                wanted[device].add((stage, microbatch))
            if len({stage for stage, _ in path}) != len(path):
                raise PlanError(f"microbatch {microbatch} visits a stage twice")
        return wanted

    def _check_visit(self, device: int, stage: int, microbatch: int, found: set[Action]) -> None:
        has = {kind for kind in TORCH_KINDS if Action(stage, kind, microbatch) in found}
        if has not in ({"F", "B"}, {"F", "I", "W"}):
            raise PlanError(
                f"device {device} runs {', '.join(sorted(has)) or 'nothing'} of microbatch {microbatch} "
                f"on stage {stage}: it takes F and B, or F, I and W"
            )
        place = {text: i for i, text in enumerate(self.orders[device])}
        order = [place[f"{stage}{k}{microbatch}"] for k in ("FB" if "B" in has else "FIW")]
        if order != sorted(order):
            raise PlanError(f"device {device} runs {stage}F{microbatch} after its backward")

    def __str__(self) -> str:
        proof = ""
        if self.bound_s:
            proof = ", optimal" if self.is_optimal else f", {self.gap:.1%} above the bound"
        peak = f"{max(self.peak_activations, default=0):g} activations"
        if any(self.peak_bytes):
            peak += f" ({format_bytes(max(self.peak_bytes))})"
        return "\n".join(
            [
                f"{self.schedule}: {self.stages} stages on {self.devices} devices, "
                f"{self.microbatches} microbatches",
                f"  step   {self.makespan_s:.4g} s, {self.bubble_share:.1%} idle{proof}",
                f"  bound  {self.bound_s:.4g} s: {self.bound or 'none known'}",
                f"  peak   {peak}",
            ]
        )
