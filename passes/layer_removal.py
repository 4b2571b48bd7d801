"""Removal of blocks from a copy of a model: the list, the indices inside blocks, the configuration."""

import copy
import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from graphopt.passes.blocks import Stack

# How configurations and modules name the number of their blocks.
_COUNT = re.compile(r"(num|n)_(hidden_)?layers?|(encoder|decoder)_layers")
# How configurations name lists of blocks by position, and how many of the first blocks are of a kind.
_POSITIONS = re.compile(r".*_(layers|layers?_idxs?|idxs|indices)")
_LEADING = re.compile(r"first_k_dense_replace|max_window_layers")
# Lists of a configuration that have nothing to do with blocks, whatever their length.
_NOT_PER_LAYER = re.compile(r"architectures|.*_token_ids?")


def without_blocks(
    model: nn.Module, stack: Stack, kept: Sequence[int], *, share: bool = False
) -> nn.Module:
    """A copy of `model` with only the blocks at positions `kept`, numbered anew.

    The copy shares nothing with `model`, or parameters and buffers (`share`); the blocks left out are
    never copied. A caching
    implementation finds the state of a block by its index, so every index is renumbered, and a saved
    model is rebuilt from its configuration, so its count and its lists per block are cut.
    """
    removed = [block for i, block in enumerate(stack.blocks) if i not in set(kept)]
    tensors = [*model.parameters(), *model.buffers()] if share else []
    memo = {id(block): nn.Identity() for block in removed} | {id(t): t for t in tensors}
    short = copy.deepcopy(model, memo)
    container = short.get_submodule(stack.path)
    names, copies = list(container._modules), list(container.children())
    blocks = [copies[i] for i in kept]
    container._modules = OrderedDict(zip(names, blocks, strict=False))
    _renumber(index_names(stack.blocks), blocks, kept)
    for owner in owners(short, stack.path):
        _cut(owner, len(stack.blocks), kept)
    return short


def owners(model: nn.Module, path: str) -> Iterator[Any]:
    """The modules around the list at `path`, innermost first, and their configurations."""
    seen: set[int] = set()
    parts = path.split(".")
    for depth in reversed(range(len(parts))):
        module = model.get_submodule(".".join(parts[:depth]))
        for owner in (module, getattr(module, "config", None)):
            if owner is not None and id(owner) not in seen:
                seen.add(id(owner))
                yield owner


def index_names(blocks: Sequence[nn.Module]) -> frozenset[str]:
    """The attributes that hold a block's position: integers that differ from it by one constant.

    They are found by value in two or more of the blocks, wherever inside them they stand.
    """
    offsets: dict[str, set[int]] = {}
    places: dict[str, set[int]] = {}
    for position, block in enumerate(blocks):
        for module in block.modules():
            for name, value in vars(module).items():
                if type(value) is int:
                    offsets.setdefault(name, set()).add(value - position)
                    places.setdefault(name, set()).add(position)
    return frozenset(name for name in offsets if len(offsets[name]) == 1 < len(places[name]))


def _renumber(names: frozenset[str], blocks: Sequence[nn.Module], kept: Sequence[int]) -> None:
    for new, (block, old) in enumerate(zip(blocks, kept, strict=True)):
        for module in block.modules():
            for name in names & vars(module).keys():
                setattr(module, name, getattr(module, name) - old + new)


def _cut(owner: Any, count: int, kept: Sequence[int]) -> None:
    """Set the count of blocks and cut the lists per block of a module or a configuration."""
    changed: dict[str, Any] = {}
    for name, value in vars(owner).items():
        if type(value) is int and value == count and _COUNT.fullmatch(name):
            changed[name] = len(kept)
        elif _are_positions(owner, name, value, count):
            changed[name] = type(value)(new for new, old in enumerate(kept) if old in value)
        elif _per_layer(owner, name, value, count):
            changed[name] = type(value)(value[i] for i in kept)
        elif type(value) is int and not isinstance(owner, nn.Module) and _LEADING.fullmatch(name):
            changed[name] = sum(old < value for old in kept)
    vars(owner).update(changed)  # at once: a configuration checks that its lists fit its count


def _are_positions(owner: Any, name: str, value: Any, count: int) -> bool:
    """Whether `value` is a configuration's list of blocks by their positions."""
    if isinstance(owner, nn.Module) or not isinstance(value, list | tuple) or not value:
        return False
    ascend = all(type(i) is int for i in value) and sorted(set(value) & set(range(count))) == [*value]
    return ascend and _POSITIONS.fullmatch(name) is not None


def _per_layer(owner: Any, name: str, value: Any, count: int) -> bool:
    """Whether `value` is a configuration's list with an entry for each of `count` blocks."""
    if isinstance(owner, nn.Module) or _NOT_PER_LAYER.fullmatch(name):
        return False
    return isinstance(value, list | tuple) and len(value) == count
