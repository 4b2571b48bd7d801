"""Where CUDA kernels run, and how one is started so that a launch costs little on the host.

A kernel is prepared once for each layout of its tensors: its arguments lie in memory as the driver takes
them, and a launch writes only those that change, addresses above all. Which stream is current is asked at
every launch, as CUDA graphs need: a stream that is remembered leaves them empty.
"""

import ctypes
import struct
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

from graphopt.codegen.cuda_form import Size
from graphopt.codegen.cuda_source import NAME, Source
from graphopt.codegen.device_text import cuda_text
from graphopt.errors import CodegenError

Start: TypeAlias = Callable[[Sequence[int | float]], None]
_SLOT = 8  # bytes for an argument of any type
_FORMATS = {"i": "q", "f": "f4x", "d": "d"}


class Runner(Protocol):
    """Where kernels run; `processors` is the number of its multiprocessors."""

    processors: int

    def prepare(self, source: Source, size: Size, fixed: Sequence[int | None]) -> Start:
        """A function that starts a kernel; CodegenError where it cannot be made.

        `fixed` has an argument for each of `Source.parameters`; those that are None the function is
        given, in this order.
        """


@runtime_checkable
class Timer(Runner, Protocol):
    """A runner that can be measured: launches of its kernels may be tuned.

    `device` is all that tells kinds of its device apart, as text.
    """

    device: str

    def seconds(self, run: Callable[[], None], count: int) -> float:
        """The mean time of `count` calls of `run` on the device, one after the other."""


class Arguments:
    """A kernel's arguments in memory, and at `address` the addresses of these.

    They serve one thread: a launch has read them when it returns, and another must not write before.
    """

    def __init__(self, parameters: str, fixed: Sequence[int | None]) -> None:
        places = [n for n, x in enumerate(fixed) if x is None]
        places += [n for n, x in enumerate(fixed) if x is not None]
        self._memory = ctypes.create_string_buffer(_SLOT * len(fixed))
        begin = ctypes.addressof(self._memory)
        slots = {n: begin + _SLOT * slot for slot, n in enumerate(places)}
        self._addresses = (ctypes.c_void_p * len(fixed))(*(slots[n] for n in range(len(fixed))))
        self.address = ctypes.addressof(self._addresses)
        formats = [_FORMATS[kind] for kind in parameters]
        struct.pack_into(
            "".join(formats[n] for n in places), self._memory, 0, *(fixed[n] or 0 for n in places)
        )
        self._pack = struct.Struct(
            "".join(formats[n] for n, x in enumerate(fixed) if x is None)
        ).pack_into

    def set(self, given: Sequence[int | float]) -> None:
        """Write those that are not fixed."""
        try:
            self._pack(self._memory, 0, *given)
        except OverflowError:  # infinite in float32
            self._pack(self._memory, 0, *(_single(x) if isinstance(x, float) else x for x in given))


def _single(number: float) -> float:
    return ctypes.c_float(number).value


class _OfThread(threading.local):
    """Arguments of the thread that asks; `begin` is called in each first."""

    def __init__(self, begin: Callable[[], object], parameters: str, fixed: Sequence[int | None]) -> None:
        begin()
        self.arguments = Arguments(parameters, fixed)


class CuPyRunner:
    """One GPU, through CuPy. Raises CodegenError where there is none, or no CuPy.

    Kernels are started by the driver's own function: CuPy's call of a kernel packs its arguments anew.
    """

    def __init__(self, index: int) -> None:
        try:
            import cupy
        except ImportError as error:
            raise CodegenError(f"CUDA kernels need CuPy: pip install graphopt[cuda] ({error})") from error
        self.cupy, self.index = cupy, index
        self.processors = torch.cuda.get_device_properties(index).multi_processor_count
        self._functions: dict[str, Any] = {}

    def prepare(self, source: Source, size: Size, fixed: Sequence[int | None]) -> Start:
        """As `Runner`: kernels go to the stream that is torch's current one when they are started."""
        function = self._functions.get(source.text)
        if function is None:
            function = self._functions[source.text] = self._compile(source)
        index, entry, launch = self.index, function.ptr, self.cupy.cuda.driver.launchKernel
        current, stream = torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream
        own = _OfThread(self._begin, source.parameters, fixed)
        (across, down), (wide, high) = size.blocks, size.threads

        def start(given: Sequence[int | float]) -> None:
            if current() != index:
                with torch.cuda.device(index):
                    return start(given)
            arguments = own.arguments
            arguments.set(given)
            launch(entry, across, down, 1, wide, high, 1, 0, stream(index), arguments.address, 0)
            return None

        return start

    @cached_property
    def device(self) -> str:
        """As `Timer`."""
        runtime = self.cupy.cuda.runtime
        versions = f"driver {runtime.driverGetVersion()}, runtime {runtime.runtimeGetVersion()}"
        return cuda_text(self.index, f"{versions}, CuPy {self.cupy.__version__}")

    def seconds(self, run: Callable[[], None], count: int) -> float:
        """As `Timer`, between two events of torch's current stream."""
        with torch.cuda.device(self.index):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(count):
                run()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / count

    def _begin(self) -> None:
        """Make the context of the current device current in a thread that has not used it yet."""
        if not self.cupy.cuda.driver.ctxGetCurrent():
            self.cupy.cuda.runtime.free(0)

    def _compile(self, source: Source) -> Any:
        try:
            with self.cupy.cuda.Device(self.index):
                return self.cupy.RawKernel(source.text, NAME, options=("-std=c++17",)).kernel
        except Exception as error:  # CuPy's, of the compiler, the driver or the file system
            raise CodegenError(f"CuPy could not compile a kernel: {error}") from error
