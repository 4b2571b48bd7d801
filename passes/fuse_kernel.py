"""From nodes of a graph to one kernel: the grid that they lie on, what is read, what is made."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import getitem
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from graphopt.codegen.backends import installed
from graphopt.codegen.builder import Builder
from graphopt.codegen.region import Extent, Facts, Output
from graphopt.errors import CodegenError
from graphopt.fused_ops import Fused, Place
from graphopt.passes.fuse_rules import RULES, emitted, layered_dim
from graphopt.passes.fuse_values import (
    CannotFuse,
    Emitter,
    Ints,
    Value,
    args_of,
    is_transparent,
    layout_of,
    needs,
    place_of,
    restrided,
)

aten = torch.ops.aten
MAX_TENSORS = 32  # of one kernel; beyond, registers and the kernel's parameters cost more than is saved
MAX_PIECES = 4
# The argument that has the shape of the grid, where it is not that of the result.
_GRID_ARGUMENT: dict[Any, int] = {
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default), 0),
    aten.nll_loss_backward.default: 1,
    aten.native_layer_norm.default: 0,
    aten.native_layer_norm_backward.default: 1,
}
_EXTENTS = {"full": Extent.FULL, "row": Extent.ROW, "column": Extent.COLUMN}


@dataclass(frozen=True)
class Kernel:
    """A kernel, the nodes whose tensors it is given, and those whose tensors it makes."""

    fused: Fused
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def grid_shape_of(node: fx.Node) -> Ints:
    """The shape of the largest tensor that `node` works on; CannotFuse where a size is a symbol or 0."""
    position = None if layered_dim(node) is not None else _GRID_ARGUMENT.get(node.target)
    holder: Any = node if position is None else node.args[position]
    tensor = holder.meta["val"]
    needs(isinstance(tensor, torch.Tensor), "operand", "it makes several tensors")
    shape = tuple(tensor.shape)
    needs(all(type(size) is int for size in shape), "shape", "its sizes are symbols")
    needs(prod(shape) > 1 and len(shape) > 0, "shape", "it works on one number or none")
    return shape


def check_alone(node: fx.Node) -> None:
    """Raise CannotFuse where `node` can be in no region."""
    needs(node.target in RULES, "operator", f"{node.target} has no formula")
    grid_shape_of(node)
    values = [n.meta.get("val") for n in (node, *node.all_input_nodes)]
    tensors = [t for v in values for t in (v if isinstance(v, tuple | list) else (v,))]
    for tensor in tensors:
        needs(isinstance(tensor, torch.Tensor), "operand", "an operand is no tensor")
        needs(tensor.layout is torch.strided, "operand", "a tensor has no strides")
        needs(type(tensor) is FakeTensor, "operand", "a tensor is of a class of its own")
        sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        needs(all(type(size) is int for size in sizes), "shape", "sizes or strides are symbols")
    devices = {t.device for t in tensors if t.dim() > 0}
    needs(len(devices) == 1, "device", "tensors are on several devices")
    kind = next(iter(devices)).type
    needs(installed(kind), "device", f"there is no backend for {kind} here")


def kernel_of(nodes: Sequence[fx.Node], outputs: Sequence[fx.Node] | None = None) -> Kernel:
    """The kernel of `nodes`, which are in order; CannotFuse where there is none.

    It makes `outputs`, by default all that is read elsewhere.
    """
    rows, width = _grid(nodes)
    wide = any(t.dtype is torch.float64 for n in nodes for t in _tensors(n))
    e = Emitter(Builder("float64" if wide else "float32"), rows, width)
    outputs = outputs_of(nodes) if outputs is None else list(outputs)
    needs(bool(outputs), "outputs", f"nobody reads what {nodes[-1].name} makes")
    try:
        for node in nodes:
            found = emitted(e, node)
            for holder in results_of(node):
                own = found if isinstance(found, Value) else found[int(args_of(holder)[1])]
                e.values[holder] = _as_stored(e, own, holder) if holder in outputs else own
        return _finished(e, outputs)
    except CodegenError as error:
        raise CannotFuse("kernel", str(error)) from error


def _as_stored(e: Emitter, value: Value, node: fx.Node) -> Value:
    """A value that is kept, as others will read it: what the region makes of it agrees with that."""
    tensor = node.meta["val"]
    narrow = tensor.dtype.is_floating_point and tensor.dtype.itemsize < (
        8 if e.b.math == "float64" else 4
    )
    if not narrow or value.kind == "column":
        return value
    dtype: Any = str(tensor.dtype).removeprefix("torch.")
    return replace(value, pieces=tuple(e.b.round(piece, dtype) for piece in value.pieces))


def outputs_of(nodes: Sequence[fx.Node], inside: set[fx.Node] | None = None) -> list[fx.Node]:
    """The nodes of a region whose values are read elsewhere; of several results, the `getitem`s.

    Readers that are `inside`, by default in `nodes`, do not count.
    """
    inside = {*nodes} if inside is None else inside
    holders = [h for n in nodes for h in results_of(n)]
    return [h for h in holders if _leaves_region(h, inside)]


def results_of(node: fx.Node) -> list[fx.Node]:
    """The nodes that hold the tensors of `node`."""
    if isinstance(node.meta["val"], torch.Tensor):
        return [node]
    return [user for user in node.users if user.target is getitem]


def _leaves_region(node: fx.Node, inside: set[fx.Node]) -> bool:
    return any(
        user not in inside
        and (not is_transparent(user) or not user.users or _leaves_region(user, inside))
        for user in node.users
    )


def _tensors(node: fx.Node) -> list[torch.Tensor]:
    return [h.meta["val"] for h in results_of(node)]


def _grid(nodes: Sequence[fx.Node]) -> tuple[Ints, int]:
    """Sizes of the rows, and columns of a piece."""
    shapes = [grid_shape_of(n) for n in nodes]
    for node in nodes:
        if node.target in (aten.cat.default, aten.slice_backward.default):
            shapes += [tuple(n.meta["val"].shape) for n in node.all_input_nodes]
    count = max(prod(s[:-1]) for s in shapes)
    wide = [s for s in shapes if prod(s[:-1]) == count and s[-1] > 1]
    needs(bool(wide), "grid", "there are no columns")
    width = min(s[-1] for s in wide)
    for shape in shapes:
        fits = prod(shape) == count or (prod(shape[:-1]) == count and shape[-1] % width == 0)
        needs(fits, "grid", f"{list(shape)} is not {count} rows of pieces of {width}")
    needs(max(s[-1] for s in wide) <= MAX_PIECES * width, "pieces", f"more than {MAX_PIECES}")
    return max((s[:-1] for s in wide), key=len) or (1,), width


def _finished(e: Emitter, outputs: list[fx.Node]) -> Kernel:
    results: list[Output] = []
    writes: list[Place] = []
    kinds: list[Extent] = []
    facts = e.b.region().facts
    for number, node in enumerate(outputs):
        tensor = node.meta["val"]
        value = _spread(e, e.values[node], facts)
        dense = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        needs(dense, "layout", f"{node.name} has gaps in memory")
        for piece, place in zip(value.pieces, _places(e, value, tensor, number), strict=True):
            dtype: Any = str(tensor.dtype).removeprefix("torch.")
            results.append(Output(f"y{len(results)}", piece.position, dtype))
            writes.append(place)
            kinds.append(_EXTENTS[value.kind])
    region = e.b.region(*results)
    for out, extent, place in zip(results, kinds, writes, strict=True):
        same = region.facts[out.value].extent is extent
        needs(same, "broadcast", f"{outputs[place.tensor].name} repeats itself along the grid")
    sources = list(dict.fromkeys(read.source for read in e.reads))
    needs(len(e.reads) + len(results) <= MAX_TENSORS, "tensors", f"more than {MAX_TENSORS} are touched")
    needs(bool(sources), "operand", "it reads nothing")
    fused = Fused(
        region,
        (*e.rows, e.width),
        tuple(layout_of(s.meta["val"]) for s in sources),
        tuple(place_of(read, sources.index(read.source)) for read in e.reads),
        tuple(layout_of(n.meta["val"]) for n in outputs),
        tuple(writes),
    )
    return Kernel(fused, tuple(sources), tuple(outputs))


def _spread(e: Emitter, value: Value, facts: tuple[Facts, ...]) -> Value:
    """A full value made so that the kernel knows it for one, where it repeats itself along the grid.

    It is chosen by what is true of every number, and a full input has numbers everywhere.
    """
    full = [x for read, (x,) in e.reads.items() if read.extent is Extent.FULL]
    floats = [x for x in full if facts[x.position].kind == "float"]
    if value.kind != "full" or not floats:
        return value
    if all(facts[p.position].extent is Extent.FULL for p in value.pieces):
        return value
    x = floats[0]
    always = e.b.apply("logical_or", e.b.apply("eq", x, x), e.b.apply("ne", x, x))
    spread = (e.b.apply("where", always, p, p) for p in value.pieces)
    return replace(value, pieces=tuple(spread))


def _places(e: Emitter, value: Value, tensor: torch.Tensor, number: int) -> list[Place]:
    """Where the pieces of a result go."""
    laid = tensor if value.order is None else tensor.permute(value.order)
    shape, strides = tuple(laid.shape), laid.stride()
    if value.kind == "column":
        return [Place(number, (e.width,), (1,), j * e.width) for j in range(len(value.pieces))]
    if value.kind == "row":
        return [Place(number, e.rows, restrided(shape, strides, e.rows))]
    steps = (*restrided(shape[:-1], strides[:-1], e.rows), strides[-1])
    step = e.width * strides[-1]
    return [Place(number, (*e.rows, e.width), steps, j * step) for j in range(len(value.pieces))]
