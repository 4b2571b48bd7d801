"""What a node's recorded values say: its tensors, their concrete sizes, the bytes they touch.

All of it reads ``node.meta["val"]`` (fake tensors as the tracer left them). A symbolic size counts
as its hint, the size it had in the example inputs; reading a hint adds no guard.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# Ops that take a tensor for its shape, dtype and device only, or to overwrite all of it.
_READ_NOTHING = frozenset(
    {
        aten.zeros_like.default,
        aten.ones_like.default,
        aten.full_like.default,
        aten.empty_like.default,
        aten.rand_like.default,
        aten.randn_like.default,
        aten.new_zeros.default,
        aten.new_ones.default,
        aten.new_full.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.bernoulli.p,
        aten.zero_.default,
        aten.fill_.Scalar,
    }
)

# op -> position of the argument that is taken for its shape only or overwritten, and of the
# argument of which no more elements are read than there are in the outputs.
_READ_PARTLY: dict[Any, tuple[int | None, int | None]] = {
    aten.embedding.default: (None, 0),
    aten.index.Tensor: (None, 0),
    aten.index_select.default: (None, 0),
    aten.gather.default: (None, 0),
    aten.take.default: (None, 0),
    aten.nll_loss_backward.default: (1, None),
    aten.nll_loss2d_backward.default: (1, None),
    aten.max_pool2d_with_indices_backward.default: (1, None),
    aten.copy_.default: (0, None),
}

# The size of a symbol that has no hint (it depends on data); torch's partitioner assumes the same.
UNBACKED_SIZE = 4096


def hint(size: int | torch.SymInt) -> int:
    """`size` as an integer: a symbol's hint, or `UNBACKED_SIZE` where it has none."""
    if isinstance(size, int):
        return size
    known = size.node.hint
    return UNBACKED_SIZE if known is None else int(known)


def shape_of(tensor: torch.Tensor) -> tuple[int, ...]:
    """The sizes of `tensor` as integers."""
    return tuple(hint(size) for size in tensor.shape)


def numel(tensor: torch.Tensor) -> int:
    """The number of elements of `tensor`."""
    return math.prod(shape_of(tensor))


def touched_bytes(tensor: torch.Tensor) -> int:
    """Bytes of memory that reading all of `tensor` touches: an expanded dimension counts once."""
    sizes = (hint(size) for size, stride in strides_of(tensor) if hint(stride) != 0)
    return 0 if numel(tensor) == 0 else math.prod(sizes) * tensor.element_size()


def strides_of(tensor: torch.Tensor) -> list[tuple[int | torch.SymInt, int | torch.SymInt]]:
    """(size, stride) of each dimension; a tensor without strides (sparse) counts as dense."""
    if tensor.layout is not torch.strided:
        return [(size, 1) for size in tensor.shape]
    return list(zip(tensor.shape, tensor.stride(), strict=True))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a value: a tensor, nothing, or tuples and lists of them."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def output_tensors(node: fx.Node) -> list[torch.Tensor]:
    """The tensors that `node` returns."""
    return list(tensors(node.meta.get("val")))


def operands(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keywords of `node`, with the recorded value in place of each node."""
    return fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta.get("val"))


def elements_read(node: fx.Node) -> list[tuple[torch.Tensor, int]]:
    """The tensors that `node` reads, each with how many of its elements at most.

    An embedding reads the rows that its indices name; a `zeros_like` reads nothing.
    """
    return [(tensor, min(bounds)) for tensor, bounds in element_bounds(node)]


def element_bounds(node: fx.Node) -> list[tuple[torch.Tensor, tuple[int, ...]]]:
    """As `elements_read`, with all bounds of how many elements are read: the least of them counts."""
    if node.target in _READ_NOTHING:
        return []
    skipped, picked = _READ_PARTLY.get(node.target, (None, None))
    outputs = sum(numel(tensor) for tensor in output_tensors(node))
    reads: list[tuple[torch.Tensor, tuple[int, ...]]] = []
    for argument in node.all_input_nodes:
        for tensor in tensors(argument.meta.get("val")):
            if skipped is not None and argument is node.args[skipped]:
                continue
            is_picked = picked is not None and argument is node.args[picked]
            reads.append((tensor, (numel(tensor), outputs) if is_picked else (numel(tensor),)))
    return reads


def is_view(node: fx.Node) -> bool:
    """True where every output of `node` shares its storage with an input, and nothing is written.

    Such a node runs no kernel. Whether `reshape` or `contiguous` copies is seen by this, too.
    """
    outputs = output_tensors(node)
    schema = getattr(node.target, "_schema", None)
    if not outputs or schema is None or schema.is_mutable:
        return False
    sources = {
        _storage(tensor) for source in node.all_input_nodes for tensor in tensors(source.meta.get("val"))
    } - {None}
    return all(_storage(tensor) in sources for tensor in outputs)


def _storage(tensor: torch.Tensor) -> int | None:
    """The identity of the storage, None where a tensor has none (sparse, wrapper subclasses)."""
    if tensor.layout is not torch.strided:
        return None
    return int(tensor.untyped_storage()._cdata)
