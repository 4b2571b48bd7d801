"""Regions as CUDA kernels on tensors of a GPU, compiled and launched through CuPy.

    kernel = cuda_kernel(region)
    out, total = kernel(x, residual, eps, weight)

A kernel takes the inputs of its region in order, tensors of any strides that broadcast to one grid, and
Python numbers or tensors of one element for scalars; of the latter those on the device are read there.
Outputs come from torch's allocator, or are given as `out=`. Each launch goes to what is torch's current
stream at that moment; nothing waits for the device, and no memory comes from elsewhere, so that launches
can be captured in CUDA graphs once they have run. All tensors belong to that stream like those of any
torch operator, whose rules hold: memory that came from another stream needs `record_stream` from its
owner.

CuPy compiles for the device at hand, from compute capability 8.0 on.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from graphopt.codegen.cuda_form import ACCESS_BYTES, Form, Size, Traits, form_of, size_of
from graphopt.codegen.cuda_source import NAME, Source, write
from graphopt.codegen.launching import RegionKernel
from graphopt.codegen.layout import Grid, grid_of, grid_shape
from graphopt.codegen.region import Extent, Gather, Region
from graphopt.errors import CodegenError

_MOST_LAUNCHES = 4096  # layouts that a kernel remembers


class Runner(Protocol):
    """Where kernels run; `processors` is the number of its multiprocessors."""

    processors: int

    def launch(self, source: Source, size: Size, arguments: Sequence[int | float]) -> None:
        """Start a kernel with one argument for each of `Source.parameters`."""


class CuPyRunner:
    """One GPU, through CuPy. Raises CodegenError where there is none, or no CuPy."""

    def __init__(self, index: int) -> None:
        try:
            import cupy
        except ImportError as error:
            raise CodegenError(f"CUDA kernels need CuPy: pip install graphopt[cuda] ({error})") from error
        self.cupy, self.index = cupy, index
        self.processors = torch.cuda.get_device_properties(index).multi_processor_count
        self._functions: dict[Source, Any] = {}
        self._streams: dict[int, Any] = {}

    def launch(self, source: Source, size: Size, arguments: Sequence[int | float]) -> None:
        """Start a kernel on the stream that is torch's current one now."""
        import numpy as np

        single = np.float32
        given = [single(x) if k == "f" else x for k, x in zip(source.parameters, arguments, strict=True)]
        with self.cupy.cuda.Device(self.index):
            function = self._functions.get(source)
            if function is None:
                function = self._functions[source] = self._compile(source)
            function(size.blocks, size.threads, given, stream=self._stream())

    def _compile(self, source: Source) -> Any:
        try:
            return self.cupy.RawKernel(source.text, NAME, options=("-std=c++17",)).kernel
        except Exception as error:  # CuPy's, of the compiler, the driver or the file system
            raise CodegenError(f"CuPy could not compile a kernel: {error}") from error

    def _stream(self) -> Any:
        """CuPy's name for torch's current stream."""
        current = torch.cuda.current_stream(self.index)
        known = self._streams.get(current.cuda_stream)
        if known is None:
            streams = self.cupy.cuda
            if hasattr(streams.Stream, "from_external"):
                known = streams.Stream.from_external(current)
            else:
                known = streams.ExternalStream(current.cuda_stream, self.index)
            self._streams[current.cuda_stream] = known
        return known


@functools.lru_cache(maxsize=64)
def _device(index: int) -> CuPyRunner:
    return CuPyRunner(index)


@functools.lru_cache(maxsize=1024)
def cuda_kernel(region: Region) -> "CudaKernel":
    """The kernel of a region; CodegenError names an operator that it cannot do."""
    return CudaKernel(region)


@dataclass(frozen=True)
class _Launch:
    """All that depends on shapes, strides and alignment, but not on addresses."""

    source: Source
    size: Size
    shape: tuple[int, ...]
    arguments: tuple[int, ...]  # with zeros for addresses
    addresses: tuple[int, ...]  # positions of these among `arguments`
    empty: bool
    columns: int


class CudaKernel(RegionKernel):
    """A region as a callable on tensors of one device; `runner` is where, by default their GPU."""

    def __init__(self, region: Region, runner: Runner | None = None) -> None:
        super().__init__(region)
        self.runner = runner
        self.traits = Traits(region)
        write(region, Form())  # raises what cannot be written
        self._real = getattr(torch, region.math)
        self._launches: dict[Any, _Launch] = {}

    def may_lie_over(self, number: int, output: int) -> bool:
        """Whether an output may be written over an input: no pass after that which stores it reads it.

        Within a pass, a thread reads all that it needs at its places before it writes there.
        """
        named, value = self.region.inputs[number], self.region.outputs[output].value
        at = self.region.values.index(named)
        if self.region.facts[value].extent is not Extent.FULL or named.extent is not Extent.FULL:
            return False
        if any(isinstance(v, Gather) and v.source == at for v in self.region.values):
            return False
        passes = self.traits.looped_stages
        stores = next(n for n, stage in enumerate(passes) if output in stage.outputs)
        return all(n <= stores for n, stage in enumerate(passes) if at in stage.places)

    def __call__(
        self, *inputs: Tensor | float, out: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """As `RegionKernel`."""
        read = self.readable(inputs, out)
        device = self._device(read, out)
        numbers, pointers = self._numbers(inputs, device)
        return self.launched_or_by_torch(
            lambda: self._launched(read, numbers, pointers, out, device), inputs, out
        )

    def _launched(
        self,
        read: list[Tensor],
        numbers: list[Any],
        pointers: tuple[str, ...],
        out: Sequence[Tensor] | None,
        device: torch.device,
    ) -> tuple[Tensor, ...]:
        runner = self.runner or _device(device.index)
        places = tuple(x.data_ptr() % ACCESS_BYTES for x in (*read, *(out or ())))
        layout = tuple((x.shape, x.stride()) for x in (*read, *(out or ())))
        key = (places, layout, pointers, device, out is None)
        launch = self._launches.get(key)
        if launch is None:
            launch = self._plan(read, out, pointers, runner)
            if len(self._launches) >= _MOST_LAUNCHES:
                self._launches.clear()
            self._launches[key] = launch
        results = tuple(out) if out is not None else self.allocate(launch.shape, device)
        sums = None
        if self.sums:
            made = torch.empty if launch.source.form.held and not launch.empty else torch.zeros
            size = (len(self.traits.sums), launch.size.parts, launch.columns)
            sums = made(size, dtype=self._real, device=device)
        if not launch.empty:
            every = [*read, *(y for k, y in enumerate(results) if k not in self.sums)]
            runner.launch(launch.source, launch.size, self._arguments(launch, every, numbers, sums))
        if sums is not None:
            for k in self.sums:
                results[k].copy_(sums[self.traits.sums.index(self.region.outputs[k].value)].sum(0))
        return results

    def _arguments(
        self, launch: _Launch, every: list[Tensor], numbers: list[Any], sums: Tensor | None
    ) -> list[int | float]:
        found: list[int | float] = [*launch.arguments]
        for position, x in zip(launch.addresses, every, strict=True):
            found[position] = x.data_ptr()
        found += [x.data_ptr() if isinstance(x, Tensor) else x for x in numbers]
        return found if sums is None else [*found, sums.data_ptr()]

    # --- what is given -----------------------------------------------------------------------

    def _device(self, read: list[Tensor], out: Sequence[Tensor] | None) -> torch.device:
        """The device of all tensors."""
        if not (read or out):
            raise CodegenError("a kernel without tensors has no device")
        device = (read or list(out or ()))[0].device
        given = self.runner is not None or device.type == "cuda"
        self.check(read, out, device if given else torch.device("cuda"))
        return device

    def _numbers(
        self, inputs: Sequence[Tensor | float], device: torch.device
    ) -> tuple[list[Any], tuple[str, ...]]:
        """Scalars as numbers, or tensors of the device; and the names of the latter."""
        found: list[Any] = []
        names = []
        for n in self.scalars:
            value, x = self.region.inputs[n], inputs[n]
            if isinstance(x, Tensor) and x.device == device:
                names.append(value.name)
                found.append(x.to(getattr(torch, value.dtype)))
            else:
                found.append(x.item() if isinstance(x, Tensor) else x)
        return found, tuple(names)

    # --- planning a launch -------------------------------------------------------------------

    def _plan(
        self,
        read: list[Tensor],
        out: Sequence[Tensor] | None,
        pointers: tuple[str, ...],
        runner: Runner,
    ) -> _Launch:
        extents = [self.region.inputs[n].extent for n in self.given]
        shape = grid_shape(extents, [tuple(x.shape) for x in read])
        results = out if out is not None else self.allocate(shape, torch.device("meta"))
        every = [*read, *(y for k, y in enumerate(results) if k not in self.sums)]
        kinds = [t.extent for t in self.traits.tensors]
        grid = grid_of(
            self.region, shape, kinds, [tuple(x.shape) for x in every], [x.stride() for x in every]
        )
        # What torch allocates is aligned; tensors on the meta device have no address.
        addresses = [0 if x.device.type == "meta" else x.data_ptr() for x in every]
        form = form_of(self.traits, grid, addresses, pointers)
        size = size_of(self.traits, grid, form, runner.processors)
        arguments, positions = _arguments(self.traits, grid, form)
        source = write(self.region, form)
        empty = grid.rows == 0
        return _Launch(source, size, shape, arguments, positions, empty, grid.columns)


def _arguments(traits: Traits, grid: Grid, form: Form) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The numbers before scalars, and where addresses belong among them."""
    from graphopt.codegen.cuda_form import BYTES

    flat = (1, grid.rows * grid.columns)
    found: list[int] = [*(flat if form.flat else (grid.rows, grid.columns)), *grid.sizes[1:]]
    addresses = []
    for t, steps in zip(traits.tensors, grid.steps, strict=True):
        addresses.append(len(found))
        found.append(0)
        if t.extent.by_row and not form.flat:
            found += [step * BYTES[t.dtype] for step in steps[:-1]]
        if t.name in form.strided:
            found.append(steps[-1] * BYTES[t.dtype])
    return tuple(found), tuple(addresses)
