"""Short calls in a lowered module: a chain of views is one look at memory, and equal ones are shared.

Between two operators of a step stand views: of weights turned, of rows that become batches, of heads.
Each is a call through the dispatcher, and a step has hundreds: with caches full of matrices some ten
microseconds each. Sizes and strides are known, so a chain is one `torch.as_strided`.
"""

from collections.abc import Mapping, Sequence
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from graphopt import ops

aten = torch.ops.aten
Ints = tuple[int, ...]

# Functions that do what an operator does, and parse their arguments in half the time.
_FUNCTIONS: Mapping[Any, Any] = {
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
}


class View:
    """A chain of views of a tensor, by the sizes and strides that it ends with.

    Where the tensor lies otherwise than it did when the graph was traced, the views run one by one.
    """

    def __init__(self, base: Tensor, seen: Tensor, chain: Sequence[fx.Node]) -> None:
        self.__name__ = self.__qualname__ = "view"
        self._expected = base.stride()
        self._sizes, self._strides = tuple(seen.shape), seen.stride()
        self._offset = int(seen.storage_offset())
        self._chain: list[Any] = [(n.target, n.args[1:], n.kwargs) for n in chain]

    def __call__(self, x: Tensor) -> Tensor:
        """What the views show of `x`."""
        if x.stride() == self._expected:
            if self._offset:
                return torch.as_strided(x, self._sizes, self._strides, x.storage_offset() + self._offset)
            return torch.as_strided(x, self._sizes, self._strides)
        found: Any = x
        for target, args, kwargs in self._chain:
            found = target(found, *args, **kwargs)
        return found  # type: ignore[no-any-return]

    @property
    def place(self) -> tuple[Ints, Ints, int]:
        """What tells it from other views of the same tensor."""
        return self._sizes, self._strides, self._offset


def shorten_calls(module: fx.GraphModule) -> int:
    """Rewrite `module`, which has to be recompiled, in place; the number of calls that are shorter."""
    graph, count = module.graph, 0
    returned = {*graph.output_node().all_input_nodes}
    shared: dict[tuple[fx.Node, Any], fx.Node] = {}
    for node, found in [(node, _view(node)) for node in graph.nodes]:
        if node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]
        elif found is not None:
            base, view = found
            same = base if _is_whole(base, view) else shared.get((base, view.place))
            if same is not None and not {node, same} & returned:
                node.replace_all_uses_with(same)
            else:
                node.target, node.args, node.kwargs = view, (base,), {}
                shared[base, view.place] = node
        else:
            continue
        count += 1
    for node in reversed(graph.nodes):
        if (_is_view(node) or isinstance(node.target, View)) and not node.users:
            graph.erase_node(node)
    return count


def _is_view(node: fx.Node) -> bool:
    """True for a view of one node by constants, and for one of several views made by one operator."""
    if node.op != "call_function" or not node.args or node.all_input_nodes != [node.args[0]]:
        return False
    if node.target is getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and source.target is not getitem and _is_view(source)
    return getattr(node.target, "namespace", None) == "aten" and ops.is_view(node.target)


def _view(node: fx.Node) -> tuple[fx.Node, View] | None:
    """The tensor that a chain of views begins with, and the chain, where it is a look at memory."""
    chain: list[fx.Node] = []
    base = node
    while _is_view(base):
        chain.insert(0, base)
        base = base.args[0]  # type: ignore[assignment]
    value: Any = base.meta.get("val")
    if not chain or not _is_plain(value):
        return None
    given = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    seen: Any = given
    try:
        for step in chain:
            seen = step.target(seen, *step.args[1:], **step.kwargs)  # type: ignore[operator]
    except RuntimeError:  # strides that no view has
        return None
    if not _is_plain(seen) or seen.dtype != given.dtype or seen.is_conj() or seen.is_neg():
        return None
    if seen.untyped_storage()._cdata != given.untyped_storage()._cdata:  # a reshape that copies
        return None
    return base, View(given, seen, chain)


def _is_plain(value: Any) -> bool:
    """Whether it is a tensor of known sizes and strides."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    return all(type(size) is int for size in (*value.shape, *value.stride(), value.storage_offset()))


def _is_whole(base: fx.Node, view: View) -> bool:
    """Whether the view shows the tensor as it is."""
    value = base.meta["val"]
    return view.place == (tuple(value.shape), value.stride(), 0)
