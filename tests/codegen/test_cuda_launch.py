"""How kernels are launched: outputs in place, streams as they are at that moment, and what is refused."""

import contextlib
import ctypes
import sys
import threading
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from graphopt.codegen import cuda_emulation, launching, regions
from graphopt.codegen.cuda_emulation import Emulator
from graphopt.codegen.cuda_form import Size
from graphopt.codegen.cuda_launch import CudaKernel, cuda_kernel
from graphopt.codegen.cuda_runner import CuPyRunner, Start
from graphopt.codegen.cuda_source import NAME, Source
from graphopt.codegen.region import Region
from graphopt.errors import CodegenError

needs_compiler = pytest.mark.skipif(cuda_emulation.compiler() is None, reason="no C++ compiler")


class Recorder:
    """A device that only writes down what it is asked to launch."""

    processors = 132

    def __init__(self) -> None:
        self.launches: list[tuple[Source, Size, Sequence[int | float]]] = []

    def prepare(self, source: Source, size: Size, fixed: Sequence[int | None]) -> Start:
        def start(given: Sequence[int | float]) -> None:
            left = iter(given)
            every = [next(left) if x is None else x for x in fixed]
            assert not [*left]
            self.launches.append((source, size, every))

        return start


def recorded(region: Region, *inputs: Any) -> tuple[Source, Size, Sequence[int | float]]:
    runner = Recorder()
    CudaKernel(region, runner)(*inputs)
    (launch,) = runner.launches
    return launch


def test_sizes() -> None:
    softmax = regions.softmax("bfloat16")
    _, size, _ = recorded(softmax, torch.zeros(1000, 4096, dtype=torch.bfloat16))
    assert size == Size((1000, 1), (128, 1), 0)
    _, size, _ = recorded(softmax, torch.zeros(1000, 64, dtype=torch.bfloat16))
    assert size == Size((32, 1), (8, 32), 0)  # 32 rows in a block, the last of 8
    x = torch.zeros(4096, 4096)
    _, size, _ = recorded(regions.bias_gelu_residual("float32", "tanh"), x, x[0], x)
    assert size == Size((4096, 2), (256, 1), 0)  # 4 x 256 columns in each of 2 packs of a thread
    source, size, _ = recorded(regions.swiglu("float32"), x, x)
    assert source.form.flat and size == Size((64 * 132, 1), (256, 1), 0)
    _, size, _ = recorded(regions.bias_gelu_residual_backward("float32", "tanh"), x, x, x[0])
    assert size == Size((264, 4), (256, 1), 264)  # 132 x 8 blocks in all


def test_arguments() -> None:
    x, w = torch.zeros(2, 3, 8), torch.zeros(8)
    source, _, found = recorded(regions.rms_norm("float32", False), x.transpose(0, 1), 0.5, w)
    assert source.parameters == "iiiiiiiiiif"
    assert found[:6] == [6, 8, 3, x.data_ptr(), 96, 32]  # rows in the order of memory
    assert found[6] == w.data_ptr() and found[8:] == [32, 64, 0.5]


@needs_compiler
def test_in_place() -> None:
    """An output over an input gives what it gives elsewhere; where it cannot, the input is copied."""
    weight, runner = torch.randn(48), Emulator()
    for columns, region in ((48, regions.rms_norm("float32", True)),):
        kernel = CudaKernel(region, runner)
        start = torch.randn(2, 5, columns)
        expected = kernel(start[0], start[1], 1e-6, weight)
        for over in ((0, 1), (1, 0)):
            x = start.clone()
            kernel(x[0], x[1], 1e-6, weight, out=[x[n] for n in over])
            for n, y in zip(over, expected, strict=True):
                assert torch.equal(x[n], y)
    kernel = CudaKernel(regions.softmax("float32"), runner)
    memory = torch.empty(5, 65)
    for first in (0, 30):  # onto the input itself, and half a row past it
        x = torch.randn(4, 65)
        memory[:4] = x
        (found,) = kernel(memory[:4], out=(memory.view(-1)[first : first + 260].view(4, 65),))
        torch.testing.assert_close(found, x.softmax(-1))


def test_what_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = CudaKernel(regions.rms_norm("float32", True), Recorder())
    x, y = torch.zeros(4, 48), torch.zeros(4, 48)
    copied = []
    clone = torch.Tensor.clone
    monkeypatch.setattr(torch.Tensor, "clone", lambda t: copied.append(t.data_ptr()) or clone(t))
    kernel(x, y, 1e-6, x[0], out=[x, torch.zeros(4, 48)])
    assert copied == [x.data_ptr()]  # the weight, which is a part of the output; x itself is not
    kernel(x, y, 1e-6, torch.zeros(48), out=[torch.zeros(4, 48), x])
    assert copied[1:] == [x.data_ptr()]  # the sum is stored before x is read for the last time


def test_tensors_that_a_kernel_is_not_for() -> None:
    kernel = cuda_kernel(regions.softmax("float32"))
    with pytest.raises(CodegenError, match=r"float32 on cuda was given torch\.float32 on cpu"):
        kernel(torch.randn(2, 3))
    emulated = CudaKernel(regions.softmax("float32"), Recorder())
    with pytest.raises(CodegenError, match=r"was given torch\.float64 on cpu"):
        emulated(torch.randn(2, 3, dtype=torch.float64))
    with pytest.raises(CodegenError, match="on meta"):
        CudaKernel(regions.swiglu("float32"), Recorder())(torch.ones(2), torch.ones(2, device="meta"))


def test_a_missing_compiler_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_emulation, "compiler", lambda: None)
    cuda_emulation._compiled.cache_clear()
    launching.say.cache_clear()
    kernel, x = CudaKernel(regions.softmax("float32"), Emulator()), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="runs by torch operators: no C") as remarks:
        (first,), (second,) = kernel(x), kernel(x, out=(torch.empty(3, 4),))
    assert len(remarks) == 1
    torch.testing.assert_close(first, x.softmax(-1))
    assert torch.equal(first, second)


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(CodegenError, match="pip install"):
        CuPyRunner(0)


# --- what CuPy is told: a made-up CuPy writes it down ------------------------------------------


class MadeUp:
    """CuPy and what torch knows of streams and devices, of one GPU that does nothing."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.compiled: list[tuple[str, tuple[str, ...]]] = []
        self.stream, self.device, self.context, self.begun = 7, 0, 0, 0
        self.broken = ""
        driver = types.SimpleNamespace(launchKernel=self.launch, ctxGetCurrent=lambda: self.context)
        versions = {"driverGetVersion": lambda: 13000, "runtimeGetVersion": lambda: 13000}
        runtime = types.SimpleNamespace(free=self.begin, **versions)
        device = lambda index: contextlib.nullcontext()  # noqa: E731
        cuda = types.SimpleNamespace(Device=device, driver=driver, runtime=runtime)
        cupy = types.SimpleNamespace(cuda=cuda, RawKernel=self.kernel, __version__="14.2")
        patch.setitem(sys.modules, "cupy", cupy)
        properties = types.SimpleNamespace(
            multi_processor_count=132, name="made up", major=9, minor=0, total_memory=1
        )
        patch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        patch.setattr(torch.cuda, "device", self.moved)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: self.device, raising=False)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: self.stream, raising=False)

    def kernel(self, text: str, name: str, options: tuple[str, ...]) -> Any:
        if self.broken:
            raise RuntimeError(self.broken)
        self.compiled.append((name, options))
        return types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=99))

    def launch(self, entry: int, *given: int) -> None:
        *sizes, shared, stream, pointers, extra = given
        assert (entry, shared, extra) == (99, 0, 0)
        self.launches.append((stream, tuple(sizes), pointers))

    def begin(self, address: int) -> None:
        self.context, self.begun = 1, self.begun + 1

    @contextlib.contextmanager
    def moved(self, index: int) -> Any:
        before, self.device = self.device, index
        yield
        self.device = before


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> MadeUp:
    launching.say.cache_clear()
    return MadeUp(monkeypatch)


def memory(pointers: int, kinds: str) -> list[int | float]:
    """The arguments that a launch finds at its addresses."""
    types_ = {"i": ctypes.c_longlong, "f": ctypes.c_float, "d": ctypes.c_double}
    addresses = (ctypes.c_void_p * len(kinds)).from_address(pointers)
    return [types_[k].from_address(a).value for k, a in zip(kinds, addresses, strict=True)]


def test_streams_are_those_of_the_moment(made_up: MadeUp) -> None:
    """As CUDA graphs need: a launch goes to the stream that is current then, not to the first one."""
    kernel = CudaKernel(regions.rms_norm("float32", False), CuPyRunner(0))
    x, w = torch.zeros(4, 8), torch.zeros(8)
    for stream in (7, 9, 7):
        made_up.stream = stream
        (out,) = kernel(x, 0.1, w)
        found = memory(made_up.launches[-1][-1], "iiiiiiif")
        assert found[:2] == [4, 8] and found[2:7] == [x.data_ptr(), 32, w.data_ptr(), out.data_ptr(), 32]
        assert found[-1] == ctypes.c_float(0.1).value
    kernel(x, 1e300, w)
    assert memory(made_up.launches[-1][-1], "iiiiiiif")[-1] == float("inf")
    assert [launch[0] for launch in made_up.launches] == [7, 9, 7, 7]
    assert made_up.launches[0][1] == (1, 1, 1, 2, 128, 1)
    assert made_up.compiled == [(NAME, ("-std=c++17",))]


def test_threads_and_devices(made_up: MadeUp) -> None:
    """Each thread has arguments of its own, and a context; a launch is on the tensors' device."""
    kernel, x = CudaKernel(regions.swiglu("float32"), CuPyRunner(1)), torch.zeros(4, 8)
    kernel(x, x)
    assert (made_up.begun, made_up.device) == (1, 0)
    made_up.device = 1
    kernel(x, x)
    made_up.context = 0
    thread = threading.Thread(target=kernel, args=(x, x))
    thread.start()
    thread.join()
    pointers = [launch[-1] for launch in made_up.launches]
    assert pointers[0] == pointers[1] != pointers[2] and made_up.begun == 2


def test_a_driver_that_fails(made_up: MadeUp) -> None:
    made_up.broken = "cudaErrorInsufficientDriver"
    x, every = torch.randn(3, 4), [regions.softmax("float32"), regions.softmax("float32", log=True)]
    with pytest.warns(UserWarning, match="InsufficientDriver") as remarks:
        (found,), (log,) = (CudaKernel(region, CuPyRunner(0))(x) for region in every)
    assert len(remarks) == 1
    torch.testing.assert_close((found, log), (x.softmax(-1), x.log_softmax(-1)))


def test_a_wrong_call_does_not_break_a_kernel() -> None:
    kernel = CudaKernel(regions.swiglu("float32"), Recorder())
    with pytest.raises(CodegenError, match="make no grid"):
        kernel(torch.zeros(3), torch.zeros(4))
    with pytest.raises(CodegenError, match="does not lie on a grid"):
        kernel(torch.zeros(3), torch.zeros(3), out=[torch.zeros(4)])
    assert not kernel.broken
