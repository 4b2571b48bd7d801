"""Causal attention on parts of one text: queries of a part, keys and values up to its last token.

A token attends to itself and to what is before it. So a part of the queries needs the keys of its own
part and of those before, and the first part never waits for the second: the parts of one text can run as
the samples of a batch do (as in "TokenWeave", Gond et al., arXiv 2505.11329, 2025, for a prompt).

The kernel adds up over blocks of keys, and rounds in another order where a block has another width. Keys
of a part are therefore followed by zeros, up to the end of a block or of the text: hidden keys have a
weight of exactly zero, and a row is the same sum in the same order as in the attention of the whole.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from graphopt.errors import PlanError
from graphopt.passes.batch_rules import Batch, Known, RowRule, aten

# Keys that the kernel takes at once (aten/src/ATen/native/cpu/FlashAttentionKernel.cpp, kv_split_size).
KEY_BLOCK = 512
_CAUSAL = 4  # the position of the argument `is_causal`
_FLASH = aten._scaled_dot_product_flash_attention_for_cpu.default
_OTHERS = (
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
    aten._scaled_dot_product_attention_math.default,
)


class NotCausal(PlanError):
    """The attention for which a text cannot be cut, and why."""


def _attention(node: fx.Node, known: Known) -> RowRule:
    """Attention of [batch, heads, length, width] to the keys up to the own place."""
    tensors: Any = list(node.args[:3])
    lengths = {int(n.meta["val"].shape[2]) for n in tensors}
    if node.kwargs.get("attn_mask") is not None:
        raise _not_causal(node, "has a mask, which is not known to hide what comes later")
    if len(node.args) <= _CAUSAL or node.args[_CAUSAL] is not True or len(lengths) != 1:
        raise _not_causal(node, "is not causal")
    if any(n in known and known[n].dims != (2,) for n in tensors):
        raise _not_causal(node, "has the sequence in another place than its length")
    return RowRule((2, 2), dict.fromkeys(tensors, 2), upto=(1, 2))


def _refused(node: fx.Node, known: Known) -> RowRule:
    raise _not_causal(node, "is a kernel that is not known to take a part of the queries")


def _not_causal(node: fx.Node, reason: str) -> NotCausal:
    return NotCausal(f"{node.name} ({node.target}) {reason}")


CAUSAL_RULES: Mapping[Any, Any] = {_FLASH: _attention, **dict.fromkeys(_OTHERS, _refused)}


def keys_of(batch: Batch, index: int, size: int) -> tuple[int, int]:
    """Of `size` keys those that a part reads, and how many of zeros come behind them.

    >>> keys_of(Batch(1200, 2, "sequence"), 0, 1200), keys_of(Batch(12, 2, "sequence"), 0, 12)
    ((600, 424), (6, 6))
    """
    end = batch.cuts(size)[index + 1]
    return end, min(size, -(-end // KEY_BLOCK) * KEY_BLOCK) - end


def padding(rank: int, dim: int, rows: int) -> list[int]:
    """The argument of `constant_pad_nd` for `rows` more at the end of `dim`.

    >>> padding(4, 2, 6)
    [0, 0, 0, 6]
    """
    return [0, 0] * (rank - 1 - dim) + [0, rows]


def arguments_of_part(args: list[Any], kwargs: Mapping[str, Any], mask: fx.Node | None) -> Any:
    """Those of the attention of a part: causal without a `mask`, which all parts but the first have."""
    args[_CAUSAL] = mask is None
    return args, dict(kwargs) if mask is None else {**kwargs, "attn_mask": mask}


def mask_calls(queries: int, keys: int, first: int, like: torch.Tensor) -> list[tuple[Any, Any, Any]]:
    """Calls, each on the result of that before, that make the mask [queries, keys] to add to scores.

    Of a part whose first query is at place `first`: 0 up to the own place, -inf behind it.
    """
    made = {"dtype": like.dtype, "device": like.device}
    return [
        (aten.full.default, ([queries, keys], -torch.inf), made),
        (aten.triu.default, (first + 1,), {}),
    ]
