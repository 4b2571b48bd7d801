"""Runs of some of a model's blocks over a cache that keeps the states of all of them."""

import copy
from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.passes.blocks import Stack

# Caches of the transformers library whose entries are keys and values of single tokens.
KINDS = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer", "StaticSlidingWindowLayer")


def check_entries(cache: Any, blocks: int, kinds: Collection[str] = KINDS) -> None:
    """GraphoptError unless `cache` has, for each of `blocks` blocks, an entry of one of `kinds`."""
    entries = getattr(cache, "layers", None)
    if entries is None or len(entries) != blocks:
        found = "no entries" if entries is None else f"{len(entries)} entries"
        raise GraphoptError(f"the {type(cache).__name__} has {found} for {blocks} blocks")
    if unknown := sorted({type(entry).__name__ for entry in entries} - set(kinds)):
        raise GraphoptError(
            f"a cache of {', '.join(unknown)} is not supported, only of {', '.join(kinds)}"
        )


def tokens_seen(cache: Any, block: int) -> int:
    """How many tokens the entry of a block has seen."""
    return int(cache.layers[block].get_seq_length())


def cache_seen_by(cache: Any, running: Collection[int]) -> Any:
    """`cache` for a run of the blocks `running` only; it shares its entries.

    A model derives positions and masks from the first entry and from the first of each kind (full,
    sliding), which are behind where these blocks were left out before. In the result, the entry of a
    block that does not run is another name for that of one that does, of its kind where there is one.
    """
    entries = cache.layers
    first: dict[type, Any] = {}
    for i in sorted(running):
        first.setdefault(type(entries[i]), entries[i])
    default = entries[min(running)]
    seen = copy.copy(cache)
    seen.layers = [
        entry if i in running else first.get(type(entry), default) for i, entry in enumerate(entries)
    ]
    return seen


def straight(stack: Stack, see: Callable[[Tensor], object] = lambda hidden: None) -> Callable[..., Any]:
    """The forward of a block that changes nothing; `see` is given the hidden states."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = stack.hidden(args, kwargs)
        see(hidden)
        return stack.output(hidden)

    return forward
