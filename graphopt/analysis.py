"""A report on a model that never runs: traced on fake tensors, planned for any device."""

import time
from collections.abc import Sequence
from typing import Any

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import Device
from graphopt.models import LoadedModel
from graphopt.passes.base import Pass
from graphopt.passes.pipeline import run_passes
from graphopt.passes.stream_blocks import run_or_stream
from graphopt.program import Program
from graphopt.report import Report
from graphopt.runtime import GraphRecord, Log, Settings
from graphopt.tangents import unlikely_tangents, without_gradients
from graphopt.tracing import Examples, trace


def analyse(
    program: Program,
    name: str,
    passes: Sequence[Pass],
    device: Device,
    trace_seconds: float = 0.0,
    *,
    streams_blocks: bool = False,
) -> Report:
    """The report on `program` after `passes`, with costs on `device`; raises what they raise.

    With `streams_blocks` a budget may be met by `StreamBlocks`, as in `optimize(memory=...)`.

    >>> import torch
    >>> from graphopt import Checkpoint
    >>> from graphopt.cost_models.devices import get_device
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Tanh(), torch.nn.Dropout())
    >>> program = trace(net, torch.zeros(1000, 8))
    >>> report = analyse(program, "net", [Checkpoint(memory=1.0)], get_device("h100"))
    >>> report.predicted_peak_bytes <= report.baseline_peak_bytes
    True
    """
    settings = Settings(tuple(passes), tuple(passes), "eager", device)
    program = as_planned(program)
    costs = Costs.of(program, device)
    run = run_or_stream if streams_blocks else run_passes
    changed, steps = run(program, passes, lambda p: Costs.of(p, device), time.perf_counter)
    record = GraphRecord(program, changed, steps, costs, trace_seconds)
    return Report.of(name, settings, Log(records=[record]))


def as_planned(program: Program) -> Program:
    """`program` without the gradients of outputs beside a loss, as `optimize` plans it."""
    tangents = unlikely_tangents(program)
    return without_gradients(program, tangents) if tangents else program


def trace_loaded(loaded: LoadedModel, *, training: bool) -> Program:
    """The Program of one step of a loaded model on its example inputs."""
    model, args, kwargs = loaded.model, loaded.example_args, dict(loaded.example_kwargs)
    examples: Examples = args or kwargs
    if not (args and kwargs):
        return trace(model, examples, training=training)

    def call(positional: Any, named: Any) -> Any:
        return model(*positional, **named)

    return trace(call, (args, kwargs), training=training)
