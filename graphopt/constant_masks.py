"""Attention masks that are the same in every step: a causal one is a flag, one that hides nothing goes.

Models build their mask from positions alone where nothing is padded, and while a graph is captured they
cannot look at it. So a causal mask of shape (queries, keys) is made and read, where the kernel would skip
what lies in the future by itself. Here such a mask is computed, some rows at a time, and compared.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from graphopt import ops
from graphopt.program import tensors_of
from graphopt.ranks import outside_tracing

aten = torch.ops.aten
_ATTENTION = (
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
)
ENTRIES = 2**22  # of a mask that are compared at once, and of a tensor that is computed as a whole


def without_constant_masks(graph: fx.Graph) -> None:
    """Attention in `graph` takes no mask that is causal or hides nothing, if no input decides on it.

    What is hidden stays hidden: results are those of the mask, up to the order in which a kernel adds.
    """
    known: dict[fx.Node, str | None] = {}
    for target in _ATTENTION:
        for node in graph.find_nodes(op="call_function", target=target):
            mask = node.kwargs.get("attn_mask")
            if isinstance(mask, fx.Node):
                if mask not in known:
                    known[mask] = kind_of(mask)
                if known[mask] is not None:
                    _replace_mask(node, causal=known[mask] == "causal")


def kind_of(mask: fx.Node) -> str | None:
    """ "causal" where a query sees the keys up to its own place, "all" where it sees all, else None.

    `mask` has shape (..., queries, keys), boolean (True: seen) or added to the scores (0 or -inf).
    """
    kinds = {"causal", "all"}
    try:
        with outside_tracing():
            for first, seen in _rows_of(mask):
                wanted = torch.ones(seen.shape[-2:], dtype=torch.bool)
                if not seen.all():
                    kinds.discard("all")
                if not torch.equal(seen, wanted.tril(first).expand(seen.shape)):
                    kinds.discard("causal")
                if not kinds:
                    return None
    except _NotConstant:
        return None
    return "all" if "all" in kinds else "causal"


class _NotConstant(Exception):
    """A node depends on inputs or chance, or is too large to be computed."""


def _rows_of(mask: fx.Node) -> Iterator[tuple[int, Tensor]]:
    """Which keys are seen, of some queries at a time, and the first of these."""
    (shape,) = (t.shape for t in tensors_of(mask) if t is not None)
    if len(shape) < 2 or not shape.numel():
        raise _NotConstant
    step = max(1, ENTRIES * shape[-2] // shape.numel())
    whole: dict[fx.Node, Any] = {}
    for first in range(0, shape[-2], step):
        rows = _Rows(whole, first, min(first + step, shape[-2])).of(mask)
        seen = rows if rows.dtype is torch.bool else rows == 0
        if rows.dtype is not torch.bool and not (seen | (rows == -torch.inf)).all():
            raise _NotConstant
        yield first, seen


class _Rows:
    """Values of constant nodes, tensors with many entries at rows first to last of their matrices.

    What is small is computed once, for all rows, and kept in `whole`.
    """

    def __init__(self, whole: dict[fx.Node, Any], first: int, last: int) -> None:
        self.whole, self.first, self.last = whole, first, last
        self.found: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        """The rows of `node`; of a tensor whose rows are all alike, or of fewer dimensions, itself."""
        (tensor,) = tensors_of(node)
        if tensor is not None and tensor.numel() <= ENTRIES // 4:
            value = self._all_of(node)
            return (
                value if value.ndim < 2 or value.shape[-2] == 1 else value[..., self.first : self.last, :]
            )
        if node not in self.found:
            self.found[node] = self._computed(node)
        return self.found[node]

    def _computed(self, node: fx.Node) -> Any:
        args: Any
        kwargs: Any
        args, kwargs = map_arg((node.args, _on_cpu(node)), self.of)
        if node.target is aten.expand.default:
            sizes = list(args[1])
            sizes[-2] = self.last - self.first
            args = (args[0], sizes)
        elif not ops.is_elementwise(node):
            raise _NotConstant
        return _run(node, args, kwargs)

    def _all_of(self, node: fx.Node) -> Any:
        if node not in self.whole:
            sizes = (t.numel() for t in tensors_of(node) if t is not None)
            if sum(sizes) > ENTRIES:
                raise _NotConstant
            args, kwargs = map_arg((node.args, _on_cpu(node)), self._all_of)
            self.whole[node] = _run(node, args, kwargs)
        return self.whole[node]


def _on_cpu(node: fx.Node) -> dict[str, Any]:
    return {k: torch.device("cpu") if k == "device" else v for k, v in node.kwargs.items()}


def _run(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op != "call_function" or ops.mutates(node.target) or ops.is_random(node):
        raise _NotConstant
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _replace_mask(node: fx.Node, causal: bool) -> None:
    """Attention `node` without its mask; with the flag for a causal one."""
    arguments = node.target._schema.arguments  # type: ignore[union-attr]
    place = [a.name for a in arguments].index("is_causal")
    args = [*node.args, *(a.default_value for a in arguments[len(node.args) : place + 1])]
    args[place] = causal or args[place]
    node.args = tuple(args)
    node.kwargs = {k: v for k, v in node.kwargs.items() if k != "attn_mask"}
