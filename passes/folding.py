"""Neighbouring blocks that run with the weights of one of them: the second half of `strategy="fold"`.

FoldGPT (Liu et al., arXiv 2407.00928) removes blocks by importance, then lets blocks of a group share
their weights and adapts their norms anew. There learnable gates find the importance, and distillation
trains what is left. Both need training, which a pass does not have: here the importance is Block
Influence, and the norms are fitted by least squares on the calibration batches (see `norm_fit`). The
paper's size of groups was not available to us; ours, and how groups are chosen, are our own:

- A trial puts the matrices of one block into another one near it, with norms fitted on a few samples.
  Its cost is the squared error of what the block then returns, relative to what it returned.
- Of all ways to cut the blocks into contiguous groups, with one source of weights each, the one of
  least total cost is found exactly, by dynamic programming.
- From the front to the back the norms of each block that lost its matrices are fitted, on what the
  folded blocks before it return, towards the hidden states of the model unfolded.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from graphopt.errors import PlanError
from graphopt.passes.blocks import Batch, Stack, evaluation
from graphopt.passes.compensation import Call, block_calls, output_of, rows_of
from graphopt.passes.layer_sharing import (
    can_share,
    norm_parameters,
    positions_among,
    saved_parameters,
    share,
    shared_tensors,
)
from graphopt.passes.layer_trials import hidden_states, token_mask
from graphopt.passes.norm_fit import ITERATIONS, STEPS, Function, Values, fitted
from graphopt.passes.skip_plan import Groups
from graphopt.passes.skip_strategies import Evidence, Removed
from graphopt.passes.sublayer_removal import without_units

LARGEST_GROUP = 3  # blocks that share one set of weights, at most
SHARE = 4  # one block of so many runs with a neighbour's weights, where no number is given
TRIAL_TOKENS = 512  # of the first batch, that trials see
TRIAL_FIT = (1, 4)  # steps, and iterations of each

Costs = Mapping[tuple[int, int], float]  # of a block that runs with a source's weights: (source, block)


def shared_count(given: int | None, kept: int) -> int:
    """How many of `kept` blocks run with a neighbour's weights; PlanError where they cannot.

    >>> shared_count(None, 8), shared_count(None, 2), shared_count(4, 6)
    (2, 1, 4)
    """
    most = kept - math.ceil(kept / LARGEST_GROUP)
    count = max(1, kept // SHARE) if given is None else given
    if count > most:
        raise PlanError(
            f"shared={count}: of {kept} blocks that stay at most {most} can run with the weights of a "
            f"neighbour, in groups of {LARGEST_GROUP}"
        )
    return count


def cheapest_groups(blocks: int, shared: int, costs: Costs) -> Groups:
    """Contiguous groups of least total cost in which `shared` blocks run with another's weights.

    Groups of one are left out; the first of each group is the source. What `costs` leaves out cannot
    be. PlanError where no groups have so many.

    >>> cheapest_groups(4, 2, {(0, 1): 3.0, (1, 0): 1.0, (1, 2): 2.0, (2, 3): 4.0})
    ((1, 0, 2),)
    """
    best: dict[tuple[int, int], tuple[float, Groups]] = {(0, 0): (0.0, ())}  # of the first blocks
    for end in range(1, blocks + 1):
        for size in range(1, min(LARGEST_GROUP, end) + 1):
            cost, group = _group(range(end - size, end), costs)
            for count in range(shared - size + 2):
                if (end - size, count) not in best or math.isinf(cost):
                    continue
                total, before = best[end - size, count]
                found = total + cost, before if size == 1 else (*before, group)
                key = end, count + size - 1
                if key not in best or found[0] < best[key][0]:
                    best[key] = found
    if (blocks, shared) not in best:
        most = max(count for end, count in best if end == blocks)
        raise PlanError(
            f"shared={shared}: only {most} of the {blocks} blocks that stay have a neighbour of the same "
            "shapes to take the weights of"
        )
    return best[blocks, shared][1]


def _group(members: range, costs: Costs) -> tuple[float, tuple[int, ...]]:
    """The cost of a group with its best source, and its blocks, the source first."""

    def cost(source: int) -> float:
        return sum(costs.get((source, i), math.inf) for i in members if i != source)

    source = min(members, key=cost)
    return cost(source), (source, *(i for i in members if i != source))


def folded(evidence: Evidence, removed: Removed, shared: int | None) -> tuple[nn.Module, Groups, int]:
    """The model without the blocks `removed`, compensated and folded; which blocks share weights, and
    how many parameters that saves.

    It shares with the model what folding leaves as it is. `shared` blocks run with a neighbour's
    weights, None for one of `SHARE`.
    """
    short = without_units(evidence.model, evidence.stack, evidence.units, removed, share=True)
    if evidence.compensation != "none" and removed:
        evidence.refit(short, removed)
    kept = [i for i in range(evidence.count) if i not in removed]
    groups = choose_groups(evidence, short, kept, shared_count(shared, len(kept)))
    return short, groups, fold(evidence, short, kept, groups)


def choose_groups(evidence: Evidence, short: nn.Module, kept: Sequence[int], shared: int) -> Groups:
    """Which of the blocks `kept` share weights, by trials on samples of the first batch.

    `short` is the model of these blocks.
    """
    stack, batch = evidence.stack, _few_samples(evidence.batches[0])
    blocks = tuple(short.get_submodule(stack.path).children())
    (calls,) = block_calls(evidence.model, stack, [batch])
    ((hidden, *_),) = hidden_states(evidence.model, stack, [batch])
    mask, costs = token_mask(batch), dict[tuple[int, int], float]()
    with evaluation(short):
        for position, block in enumerate(blocks):
            given = stack.with_hidden(*calls[kept[position]], hidden)
            hidden = output_of(block, given)
            size = float(rows_of(hidden, mask).double().square().sum())
            near = range(max(0, position - LARGEST_GROUP + 1), position + LARGEST_GROUP)
            for source, other in enumerate(blocks):
                if source in near and source != position and can_share(other, block):
                    _, error = adapted_norms(other, block, [given], [hidden], [mask], *TRIAL_FIT)
                    costs[source, position] = error / max(size, 1e-30)
    found = cheapest_groups(len(blocks), shared, costs)
    return tuple(tuple(kept[i] for i in group) for group in found)


def _few_samples(batch: Batch) -> Batch:
    """The first samples of a batch, with about `TRIAL_TOKENS` tokens; all where they cannot be told."""
    values: dict[Any, Any] = dict(batch if isinstance(batch, Mapping) else enumerate(batch))
    tensors = [value for value in values.values() if isinstance(value, Tensor) and value.ndim]
    sizes = {len(tensor) for tensor in tensors}
    if len(sizes) != 1:
        return batch
    first = tensors[0]
    tokens = first.shape[1] if first.ndim == 2 else 1
    some = max(1, TRIAL_TOKENS // max(1, tokens))
    cut = {
        name: value[:some] if isinstance(value, Tensor) and value.ndim else value
        for name, value in values.items()
    }
    return cut if isinstance(batch, Mapping) else tuple(cut.values())


def fold(evidence: Evidence, short: nn.Module, kept: Sequence[int], groups: Groups) -> int:
    """Let the blocks of `short` share weights by `groups`, and adapt their norms; how many parameters
    less it stores then.

    `short` has the blocks `kept` of the model of `evidence`. What is shared are the parameters of the
    first block of a group; norms of the others are new ones.
    """
    stack, masks = evidence.stack, [token_mask(batch) for batch in evidence.batches]
    blocks = tuple(short.get_submodule(stack.path).children())
    places = positions_among(groups, kept)
    sources, saved = {i: g[0] for g in places for i in g[1:]}, saved_parameters(blocks, places)
    rows = [[row[place] for place in kept] for row in evidence.calls]
    hidden = [row[0] for row in evidence.states]
    with evaluation(short):
        wanted = _outputs_at(sources, blocks, stack, rows, hidden)
        for position, block in enumerate(blocks):
            given = [stack.with_hidden(*row[position], h) for row, h in zip(rows, hidden, strict=True)]
            if position in sources:
                source = blocks[sources[position]]
                if not can_share(source, block):
                    raise PlanError(
                        f"blocks {kept[sources[position]]} and {kept[position]} cannot share weights: "
                        "their shapes differ"
                    )
                values, _ = adapted_norms(source, block, given, wanted[position], masks)
                share(source, block)
                _set(block, values)
            hidden = [output_of(block, one) for one in given]
    return saved


def _outputs_at(
    positions: Mapping[int, int],
    blocks: Sequence[nn.Module],
    stack: Stack,
    rows: Sequence[Sequence[Call]],
    starts: Sequence[Tensor],
) -> dict[int, list[Tensor]]:
    """What the blocks at some positions return, in every batch."""
    found, hidden = dict[int, list[Tensor]](), list(starts)
    for position, block in enumerate(blocks[: max(positions, default=-1) + 1]):
        hidden = [
            output_of(block, stack.with_hidden(*row[position], h))
            for row, h in zip(rows, hidden, strict=True)
        ]
        if position in positions:
            found[position] = hidden
    return found


def adapted_norms(
    source: nn.Module,
    block: nn.Module,
    calls: Sequence[Call],
    wanted: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    steps: int = STEPS,
    iterations: int = ITERATIONS,
) -> tuple[Values, float]:
    """Norm parameters with which `block`, with the matrices of `source`, returns nearly what is `wanted`
    on `calls`, and the squared error of all its tokens; changes neither block.

    Begins at the block's own norms or those of the source, whichever are better. Fitted at least in
    float32, and rounded to the block's dtype only then.
    """
    matrices = shared_tensors(source)
    dtype = torch.promote_types(next(iter(matrices.values())).dtype, torch.float32)
    runs = copy.deepcopy(block).to(dtype) if _below(block, dtype) else block
    fixed = {name: _to(tensor, dtype) for name, tensor in matrices.items()}

    def function(given: Call, mask: Tensor | None) -> Function:
        args, kwargs = _to(given, dtype)

        def rows(values: Values) -> Tensor:
            output = functional_call(runs, {**fixed, **values}, args, kwargs)
            return rows_of(output if isinstance(output, Tensor) else output[0], mask)

        return rows

    functions = [function(given, mask) for given, mask in zip(calls, masks, strict=True)]
    targets = [rows_of(target, mask) for target, mask in zip(wanted, masks, strict=True)]
    norms = [{n: _to(p.detach(), dtype) for n, p in norm_parameters(b).items()} for b in (block, source)]
    starts = norms if norms[0].keys() == norms[1].keys() else norms[:1]
    return fitted(functions, targets, starts, steps if norms[0] else 0, iterations)


def _below(block: nn.Module, dtype: torch.dtype) -> bool:
    return any(p.is_floating_point() and p.dtype != dtype for p in block.parameters())


def _to(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in `dtype`, wherever they are inside tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return value.detach().to(dtype) if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_to(part, dtype) for part in value)
    if isinstance(value, dict):
        return {name: _to(part, dtype) for name, part in value.items()}
    return value


def _set(block: nn.Module, values: Values) -> None:
    """New parameters: the old ones may be those of the whole model."""
    for name, old in norm_parameters(block).items():
        path, _, own = name.rpartition(".")
        new = nn.Parameter(values[name].detach().to(old), requires_grad=old.requires_grad)
        setattr(block.get_submodule(path), own, new)
