"""How kernels are launched: outputs in place, streams as they are at that moment, and what is refused."""

import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from graphopt.codegen import cuda_emulation, cuda_launch, regions
from graphopt.codegen.cuda_emulation import Emulator
from graphopt.codegen.cuda_form import Size
from graphopt.codegen.cuda_launch import CudaKernel, CuPyRunner, cuda_kernel
from graphopt.codegen.cuda_source import NAME, Source
from graphopt.codegen.region import Region
from graphopt.errors import CodegenError

needs_compiler = pytest.mark.skipif(cuda_emulation.compiler() is None, reason="no C++ compiler")


class Recorder:
    """A device that only writes down what it is asked to launch."""

    processors = 132

    def __init__(self) -> None:
        self.launches: list[tuple[Source, Size, Sequence[int | float]]] = []

    def launch(self, source: Source, size: Size, arguments: Sequence[int | float]) -> None:
        self.launches.append((source, size, arguments))


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


class _Context:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize("modern", [True, False])
def test_streams_are_those_of_the_moment(modern: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As CUDA graphs need: a launch goes to the stream that is current then, not to the first one."""
    launches: list[tuple[Any, ...]] = []
    compiled: list[tuple[str, tuple[str, ...]]] = []

    class RawKernel:
        def __init__(self, text: str, name: str, options: tuple[str, ...]) -> None:
            compiled.append((name, options))

        def kernel(self, *given: Any, stream: Any) -> None:
            launches.append((*given, stream))

    cuda = types.SimpleNamespace(
        Device=lambda index: _Context(),
        Stream=types.SimpleNamespace(
            **({"from_external": lambda s: ("new", s.cuda_stream)} if modern else {})
        ),
        ExternalStream=lambda address, index: ("old", address),
    )
    fake = types.SimpleNamespace(cuda=cuda, RawKernel=RawKernel)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    current = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: current)
    kernel = CudaKernel(regions.rms_norm("float32", False), CuPyRunner(0))
    x, w = torch.zeros(4, 8), torch.zeros(8)
    for address in (7, 9, 7):
        current.cuda_stream = address
        kernel(x, 0.5, w)
    assert [launch[-1][1] for launch in launches] == [7, 9, 7]
    assert launches[0][-1][0] == ("new" if modern else "old")
    assert compiled == [(NAME, ("-std=c++17",))]
    blocks, threads, arguments, _ = launches[0]
    assert (blocks, threads) == ((1, 1), (2, 128))
    assert arguments[2] == x.data_ptr() and type(arguments[-1]).__name__ == "float32"


def test_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("cudaErrorInsufficientDriver")

    cuda = types.SimpleNamespace(Device=lambda index: _Context())
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda, RawKernel=broken))
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    kernel, x = CudaKernel(regions.softmax("float32"), cuda_launch.CuPyRunner(0)), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="InsufficientDriver"):
        (found,) = kernel(x)
    torch.testing.assert_close(found, x.softmax(-1))
