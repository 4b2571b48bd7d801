"""Removal of sublayers from a copy of a model, with the places of the caches that stay."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NoReturn

from torch import nn

from graphopt.errors import PlanError
from graphopt.passes.blocks import Stack
from graphopt.passes.layer_removal import index_names, without_blocks
from graphopt.passes.skip_units import Unit, empty_blocks
from graphopt.passes.sublayers import stand_ins


def without_units(
    model: nn.Module, stack: Stack, units: Sequence[Unit], removed: frozenset[int], *, share: bool = False
) -> nn.Module:
    """A copy of `model` without the units `removed`, which shares its tensors where `share` says so.

    Blocks of which nothing stays go whole. The modules of other removed sublayers are replaced by ones
    that have no parameters, and the attentions that stay are given the first places of the cache.
    """
    if reason := empty_cache(model, stack, units, removed):
        raise PlanError(reason)
    gone = empty_blocks(stack, units, removed)
    kept = [i for i in range(len(stack.blocks)) if i not in gone]
    short = without_blocks(model, stack, kept, share=share)
    partly = [units[i] for i in sorted(removed) if units[i].block not in gone]
    if not partly:
        return short
    blocks = tuple(short.get_submodule(stack.path).children())
    places = _cache_places(short, units, removed, kept)
    for name in index_names(stack.blocks):
        for unit, place in places:
            for path in unit.branch.modules if unit.branch else ():
                _set_index(blocks[kept.index(unit.block)].get_submodule(path), name, place)
    for unit in partly:
        _replace(blocks[kept.index(unit.block)], unit)
    short.save_pretrained = partial(refuse_saving, type(short).__name__)  # type: ignore[assignment]
    return short


def can_be_saved(model: nn.Module) -> bool:
    """Whether `save_pretrained` of what `without_units` returned can express it."""
    saves = vars(model).get("save_pretrained")
    return not isinstance(saves, partial) or saves.func is not refuse_saving


def refuse_saving(name: str, *_: object, **__: object) -> NoReturn:
    """What `save_pretrained` of a model without some sublayers does."""
    raise PlanError(
        f"save_pretrained: the configuration of {name} cannot say that a layer has no attention or no "
        "MLP, so that the model loaded again would have random ones; save the plan and the state_dict, "
        "and load them into SkipLayers.apply(whole model, plan), or use granularity='layers'"
    )


def _replace(block: nn.Module, unit: Unit) -> None:
    assert unit.branch is not None
    for path, new in stand_ins(unit.branch).items():
        owner, _, name = path.rpartition(".")
        setattr(block.get_submodule(owner), name, new)


def _set_index(module: nn.Module, name: str, place: int) -> None:
    for part in module.modules():
        if name in vars(part):
            setattr(part, name, place)


def _cache_places(
    short: nn.Module, units: Sequence[Unit], removed: frozenset[int], kept: Sequence[int]
) -> list[tuple[Unit, int]]:
    """A place in the cache for each attention that stays.

    A cache has a place for every block, of the kind that the configuration's list of layer types says,
    and takes lengths from its first place and from the first of a kind. So the attentions of a kind
    take the places of that kind in order, and those that stay empty are the last.
    """
    config: Any = getattr(short, "config", None)
    kinds = getattr(config, "layer_types", None) or ["attention"] * len(kept)
    free = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in kinds}
    found = []
    for i, unit in enumerate(units):
        if i not in removed and unit.branch is not None and unit.branch.kind == "attention":
            kind = kinds[kept.index(unit.block)]
            found.append((unit, free[kind].pop(0)))
    return found


def empty_cache(
    model: nn.Module, stack: Stack, units: Sequence[Unit], removed: frozenset[int]
) -> str | None:
    """Why a cache of the model without the units `removed` has no length; None where it has one.

    Its length is that of its first place, which an attention of the first block's kind fills.
    """
    generates = getattr(model, "can_generate", None)
    if generates is None or not generates() or all(units[i].branch is None for i in removed):
        return None
    gone = empty_blocks(stack, units, removed)
    types = getattr(model.config, "layer_types", None) or ["attention"] * len(stack.blocks)
    first = types[min(set(range(len(stack.blocks))) - gone, default=0)]
    fill = [
        i
        for i, unit in enumerate(units)
        if unit.branch is not None and unit.branch.kind == "attention" and types[unit.block] == first
    ]
    if not removed.issuperset(fill):
        return None
    names = ", ".join(units[i].name for i in fill)
    return f"a cache takes its length from its first place, which one of {names} has to stay to fill"
