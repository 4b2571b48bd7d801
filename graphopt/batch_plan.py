"""Batches for training at rising sequence lengths or resolutions: the largest that fits, and a small one.

At each stage the largest batch that fits is found on the formula of the peak. Beside workers with that
batch, some may train with a small one, for what its noise does to generalisation (Lu, Hong, Liu and Wu,
"Hybrid Dual-Batch and Cyclic Progressive Learning for Efficient Distributed Training", arXiv 2509.26092,
2025). A large worker takes k times an equal share of the samples, which makes the epoch k times as long;
the small workers share the rest, and the small batch is the smallest with which they end in that time.
With n workers, n_S of them small, and t(B) the seconds per sample at batch B:

    share_L = k / n,  share_S = (1 - (n - n_S) share_L) / n_S,  t(B_S) share_S <= t(B_L) share_L

There t is from a line fitted to measurements; here it is that of the roofline at each batch. Stages are
gone through again in each cycle (cyclic progressive learning), from the shortest on.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphopt.api import _device
from graphopt.cost_models.devices import Device, format_bytes, parse_bytes
from graphopt.cost_models.training_state import TrainingSetup
from graphopt.errors import GraphoptError, PlanError
from graphopt.fitting import Fitting
from graphopt.html_table import cell_text, heading, preformatted, table
from graphopt.origin import format_seconds
from graphopt.passes.base import Pass
from graphopt.passes.symbolic_peak import SymbolicStep
from graphopt.sized_model import LEAST, sized_model
from graphopt.tracing import Examples


@dataclass(frozen=True)
class Dual:
    """How many of `workers` train with a small batch, and how many times as long an epoch may take."""

    workers: int = 1
    small_workers: int = 1
    extra_time: float = 1.05

    def __post_init__(self) -> None:
        if not 1 <= self.small_workers <= self.workers:
            raise GraphoptError(f"of {self.workers} workers, {self.small_workers} cannot be small ones")
        if self.extra_time < 1 or self.small_share <= 0:
            most = self.workers / max(1, self.workers - self.small_workers)
            raise GraphoptError(f"extra_time={self.extra_time} does not lie between 1 and {most:.3g}")

    @property
    def large_share(self) -> float:
        """The part of the samples that a worker with the large batch takes."""
        return self.extra_time / self.workers

    @property
    def small_share(self) -> float:
        """The part of the samples that a worker with the small batch takes."""
        large = self.workers - self.small_workers
        return (1 - large * self.large_share) / self.small_workers


@dataclass(frozen=True)
class BatchStage:
    """One stage: its sequence length or resolution, both batches, the peak with the large one in bytes.

    `epoch_seconds` is with both batches, `plain_seconds` with the large one on every worker; `samples`
    are those of an epoch of one large and of one small worker.
    """

    size: int
    large_batch: int
    small_batch: int
    samples: tuple[int, int]
    peak_bytes: int
    epoch_seconds: float
    plain_seconds: float


@dataclass(frozen=True)
class BatchPlan:
    """Stages of rising `size` ("seq" or "resolution"), gone through in each of `cycles`, `epochs` each.

    Seconds are those of all cycles; `constant_seconds` of as many epochs at the last stage's size with
    its large batch.
    """

    model: str
    variable: str
    memory_bytes: int
    dual: Dual
    stages: tuple[BatchStage, ...]
    epochs: int
    cycles: int

    @property
    def seconds(self) -> float:
        """The predicted time of all epochs."""
        return self.cycles * self.epochs * sum(s.epoch_seconds for s in self.stages)

    @property
    def constant_seconds(self) -> float:
        """The predicted time of as many epochs at the largest size."""
        return self.cycles * self.epochs * len(self.stages) * self.stages[-1].plain_seconds

    def to_json(self) -> str:
        """The plan as JSON text."""
        both = {"seconds": self.seconds, "constant_seconds": self.constant_seconds}
        return json.dumps({**dataclasses.asdict(self), **both}, indent=1)

    def _repr_html_(self) -> str:
        """A table for a notebook."""
        head = (self.variable, "large batch", "small batch", "peak", "an epoch takes")
        rows = [
            (
                *map(cell_text, (s.size, s.large_batch, s.small_batch)),
                format_bytes(s.peak_bytes),
                format_seconds(s.epoch_seconds),
            )
            for s in self.stages
        ]
        first, *_, last = str(self).splitlines()
        return "\n".join([heading(first.rstrip(":")), table(head, rows), preformatted(last.strip())])

    def __str__(self) -> str:
        lines = [f"{self.model} in {format_bytes(self.memory_bytes)}, {self.cycles} cycles:"]
        for s in self.stages:
            time = format_seconds(s.epoch_seconds)
            batches = f"batches {s.large_batch} and {s.small_batch}"
            lines.append(f"  {self.variable} {s.size}: {batches}, {self.epochs} epochs of {time} each")
        share = self.seconds / self.constant_seconds
        lines.append(
            f"  {format_seconds(self.seconds)} in all, {share:.0%} of all epochs at the last size"
        )
        return "\n".join(lines)


def plan_batches(
    model: str | nn.Module,
    *,
    memory: int | str,
    stages: Sequence[int],
    samples: int,
    epochs: int = 1,
    cycles: int = 1,
    dual: Dual | None = None,
    passes: Sequence[Pass] = (),
    inputs: Callable[..., Examples] | None = None,
    device: str | Device | None = None,
    setup: TrainingSetup | None = None,
    **of_model: Any,
) -> BatchPlan:
    """The batches of each stage: sequence lengths, or resolutions of a zoo model of images.

    `samples` are those of one epoch. `passes` may be one `Checkpoint`: what it decides at the last stage
    holds at all of them. The other arguments are those of `fit`. Raises PlanError with the stage at which
    not even a batch of two fits.
    """
    known, chosen = _device(device, model), sized_model(model, inputs, **of_model)
    fitting = Fitting(chosen, known, setup or TrainingSetup())
    sizes, limit = sorted(set(stages)), parse_bytes(memory)
    if not sizes or samples < 1:
        raise GraphoptError("a batch plan needs stages and samples")
    variable = "seq" if "seq" in chosen.variables else "resolution"
    steps = _steps(fitting, variable, sizes, tuple(passes))
    made = [_stage(fitting, steps[size], size, limit, samples, dual or Dual()) for size in sizes]
    return BatchPlan(chosen.name, variable, limit, dual or Dual(), tuple(made), epochs, cycles)


def _steps(
    fitting: Fitting, variable: str, sizes: Sequence[int], passes: tuple[Pass, ...]
) -> Mapping[int, SymbolicStep]:
    """The step of each stage: one formula of batch and sequence, or one of the batch per resolution."""
    if variable == "seq":
        step = fitting.step((sizes[0], max(sizes[-1], sizes[0] + 2)), passes, (8, sizes[-1]))
        return dict.fromkeys(sizes, step)
    found = {}
    for size in sizes:
        flow = fitting.flow({"resolution": size}, LEAST, ())
        found[size] = fitting.planned(flow, flow.ranges[0][0])[0] if passes else SymbolicStep.of(flow)
    return found


def _stage(
    fitting: Fitting, step: SymbolicStep, size: int, limit: int, samples: int, dual: Dual
) -> BatchStage:
    others = (size,) if "seq" in step.flow.terms.variables else ()
    formula = step.formula(fitting.setup)
    large = formula.largest("batch", limit, others)
    if large is None:
        least = formula.at(2, *others)
        raise PlanError(f"no batch of two fits at {size}", reachable_bytes=least, budget_bytes=limit)

    def per_sample(batch: int) -> float:
        return step.seconds((batch, *others), fitting.device) / batch

    limit_s = per_sample(large) * dual.large_share / dual.small_share
    low, high = formula.ranges[0][0], large
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if per_sample(middle) <= limit_s else (middle + 1, high)
    shares = round(samples * dual.large_share), round(samples * dual.small_share)
    plain = samples / dual.workers * per_sample(large)
    return BatchStage(
        size, large, low, shares, formula.at(large, *others), dual.extra_time * plain, plain
    )
