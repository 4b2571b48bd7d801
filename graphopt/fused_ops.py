"""Generated kernels as one operator of a graph: `torch.ops.graphopt.fused`.

    outputs = torch.ops.graphopt.fused(inputs, kernel)

`kernel` is a `Fused` as JSON text: the region, and how its inputs and outputs lie in tensors. It is a
constant of the graph, so that a program that is copied, pickled or exported takes its kernels along. On
CPU tensors the kernel is compiled by Numba, on those of a GPU by CuPy or numba-cuda, and elsewhere, or
where none of them can, the region runs by torch operators. Nothing is known of gradients: the operator
belongs into graphs that hold their backward.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._dynamo import guards

from graphopt.codegen.backends import kernel_on
from graphopt.codegen.huge_pages import advised
from graphopt.codegen.launching import Launched, RegionKernel
from graphopt.codegen.region import Extent, Reduce, Region, cost
from graphopt.codegen.region_text import from_data, to_data
from graphopt.codegen.stages import may_overwrite
from graphopt.custom_ops import register
from graphopt.errors import CodegenError

Ints = tuple[int, ...]
# A launch: gives the made tensors, or None where another way is needed.
_Ready = Callable[[Sequence[Tensor], Sequence[Tensor | None]], list[Tensor] | None]
_STRIDE, _ADDRESS = Tensor.stride, Tensor.data_ptr


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

    Where `over` names an input tensor and a made tensor, this is written over the input; others may be
    written `into` given tensors. Calls cost a few microseconds: what follows from layouts is found once.
    """

    def __init__(self, fused: Fused, over: tuple[int, int] | None = None) -> None:
        self.fused, self.over = fused, over
        self.__name__ = self.__qualname__ = "fused"
        self._strides = [x.strides for x in fused.given]
        self._ready: dict[int, _Ready] = {}

    def __reduce__(self) -> Any:
        """Without what was found for the tensors of this process."""
        return FusedCall, (self.fused, self.over)

    def __call__(self, *inputs: Tensor, into: Sequence[Tensor | None] = ()) -> list[Tensor]:
        """The made tensors; `into` has those that are given, of the layout of what is made."""
        if [*map(_STRIDE, inputs)] != self._strides:
            inputs = tuple(map(_in_layout, inputs, self.fused.given))
        index = inputs[0].get_device()
        ready = self._ready.get(index)
        results = None if ready is None else ready(inputs, into)
        if results is None:
            results = _made(self.fused, self.over, inputs, into)
            _run(self.fused, inputs, results)
            if ready is None:
                self._ready[index] = _ready(self.fused, inputs, self.over)
        return results


def _made(
    fused: Fused,
    over: tuple[int, int] | None,
    inputs: Sequence[Tensor],
    into: Sequence[Tensor | None],
) -> list[Tensor]:
    """The tensors that a kernel writes: given ones, one over an input, and new ones."""
    device, results = inputs[0].device, []
    for number, (sizes, strides, dtype) in enumerate(_layouts(fused)):
        given = into[number] if into else None
        if given is not None:
            results.append(given)
        elif over is not None and over[1] == number:
            results.append(inputs[over[0]].as_strided(sizes, strides))
        else:
            results.append(advised(torch.empty_strided(sizes, strides, dtype=dtype, device=device)))
    return results


def _layouts(fused: Fused) -> list[tuple[Ints, Ints, torch.dtype]]:
    return [(m.sizes, m.strides, getattr(torch, m.dtype)) for m in fused.made]


def _ready(fused: Fused, inputs: Sequence[Tensor], over: tuple[int, int] | None) -> _Ready:
    """A launch for tensors on the device of these, in the layouts that the kernel was written for.

    It makes tensors as Inductor's generated code does, at half the cost of `torch.empty_strided`; on a
    GPU these are on the current one.
    """
    device, index = inputs[0].device, inputs[0].get_device()
    kernel = kernel_on(fused.region, device)
    scalars = [fused.reads[n].tensor for n in kernel.scalars]
    wanted = [(device, getattr(torch, fused.region.inputs[n].dtype)) for n in kernel.scalars]
    pointed = kernel.points and wanted == [(inputs[t].device, inputs[t].dtype) for t in scalars]
    launch, taken, offsets = _fixed(fused, kernel, device, len(inputs), pointed)
    if launch is None:
        return lambda inputs, into: None
    taken += scalars if pointed else []
    offsets += [0] * (len(taken) - len(offsets))
    as_given, moved = taken == [*range(len(inputs) + len(fused.made))], any(offsets)
    empty: Any = getattr(guards, f"_empty_strided_{device.type}")
    current = torch._C._cuda_getDevice if device.type == "cuda" else None
    layouts, (source, target) = _layouts(fused), over or (0, -1)
    tensors, unaligned = {fused.reads[n].tensor for n in kernel.given}, kernel.alignment - 1
    sums = [fused.writes[k] for k in kernel.sums]

    def run(inputs: Sequence[Tensor], into: Sequence[Tensor | None]) -> list[Tensor] | None:
        if current is not None and current() != index:
            return None
        if into:
            made = _made(fused, over, inputs, into)
        else:
            made = [
                empty(*layout) if n != target else inputs[source].as_strided(*layout[:2])
                for n, layout in enumerate(layouts)
            ]
        given: list[Any] = [*map(_ADDRESS, inputs), *map(_ADDRESS, made)]
        together = 0
        for t in tensors:
            together |= given[t]
        if together & unaligned:
            return None
        if not as_given:
            given = [given[t] for t in taken]
        if moved:
            given = [*map(int.__add__, given, offsets)]
        for t in scalars:
            if not pointed:
                given.append(inputs[t].item())
            elif inputs[t].get_device() != index:
                return None
        totals = launch(given)
        for place, total in zip(sums, totals, strict=True) if sums else ():
            _viewed(made[place.tensor], place).copy_(total)
        return made

    return run


def _fixed(
    fused: Fused, kernel: RegionKernel, device: torch.device, inputs: int, pointed: bool
) -> tuple[Launched | None, list[int], list[int]]:
    """A launch for fixed layouts, which tensors it takes (made ones counted on), and from which bytes."""
    region = fused.region
    stored = [k for k in range(len(region.outputs)) if k not in kernel.sums]
    reads = [(fused.reads[n], region.inputs[n].dtype) for n in kernel.given]
    writes = [(fused.writes[k], region.outputs[k].dtype) for k in stored]
    offsets = [place.offset * _itemsize(dtype) for place, dtype in (*reads, *writes)]
    taken = [place.tensor for place, _ in reads]
    taken += [inputs + place.tensor for place, _ in writes]
    names = tuple(region.inputs[n].name for n in kernel.scalars if pointed)
    every = [place for place, _ in (*reads, *writes)]
    places = [(p.sizes, p.strides, offset) for p, offset in zip(every, offsets, strict=True)]
    return kernel.fixed(fused.grid, places, device, names), taken, offsets


def places(
    fused: Fused, inputs: Sequence[Tensor], results: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """The inputs and outputs of the region in these tensors."""
    given: list[Tensor] = []
    for value, place in zip(fused.region.inputs, fused.reads, strict=True):
        x = inputs[place.tensor]
        given.append(x.reshape(()) if value.extent is Extent.SCALAR else _viewed(x, place))
    return given, [_viewed(results[place.tensor], place) for place in fused.writes]


def _run(fused: Fused, inputs: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """On tensors of any strides and device."""
    given, out = places(fused, inputs, results)
    kernel_on(fused.region, inputs[0].device)(*given, out=out)


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
