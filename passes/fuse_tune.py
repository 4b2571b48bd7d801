"""The kernels of a program measured on made-up inputs of their layouts, each distinct one once."""

from collections import Counter
from dataclasses import dataclass

import torch

from graphopt.codegen.backends import kernel_on
from graphopt.cost_models.calls import TensorSpec, make
from graphopt.cost_models.measured import limit_bytes, undisturbed
from graphopt.errors import CodegenError, PlanError
from graphopt.fused_ops import Fused, Layout, fused_of, is_fused, places
from graphopt.program import Program


@dataclass(frozen=True)
class TunedKernel:
    """How a kernel is launched, by measurement: the name of its first output, and how many are equal.

    `choice` says what differs from what the rules choose, or why nothing was measured. Seconds are those
    of one launch, as the rules choose it and as it was chosen, 0 where nothing was measured.
    """

    output: str
    count: int
    choice: str
    seconds_before: float
    seconds_after: float


def tuned_kernels(program: Program) -> tuple[TunedKernel, ...]:
    """Measure the fused nodes of a program; PlanError where their device is not here.

    What is chosen is kept for every later launch (`graphopt.codegen.tuning`); a kernel that was measured
    before, by whatever process, is not measured again.
    """
    nodes = [n for n in program.operators() if is_fused(n)]
    count = Counter(str(n.args[1]) for n in nodes)
    first = {str(n.args[1]): n for n in reversed(nodes)}
    found = []
    for text, node in reversed(first.items()):
        device = node.meta["val"][0].device
        choice, before, after = _tuned(fused_of(text), device)
        output = next(iter(node.users)).name
        found.append(TunedKernel(output, count[text], choice, before, after))
    return tuple(found)


def _tuned(fused: Fused, device: torch.device) -> tuple[str, float, float]:
    """What was chosen, and the seconds before and after."""
    if device.type != "cpu" and not (device.type == "cuda" and torch.cuda.is_available()):
        raise PlanError(f"tune=True measures kernels on {device}, which is not here")
    specs = [[_spec(layout, device) for layout in rows] for rows in (fused.given, fused.made)]
    nbytes = sum(spec.elements * spec.dtype.itemsize for rows in specs for spec in rows)
    if nbytes > limit_bytes(device):
        return f"not measured: its tensors of {nbytes} bytes are too large to be made up here", 0.0, 0.0
    kernel = kernel_on(fused.region, device)
    with undisturbed(device):
        given, out = places(fused, *([make(spec) for spec in rows] for rows in specs))
        try:
            found = kernel.tune(*given, out=out, again=False)
        except CodegenError as error:
            return f"not measured: {error}", 0.0, 0.0
    return found.chosen.beside(found.default), *found.seconds


def _spec(layout: Layout, device: torch.device) -> TensorSpec:
    return TensorSpec(getattr(torch, layout.dtype), layout.sizes, layout.strides, device)
