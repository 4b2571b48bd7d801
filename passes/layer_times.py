"""The measured time of a model's step as a sum over its blocks, or over their sublayers."""

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from graphopt.errors import PlanError
from graphopt.passes.blocks import Batch, call, evaluation
from graphopt.passes.skip_units import Unit

PHASES = ("prefill", "decode")
LEAST_RUNS, MOST_RUNS, SECONDS = 9, 200, 1.0  # timed steps: as many as fit into this time
PRECISION, PATIENCE = 0.02, 5  # of a ratio of steps, relative; so many times as long may it take


@dataclass(frozen=True)
class LayerTimes:
    """T = a + Σ c_l: `rest_seconds` is what runs besides the units, `unit_seconds` each unit's."""

    rest_seconds: float
    unit_seconds: tuple[float, ...]

    def seconds(self, removed: frozenset[int] = frozenset()) -> float:
        """The predicted time of a step without the units `removed`.

        >>> LayerTimes(1.0, (2.0, 3.0)).seconds(frozenset({1}))
        3.0
        """
        left = (s for i, s in enumerate(self.unit_seconds) if i not in removed)
        return self.rest_seconds + sum(left)

    def speedup_bound(self, count: int) -> float:
        """What no choice of `count` units is predicted to exceed."""
        slowest = sorted(range(len(self.unit_seconds)), key=lambda i: -self.unit_seconds[i])
        return self.seconds() / self.seconds(frozenset(slowest[:count]))

    @property
    def greatest_speedup(self) -> float:
        """With only the fastest unit left."""
        return self.seconds() / (self.rest_seconds + min(self.unit_seconds))


Step = Callable[[], object]
Prepare = Callable[[], Step]


def phase_step(model: nn.Module, batch: Batch, phase: str) -> Prepare:
    """Makes steps to time: the model on `batch` ("prefill"), or on one more token of it ("decode").

    Each step of decoding has its own copy of the cache, so that all are of one length.
    """
    if phase == "prefill":
        return lambda: lambda: call(model, batch)
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or not isinstance(batch, dict):
        raise PlanError(f"phase='decode' needs a model that generates, not {type(model).__name__}")
    runner: Any = model
    past = runner(**batch, use_cache=True).past_key_values
    last = batch["input_ids"][:, -1:]

    def prepared() -> Step:
        own = copy.deepcopy(past)
        return lambda: runner(input_ids=last, past_key_values=own, use_cache=True)

    return prepared


def measure_units(model: nn.Module, units: Sequence[Unit], batch: Batch, phase: str) -> LayerTimes:
    """Time each unit within steps of the whole model; medians over many steps."""
    seconds = [0.0] * len(units)
    device = next(model.parameters()).device

    def begin(number: int) -> Callable[..., None]:
        def mark(*_: object) -> None:
            seconds[number] -= _now(device)

        return mark

    def end(number: int) -> Callable[..., None]:
        def mark(*_: object) -> None:
            seconds[number] += _now(device)

        return mark

    with evaluation(model), contextlib.ExitStack() as hooks:
        step = phase_step(model, batch, phase)

        def split() -> tuple[float, ...]:
            seconds[:] = [0.0] * len(units)
            total = _seconds(step, device)
            return (total - sum(seconds), *seconds)

        for number, unit in enumerate(units):
            for module in unit.forwards:
                hooks.callback(module.register_forward_pre_hook(begin(number)).remove)
                hooks.callback(module.register_forward_hook(end(number)).remove)
        rest, *found = _medians(split)
    return LayerTimes(rest, tuple(found))


@dataclass(frozen=True)
class Comparison:
    """Steps of a whole and of a short model that took turns.

    Seconds are medians. `speedup` is the median ratio of two neighbours, which a load that comes and
    goes changes less than each of them; it is in `speedup_range` with 95 % confidence.
    """

    whole_seconds: float
    seconds: float
    speedup: float
    speedup_range: tuple[float, float]
    rounds: int


def compare_steps(whole: nn.Module, short: nn.Module, batch: Batch, phase: str) -> Comparison:
    """Time steps of two models in turns: the more of them, the more their ratio differs."""
    with evaluation(whole), evaluation(short):
        steps = phase_step(whole, batch, phase), phase_step(short, batch, phase)
        return _turns(steps, next(whole.parameters()).device)


def _turns(steps: tuple[Prepare, Prepare], device: torch.device) -> Comparison:
    """Rounds of both steps, each round in the other order than the one before."""
    rows: list[tuple[float, float]] = []
    begin = time.perf_counter()
    for number in itertools.count():
        order = (0, 1) if number % 2 == 0 else (1, 0)
        found = {at: _seconds(steps[at], device) for at in order}
        if number == 0:
            continue  # to warm up
        rows.append((found[0], found[1]))
        if len(rows) >= LEAST_RUNS and _enough(rows, time.perf_counter() - begin):
            break
    ratios = [whole / short for whole, short in rows]
    whole_seconds, seconds = (median(column) for column in zip(*rows, strict=True))
    return Comparison(whole_seconds, seconds, median(ratios), median_range(ratios), len(rows))


def _enough(rows: Sequence[tuple[float, float]], seconds: float) -> bool:
    """Whether so many rounds are enough after so long: it may take longer where they differ."""
    if len(rows) < MOST_RUNS and seconds < SECONDS:
        return False
    low, high = median_range([whole / short for whole, short in rows])
    return high - low <= PRECISION * (high + low) / 2 or seconds >= PATIENCE * SECONDS


def median_range(values: Sequence[float]) -> tuple[float, float]:
    """Where the median of what `values` are drawn from is, with 95 % confidence.

    The order statistics at n/2 ± 1.96 √n/2, by the normal approximation of the binomial distribution
    of how many values are below the median.

    >>> median_range(range(101))
    (40, 60)
    """
    ordered, half = sorted(values), 0.98 * math.sqrt(len(values))
    low, high = math.floor(len(values) / 2 - half), math.ceil(len(values) / 2 + half) - 1
    return ordered[max(0, low)], ordered[min(len(ordered) - 1, high)]


def _medians(measured: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """The median of each entry, over as many runs as fit into `SECONDS`, after one to warm up."""
    measured()
    rows: list[tuple[float, ...]] = []
    begin = time.perf_counter()
    while len(rows) < LEAST_RUNS or (len(rows) < MOST_RUNS and time.perf_counter() - begin < SECONDS):
        rows.append(measured())
    return tuple(median(column) for column in zip(*rows, strict=True))


def _seconds(prepare: Prepare, device: torch.device) -> float:
    step = prepare()
    begin = _now(device)
    step()
    return _now(device) - begin


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
