"""Weights of the blocks that stay, changed so that they stand in for what was removed.

ReplaceMe (Shopkhoev et al., arXiv 2505.02819, section 2) replaces blocks by a linear map of the output
of the last projection before them, fitted by least squares on calibration batches and merged into the
projection's weight, so that the model keeps its structure. Here the weight itself is fitted, from the
projection's inputs, which are more than its outputs.
"""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import PlanError
from graphopt.passes.blocks import Batch, Stack, call, evaluation
from graphopt.passes.layer_trials import States

KINDS = ("none", "scalar", "linear")
RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # relative to the mean square of the inputs
HELD_OUT = 4  # one row of so many decides on the ridge

Call = tuple[tuple[Any, ...], dict[str, Any]]


def compensate(
    kind: str,
    blocks: Sequence[nn.Module],
    stack: Stack,
    kept: Sequence[int],
    partly: Collection[int],
    calls: Sequence[Sequence[Call]],
    whole: States,
    masks: Sequence[Tensor | None],
) -> States:
    """Change `blocks` so that their hidden states come near to those of the whole model.

    `blocks` are those of the short model; `kept` says for each its place in the whole model, and
    `partly` are the places of those that lost a sublayer. Of the whole model are the `stack`, the hidden
    states `whole` and the `calls` of its blocks; `masks` say which tokens count. Returns `whole` with
    the states behind the last block as they are then.

    From the front to the back a block's last projection is fitted on the states that those before it
    leave: with "scalar" multiplied by a number, in blocks that something is missing behind or in; with
    "linear" by least squares, in the first of these and all behind it, which mend what is left of the
    error. Blocks removed from the front have no block before them: only "linear" makes up for them.
    """
    ends = [*kept[1:], len(whole[0]) - 1]
    missing = [i for i, end in enumerate(ends) if end > kept[i] + 1 or kept[i] in partly]
    first = 0 if kept[0] else min(missing, default=len(blocks))
    fitted = range(first, len(blocks)) if kind == "linear" else missing
    states = [row[kept[first] if first else 0] for row in whole] if first < len(blocks) else []
    for position in range(first, len(blocks)):
        run = [stack.with_hidden(*row[kept[position]], h) for row, h in zip(calls, states, strict=True)]
        if position in fitted:
            _fit(kind, blocks[position], run, [row[ends[position]] for row in whole], masks)
        states = [output_of(blocks[position], one) for one in run]
    return tuple(
        (*row[:-1], last) for row, last in zip(whole, states or [r[-1] for r in whole], strict=True)
    )


def block_calls(model: nn.Module, stack: Stack, batches: Sequence[Batch]) -> list[list[Call]]:
    """What each block is called with, in every batch, apart from the hidden states."""
    calls: list[Call] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(stack.with_hidden(args, kwargs, torch.empty(0)))

    hooks = [block.register_forward_pre_hook(note, with_kwargs=True) for block in stack.blocks]
    found = []
    try:
        with evaluation(model):
            for batch in batches:
                calls.clear()
                call(model, _uncached(model, batch))
                found.append(list(calls))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _uncached(model: nn.Module, batch: Batch) -> Batch:
    """The batch with the wish for no cache, where the model would make one."""
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate() or not isinstance(batch, Mapping):
        return batch
    return {**batch, "use_cache": False}


def output_of(block: nn.Module, given: Call) -> Tensor:
    """The hidden states that `block` returns."""
    output = block(*given[0], **given[1])
    return output if isinstance(output, Tensor) else output[0]


def _fit(
    kind: str,
    block: nn.Module,
    calls: Sequence[Call],
    wanted: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> None:
    """Change the last projection of `block` so that on `calls` it returns nearly what is `wanted`."""
    projection = residual_projection(block, calls[0])
    inputs, outputs, missing = [], [], []
    for given, target, mask in zip(calls, wanted, masks, strict=True):
        with _watched([projection]) as seen:
            after = output_of(block, given)
        ((_, taken, made),) = seen
        inputs.append(rows_of(taken, mask))
        outputs.append(rows_of(made, mask))
        missing.append(rows_of(target, mask) - rows_of(after, mask))
    a, b, error = torch.cat(inputs), torch.cat(outputs), torch.cat(missing)
    if kind == "scalar":
        _scale(projection, scale_of(b, b + error))
    else:
        _add(projection, a, error)


def rows_of(states: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that count, (tokens, width), at least in float32."""
    rows = states.flatten(0, -2)
    if mask is not None and mask.numel() == len(rows):
        rows = rows[mask.flatten()]
    return rows.to(torch.promote_types(rows.dtype, torch.float32))


def scale_of(source: Tensor, target: Tensor) -> float:
    """The number that brings the rows of `source`, times it, nearest to those of `target`."""
    return float((source * target).sum() / (source * source).sum().clamp(min=1e-30))


def least_squares(source: Tensor, target: Tensor) -> Tensor:
    """The matrix X, (inputs, outputs), of least ‖source X − target‖² + ridge ‖X‖².

    The ridge is the one of `RIDGES` that has the least error on rows that it was not fitted on: the
    last of `HELD_OUT` equal parts.
    """
    rows = len(source) - len(source) // HELD_OUT
    seen, unseen = (_products(source[:rows], target[:rows]), (source[rows:], target[rows:]))
    errors = [
        float((unseen[0] @ _solved(*seen, ridge).to(source) - unseen[1]).square().sum())
        for ridge in RIDGES
    ]
    best = RIDGES[errors.index(min(errors))]
    return _solved(*_products(source, target), best)


def _products(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return (source.T @ source).double(), (source.T @ target).double()


def _solved(gram: Tensor, product: Tensor, ridge: float) -> Tensor:
    scale = gram.diagonal().mean().clamp(min=1e-30)
    damped = gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(damped, product)  # type: ignore[no-any-return]


def _scale(projection: nn.Module, factor: float) -> None:
    for name, value in list(projection.named_parameters(recurse=False)):
        _replace(projection, name, value * factor)


def _add(projection: nn.Module, inputs: Tensor, missing: Tensor) -> None:
    """Change the weight, and the bias where there is one, so that `missing` is added."""
    parameters: dict[str, Tensor] = dict(projection.named_parameters(recurse=False))
    weight, bias = parameters["weight"], parameters.get("bias")
    if bias is not None:
        inputs = torch.cat([inputs, inputs.new_ones(len(inputs), 1)], dim=1)
    change = least_squares(inputs, missing)
    if bias is not None:
        _replace(projection, "bias", bias + change[-1])
        change = change[:-1]
    # Of GPT-2 the weight is stored as (inputs, outputs).
    _replace(projection, "weight", weight + (change.T if isinstance(projection, nn.Linear) else change))


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """A new parameter: the old one may be that of the whole model."""
    old = module.get_parameter(name)
    setattr(module, name, nn.Parameter(value.detach().to(old), requires_grad=old.requires_grad))


@contextlib.contextmanager
def _watched(modules: Sequence[nn.Module]) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """Runs of `modules`: the module, its input and its output."""
    seen: list[tuple[nn.Module, Tensor, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append((module, args[0], output)))
        for module in modules
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def residual_projection(block: nn.Module, given: Call) -> nn.Module:
    """The last projection of `block` whose output is added to what the block returns, as it is.

    Found by a run: what is added to the projection's output arrives unchanged in the block's.
    PlanError where there is none, as in blocks that end with a norm.
    """
    matrices = [m for m in block.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    with _watched(matrices) as seen:
        plain = output_of(block, given)
    last = seen[-1][0] if seen else None
    if last is None or not _arrives(block, given, last, plain):
        raise PlanError(
            f"compensation= needs a projection whose output is added at the end of {type(block).__name__}"
        )
    return last


def _arrives(block: nn.Module, given: Call, module: nn.Module, plain: Tensor) -> bool:
    added = torch.zeros_like(plain[0, -1])
    added[0] = plain.abs().max().clamp(min=1)

    def add(module: nn.Module, args: Any, output: Tensor) -> Any:
        return output + added if output.shape[-1] == len(added) else None

    hook = module.register_forward_hook(add)
    try:
        moved = output_of(block, given) - plain
    finally:
        hook.remove()
    return torch.allclose(moved, added.expand_as(moved), atol=1e-2 * float(added[0].detach()), rtol=0)
