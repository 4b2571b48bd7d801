"""A plain and an optimised training step, measured side by side; the model is left as it was."""

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.measurement import measure
from graphopt.models import loss_of

RUNS = 3  # timed steps of each kind, in turn


@dataclass(frozen=True)
class StepFigures:
    """One kind of step: bytes above what was live before it, and its median time.

    `activation_bytes` leaves out the gradients of parameters and inputs.
    """

    peak_bytes: int
    activation_bytes: int
    seconds: float


@dataclass(frozen=True)
class StepComparison:
    """What was measured of the model as it was, and of the optimised one, on the same inputs.

    `static_bytes` were live before each step: parameters, buffers and inputs.
    """

    plain: StepFigures
    optimized: StepFigures
    static_bytes: int


def compare_steps(
    plain: Callable[..., Any],
    optimized: Callable[..., Any],
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> StepComparison:
    """Measure a step of `plain` and of `optimized`, two callables around the same `model`.

    A step is a forward and the backward of its loss, or under `no_grad` a forward. Each kind runs once
    to warm up, once under `measure`, and `RUNS` times in turn with the other for its time. Every step
    starts without gradients and from the same random numbers; gradients, buffers and the state of the
    generators are put back at the end.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    leaves = gradient_leaves(model, args, kwargs)
    steps = (_step(plain, leaves, args, kwargs), _step(optimized, leaves, args, kwargs))
    with left_as_it_was(model, leaves, device) as start_again:
        peaks, times = [], []
        for step in steps:
            start_again()
            step()
            start_again()
            peaks.append(measure(step, gradients=lambda: _gradients(leaves), device=device))
        for _ in range(RUNS):
            for step in steps:
                start_again()
                times.append(_seconds(step, device))
    figures = [
        StepFigures(peak.peak_bytes, peak.activation_bytes, median(times[kind :: len(steps)]))
        for kind, peak in enumerate(peaks)
    ]
    return StepComparison(figures[0], figures[1], _static_bytes(model, args, kwargs))


def gradient_leaves(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor, ...]:
    """The tensors that get a gradient: parameters and inputs."""
    tensors = [*model.parameters(), *pytree.tree_leaves((args, kwargs))]
    return tuple(
        {
            id(t): t for t in tensors if isinstance(t, torch.Tensor) and t.requires_grad and t.is_leaf
        }.values()
    )


def _static_bytes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    tensors = [*model.parameters(), *model.buffers(), *pytree.tree_leaves((args, kwargs))]
    storages = [t.untyped_storage() for t in tensors if isinstance(t, torch.Tensor)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _gradients(leaves: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
    return (t.grad for t in leaves if t.grad is not None)


def _step(
    function: Callable[..., Any],
    leaves: tuple[torch.Tensor, ...],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Callable[[], None]:
    def step() -> None:
        loss_of(function(*args, **kwargs)).backward()

    def forward() -> None:
        function(*args, **kwargs)

    return step if torch.is_grad_enabled() else forward


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    _wait_for(device)
    begin = time.perf_counter()
    step()
    _wait_for(device)
    return time.perf_counter() - begin


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def left_as_it_was(
    model: nn.Module, leaves: tuple[torch.Tensor, ...], device: torch.device
) -> Iterator[Callable[[], None]]:
    """Gives a function that goes back to the start: no gradients, same buffers, same generators."""
    gradients = [t.grad for t in leaves]
    owners = [(module, dict(module._buffers)) for module in model.modules()]
    contents = [(b, b.detach().clone()) for b in model.buffers()]
    numbers = random.getstate()
    cuda = device.type == "cuda"
    generators = torch.get_rng_state(), torch.cuda.get_rng_state(device) if cuda else None

    def start_again() -> None:
        for tensor in leaves:
            tensor.grad = None
        for module, buffers in owners:
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, content in contents:
                buffer.copy_(content)
        random.setstate(numbers)
        torch.set_rng_state(generators[0])
        if generators[1] is not None:
            torch.cuda.set_rng_state(generators[1], device)

    try:
        yield start_again
    finally:
        start_again()
        for tensor, gradient in zip(leaves, gradients, strict=True):
            tensor.grad = gradient
