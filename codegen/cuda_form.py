"""For what layout, and with how many threads, a CUDA kernel of a region is written.

A row belongs to a **team** of threads: a part of a warp, a warp, or a block. Each thread takes packs of
`pack` neighbouring columns, so that memory is touched 16 bytes at a time. Rows that fit are **held**:
each thread keeps its packs in registers from the first pass to the last, and memory is read once. Longer
rows are read again in each pass, mostly from the second-level cache, with maximum and sum of exponentials
in one pass. Without reductions over columns, the packs of a row are spread over blocks.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import NamedTuple

from graphopt.codegen.layout import Grid, grid_of, output_shape
from graphopt.codegen.region import Dtype, Extent, Input, Reduce, Region
from graphopt.codegen.stages import RECOMPUTE_ALL, Stage, stages
from graphopt.errors import CodegenError

BYTES: dict[Dtype, int] = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "int64": 8,
    "int32": 4,
    "bool": 1,
}
ACCESS_BYTES = 16  # the widest access of one thread
MAX_PACK = 8
BLOCK = 256  # threads, where a row does not ask for more
MAX_TEAM = 1024
# Bytes of a row that one thread may hold, by the threads of its block: of the 64 Ki registers of a
# multiprocessor, what leaves room for the arithmetic, and for two blocks side by side (one of 1024).
HELD_BYTES = {256: 256, 512: 128, 1024: 128}
# Of up to so many packs, column values (weights) are loaded before the first is used.
MAX_AHEAD = 4


@dataclass(frozen=True)
class Form:
    """What of layout and sizes a kernel is written for.

    `row_dims`: into how many dimensions rows fall. `strided`: tensors whose columns are not neighbours.
    `pointers`: scalars that are read from device memory. `flat`: rows do not matter. `pack`: columns of
    a pack; with `tail` the last of a row may be cut. `team`: threads of a row; `teams`: rows of a block.
    `held`: packs of a thread, 0 where it goes through the row in a loop; `lean`: of these, numbers from
    memory alone, and what is made of them again in each pass.
    """

    row_dims: int = 1
    strided: tuple[str, ...] = ()
    pointers: tuple[str, ...] = ()
    flat: bool = False
    pack: int = 1
    tail: bool = False
    team: int = BLOCK
    teams: int = 1
    held: int = 0
    lean: bool = False


class Argument(NamedTuple):
    """A tensor of a kernel: the variable of its address, and what it is."""

    variable: str
    name: str
    dtype: Dtype
    extent: Extent
    written: bool


@dataclass(frozen=True)
class Traits:
    """What the form of a region's kernels follows from; computed once."""

    region: Region

    @cached_property
    def tensors(self) -> tuple[Argument, ...]:
        """Inputs and outputs in memory, in the order of parameters; without scalars and sums of rows."""
        region = self.region
        found = [
            Argument(f"x{n}", v.name, v.dtype, v.extent, False)
            for n, v in enumerate(region.inputs)
            if v.extent is not Extent.SCALAR
        ]
        for n, out in enumerate(region.outputs):
            if out.value not in self.sums:
                extent = region.facts[out.value].extent
                found.append(Argument(f"y{n}", out.name, out.dtype, extent, True))
        return tuple(found)

    @cached_property
    def sums(self) -> tuple[int, ...]:
        """Positions of the sums over rows that are outputs."""
        values = [out.value for out in self.region.outputs]
        return tuple(
            i
            for i, v in enumerate(self.region.values)
            if i in values and isinstance(v, Reduce) and v.over == "rows"
        )

    @cached_property
    def reduces(self) -> bool:
        """Whether anything is reduced over columns."""
        return any(isinstance(v, Reduce) and v.over == "columns" for v in self.region.values)

    @cached_property
    def held_stages(self) -> tuple[Stage, ...]:
        """Passes over a row in registers, which keep there what takes long to compute.

        A maximum and the sum of exponentials take two, as these read no memory.
        """
        return stages(self.region, online=False)

    @cached_property
    def lean_stages(self) -> tuple[Stage, ...]:
        """Passes over a row in registers that compute again instead."""
        return stages(self.region, RECOMPUTE_ALL, online=False)

    @cached_property
    def looped_stages(self) -> tuple[Stage, ...]:
        """Passes that read a long row again and again, and keep nothing in between."""
        return stages(self.region, RECOMPUTE_ALL)

    def stages_of(self, form: Form) -> tuple[Stage, ...]:
        """The passes of one form."""
        if not form.held:
            return self.looped_stages
        return self.lean_stages if form.lean else self.held_stages

    def column_bytes(self, lean: bool, ahead: bool) -> int:
        """Bytes of one column that a thread which holds a row keeps in registers.

        `ahead`: with those of column values.
        """
        extents = (Extent.FULL, Extent.COLUMN) if ahead else (Extent.FULL,)
        real = 8 if self.region.math == "float64" else 4
        inputs = sum(BYTES[v.dtype] for v in self.region.inputs if v.extent in extents)
        kept = sum(len(stage.kept) for stage in (self.lean_stages if lean else self.held_stages))
        return inputs + real * (kept + len(self.sums))


def form_of(traits: Traits, grid: Grid, addresses: Sequence[int], pointers: tuple[str, ...] = ()) -> Form:
    """The form for tensors at these addresses; only their remainders to 16 matter."""
    if grid.rows >= 2**31:
        raise CodegenError(f"a kernel for {grid.rows} rows: fewer than 2**31 are supported")
    strided = tuple(
        t.name
        for t, s in zip(traits.tensors, grid.steps, strict=True)
        if t.extent.by_column and s[-1] != 1
    )
    columns = grid.rows * grid.columns if grid.flat else grid.columns
    pack = _pack(traits, grid, addresses, columns)
    form = Form(len(grid.sizes), strided, pointers, grid.flat, pack, columns % pack != 0)
    packs = max(-(-columns // pack), 1)
    if grid.flat:
        return form
    if not traits.reduces:
        team = min(BLOCK, _power_of_two(packs))
        held = 2 if packs >= 2 * BLOCK and not traits.sums else 1
        return replace(form, team=team, teams=BLOCK // team, held=held)
    return _reducing(traits, form, packs)


def _reducing(traits: Traits, form: Form, packs: int) -> Form:
    """The smallest team that holds a row; or a block that goes through it in a loop."""
    teams = (_power_of_two(min(packs, 32)), 128, 256, 512, MAX_TEAM)
    for lean, team, held in itertools.product((False, True), teams, (1, 2, 3, 4, 6, 8)):
        if held > MAX_AHEAD and team < MAX_TEAM:
            continue
        held_bytes = held * form.pack * traits.column_bytes(lean, held <= MAX_AHEAD)
        if team * held >= packs and held_bytes <= HELD_BYTES[max(team, BLOCK)]:
            return replace(
                form, team=team, teams=BLOCK // team if team <= 32 else 1, held=held, lean=lean
            )
    return replace(form, team=MAX_TEAM // 2)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _pack(traits: Traits, grid: Grid, addresses: Sequence[int], columns: int) -> int:
    """As many columns as the narrowest tensor has in 16 bytes, if all lie so that packs are aligned."""
    wide = [
        (BYTES[t.dtype], address, steps[:-1] if t.extent.by_row and not grid.flat else ())
        for t, steps, address in zip(traits.tensors, grid.steps, addresses, strict=True)
        if t.extent.by_column and steps[-1] == 1
    ]
    if not wide:
        return 1
    pack = min(MAX_PACK, ACCESS_BYTES // min(size for size, _, _ in wide), _power_of_two(max(columns, 1)))
    while pack > 1 and not all(
        at % min(ACCESS_BYTES, pack * size) == 0
        for size, address, steps in wide
        for at in (address, *(s * size for s in steps))
    ):
        pack //= 2
    return pack


@dataclass(frozen=True)
class Size:
    """How a kernel is launched: `blocks` (x, y), `threads` (x, y), and how many partial sums are left."""

    blocks: tuple[int, int]
    threads: tuple[int, int]
    parts: int


def size_of(traits: Traits, grid: Grid, form: Form, processors: int) -> Size:
    """The launch on a device of so many multiprocessors."""
    threads = (form.team, form.teams)
    if form.flat:
        packs = -(-grid.rows * grid.columns // form.pack)
        return Size((max(min(-(-packs // form.team), 64 * processors), 1), 1), threads, 0)
    groups = max(-(-grid.rows // form.teams), 1)
    across = 1
    if form.held and not traits.reduces:
        across = max(-(-grid.columns // (form.pack * form.team * form.held)), 1)
    if across > 65535:
        raise CodegenError(f"a kernel for rows of {grid.columns} columns")
    if traits.sums:  # few blocks that go on from row to row, as each leaves sums to add up
        groups = min(groups, max(2048 // (form.team * form.teams) * processors // across, 1))
    return Size((groups, across), threads, groups * form.teams if traits.sums else 0)


def contiguous_grid(traits: Traits, shape: tuple[int, ...]) -> Grid:
    """The grid of `shape` for tensors without gaps."""
    tensors = traits.tensors
    shapes = [output_shape(t.extent, shape) for t in tensors]
    strides = [tuple(prod(own[d + 1 :]) for d in range(len(own))) for own in shapes]
    return grid_of(traits.region, shape, [t.extent for t in tensors], shapes, strides)


def moved_bytes(traits: Traits, shape: tuple[int, ...]) -> int:
    """What a kernel reads and writes at least: each tensor once."""
    kinds = [(t.extent, t.dtype) for t in traits.tensors]
    kinds += [(Extent.COLUMN, out.dtype) for out in traits.region.outputs if out.value in traits.sums]
    return sum(prod(output_shape(extent, shape)) * BYTES[dtype] for extent, dtype in kinds)


def scalars(region: Region) -> list[tuple[int, Input]]:
    """The scalar inputs, with their positions among the inputs."""
    return [(n, v) for n, v in enumerate(region.inputs) if v.extent is Extent.SCALAR]
