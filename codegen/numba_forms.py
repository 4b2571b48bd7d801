"""What Numba kernels are written for: their tensors, and what of the layout a text depends on."""

from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.codegen.region import Dtype, Extent, Reduce, Region
from graphopt.codegen.stages import RECOMPUTE_COST

BLOCK = 2048  # columns that a pass does at a time; of four inputs they fit into a cache of 32 KiB
TILE = 512  # of a pass whose outputs bypass the caches: there, both tiles and inputs have to fit
KNOWN_COLUMNS = 64  # up to so many, a kernel is written for their number
_LANES = 8  # numbers in the shortest vectors that are worth it
BYTES: Mapping[Dtype, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "bool": 1,
}


@dataclass(frozen=True)
class Form:
    """What of its tensors' layout, and of its `NumbaChoice`, a kernel is written for.

    `row_dims`: into how many dimensions rows fall. `strided`: tensors whose columns are not neighbours.
    `streamed`: outputs that bypass the caches. `flat`: rows do not matter. `columns`: how many there are,
    0 for any number; a short loop of known length becomes a few vector instructions. `block`,
    `tile`, `recompute_cost` and `online` are those of the choice.
    """

    row_dims: int = 1
    strided: tuple[str, ...] = ()
    streamed: tuple[str, ...] = ()
    flat: bool = False
    columns: int = 0
    block: int = BLOCK
    tile: int = TILE
    recompute_cost: int = RECOMPUTE_COST
    online: bool = True


@dataclass(frozen=True)
class Operand:
    """An input or output in memory: the variable that holds its address, and the place it touches."""

    variable: str
    name: str
    dtype: Dtype
    extent: Extent
    place: int


@dataclass(frozen=True)
class Source:
    """A kernel's text, the types of its parameters ("i" or "f"), and what memory it works with.

    `buffers` of one row each, `tiles` of one block, and sums over rows, by the positions of their values.
    """

    text: str
    parameters: str
    buffers: int
    tiles: int
    sums: tuple[int, ...]


def tensors(region: Region) -> tuple[Operand, ...]:
    """All inputs and outputs that are tensors, in the order of the kernel's parameters."""
    found = [
        Operand(f"x{n}", v.name, v.dtype, v.extent, 0)
        for n, v in enumerate(region.inputs)
        if v.extent is not Extent.SCALAR
    ]
    for n, out in enumerate(region.outputs):
        if not isinstance(value := region.values[out.value], Reduce) or value.over == "columns":
            found.append(Operand(f"y{n}", out.name, out.dtype, region.facts[out.value].extent, 1 + n))
    return tuple(found)


def known_columns(columns: int) -> str:
    """The number of columns in a kernel's text, as one of which LLVM knows a bound and a divisor only.

    Loops whose length it knows it takes apart into single numbers before it looks for vectors.

    >>> known_columns(16)
    'columns & 16'
    """
    return f"columns & {columns}" if columns % _LANES == 0 else str(columns)
