"""Generated kernels as one operator of a graph: `torch.ops.graphopt.fused`.

    outputs = torch.ops.graphopt.fused(inputs, kernel)

`kernel` is a `Fused` as JSON text: the region, and how its inputs and outputs lie in tensors. It is a
constant of the graph, so that a program that is copied, pickled or exported takes its kernels along. On
CPU tensors the kernel is compiled by Numba, on those of a GPU by CuPy, and elsewhere, or where neither
can, the region runs by torch operators. Nothing is known of gradients: the operator belongs into graphs
that hold their backward.
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.codegen import reference
from graphopt.codegen.cuda_launch import cuda_kernel
from graphopt.codegen.huge_pages import advised
from graphopt.codegen.numba_cpu import STREAM_BYTES, Launch, compile_region
from graphopt.codegen.region import Extent, Reduce, Region, cost
from graphopt.codegen.region_text import from_data, to_data
from graphopt.codegen.stages import may_overwrite
from graphopt.custom_ops import register
from graphopt.errors import CodegenError

Ints = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """Where numbers lie: in which tensor, with which sizes and strides, from which element on.

    The offset counts from the tensor's first element.
    """

    tensor: int
    sizes: Ints
    strides: Ints
    offset: int = 0


@dataclass(frozen=True)
class Layout:
    """A tensor's dtype, sizes and strides (elements)."""

    dtype: str
    sizes: Ints
    strides: Ints


@dataclass(frozen=True)
class Fused:
    """A region, and where its inputs and outputs lie in the tensors that are `given` and those `made`.

    `grid` is the shape that rows and columns are counted in; `reads` has the place of each input,
    `writes` that of each output. Scalars are read from tensors of one element.
    """

    region: Region
    grid: Ints
    given: tuple[Layout, ...]
    reads: tuple[Place, ...]
    made: tuple[Layout, ...]
    writes: tuple[Place, ...]

    def to_text(self) -> str:
        """As JSON."""
        rows = ("given", "reads", "made", "writes")
        lists = {name: [list(vars(row).values()) for row in getattr(self, name)] for name in rows}
        data = {"region": to_data(self.region), "grid": self.grid, **lists}
        return json.dumps(data, separators=(",", ":"))

    @functools.cached_property
    def instructions(self) -> int:
        """About how many instructions all of it takes, one number at a time."""
        rows, columns = 1, self.grid[-1]
        for size in self.grid[:-1]:
            rows *= size
        count = {Extent.FULL: rows * columns, Extent.ROW: rows, Extent.COLUMN: columns, Extent.SCALAR: 1}
        total = 0
        for value, fact in zip(self.region.values, self.region.facts, strict=True):
            over = self.region.facts[value.arg].extent if isinstance(value, Reduce) else fact.extent
            total += cost(value) * count[over]
        return total


@functools.lru_cache(maxsize=4096)
def fused_of(text: str) -> Fused:
    """The kernel that `Fused.to_text` wrote; CodegenError where it is none."""
    try:
        data = json.loads(text)
        reads, writes = (tuple(_place(*row) for row in data[name]) for name in ("reads", "writes"))
        given, made = (tuple(_layout(*row) for row in data[name]) for name in ("given", "made"))
        return Fused(from_data(data["region"]), tuple(data["grid"]), given, reads, made, writes)
    except (KeyError, TypeError, ValueError) as error:
        raise CodegenError(f"not a kernel: {error}") from error


def _layout(dtype: str, sizes: list[int], strides: list[int]) -> Layout:
    return Layout(dtype, tuple(sizes), tuple(strides))


def _place(tensor: int, sizes: list[int], strides: list[int], offset: int) -> Place:
    return Place(tensor, tuple(sizes), tuple(strides), offset)


def is_fused(node: fx.Node) -> bool:
    """True for a node that runs a generated kernel."""
    return node.target is FUSED


def fused_at(node: fx.Node) -> Fused:
    """The kernel of a fused node."""
    return fused_of(str(node.args[1]))


def overwritable(fused: Fused) -> list[tuple[int, int]]:
    """Pairs of an input tensor and a made tensor that may lie in its memory, as far as their places go.

    Every place that is read of the input has to be one that is written, after the last read of it, or
    other columns of the same rows. That both tensors are of one size and dtype is not looked at.
    """
    tensors = [n for n in range(1 + max(p.tensor for p in fused.reads))]
    return [
        (source, target)
        for target in range(len(fused.made))
        for source in tensors
        if all(
            _may_meet(fused, n, k)
            for n, read in enumerate(fused.reads)
            for k, write in enumerate(fused.writes)
            if read.tensor == source and write.tensor == target
        )
    ]


def _may_meet(fused: Fused, number: int, output: int) -> bool:
    read, write = fused.reads[number], fused.writes[output]
    if read.sizes != write.sizes or read.strides != write.strides:
        return False
    if read.offset == write.offset:
        return may_overwrite(fused.region, number, output)
    apart, width = abs(read.offset - write.offset), fused.grid[-1]
    rows = [step for size, step in zip(read.sizes[:-1], read.strides[:-1], strict=True) if size > 1]
    beside = apart >= width and all(step >= apart + width for step in rows)
    return beside and read.strides[-1] == 1 and len(read.sizes) == len(fused.grid)


# --- running -----------------------------------------------------------------------------------


class FusedCall:
    """A kernel as a function of its tensors, of the layouts that it was written for.

    Where `over` names an input tensor and a made tensor, this is written over the input. Calls cost a few
    microseconds: all that follows from layouts is found once.
    """

    def __init__(self, fused: Fused, over: tuple[int, int] | None = None) -> None:
        self.fused, self.over = fused, over
        self.__name__ = self.__qualname__ = "fused"
        self._strides = [x.strides for x in fused.given]
        self._ready: _Ready | None = None

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """The made tensors."""
        if [x.stride() for x in inputs] != self._strides:
            inputs = tuple(map(_in_layout, inputs, self.fused.given))
        results = self._made(inputs)
        ready = self._ready
        if ready is None or not ready.run(inputs, results):
            _run(self.fused, inputs, results)
            if ready is None and inputs[0].device.type == "cpu":
                self._ready = _Ready(self.fused)
        return results

    def _made(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        results = []
        for number, (dtype, sizes, strides) in enumerate(self._layouts):
            if self.over is not None and self.over[1] == number:
                source = inputs[self.over[0]]
                results.append(source.as_strided(sizes, strides))
            else:
                device = inputs[0].device
                results.append(advised(torch.empty_strided(sizes, strides, dtype=dtype, device=device)))
        return results

    @functools.cached_property
    def _layouts(self) -> list[tuple[torch.dtype, Ints, Ints]]:
        return [(getattr(torch, m.dtype), m.sizes, m.strides) for m in self.fused.made]


class _Ready:
    """A launch on CPU tensors."""

    def __init__(self, fused: Fused) -> None:
        kernel, region = compile_region(fused.region), fused.region
        self.kernel = kernel
        self.scalars = [fused.reads[n].tensor for n in kernel.scalars]
        self.reads = [
            (fused.reads[n].tensor, fused.reads[n].offset * _itemsize(region.inputs[n].dtype))
            for n in kernel.given
        ]
        stored = [k for k in range(len(region.outputs)) if k not in kernel.sums]
        self.writes = [
            (fused.writes[k].tensor, fused.writes[k].offset * _itemsize(region.outputs[k].dtype))
            for k in stored
        ]
        self.sums = [fused.writes[k] for k in kernel.sums]
        places = [fused.reads[n] for n in kernel.given] + [fused.writes[k] for k in stored]
        sizes, strides = [p.sizes for p in places], [p.strides for p in places]
        self.launch: Launch = kernel.planned(fused.grid, sizes, strides, False)
        self.usable = not kernel.broken and self.launch.nbytes < STREAM_BYTES

    def run(self, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> bool:
        """Launch; False where another way is needed."""
        if not self.usable:
            return False
        addresses = [inputs[t].data_ptr() + offset for t, offset in self.reads]
        addresses += [results[t].data_ptr() + offset for t, offset in self.writes]
        numbers = [inputs[t].item() for t in self.scalars]
        for place, total in zip(self.sums, self.kernel.run(self.launch, addresses, numbers), strict=True):
            _viewed(results[place.tensor], place).copy_(total)
        return True


def _run(fused: Fused, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """On tensors of any strides and device."""
    region = fused.region
    given: list[Tensor] = []
    for value, place in zip(region.inputs, fused.reads, strict=True):
        x = inputs[place.tensor]
        given.append(x.reshape(()) if value.extent is Extent.SCALAR else _viewed(x, place))
    out = [_viewed(results[place.tensor], place) for place in fused.writes]
    device = inputs[0].device.type
    if device == "cpu":
        compile_region(region)(*given, out=out)
    elif device == "cuda":
        cuda_kernel(region)(*given, out=out)
    else:
        for y, x in zip(out, reference.run(region, *given), strict=True):
            y.copy_(x)


def _in_layout(x: Tensor, layout: Layout) -> Tensor:
    """`x`, copied where it lies otherwise than it did when the graph was traced."""
    if x.shape != layout.sizes:
        raise CodegenError(f"a kernel for tensors of {layout.sizes} was given {tuple(x.shape)}")
    if x.stride() == layout.strides:
        return x
    return torch.empty_strided(layout.sizes, layout.strides, dtype=x.dtype, device=x.device).copy_(x)


def _viewed(x: Tensor, place: Place) -> Tensor:
    return x.as_strided(place.sizes, place.strides, x.storage_offset() + place.offset)


def _itemsize(dtype: str) -> int:
    kind: torch.dtype = getattr(torch, dtype)
    return kind.itemsize


def _fused(inputs: Sequence[Tensor], kernel: str) -> list[Tensor]:
    return _call(kernel)(*inputs)


@functools.lru_cache(maxsize=4096)
def _call(kernel: str) -> FusedCall:
    return FusedCall(fused_of(kernel))


def _fused_like(inputs: Sequence[Tensor], kernel: str) -> list[Tensor]:
    return [
        inputs[0].new_empty_strided(m.sizes, m.strides, dtype=getattr(torch, m.dtype))
        for m in fused_of(kernel).made
    ]


register("fused", "(Tensor[] inputs, str kernel) -> Tensor[]", _fused, _fused_like)
FUSED = torch.ops.graphopt.fused.default
