"""How the tensors given to a kernel lie on its grid of rows x columns.

Tensors broadcast against one another as in eager mode: a full tensor has the shape of the grid or one
that broadcasts to it, a row tensor has no columns, a column tensor nothing else. Row dimensions are
taken in the order in which rows lie in memory, and neighbours that all tensors step through evenly are
merged, so that most grids have one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from graphopt.codegen.region import Apply, Extent, Gather, Reduce, Region, Uniform
from graphopt.errors import CodegenError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """`sizes` of the row dimensions (at least one), the number of `columns`, and the steps.

    `steps` has for each tensor the number of elements from one place to the next: along each row
    dimension, and along the columns. `flat` says that rows may be cut anywhere: all places lie one
    after the other in every tensor, and no value depends on its row or column.
    """

    sizes: Shape
    columns: int
    steps: tuple[Shape, ...]
    flat: bool = False

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return prod(self.sizes)


def grid_shape(extents: Sequence[Extent], shapes: Sequence[Shape]) -> Shape:
    """The shape of the grid that tensors of these extents and shapes make.

    >>> grid_shape([Extent.FULL, Extent.ROW, Extent.COLUMN], [(4, 1, 8), (4, 3), (8,)])
    (4, 3, 8)
    """
    padded = [
        (*shape, 1) if extent is Extent.ROW else shape
        for extent, shape in zip(extents, shapes, strict=True)
        if extent is not Extent.SCALAR
    ]
    try:
        found = tuple(np.broadcast_shapes(*padded))  # torch's loads sympy first
    except ValueError as error:
        raise CodegenError(f"shapes {list(shapes)} make no grid: {error}") from error
    return found or (1,)


def output_shape(extent: Extent, shape: Shape) -> Shape:
    """The shape of an output on a grid of `shape`.

    >>> output_shape(Extent.ROW, (4, 3, 8))
    (4, 3)
    """
    return {Extent.FULL: shape, Extent.ROW: shape[:-1], Extent.COLUMN: shape[-1:]}[extent]


def grid_of(
    region: Region,
    shape: Shape,
    extents: Sequence[Extent],
    shapes: Sequence[Shape],
    strides: Sequence[Shape],
) -> Grid:
    """The grid of `shape` on which tensors of these extents, shapes and strides (elements) lie."""
    steps = [
        _steps(extent, shape, own, stride)
        for extent, own, stride in zip(extents, shapes, strides, strict=True)
    ]
    sizes = shape[:-1]
    if not any(isinstance(value, Uniform) for value in region.values):  # drawn by the number of the row
        sizes, steps = _in_memory_order(sizes, steps)
    sizes, steps = _merged(sizes, steps)
    even = all(s[-1] == 1 and (sizes == (1,) or s[0] == shape[-1]) for s in steps)
    flat = len(sizes) == 1 and even and _places_are_alike(region, extents)
    return Grid(sizes, shape[-1], tuple(steps), flat)


def _places_are_alike(region: Region, extents: Sequence[Extent]) -> bool:
    return {*extents} <= {Extent.FULL} and not any(
        isinstance(value, Reduce | Gather | Uniform)
        or (isinstance(value, Apply) and value.op in ("columns", "column_index"))
        for value in region.values
    )


def _steps(extent: Extent, shape: Shape, own: Shape, strides: Shape) -> Shape:
    """Steps of one tensor along all dimensions of the grid, 0 where it is broadcast."""
    if extent is Extent.ROW:
        own, strides = (*own, 1), (*strides, 0)
    missing = len(shape) - len(own)
    if missing < 0 or any(o not in (1, s) for o, s in zip(own, shape[missing:], strict=True)):
        raise CodegenError(f"a tensor of shape {own} does not lie on a grid of shape {shape}")
    spread = (0 if o == 1 else s for o, s in zip(own, strides, strict=True))
    return (*(0,) * missing, *spread)


def _in_memory_order(sizes: Shape, steps: list[Shape]) -> tuple[Shape, list[Shape]]:
    """Row dimensions from the longest steps, of all tensors together, to the shortest."""
    order = sorted(range(len(sizes)), key=lambda d: -sum(abs(s[d]) for s in steps))
    return tuple(sizes[d] for d in order), [(*(s[d] for d in order), s[-1]) for s in steps]


def _merged(sizes: Shape, steps: list[Shape]) -> tuple[Shape, list[Shape]]:
    """Row dimensions merged from the last to the first, those of one row left out."""
    kept: list[int] = []
    merged: list[int] = []
    for d in reversed(range(len(sizes))):
        if sizes[d] == 1:
            continue
        if kept and all(s[d] == s[kept[-1]] * merged[-1] for s in steps):
            merged[-1] *= sizes[d]
        else:
            kept.append(d)
            merged.append(sizes[d])
    if not kept:
        return (1,), [(0, s[-1]) for s in steps]
    return tuple(merged[::-1]), [(*(s[d] for d in kept[::-1]), s[-1]) for s in steps]
