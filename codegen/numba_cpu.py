"""Regions as Numba kernels on CPU tensors.

    kernel = compile_region(region)
    out, total = kernel(x, residual, eps, weight)

A kernel takes the inputs of its region in order, tensors of any strides that broadcast to one grid, and
Python numbers for scalars. It allocates its outputs, or writes to those given as `out=`. The same text
serves all shapes; a few properties of the layout (`Form`) lead to texts of their own, compiled when
first met.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.codegen.device_text import cpu_text
from graphopt.codegen.huge_pages import resident
from graphopt.codegen.kernel_cache import DEFAULT_CACHE, toolchain
from graphopt.codegen.launching import Launched, RegionKernel, span
from graphopt.codegen.layout import Grid, Shape, grid_of, grid_shape
from graphopt.codegen.native import Kernel
from graphopt.codegen.numba_choice import NumbaChoice, default_choice, fits, stored_costs
from graphopt.codegen.numba_forms import BYTES, KNOWN_COLUMNS, Form, tensors
from graphopt.codegen.numba_source import write
from graphopt.codegen.region import Extent, Region
from graphopt.codegen.stages import may_overwrite
from graphopt.codegen.tuned_choices import TunedChoices, layout_class

if TYPE_CHECKING:
    from graphopt.codegen.numba_bench import NumbaBench

_STREAM_ITEM_BYTES = 4  # of the narrowest numbers that bypass the caches
# Rows of which sums are added one by one; the sums of so many are added pair by pair.
SUMMED_ROWS, MOST_PARTS = 64, 64
CHUNKS = 16  # of a thread: where one is held up, others take what is left of its rows
_MOST_LAUNCHES = 4096  # layouts that a kernel remembers
_CPU = torch.device("cpu")
_LINE = 64  # bytes that a streamed output has to be aligned to
# What writes kernels, beside what `toolchain` names.
_WRITTEN_BY = ("numba_choice.py", "numba_forms.py", "numba_source.py", "stages.py")


class _Process:
    """What this process may do: in a forked child, the threads of the parent are gone."""

    forked = False

    @classmethod
    def after_fork(cls) -> None:
        """The child's part."""
        cls.forked = True


os.register_at_fork(after_in_child=_Process.after_fork)


@functools.lru_cache(maxsize=1024)
def compile_region(region: Region, cache: Path | None = DEFAULT_CACHE) -> "NumbaKernel":
    """The kernel of a region; CodegenError names an operator that it cannot do. None keeps no files."""
    return NumbaKernel(region, cache)


@dataclass(frozen=True)
class Launch:
    """All that depends on shapes and strides, but not on addresses."""

    grid: Grid
    shape: tuple[int, ...]
    compiled: Kernel
    arguments: tuple[int, ...]  # with zeros for addresses
    addresses: tuple[int, ...]  # positions of these among `arguments`
    pitch: int
    nbytes: int
    choice: NumbaChoice
    streams: bool  # whether outputs would bypass the caches if they may


class NumbaKernel(RegionKernel):
    """A region as a callable on CPU tensors; `source()` is its text."""

    def __init__(self, region: Region, cache: Path | None = DEFAULT_CACHE) -> None:
        super().__init__(region)
        self.cache = cache
        self._tensors = tensors(region)
        write(region, Form())  # raises what cannot be written
        self._launches: dict[Any, Launch] = {}
        self._compiled: dict[Form, Kernel] = {}

    @functools.cached_property
    def choices(self) -> TunedChoices[NumbaChoice]:
        """What is known of measured launches."""
        return TunedChoices(self.region, NumbaChoice, _WRITTEN_BY, toolchain(), self.cache)

    def source(self, form: Form | None = None) -> str:
        """The kernel's text for a form, by default for contiguous tensors."""
        return write(self.region, form or Form()).text

    def may_lie_over(self, number: int, output: int) -> bool:
        """Whether an output may be written over an input, place for place."""
        return may_overwrite(self.region, number, output)

    def __call__(
        self, *inputs: Tensor | float, out: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """As `RegionKernel`."""
        read = self.readable(inputs, out)
        launch = self._launch(read, out, self.may_stream(out or ()))
        results = tuple(out) if out is not None else self.allocate(launch.shape, _CPU)
        if launch.compiled.source.tiles and not all(map(_resident, results)):
            launch = self._launch(read, out, False)

        def run() -> tuple[Tensor, ...]:
            self._run(launch, read, inputs, results)
            return results

        return self.launched_or_by_torch(run, inputs, results)

    def _launch(self, read: list[Tensor], out: Sequence[Tensor] | None, may_stream: bool) -> Launch:
        layouts = ((x.shape, x.stride(), x.dtype, x.device) for x in (*read, *(out or ())))
        key = (may_stream, torch.get_num_threads(), *layouts)
        launch = self._launches.get(key)
        if launch is None:
            launch = self.plan(read, out, may_stream)
            if len(self._launches) >= _MOST_LAUNCHES:
                self._launches.clear()
            self._launches[key] = launch
        return launch

    # --- planning a launch -------------------------------------------------------------------

    @staticmethod
    def may_stream(out: Sequence[Tensor]) -> bool:
        """Whether outputs lie so that they can bypass the caches; those that are made here do."""
        return all(y.data_ptr() % _LINE == 0 for y in out)

    def plan(
        self,
        read: list[Tensor],
        out: Sequence[Tensor] | None,
        may_stream: bool,
        choice: NumbaChoice | None = None,
    ) -> Launch:
        """As `planned`, for tensors."""
        self.check(read, out, _CPU)
        extents = [self.region.inputs[n].extent for n in self.given]
        shape = grid_shape(extents, [tuple(x.shape) for x in read])
        results = out if out is not None else self.allocate(shape, torch.device("meta"))
        every = [*read, *(y for k, y in enumerate(results) if k not in self.sums)]
        return self.planned(
            shape, [tuple(x.shape) for x in every], [x.stride() for x in every], may_stream, choice
        )

    def planned(
        self,
        shape: Shape,
        shapes: Sequence[Shape],
        strides: Sequence[Shape],
        may_stream: bool,
        choice: NumbaChoice | None = None,
    ) -> Launch:
        """The launch on a grid of `shape` for tensors of these shapes and strides (elements).

        The tensors are the inputs but for scalars, then the outputs but for sums over the rows. Without
        a `choice`, that which was measured for such tensors here, or what the rules say.
        """
        extents = [t.extent for t in self._tensors]
        grid = grid_of(self.region, shape, extents, shapes, strides)
        nbytes = sum(prod(s) * BYTES[t.dtype] for s, t in zip(shapes, self._tensors, strict=True))
        choice = choice or self._tuned(grid) or default_choice(self.region, nbytes)
        streamed = self._streamed(grid, choice)
        form = self._form(grid, choice, streamed if may_stream else ())
        compiled = self._compiled.get(form)
        if compiled is None:
            compiled = self._compiled[form] = Kernel(write(self.region, form), self.cache)
        arguments, addresses = self._arguments(grid, form)
        size = BYTES[self.region.math]
        pitch = -(-grid.columns * size // _LINE) * _LINE
        return Launch(grid, shape, compiled, arguments, addresses, pitch, nbytes, choice, bool(streamed))

    def _tuned(self, grid: Grid) -> NumbaChoice | None:
        choice = self.choices.choice(self.layout_class(grid), cpu_text())
        return choice if choice is not None and fits(self.region, choice) else None

    def layout_class(self, grid: Grid) -> str:
        """The key of a layout among measured ones."""
        return layout_class(grid, [t.name for t in self._tensors])

    def bench(self, *inputs: Tensor | float, out: Sequence[Tensor] | None = None) -> "NumbaBench":
        """The kernel with these inputs, for measurements."""
        from graphopt.codegen.numba_bench import NumbaBench

        return NumbaBench(self, inputs, out)

    def forget_launches(self) -> None:
        """Plan anew from now on, as there is another choice."""
        self._launches.clear()

    def _streamed(self, grid: Grid, choice: NumbaChoice) -> tuple[str, ...]:
        """The outputs that bypass the caches: whole lines of full rows, of passes that compute little."""
        costs = stored_costs(self.region, choice)
        found = []
        for tensor, steps in zip(self._tensors, grid.steps, strict=True):
            wide = tensor.extent is Extent.FULL and BYTES[tensor.dtype] >= _STREAM_ITEM_BYTES
            if not (tensor.place and wide and steps[-1] == 1):
                continue
            lines = all(step * BYTES[tensor.dtype] % _LINE == 0 for step in steps[:-1])
            if (lines or grid.flat) and costs[tensor.name] <= choice.stream_cost:
                found.append(tensor.name)
        return tuple(found)

    def _form(self, grid: Grid, choice: NumbaChoice, streamed: tuple[str, ...]) -> Form:
        strided = tuple(
            tensor.name
            for tensor, steps in zip(self._tensors, grid.steps, strict=True)
            if tensor.extent.by_column and steps[-1] != 1
        )
        known = grid.columns if grid.columns <= KNOWN_COLUMNS and not (grid.flat or streamed) else 0
        own = choice.block, choice.tile, choice.recompute_cost, choice.online
        return Form(len(grid.sizes), strided, streamed, grid.flat, known, *own)

    def _arguments(self, grid: Grid, form: Form) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The numbers after begin and end, scalars left out, and where addresses belong among them."""
        found: list[int] = [grid.columns, 0, 0, 0, *grid.sizes[1:]]
        addresses = []
        for tensor, steps in zip(self._tensors, grid.steps, strict=True):
            addresses.append(len(found))
            found.append(0)
            if not form.flat and tensor.extent.by_row:
                found += [step * BYTES[tensor.dtype] for step in steps[:-1]]
            if tensor.name in form.strided:
                found.append(steps[-1])
        return tuple(found), tuple(addresses)

    # --- running -----------------------------------------------------------------------------

    def fixed(
        self,
        shape: Shape,
        places: Sequence[tuple[Shape, Shape, int]],
        device: torch.device,
        pointers: tuple[str, ...],
    ) -> Launched | None:
        """As `RegionKernel`; large outputs are left to calls that look at their memory."""
        launch = self.planned(shape, [p[0] for p in places], [p[1] for p in places], False)
        if self.broken or launch.streams:
            return None
        count = len(places)

        def launched(given: Sequence[Any]) -> Sequence[Tensor]:
            return self.run(launch, given[:count], given[count:])

        return launched

    def _run(
        self,
        launch: Launch,
        read: list[Tensor],
        inputs: Sequence[Tensor | float],
        results: tuple[Tensor, ...],
    ) -> None:
        every = [*read, *(x for k, x in enumerate(results) if k not in self.sums)]
        numbers = [_number(inputs[n]) for n in self.scalars]
        totals = self.run(launch, [x.data_ptr() for x in every], numbers)
        for k, total in zip(self.sums, totals, strict=True):
            results[k].copy_(total)

    def run(self, launch: Launch, addresses: Sequence[int], numbers: Sequence[float]) -> list[Tensor]:
        """Run on the tensors at `addresses`, in the order of `planned`, with these scalars.

        Gives the sums over the rows, each (columns,), in the dtype of the computation.
        """
        grid, source = launch.grid, launch.compiled.source
        count = grid.rows * grid.columns if grid.flat else grid.rows
        threads = self._threads(launch.choice.threads)
        chunks = max(1, min(count, self._parts(count, threads)))
        arguments: list[Any] = [*launch.arguments]
        for position, address in zip(launch.addresses, addresses, strict=True):
            arguments[position] = address
        arguments += numbers
        own = source.buffers * launch.pitch + source.tiles * launch.choice.tile * 8
        work = torch.empty(threads * own, dtype=torch.uint8) if own else None
        arguments[1:3] = [0 if work is None else work.data_ptr(), launch.pitch]
        if not self.sums:
            launch.compiled(threads, chunks, count, own, 0, arguments)
            return []
        sums = torch.zeros(chunks, len(source.sums), launch.pitch, dtype=torch.uint8)
        arguments[3] = sums.data_ptr()
        launch.compiled(threads, chunks, count, own, len(source.sums) * launch.pitch, arguments)
        parts = sums.view(getattr(torch, self.region.math))[..., : grid.columns]
        totals = parts[0] if chunks == 1 else parts.sum(0)
        return [totals[source.sums.index(self.region.outputs[k].value)] for k in self.sums]

    def _parts(self, rows: int, threads: int) -> int:
        """In how many parts rows are worked on; sums so that their errors stay as small as torch's."""
        if self.sums:
            return max(threads, min(-(-rows // SUMMED_ROWS), MOST_PARTS))
        return 1 if threads == 1 else threads * CHUNKS

    def _threads(self, most: int) -> int:
        """How many of torch's threads take part, at most so many where that is not 0."""
        if most == 1 or _Process.forked:
            return 1
        threads = torch.get_num_threads()
        return min(threads, most) if most else threads


def _number(x: Tensor | float) -> float:
    return x.item() if isinstance(x, Tensor) else x


def _resident(x: Tensor) -> bool:
    """Whether the memory of a tensor is there already."""
    begin, end = span(x)
    return resident(begin, end - begin)
