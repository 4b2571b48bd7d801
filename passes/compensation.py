"""Weights of the blocks that stay, changed so that they stand in for those that were removed.

ReplaceMe (Shopkhoev et al., arXiv 2505.02819, section 2) replaces blocks by a linear map of the last
projection before them, fitted by least squares on calibration batches; the map is merged into the
projection's weight, so that the model keeps its structure.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import PlanError
from graphopt.passes.blocks import Batch, Stack, call, evaluation
from graphopt.passes.layer_trials import States, hidden_states

KINDS = ("none", "scalar", "linear")


def compensate(
    kind: str,
    short: nn.Module,
    stack: Stack,
    kept: Sequence[int],
    batches: Sequence[Batch],
    whole: States,
) -> None:
    """Change `short` so that its hidden states after each gap come near to those of the whole model.

    `whole` are the whole model's hidden states and `stack` is that of `short`. Gaps are closed from
    the front to the back, each on the states that those before it leave. With "scalar" the projection
    in front of a gap is multiplied by a number, with "linear" by a matrix. Nothing stands in for
    blocks removed from the front, since no block comes before them.
    """
    ends = [*kept[1:], len(whole[0]) - 1]
    for position, (block, end) in enumerate(zip(kept, ends, strict=True)):
        if end > block + 1:
            targets = [row[end] for row in whole]
            _close_gap(kind, short, stack.blocks[position], stack, position, batches, targets)


def _close_gap(
    kind: str,
    short: nn.Module,
    block: nn.Module,
    stack: Stack,
    position: int,
    batches: Sequence[Batch],
    targets: Sequence[Tensor],
) -> None:
    projection = residual_projection(short, block, batches[0], stack)
    parts: list[Tensor] = []
    hook = projection.register_forward_hook(lambda module, args, output: parts.append(output))
    try:
        states = hidden_states(short, stack, batches)
    finally:
        hook.remove()
    source, after, wanted = (
        torch.cat([rows.flatten(0, -2) for rows in batches_of]).double()
        for batches_of in (parts, [row[position + 1] for row in states], targets)
    )
    target = source + wanted - after
    _multiply(projection, scalar_map(source, target) if kind == "scalar" else linear_map(source, target))


def scalar_map(source: Tensor, target: Tensor) -> Tensor:
    """The multiple of the identity, (width, width), that brings the rows of `source` next to `target`."""
    factor = (source * target).sum() / (source * source).sum().clamp(min=1e-30)
    return torch.eye(source.shape[-1], dtype=source.dtype, device=source.device).mul(factor)


def linear_map(source: Tensor, target: Tensor) -> Tensor:
    """The matrix T, (width, width), of least squares ‖source T − target‖.

    A small ridge (1e-6 of the mean square) pulls it to the identity where there are few tokens.
    """
    width = source.shape[-1]
    identity = torch.eye(width, dtype=source.dtype, device=source.device)
    gram = source.T @ source
    ridge = 1e-6 * gram.diagonal().mean().clamp(min=1e-30)
    change: Tensor = torch.linalg.solve(gram + ridge * identity, source.T @ (target - source))
    return identity + change


def _multiply(projection: nn.Module, matrix: Tensor) -> None:
    """Make `projection` return what it did, times `matrix`."""
    parameters: dict[str, Any] = dict(projection.named_parameters(recurse=False))
    weight, bias = parameters["weight"], parameters.get("bias")
    with torch.no_grad():
        if isinstance(projection, nn.Linear):
            weight.copy_((matrix.T @ weight.double()).to(weight))
        else:  # stored as (inputs, outputs), as GPT-2 does
            weight.copy_((weight.double() @ matrix).to(weight))
        if bias is not None:
            bias.copy_((bias.double() @ matrix).to(bias))


def residual_projection(model: nn.Module, block: nn.Module, batch: Batch, stack: Stack) -> nn.Module:
    """The last projection of `block` whose output is added to what the block returns, as it is.

    Found by a run: what is added to the projection's output arrives unchanged in the block's.
    PlanError where there is none, as in blocks that end with a norm.
    """
    found: list[nn.Module] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: found.append(module))
        for module in block.modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2
    ]
    try:
        plain = _output(model, block, batch)
    finally:
        for hook in hooks:
            hook.remove()
    last = found[-1] if found else None
    if last is None or not _arrives(model, block, batch, last, plain):
        raise PlanError(
            f"compensation= needs a projection whose output is added at the end of {type(block).__name__}"
        )
    return last


def _arrives(model: nn.Module, block: nn.Module, batch: Batch, module: nn.Module, plain: Tensor) -> bool:
    added = torch.zeros_like(plain[0, -1])
    added[0] = plain.abs().max().clamp(min=1)

    def add(module: nn.Module, args: Any, output: Tensor) -> Any:
        return output + added if output.shape[-1] == len(added) else None

    hook = module.register_forward_hook(add)
    try:
        moved = _output(model, block, batch) - plain
    finally:
        hook.remove()
    return torch.allclose(moved, added.expand_as(moved), atol=1e-2 * float(added[0]), rtol=0)


def _output(model: nn.Module, block: nn.Module, batch: Batch) -> Tensor:
    outputs: list[Any] = []
    hook = block.register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        with evaluation(model):
            call(model, batch)
    finally:
        hook.remove()
    return outputs[0] if isinstance(outputs[0], Tensor) else outputs[0][0]
