"""A cache of keys and values whose rows end at different tokens, put in line again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def crop(cache: Any, blocks: Sequence[int], tokens: int) -> None:
    """Drop the last `tokens` tokens from the entries of some blocks."""
    for i in blocks:
        cache.layers[i].crop(-tokens)


def realign(cache: Any, slots: int, rows: Sequence[int], ends: Sequence[int], width: int) -> None:
    """Keep some rows, and of each the last `width` slots before its end, at the right edge.

    Entries hold the last slots of `slots`, as tensors of shape (rows, heads, slots, size); the row
    rows[i] ends before slot ends[i]. Slots before the first are filled with what is at hand and have to
    be masked. What an entry with a sliding window lets go again is what later tokens do not see.
    """
    for entry in cache.layers:
        window = entry.sliding_window - 1 if entry.is_sliding else width
        kept, stored = min(width, window), entry.keys.shape[-2]
        starts = torch.tensor(ends, device=entry.keys.device) - kept - (slots - stored)
        at = (starts[:, None] + torch.arange(kept, device=starts.device)).clamp(min=0)
        chosen = torch.tensor(rows, device=starts.device)
        entry.keys, entry.values = (_taken(states, chosen, at) for states in (entry.keys, entry.values))
        if entry.is_sliding:
            entry.cumulative_length = width


def _taken(states: Tensor, rows: Tensor, at: Tensor) -> Tensor:
    """Of each row the slots `at`, of shape (rows, slots); whole vectors are copied at once."""
    heads, slots, size = states.shape[1:]
    first = (rows[:, None] * heads + torch.arange(heads, device=rows.device)) * slots
    flat = first[:, :, None] + at[:, None, :]
    return states.reshape(-1, size).index_select(0, flat.flatten()).view(*flat.shape, size)


def masks(counts: Sequence[int], width: int, device: torch.device) -> Tensor:
    """Which of `width` slots hold a token, where row i has counts[i] at the right edge.

    >>> masks([2, 3], 3, torch.device("cpu")).tolist()
    [[0, 1, 1], [1, 1, 1]]
    """
    pads = width - torch.tensor(counts, device=device)
    return (torch.arange(width, device=device) >= pads[:, None]).long()
