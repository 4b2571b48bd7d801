"""Blocks that run with one set of weights: what is shared, how it is saved, and how it is shared again.

Tensors are shared, not modules: a block keeps its modules, with its index in a cache, and its norms.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import PlanError
from graphopt.passes.skip_plan import Groups, SkipPlan


def shared_tensors(block: nn.Module) -> dict[str, Tensor]:
    """What `block` can share, by name: parameters and buffers of modules that own a matrix.

    Modules whose own parameters are all vectors are norms, or scales of channels, and stay each
    block's own.
    """
    return {
        name: tensor
        for path, module in block.named_modules()
        if any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
        for name, tensor in _own_tensors(path, module)
    }


def norm_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that stay the block's own, by name."""
    shared = shared_tensors(block)
    return {name: value for name, value in block.named_parameters() if name not in shared}


def _own_tensors(path: str, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    prefix = f"{path}." if path else ""
    yield from module.named_parameters(prefix.rstrip("."), recurse=False)
    yield from module.named_buffers(prefix.rstrip("."), recurse=False)


def can_share(one: nn.Module, other: nn.Module) -> bool:
    """Whether the tensors of one block fit into the other: same names, shapes, dtypes and devices."""
    kinds = [
        {name: (t.shape, t.dtype, t.device) for name, t in shared_tensors(block).items()}
        for block in (one, other)
    ]
    return kinds[0] == kinds[1] and bool(kinds[0])


def share(source: nn.Module, block: nn.Module) -> None:
    """`block` runs with the matrices of `source`: the same parameters, so that gradients add up."""
    for name, tensor in shared_tensors(source).items():
        path, _, own = name.rpartition(".")
        module = block.get_submodule(path)
        if isinstance(tensor, nn.Parameter):
            module._parameters[own] = tensor
        else:
            module._buffers[own] = tensor


def saved_parameters(blocks: Sequence[nn.Module], groups: Groups) -> int:
    """How many parameters less `blocks` store once they share as `groups`, positions in it, say."""
    sources = {i: group[0] for group in groups for i in group[1:]}
    own = [[*shared_tensors(block).values()] for block in blocks]
    after = [own[sources.get(i, i)] for i in range(len(blocks))]
    return _stored(own) - _stored(after)


def _stored(tensors: Sequence[Sequence[Tensor]]) -> int:
    distinct = {id(t): t.numel() for found in tensors for t in found if isinstance(t, nn.Parameter)}
    return sum(distinct.values())


def save_with_copies(
    model: Any, path: str, save_directory: Any, *args: Any, state_dict: Any = None, **kwargs: Any
) -> None:
    """`save_pretrained` of a model whose blocks at `path` share weights: each block's are written.

    The file format has no tensors with two names, and a configuration cannot say which blocks share.
    So that `from_pretrained` of the plain class makes a model that computes the same, the file holds
    the weights of every block; `share_weights` of what was loaded brings the sharing back.
    """
    state = dict(model.state_dict() if state_dict is None else state_dict)
    prefix, seen = f"{path}.", set[int]()
    for name, value in state.items():
        if name.startswith(prefix) and isinstance(value, Tensor) and value.device.type != "meta":
            if value.data_ptr() in seen:
                state[name] = value.clone()
            seen.add(value.data_ptr())
    type(model).save_pretrained(model, save_directory, *args, state_dict=state, **kwargs)


def let_save(model: nn.Module, path: str) -> None:
    """`save_pretrained` of `model`, where it has one, writes the weights that blocks share for each."""
    if hasattr(type(model), "save_pretrained"):
        model.save_pretrained = partial(save_with_copies, model, path)  # type: ignore[assignment]


def share_weights(model: nn.Module, plan: SkipPlan) -> nn.Module:
    """`model`, a folded model that was loaded again, with the blocks sharing weights as `plan` says.

    `from_pretrained` gives every block weights of its own: equal ones, in memory of their own. This
    puts the same parameters in their place again, changes nothing that the model computes, and
    returns the model itself. PlanError where the model has other blocks than `plan` keeps, or where
    weights that were shared have come to differ.
    """
    try:
        blocks = list(model.get_submodule(plan.path).children())
    except AttributeError:
        blocks = []
    if len(blocks) != len(plan.kept):
        raise PlanError(
            f"the plan keeps {len(plan.kept)} blocks of {plan.path!r}; the model has {len(blocks)} there"
        )
    plan.check()
    groups = positions_among(plan.groups, plan.kept)
    for group in groups:
        owned = shared_tensors(blocks[group[0]])
        for position in group[1:]:
            if not can_share(blocks[group[0]], blocks[position]) or not all(
                torch.equal(value, owned[name])
                for name, value in shared_tensors(blocks[position]).items()
            ):
                raise PlanError(
                    f"blocks {group[0]} and {position} of {plan.path} do not have the same weights"
                )
    for group in groups:
        for position in group[1:]:
            share(blocks[group[0]], blocks[position])
    if groups:
        let_save(model, plan.path)
    return model


def positions_among(groups: Groups, kept: Sequence[int]) -> Groups:
    """Positions in the whole model as positions among the blocks that stay.

    >>> positions_among(((4, 2),), (0, 2, 4))
    ((2, 1),)
    """
    place = {old: new for new, old in enumerate(kept)}
    return tuple(tuple(place[i] for i in group) for group in groups)
