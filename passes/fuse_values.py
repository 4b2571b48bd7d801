"""Values of a region while it is written from the nodes of a graph, and the tensors that it reads.

A region lies on a grid of rows x columns (`graphopt.codegen.region`). A tensor of a node is *full* where
it has a number for each place, a *row* value with one for each row, a *column* value with one for each
column. Full tensors may be several *pieces* wide, each of the grid's columns: so halves of a tensor
can be exchanged, as rotary embeddings do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import fx

from graphopt import ops
from graphopt.codegen.builder import Builder, Expression
from graphopt.codegen.region import KIND_OF_DTYPE, Extent
from graphopt.fused_ops import Layout, Place
from graphopt.program import leaves

aten = torch.ops.aten
Ints = tuple[int, ...]
_RESHAPES = (
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.alias.default,
    aten.detach.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
)


class CannotFuse(Exception):
    """Why nodes do not make one kernel: the rule, and the condition that it found broken."""

    def __init__(self, rule: str, condition: str) -> None:
        super().__init__(f"{rule}: {condition}")
        self.rule, self.condition = rule, condition


def needs(holds: bool, rule: str, otherwise: str) -> None:
    """Raise CannotFuse unless a condition holds."""
    if not holds:
        raise CannotFuse(rule, otherwise)


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """The arguments of a node, whatever they are."""
    return node.args


@dataclass(frozen=True)
class Value:
    """What a node holds: the shape of its tensor, and an expression for each piece of its columns.

    With `order`, the tensor's dimensions in that order are those of `shape`; then it is a result only.
    """

    shape: Ints
    pieces: tuple[Expression, ...]
    kind: Literal["full", "row", "column"] = "full"
    order: Ints | None = None


@dataclass(frozen=True)
class Read:
    """A tensor that a region reads: the node that holds it, and where on the grid."""

    source: fx.Node
    sizes: Ints
    strides: Ints
    offset: int
    extent: Extent


def layout_of(tensor: torch.Tensor) -> Layout:
    """Dtype, sizes and strides of a tensor without symbols."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Layout(dtype, tuple(tensor.shape), tensor.stride())


def restrided(sizes: Sequence[int], strides: Sequence[int], wanted: Ints) -> Ints:
    """The strides of a tensor looked at in other sizes; CannotFuse where that takes a copy.

    >>> restrided((4, 8), (8, 1), (2, 2, 8))
    (16, 8, 1)
    """
    if tuple(sizes) == wanted:
        return tuple(strides)
    try:
        return torch.empty_strided(sizes, strides, device="meta").view(wanted).stride()
    except RuntimeError:
        raise CannotFuse("grid", f"sizes {list(sizes)} cannot be looked at as {list(wanted)}") from None


def is_transparent(node: fx.Node) -> bool:
    """True for a view of one tensor, which costs nothing and is no part of a region."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor) or not leaves(node):
        return False
    return leaves(node)[0].alias is not None and ops.is_view(node.target)


def source_of(node: fx.Node) -> fx.Node:
    """What a view looks at."""
    alias = leaves(node)[0].alias
    assert alias is not None
    return node.all_input_nodes[alias[0]]


def root_of(node: fx.Node) -> fx.Node:
    """The first node with all of the tensor that `node` looks at."""
    while is_transparent(node):
        source, tensor = source_of(node), node.meta["val"]
        value = source.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype != tensor.dtype:
            break
        node = source
    return node


class Emitter:
    """Writes one region: rows of `rows` sizes, pieces of `width` columns, computed in `b`."""

    def __init__(self, b: Builder, rows: Ints, width: int) -> None:
        self.b, self.rows, self.width = b, rows, width
        self.count = prod(rows)
        self.values: dict[fx.Node, Value] = {}
        self.reads: dict[Read, tuple[Expression, ...]] = {}
        self._hot: dict[int, tuple[Expression, Expression]] = {}

    # --- shapes ------------------------------------------------------------------------------

    def pieces(self, shape: Ints) -> int:
        """How many pieces wide a full tensor of this shape is."""
        full = len(shape) > 0 and prod(shape[:-1]) == self.count and shape[-1] % self.width == 0
        needs(full, "grid", f"{list(shape)} is not {self.count} rows of pieces of {self.width}")
        return shape[-1] // self.width

    def is_row(self, shape: Ints) -> bool:
        """Whether a tensor of this shape has one number for each row."""
        return prod(shape) == self.count

    # --- operands ----------------------------------------------------------------------------

    def held(self, node: fx.Node) -> Value | None:
        """What `node` holds, if it is made in the region, or looks at what is."""
        if node in self.values:
            turned = self.values[node].order is not None
            needs(not turned, "view", f"the rows of {node.name} are in another order")
            return self.values[node]
        if not is_transparent(node):
            return None
        value = self.held(source_of(node))
        return None if value is None else self._viewed(value, node)

    def _viewed(self, value: Value, node: fx.Node) -> Value:
        shape = tuple(node.meta["val"].shape)
        if node.target in _RESHAPES and value.kind == "full" and shape[-1:] == value.shape[-1:]:
            if prod(shape) == prod(value.shape):
                return Value(shape, value.pieces)
        elif node.target in _RESHAPES and value.kind == "row":
            if self.is_row(shape):
                return Value(shape, value.pieces, "row")
            if shape[:-1] == value.shape[:-1] and value.shape[-1] == 1:
                return Value(shape, value.pieces * self.pieces(shape))
        elif node.target is aten.slice.Tensor and value.kind == "full":
            given: list[Any] = [*args_of(node), *(0, 0, 2**63, 1)[len(node.args) - 1 :]]
            _, dim, begin, _, step = given
            first = min(int(begin or 0), value.shape[-1])
            own = dim in (-1, len(shape) - 1) and step == 1 and first >= 0 and first % self.width == 0
            if own and shape[-1] % self.width == 0:
                first //= self.width
                return Value(shape, value.pieces[first : first + shape[-1] // self.width])
        raise CannotFuse(
            "view", f"{node.name} looks at a value of the region in another way than its rows"
        )

    def turned(self, node: fx.Node) -> tuple[Value, Ints] | None:
        """What a view of a value of the region with its rows in another order looks at, and that order.

        In the order given, the dimensions of `node` are those of the value.
        """
        if node in self.values or node.target not in (aten.transpose.int, aten.permute.default):
            return None
        value = self.held(source_of(node))
        if value is None or value.kind != "full":
            return None
        count = len(value.shape)
        moved = list(range(count))
        if node.target is aten.transpose.int:
            a, b = (int(d) % count for d in args_of(node)[1:3])
            moved[a], moved[b] = moved[b], moved[a]
        else:
            moved = [int(d) % count for d in args_of(node)[1]]
        if moved[-1] != count - 1:
            return None
        return value, tuple(moved.index(d) for d in range(count))

    def operand(self, argument: Any, shape: Ints, to_float: bool) -> tuple[Expression, ...]:
        """An argument of a node whose result has this shape: an expression for each of its pieces."""
        count = 1 if self.is_row(shape) else self.pieces(shape)
        if not isinstance(argument, fx.Node):
            needs(isinstance(argument, int | float), "operand", f"{argument} is no number")
            return (self.b.constant(float(argument) if to_float else argument),) * count
        value = self.held(argument)
        if value is not None:
            found = self._aligned(value, shape, argument)
        else:
            found = self._read(argument, shape)
        found = found * count if len(found) == 1 else found
        floats = not to_float or argument.meta["val"].dtype.is_floating_point
        return found if floats else tuple(self.b.apply("to_float", x) for x in found)

    def _aligned(self, value: Value, shape: Ints, node: fx.Node) -> tuple[Expression, ...]:
        own = (*value.shape[:-1], 1) if value.kind == "row" and value.shape[-1:] != shape[-1:] else None
        wanted = shape if own is None else (*shape[:-1], 1)
        same = _without_ones(value.shape) == _without_ones(wanted)
        needs(same and value.kind != "column", "broadcast", f"{node.name} is repeated along its rows")
        return value.pieces

    def whole(self, argument: Any) -> Value:
        """A full tensor."""
        value = self.held(argument)
        if value is None:
            shape = tuple(argument.meta["val"].shape)
            self.pieces(shape)
            value = Value(shape, self._read(argument, shape))
        needs(value.kind == "full", "broadcast", f"{argument.name} has no columns")
        return value

    def row(self, argument: Any) -> Expression:
        """A tensor with one number for each row."""
        value = self.held(argument)
        if value is None:
            return self._read(argument, tuple(argument.meta["val"].shape))[0]
        needs(value.kind == "row", "broadcast", f"{argument.name} is not one number for each row")
        return value.pieces[0]

    def columns(self, argument: Any, like: Value) -> tuple[Expression, ...]:
        """A vector with one number for each column of a full value."""
        return self.operand(argument, like.shape, True)

    def scalar(self, argument: Any) -> Expression:
        """A tensor of one element that the region reads, as a float."""
        needs(argument.meta["val"].numel() == 1, "operand", f"{argument.name} is no scalar")
        return self._read(argument, (*self.rows, self.width))[0]

    def layers(self, node: fx.Node, dim: int, shape: Ints) -> list[tuple[Expression, ...]]:
        """A tensor from memory as the tensors of this shape that it has along a dimension."""
        needs(self.held(node) is None, "reduction", f"{node.name} has rows of another grid")
        tensor = node.meta["val"]
        return [self._read(node, shape, tensor.select(dim, n)) for n in range(tensor.shape[dim])]

    def _read(
        self, node: fx.Node, shape: Ints, part: torch.Tensor | None = None
    ) -> tuple[Expression, ...]:
        """A tensor from memory, or a part of it, broadcast to `shape`."""
        tensor, root = part if part is not None else node.meta["val"], root_of(node)
        offset = tensor.storage_offset() - root.meta["val"].storage_offset()
        missing = len(shape) - tensor.dim()
        fits = missing >= 0 and all(
            own in (1, size) for own, size in zip(tensor.shape, shape[missing:], strict=True)
        )
        needs(fits, "broadcast", f"{node.name} of {list(tensor.shape)} is not broadcast to {list(shape)}")
        spread = [
            0 if own == 1 else step for own, step in zip(tensor.shape, tensor.stride(), strict=True)
        ]
        strides = (*(0,) * missing, *spread)
        if root.meta["val"].numel() == 1:
            return self._input(Read(root, (), (), offset, Extent.SCALAR), tensor)
        if self.is_row(shape):
            steps = restrided(shape, strides, self.rows)
            return self._input(Read(root, self.rows, steps, offset, Extent.ROW), tensor)
        if strides[-1] == 0:
            steps = restrided(shape[:-1], strides[:-1], self.rows)
            return self._input(Read(root, self.rows, steps, offset, Extent.ROW), tensor) * self.pieces(
                shape
            )
        step = strides[-1]
        sizes: Ints = (self.width,)
        steps, extent = (step,), Extent.COLUMN
        if any(strides[:-1]):
            sizes, extent = (*self.rows, self.width), Extent.FULL
            steps = (*restrided(shape[:-1], strides[:-1], self.rows), step)
        every = range(self.pieces(shape))
        found = (Read(root, sizes, steps, offset + j * self.width * step, extent) for j in every)
        return tuple(self._input(read, tensor)[0] for read in found)

    def _input(self, read: Read, tensor: torch.Tensor) -> tuple[Expression, ...]:
        dtype: Any = str(tensor.dtype).removeprefix("torch.")
        needs(dtype in KIND_OF_DTYPE, "dtype", f"kernels have no {dtype}")
        if read not in self.reads:
            self.reads[read] = (self.b.input(f"x{len(self.reads)}", dtype, read.extent),)
        return self.reads[read]

    # --- results -----------------------------------------------------------------------------

    def pointwise(
        self,
        node: fx.Node,
        formula: Callable[..., Expression],
        operands: Sequence[Any],
        masks: Sequence[int] = (),
    ) -> Value:
        """`formula` at each place; those `operands` that are `masks` stay what they are."""
        tensor = node.meta["val"]
        needs(
            tensor.dtype.is_floating_point or tensor.dtype is torch.bool,
            "dtype",
            f"it makes {tensor.dtype}",
        )
        shape = tuple(tensor.shape)
        nodes = [a for n, a in enumerate(operands) if isinstance(a, fx.Node) and n not in masks]
        floats = (
            any(a.meta["val"].dtype.is_floating_point for a in nodes) or tensor.dtype.is_floating_point
        )
        given = [self.operand(a, shape, floats and n not in masks) for n, a in enumerate(operands)]
        pieces = tuple(formula(*xs) for xs in zip(*given, strict=True))
        return Value(shape, pieces, "row" if self.is_row(shape) else "full")

    def reduced(self, kind: str, x: Value) -> Expression:
        """The sum, mean, maximum (amax) or minimum (amin) of each row."""
        methods = {"sum": self.b.sum, "mean": self.b.sum, "amax": self.b.max, "amin": self.b.min}
        joined = {"amax": "maximum", "amin": "minimum"}.get(kind, "add")
        total = None
        for piece in x.pieces:
            if kind in ("sum", "mean") and piece.position in self._hot:
                index, own = self._hot[piece.position]
                inside = self.b.apply("logical_and", self.b.apply("ge", index, 0), self._below(index))
                part = self.b.apply("where", inside, own, 0.0)
            else:
                part = methods[kind](piece)
            total = part if total is None else self.b.apply(joined, total, part)
        assert total is not None
        return total / float(x.shape[-1]) if kind == "mean" else total

    def _below(self, index: Expression) -> Expression:
        return self.b.apply("lt", index, self.width)

    def over_rows(self, x: Value) -> tuple[Expression, ...]:
        """The sum of each column."""
        return tuple(self.b.sum(piece, over="rows") for piece in x.pieces)

    def hot(self, shape: Ints, index: Expression, own: Expression) -> Value:
        """`own` of each row in the column `index`, else 0."""
        chosen = self.b.apply("eq", self.b.apply("column_index"), index)
        found = self.b.apply("where", chosen, own, 0.0)
        self._hot[found.position] = (index, own)
        return Value(shape, (found,))


def _without_ones(shape: Ints) -> Ints:
    first = next((n for n, size in enumerate(shape) if size != 1), len(shape))
    return shape[first:]


def place_of(read: Read, tensor: int) -> Place:
    """A read as a place in one of the kernel's tensors."""
    return Place(tensor, read.sizes, read.strides, read.offset)
