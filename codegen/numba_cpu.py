"""Regions as Numba kernels on CPU tensors.

    kernel = compile_region(region)
    out, total = kernel(x, residual, eps, weight)

A kernel takes the inputs of its region in order, tensors of any strides that broadcast to one grid, and
Python numbers for scalars. It allocates its outputs, or writes to those given as `out=`. The same text
serves all shapes; a few properties of the layout (`Form`) lead to texts of their own, compiled when
first met.
"""

import ctypes
import functools
import mmap
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen import reference
from graphopt.codegen.kernel_cache import DEFAULT_CACHE, DiskCache, key_of, load
from graphopt.codegen.layout import Grid, grid_of, grid_shape, output_shape
from graphopt.codegen.numba_forms import BLOCK, BYTES, Form, Operand, Source, tensors
from graphopt.codegen.numba_source import write
from graphopt.codegen.region import Extent, Reduce, Region
from graphopt.codegen.stages import may_overwrite
from graphopt.errors import CodegenError

# Below this many bytes of inputs and outputs, threads take longer to start than they save.
PARALLEL_BYTES = 1 << 18
# From here on, outputs bypass the caches: they would not be there any more when they are read. It saves
# reading their memory before it is written. Outputs of 16-bit numbers do not: their kernels compute more
# for each byte, and the copy from the tile costs more than it saves (measured on a Zen 5 server). Nor do
# outputs in memory that the system has yet to provide: it clears a page in the caches first.
STREAM_BYTES = 24 << 20
_STREAM_ITEM_BYTES = 4
_MOST_LAUNCHES = 4096  # layouts that a kernel remembers
_LINE = 64  # bytes that a streamed output has to be aligned to


class _Process:
    """What this process may do: in a forked child, the threads of the parent are gone."""

    forked = False
    lock = threading.Lock()  # one parallel kernel at a time; another thread runs its own serially

    @classmethod
    def after_fork(cls) -> None:
        """The child's part."""
        cls.forked, cls.lock = True, threading.Lock()


os.register_at_fork(after_in_child=_Process.after_fork)


@functools.lru_cache(maxsize=1024)
def compile_region(region: Region, cache: Path | None = DEFAULT_CACHE) -> "NumbaKernel":
    """The kernel of a region; CodegenError names an operator that it cannot do. None keeps no files."""
    return NumbaKernel(region, cache)


@dataclass(frozen=True)
class _Launch:
    """All that depends on shapes and strides, but not on addresses."""

    grid: Grid
    shape: tuple[int, ...]
    compiled: "_Compiled"
    arguments: tuple[int, ...]  # with zeros for addresses
    addresses: tuple[int, ...]  # positions of these among `arguments`
    pitch: int
    nbytes: int


class NumbaKernel:
    """A region as a callable on CPU tensors; `source()` is its text."""

    def __init__(self, region: Region, cache: Path | None = DEFAULT_CACHE) -> None:
        self.region, self.cache = region, cache
        self._tensors = tensors(region)
        write(region, Form())  # raises what cannot be written
        self._scalars = [n for n, v in enumerate(region.inputs) if v.extent is Extent.SCALAR]
        self._given = [n for n, v in enumerate(region.inputs) if v.extent is not Extent.SCALAR]
        self._sums = [
            k
            for k, out in enumerate(region.outputs)
            if isinstance(value := region.values[out.value], Reduce) and value.over == "rows"
        ]
        self._dtypes = [getattr(torch, out.dtype) for out in region.outputs]
        self._launches: dict[Any, _Launch] = {}
        self._compiled: dict[Form, _Compiled] = {}
        self._broken = False

    def source(self, form: Form | None = None) -> str:
        """The kernel's text for a form, by default for contiguous tensors."""
        return write(self.region, form or Form()).text

    def __call__(
        self, *inputs: Tensor | float, out: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs, in the order of `Region.outputs`.

        `out` may be inputs written over where the region allows that; otherwise these are copied first.
        """
        read: list[Any] = [inputs[n] for n in self._given]
        if out is not None:
            read = self._apart(read, out)
        launch = self._launch(read, out, all(y.data_ptr() % _LINE == 0 for y in out or ()))
        results = tuple(out) if out is not None else self._allocate(launch.shape)
        if launch.compiled.source.tiles and not all(map(resident, results)):
            launch = self._launch(read, out, False)
        if not self._broken:
            try:
                self._run(launch, read, inputs, results)
                return results
            except CodegenError as error:
                self._broken = True
                warnings.warn(f"a region runs by torch operators: {error}", stacklevel=2)
        for y, x in zip(results, reference.run(self.region, *inputs), strict=True):
            y.copy_(x)
        return results

    def _launch(self, read: list[Tensor], out: Sequence[Tensor] | None, may_stream: bool) -> _Launch:
        key = (may_stream, *((x.shape, x.stride(), x.dtype, x.device) for x in (*read, *(out or ()))))
        launch = self._launches.get(key)
        if launch is None:
            launch = self._plan(read, out, may_stream)
            if len(self._launches) >= _MOST_LAUNCHES:
                self._launches.clear()
            self._launches[key] = launch
        return launch

    def _allocate(self, shape: tuple[int, ...], device: torch.device | None = None) -> tuple[Tensor, ...]:
        facts = self.region.facts
        return tuple(
            torch.empty(output_shape(facts[out.value].extent, shape), dtype=dtype, device=device)
            for out, dtype in zip(self.region.outputs, self._dtypes, strict=True)
        )

    def _apart(self, read: list[Tensor], out: Sequence[Tensor]) -> list[Tensor]:
        """Inputs that an output would change before they are read, copied."""
        return [
            x.clone() if any(self._spoils(n, k, x, y) for k, y in enumerate(out)) else x
            for n, x in zip(self._given, read, strict=True)
        ]

    def _spoils(self, n: int, k: int, x: Tensor, y: Tensor) -> bool:
        """Whether output k in the memory of y would change input n, x, before it is read."""
        if not _overlap(x, y):
            return False
        same = x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
        return not (same and x.dtype == y.dtype and may_overwrite(self.region, n, k))

    # --- planning a launch -------------------------------------------------------------------

    def _plan(self, read: list[Tensor], out: Sequence[Tensor] | None, may_stream: bool) -> _Launch:
        self._check(read, out)
        extents = [self.region.inputs[n].extent for n in self._given]
        shape = grid_shape(extents, [tuple(x.shape) for x in read])
        results = out if out is not None else self._like(shape)
        every = [*read, *(y for k, y in enumerate(results) if k not in self._sums)]
        extents = [t.extent for t in self._tensors]
        shapes, strides = [tuple(x.shape) for x in every], [x.stride() for x in every]
        grid = grid_of(self.region, shape, extents, shapes, strides)
        nbytes = sum(x.numel() * x.element_size() for x in every)
        form = self._form(grid, may_stream and nbytes >= STREAM_BYTES)
        compiled = self._compiled.get(form)
        if compiled is None:
            compiled = self._compiled[form] = _Compiled(write(self.region, form), self.cache)
        arguments, addresses = self._arguments(grid, form)
        size = BYTES[self.region.math]
        pitch = -(-grid.columns * size // _LINE) * _LINE
        return _Launch(grid, shape, compiled, arguments, addresses, pitch, nbytes)

    def _like(self, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        return self._allocate(shape, torch.device("meta"))

    def _check(self, read: list[Tensor], out: Sequence[Tensor] | None) -> None:
        dtypes = [getattr(torch, self.region.inputs[n].dtype) for n in self._given]
        every = [*zip(read, dtypes, strict=True), *zip(out or (), self._dtypes, strict=out is not None)]
        for x, dtype in every:
            if x.dtype != dtype or x.device.type != "cpu":
                raise CodegenError(f"a kernel for {dtype} on cpu was given {x.dtype} on {x.device}")

    def _form(self, grid: Grid, streams: bool) -> Form:
        strided, streamed = [], []
        for tensor, steps in zip(self._tensors, grid.steps, strict=True):
            if tensor.extent.by_column and steps[-1] != 1:
                strided.append(tensor.name)
            elif streams and tensor.place and self._can_stream(tensor):
                lines = [step * BYTES[tensor.dtype] % _LINE == 0 for step in steps[:-1]]
                if all(lines) or grid.flat:
                    streamed.append(tensor.name)
        return Form(len(grid.sizes), tuple(strided), tuple(streamed), grid.flat)

    @staticmethod
    def _can_stream(tensor: Operand) -> bool:
        return tensor.extent is Extent.FULL and BYTES[tensor.dtype] >= _STREAM_ITEM_BYTES

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

    def _run(
        self,
        launch: _Launch,
        read: list[Tensor],
        inputs: Sequence[Tensor | float],
        results: tuple[Tensor, ...],
    ) -> None:
        grid, source = launch.grid, launch.compiled.source
        count = grid.rows * grid.columns if grid.flat else grid.rows
        chunks = min(self._threads(launch.nbytes), max(count, 1))
        arguments: list[Any] = [*launch.arguments]
        every = [*read, *(x for k, x in enumerate(results) if k not in self._sums)]
        for position, x in zip(launch.addresses, every, strict=True):
            arguments[position] = x.data_ptr()
        arguments += [_number(inputs[n]) for n in self._scalars]
        own = source.buffers * launch.pitch + source.tiles * BLOCK * 8
        work = torch.empty(chunks * own, dtype=torch.uint8) if own else None
        arguments[1:3] = [0 if work is None else work.data_ptr(), launch.pitch]
        sums = None
        if self._sums:
            sums = torch.zeros(chunks, len(source.sums), launch.pitch, dtype=torch.uint8)
            arguments[3] = sums.data_ptr()
        launch.compiled(chunks, count, own, len(source.sums) * launch.pitch, arguments)
        if sums is not None:
            totals = sums.view(getattr(torch, self.region.math)).sum(0)
            for k in self._sums:
                number = source.sums.index(self.region.outputs[k].value)
                results[k].copy_(totals[number, : grid.columns])

    def _threads(self, nbytes: int) -> int:
        if nbytes < PARALLEL_BYTES or _Process.forked:
            return 1
        threads = torch.get_num_threads()
        if threads == 1:
            return 1
        from numba.core import config

        most: int = config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        return min(threads, most)


class _Compiled:
    """The functions of one text, compiled when first called."""

    def __init__(self, source: Source, cache: Path | None) -> None:
        self.source, self.cache = source, cache

    def __call__(self, chunks: int, count: int, own: int, own_sums: int, arguments: list[Any]) -> None:
        if chunks > 1 and _Process.lock.acquire(blocking=False):
            try:
                self._parallel(chunks, count, own, own_sums, *arguments)
            finally:
                _Process.lock.release()
        else:
            self._serial(0, count, *arguments)

    @functools.cached_property
    def _serial(self) -> Callable[..., None]:
        return self._compile("rows", 0)

    @functools.cached_property
    def _parallel(self) -> Callable[..., None]:
        load(self.source.text, self.cache).__dict__["rows"] = self._serial
        return self._compile("run", 2)

    def _compile(self, name: str, more: int) -> Callable[..., None]:
        """One function as machine code, for the types of its parameters."""
        try:
            import numba

            kinds = {"i": numba.int64, "f": numba.float64}
            types = [kinds[kind] for kind in "i" * more + self.source.parameters]
            function = load(self.source.text, self.cache).__dict__[name]
            compiler = numba.njit(error_model="numpy", nogil=True, parallel=name == "run")
            dispatcher: Any = compiler(function)
            if self.cache is not None:
                dispatcher._cache = DiskCache(self.cache, f"{key_of(self.source.text)}.{name}")
            dispatcher.compile(numba.void(*types))
            dispatcher.disable_compile()
        except Exception as error:
            raise CodegenError(f"Numba could not compile a kernel: {error}") from error
        found: Callable[..., None] = dispatcher
        return found


def _number(x: Tensor | float) -> float:
    return x.item() if isinstance(x, Tensor) else x


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the memory between the first and last element of each has bytes in common."""
    (a, b), (c, d) = _span(x), _span(y)
    return a < d and c < b


@functools.cache
def _mincore() -> Any:
    return getattr(ctypes.CDLL(None), "mincore", None)


def resident(x: Tensor) -> bool:
    """Whether the page in the middle of a tensor is in memory already; False where nobody can tell."""
    begin, end = _span(x)
    page = (begin + end) // 2 // mmap.PAGESIZE * mmap.PAGESIZE
    found = ctypes.c_ubyte(0)
    ask = _mincore()
    if ask is None or ask(ctypes.c_void_p(page), ctypes.c_size_t(1), ctypes.byref(found)) != 0:
        return False
    return bool(found.value & 1)


def _span(x: Tensor) -> tuple[int, int]:
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
