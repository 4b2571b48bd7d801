"""The measured time of a model's step as a sum over its blocks."""

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from graphopt.errors import PlanError
from graphopt.passes.blocks import Batch, Stack, call, evaluation

PHASES = ("prefill", "decode")
LEAST_RUNS, MOST_RUNS, SECONDS = 9, 200, 1.0  # timed steps: as many as fit into this time


@dataclass(frozen=True)
class LayerTimes:
    """T = a + Σ c_l: `rest_seconds` is what runs besides the blocks, `block_seconds` each block's."""

    rest_seconds: float
    block_seconds: tuple[float, ...]

    def seconds(self, removed: frozenset[int] = frozenset()) -> float:
        """The predicted time of a step without the blocks `removed`.

        >>> LayerTimes(1.0, (2.0, 3.0)).seconds(frozenset({1}))
        3.0
        """
        left = (s for i, s in enumerate(self.block_seconds) if i not in removed)
        return self.rest_seconds + sum(left)

    @property
    def greatest_speedup(self) -> float:
        """With only the fastest block left."""
        return self.seconds() / (self.rest_seconds + min(self.block_seconds))


def phase_step(model: nn.Module, batch: Batch, phase: str) -> Callable[[], object]:
    """A step to time: the model on `batch` ("prefill"), or on one more token of it ("decode")."""
    if phase == "prefill":
        return lambda: call(model, batch)
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or not isinstance(batch, dict):
        raise PlanError(f"phase='decode' needs a model that generates, not {type(model).__name__}")
    runner: Any = model
    past = runner(**batch, use_cache=True).past_key_values
    last = batch["input_ids"][:, -1:]
    return lambda: runner(input_ids=last, past_key_values=past, use_cache=True)


def measure_blocks(model: nn.Module, stack: Stack, batch: Batch, phase: str) -> LayerTimes:
    """Time each block within steps of the whole model; medians over many steps."""
    marks: list[float] = []
    device = next(model.parameters()).device

    def mark(*_: object) -> None:
        marks.append(_now(device))

    with evaluation(model):
        step = phase_step(model, batch, phase)

        def split() -> tuple[float, ...]:
            marks.clear()
            total = _seconds(step, device)
            blocks = [after - before for before, after in zip(marks[::2], marks[1::2], strict=True)]
            return (total - sum(blocks), *blocks)

        hooks = [
            hook
            for block in stack.blocks
            for hook in (block.register_forward_pre_hook(mark), block.register_forward_hook(mark))
        ]
        try:
            rest, *seconds = _medians(split)
        finally:
            for hook in hooks:
                hook.remove()
    return LayerTimes(rest, tuple(seconds))


def step_seconds(models: Sequence[nn.Module], batch: Batch, phase: str) -> tuple[float, ...]:
    """The median time of a step of each of `models`, which take turns."""
    device = next(models[0].parameters()).device
    with contextlib.ExitStack() as modes:
        for model in models:
            modes.enter_context(evaluation(model))
        steps = [phase_step(model, batch, phase) for model in models]
        return _medians(lambda: tuple(_seconds(step, device) for step in steps))


def _medians(measured: Callable[[], tuple[float, ...]]) -> tuple[float, ...]:
    """The median of each entry, over as many runs as fit into `SECONDS`, after one to warm up."""
    measured()
    rows: list[tuple[float, ...]] = []
    begin = time.perf_counter()
    while len(rows) < LEAST_RUNS or (len(rows) < MOST_RUNS and time.perf_counter() - begin < SECONDS):
        rows.append(measured())
    return tuple(median(column) for column in zip(*rows, strict=True))


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    begin = _now(device)
    step()
    return _now(device) - begin


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
