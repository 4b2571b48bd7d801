"""Regions as Numba CUDA kernels on tensors of a GPU: where numba-cuda is installed and CuPy is not.

    kernel = numba_cuda_kernel(region)
    out, total = kernel(x, residual, eps, weight)

Called as the kernels of `graphopt.codegen.cuda_launch` are, with the same rules for streams and memory:
tensors are passed by their addresses, so that those of bfloat16 and those that require gradients are
passed too, and nothing is copied. Kernels are compiled by numba-cuda for the device at hand when they
are first launched, and not kept on disk.
"""

import functools
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from graphopt.codegen.cuda_form import Form, Size, Traits, form_of, size_of
from graphopt.codegen.cuda_launch import CudaKernel
from graphopt.codegen.cuda_runner import Runner, Start
from graphopt.codegen.cuda_source import NAME, Source
from graphopt.codegen.kernel_cache import load
from graphopt.codegen.layout import Grid
from graphopt.codegen.numba_cuda_source import write
from graphopt.codegen.nvrtc import Compiled, capability_of
from graphopt.codegen.region import Region
from graphopt.errors import CodegenError

THREADS = 256  # of a block
_PACKS = 4  # of a thread, where a row is spread over blocks


@functools.lru_cache(maxsize=1024)
def numba_cuda_kernel(region: Region) -> "NumbaCudaKernel":
    """The kernel of a region; CodegenError names an operator that it cannot do."""
    return NumbaCudaKernel(region)


def numba_cuda_form(
    traits: Traits, grid: Grid, addresses: Sequence[int], pointers: tuple[str, ...] = ()
) -> Form:
    """The form for tensors at these addresses: packs are never cut, and nothing is held."""
    form = form_of(traits, grid, addresses, pointers)
    columns, pack = grid.rows * grid.columns if grid.flat else grid.columns, form.pack
    while columns % pack:
        pack //= 2
    team = THREADS if grid.flat else min(THREADS, _power_of_two(-(-columns // pack)))
    teams = THREADS // team
    return replace(form, pack=pack, tail=False, team=team, teams=teams, held=0, lean=False)


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


class NumbaCudaKernel(CudaKernel):
    """A region as a callable on tensors of one device; `runner` is where, by default their GPU."""

    def write(self, form: Form) -> Source:
        """The text for a form; CodegenError names an operator that there is none for."""
        return write(self.region, form)

    def form_and_size(
        self, grid: Grid, addresses: Sequence[int], pointers: tuple[str, ...], runner: Runner
    ) -> tuple[Form, Size]:
        """As `CudaKernel`."""
        form = numba_cuda_form(self.traits, grid, addresses, pointers)
        spread = form if form.flat else replace(form, held=_PACKS)
        return form, size_of(self.traits, grid, spread, runner.processors)

    def runner_of(self, device: torch.device) -> Runner:
        """As `CudaKernel`."""
        return self.runner or _device(device.index)


class NumbaRunner:
    """One GPU, through numba-cuda, or Numba's simulator (None). CodegenError where there is none."""

    def __init__(self, index: int | None) -> None:
        self.index, self.processors = index, 2
        self.cuda = _numba_cuda()
        if index is not None:
            self.processors = torch.cuda.get_device_properties(index).multi_processor_count
            try:
                self.device = self.cuda.gpus[index]
            except Exception as error:  # of the driver
                raise CodegenError(f"numba-cuda has no device {index}: {_plain(error)}") from error
        self._functions: dict[Source, Any] = {}

    def prepare(self, source: Source, size: Size, fixed: Sequence[int | None]) -> Start:
        """As `Runner`: kernels go to the stream that is torch's current one when they are started."""
        function, arguments = self._function(source), list(fixed)
        free = [n for n, x in enumerate(fixed) if x is None]
        ready: dict[int, Any] = {}  # by the address of a stream

        def start(given: Sequence[int | float]) -> None:
            own: list[Any] = [*arguments]
            for n, x in zip(free, given, strict=True):
                own[n] = x
            if self.index is None:
                function[size.blocks, size.threads](*own)
                return
            with self.device:
                stream = torch.cuda.current_stream(self.index).cuda_stream
                if stream not in ready:
                    ready[stream] = self._ready(function, size, stream)
                ready[stream](*own)

        return start

    def _ready(self, function: Any, size: Size, stream: int) -> Any:
        """A kernel for launches of one size on the stream at an address, 0 for the default one."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Grid size")  # few rows are few blocks
            external = self.cuda.external_stream(stream) if stream else 0
            return function[size.blocks, size.threads, external]

    def _function(self, source: Source) -> Any:
        function = self._functions.get(source)
        if function is None:
            function = self._functions[source] = self._compile(source)
        return function

    def _compile(self, source: Source) -> Any:
        try:
            return self.cuda.jit(_signature(source))(_function(source))
        except Exception as error:  # Numba's, of the compiler or the driver
            raise CodegenError(f"numba-cuda could not compile a kernel: {_plain(error)}") from error


@functools.lru_cache(maxsize=64)
def _device(index: int) -> NumbaRunner:
    return NumbaRunner(index)


def _numba_cuda() -> Any:
    missing = "Numba CUDA kernels need numba-cuda: pip install graphopt[numba-cuda]"
    try:
        from numba import cuda
    except ImportError as error:
        raise CodegenError(missing) from error
    if cuda.implementation == "Built-in":  # an older target, which Numba brings along
        raise CodegenError(missing)
    return cuda


def _function(source: Source) -> Any:
    return load(source.text, None).__dict__[NAME]


def _signature(source: Source) -> Any:
    from numba import types

    kinds = {"i": types.int64, "f": types.float32, "d": types.float64}
    return types.void(*(kinds[kind] for kind in source.parameters))


def _plain(error: Exception) -> str:
    """The message of an error, without the colours of terminals."""
    return re.sub(r"\x1b\[\d+m", "", str(error)).strip()


def compile_ptx(source: Source, architecture: str = "sm_90") -> Compiled:
    """The PTX of a kernel, for which neither GPU nor driver is needed; registers are not known yet.

    CodegenError where there is no numba-cuda, or it has no NVVM, or cannot compile.
    """
    cuda, capability = _numba_cuda(), capability_of(architecture)
    try:
        ptx, _ = cuda.compile_ptx(_function(source), _signature(source), cc=capability)
    except Exception as error:  # of NVVM, or where it is missing
        found = f"numba-cuda could not compile for {architecture}: {_plain(error)}"
        raise CodegenError(found) from error
    return Compiled(architecture, ptx, b"", "")


def can_compile() -> bool:
    """Whether numba-cuda is here, and NVVM for it."""
    try:
        _numba_cuda()
    except CodegenError:
        return False
    from numba.cuda.cudadrv import nvvm

    return bool(nvvm.is_available())
