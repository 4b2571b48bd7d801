"""Numba CUDA kernels in Numba's simulator, as PTX that needs no GPU, and launched on a made-up device."""

import importlib.util
import os
import subprocess
import sys
import types
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from random_regions import assert_no_worse

from graphopt.codegen import backends, numba_cuda, regions
from graphopt.codegen import region as region_module
from graphopt.codegen.builder import Builder
from graphopt.codegen.cuda_form import Form, Size, Traits, contiguous_grid
from graphopt.codegen.cuda_launch import CudaKernel
from graphopt.codegen.cuda_lint import inspect, ptx_faults
from graphopt.codegen.cuda_runner import Start
from graphopt.codegen.cuda_source import Source
from graphopt.codegen.numba_cuda import NumbaCudaKernel, NumbaRunner, compile_ptx, numba_cuda_form
from graphopt.codegen.numba_cuda_source import write
from graphopt.codegen.nvrtc import ARCHITECTURES
from graphopt.codegen.region import Dtype, Region
from graphopt.errors import CodegenError

ROOT = Path(__file__).resolve().parents[2]
installed = importlib.util.find_spec("numba_cuda") is not None
needs_numba_cuda = pytest.mark.skipif(not installed, reason="no numba-cuda: pip install graphopt[dev]")
needs_nvvm = pytest.mark.skipif(not numba_cuda.can_compile(), reason="no numba-cuda with NVVM")
REGIONS: dict[str, Any] = {
    "rms_norm": lambda dtype: regions.rms_norm(dtype, True, saved=True),
    "rms_norm_backward": lambda dtype: regions.rms_norm_backward(dtype, True),
    "layer_norm": regions.layer_norm,
    "layer_norm_backward": regions.layer_norm_backward,
    "softmax": regions.softmax,
    "log_softmax": lambda dtype: regions.softmax(dtype, log=True),
    "softmax_backward": regions.softmax_backward,
    "cross_entropy": lambda dtype: regions.cross_entropy(dtype, True),
    "swiglu": regions.swiglu,
    "swiglu_backward": regions.swiglu_backward,
    "bias_gelu_residual": lambda dtype: regions.bias_gelu_residual(dtype, "none"),
    "bias_gelu_residual, by tanh": lambda dtype: regions.bias_gelu_residual(dtype, "tanh"),
    "bias_gelu_residual_backward": lambda dtype: regions.bias_gelu_residual_backward(dtype, "none"),
    "bias_gelu_residual_backward, by tanh": lambda dtype: regions.bias_gelu_residual_backward(
        dtype, "tanh"
    ),
    "rotary": regions.rotary,
    "dropout": regions.dropout,
    "adamw": regions.adamw,
}


@needs_numba_cuda
def test_in_the_simulator() -> None:
    """The tests of tests/helpers/simulated_kernels.py, in a process of their own."""
    tests = ROOT / "tests" / "helpers" / "simulated_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    variables = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=variables, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


# --- PTX ---------------------------------------------------------------------------------------


def source_of(region: Region, columns: int = 4096) -> Source:
    traits = Traits(region)
    grid = contiguous_grid(traits, (4096, columns))
    return write(region, numba_cuda_form(traits, grid, [0] * len(traits.tensors)))


@needs_nvvm
@pytest.mark.parametrize("name", REGIONS)
def test_regions_compile_and_keep_the_rules(name: str) -> None:
    """Without float64 arithmetic, and with accesses of 16 bytes."""
    region = REGIONS[name]("float32")
    source = source_of(region)
    assert ptx_faults(region, source, inspect(compile_ptx(source, "sm_90"))) == []


@needs_nvvm
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str) -> None:
    region = regions.softmax("bfloat16")
    source = source_of(region)
    compiled = compile_ptx(source, architecture)
    assert f".target {architecture}" in compiled.ptx and ".visible .entry" in compiled.ptx
    facts = inspect(compiled)
    assert facts.wide_loads >= 3 and facts.wide_stores >= 1
    assert (facts.narrow_loads, facts.narrow_stores, facts.float64) == (0, 0, ())


@needs_nvvm
def test_operators_compile() -> None:
    b = Builder()
    x, y = b.input("x", "float32"), b.input("y", "float32")
    floats = {name: op.arity for name, op in region_module.OPS.items() if op.rule == "float"}
    found = [b.apply(name, *(x, y)[:arity]) for name, arity in floats.items()]
    outputs = (b.output(f"y{n}", value, "float32") for n, value in enumerate(found))
    facts = inspect(compile_ptx(source_of(b.region(*outputs))))
    of_sine_and_cosine = ("cvt.rn.f32.f64", "cvt.rn.f64.s64", "mul.f64")
    assert facts.float64 == of_sine_and_cosine


@needs_nvvm
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", REGIONS)
def test_all_on_all(name: str, architecture: str) -> None:
    dtypes: list[Dtype] = ["bfloat16", "float16", "float32", "float64"]
    for dtype in dtypes:
        for columns in (64, 4095, 4096):
            region = REGIONS[name](dtype)
            source = source_of(region, columns)
            facts = inspect(compile_ptx(source, architecture))
            assert ptx_faults(region, source, facts) == [], (dtype, columns)


@needs_nvvm
def test_faults_and_messages() -> None:
    region = regions.swiglu("float32")
    source = source_of(region)
    text = source.text.replace("real = np.float32", "real = np.float64")
    double = replace(source, text=text)
    (fault,) = ptx_faults(region, double, inspect(compile_ptx(double)))
    assert fault.startswith("float64 in a float32 kernel")
    with pytest.raises(CodegenError, match=r"for sm_90: (.|\n)*name 'nowhere' is not defined"):
        compile_ptx(replace(source, text="def kernel(x):\n    nowhere(x)\n", parameters="i"))
    with pytest.raises(CodegenError, match="sm90 is no architecture"):
        compile_ptx(source, "sm90")


# --- launches ----------------------------------------------------------------------------------


class Recorder:
    """A device that only writes down what it is asked to launch."""

    processors = 132

    def __init__(self) -> None:
        self.launches: list[tuple[Source, Size, Sequence[int | None]]] = []

    def prepare(self, source: Source, size: Size, fixed: Sequence[int | None]) -> Start:
        free = sum(x is None for x in fixed)

        def start(given: Sequence[int | float]) -> None:
            assert len(given) == free
            self.launches.append((source, size, fixed))

        return start


def recorded(region: Region, *inputs: Any) -> tuple[Form, Size]:
    runner = Recorder()
    NumbaCudaKernel(region, runner)(*inputs)
    ((source, size, fixed),) = runner.launches
    assert len(source.parameters) == len(fixed)
    return source.form, size


def test_forms_and_sizes() -> None:
    x = torch.zeros(1000, 4096)
    form, size = recorded(regions.softmax("float32"), x)
    assert (form.pack, size) == (4, Size((1000, 1), (256, 1), 0))
    form, size = recorded(regions.softmax("bfloat16"), torch.zeros(1000, 64, dtype=torch.bfloat16))
    assert (form.pack, size) == (8, Size((32, 1), (8, 32), 0))  # 32 rows in a block
    form, size = recorded(regions.softmax("float32"), torch.zeros(4, 36)[:, :33])
    assert (form.pack, form.tail) == (1, False)  # packs are not cut
    form, size = recorded(regions.swiglu("float32"), x, x)
    assert form.flat and size == Size((4000, 1), (256, 1), 0)
    large = torch.zeros(4096, 4096)
    assert recorded(regions.swiglu("float32"), large, large)[1].blocks == (64 * 132, 1)
    form, size = recorded(regions.bias_gelu_residual("float32", "tanh"), x, x[0], x)
    assert size == Size((1000, 1), (256, 1), 0)  # 4 packs of 4 columns for each of 256 threads
    form, size = recorded(regions.bias_gelu_residual_backward("float32", "tanh"), x, x, x[0])
    assert size == Size((1000, 1), (256, 1), 1000)


@needs_numba_cuda
def test_what_numba_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch goes to the stream that is current then, on its device; a kernel is compiled once."""
    launches: list[tuple[Any, ...]] = []
    compiled: list[Any] = []

    class Function:
        def __getitem__(self, given: Any) -> Any:
            return lambda *arguments: launches.append((*given, arguments))

    class Gpu:
        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    def jit(signature: Any) -> Any:
        return lambda function: compiled.append((str(signature), function.__name__)) or Function()

    fake = types.SimpleNamespace(
        jit=jit, external_stream=lambda address: ("stream", address), gpus={1: Gpu()}
    )
    monkeypatch.setattr(numba_cuda, "_numba_cuda", lambda: fake)
    properties = types.SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    current = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: current)
    kernel, runner = NumbaCudaKernel(regions.rms_norm("bfloat16", False)), NumbaRunner(1)
    kernel.runner = runner
    x, w = (
        torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True),
        torch.zeros(8, dtype=torch.bfloat16),
    )
    for address in (7, 0, 7):
        current.cuda_stream = address
        kernel(x, 0.5, w)
    assert [launch[2] for launch in launches] == [("stream", 7), 0, ("stream", 7)]
    assert compiled == [(f"({', '.join(['int64'] * 7)}, float32) -> none", "kernel")]
    blocks, threads, _, arguments = launches[0]
    assert (blocks, threads) == ((1, 1), (1, 256))
    assert arguments[:3] == (4, 8, x.data_ptr()) and arguments[-1] == 0.5


@needs_numba_cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    """Results, streams and CUDA graphs on a device."""
    target, factor = torch.tensor([0, 7, -100], device="cuda"), torch.tensor(0.5, device="cuda")
    cases: list[tuple[Region, tuple[Any, ...]]] = []
    for dtype, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        for columns in (33, 64, 5000):
            x, weight = (torch.randn(n, columns, device="cuda").to(kind) for n in (3, 1))
            cases += [
                (regions.softmax(dtype), (x,)),
                (regions.rms_norm(dtype, True), (x, x, 1e-6, weight[0])),
                (regions.rms_norm_backward(dtype, True), (x, x, x[:, 0].float(), weight[0], x)),
                (regions.cross_entropy(dtype, True), (x, target, -100, factor.double())),
                (regions.bias_gelu_residual(dtype, "none"), (x, weight[0], x)),
                (regions.dropout(dtype), (x, 5, 0.3)),
            ]
    for region, inputs in cases:
        kernel = NumbaCudaKernel(region)
        assert_no_worse(region, inputs, kernel(*inputs))
        assert not kernel.broken
    kernel, x = NumbaCudaKernel(regions.softmax("float32")), torch.randn(64, 512, device="cuda")
    out = torch.empty_like(x)
    kernel(x, out=(out,))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel(x, out=(out,))
    x.copy_(torch.randn_like(x))
    graph.replay()
    torch.testing.assert_close(out, x.softmax(-1))


def test_a_driver_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("CUDA driver library cannot be found")

    monkeypatch.setattr(numba_cuda, "_numba_cuda", lambda: types.SimpleNamespace(jit=broken))
    kernel, x = NumbaCudaKernel(regions.softmax("float32"), NumbaRunner(None)), torch.randn(3, 4)
    with pytest.warns(UserWarning, match="driver library cannot be found"):
        (found,) = kernel(x)
    torch.testing.assert_close(found, x.softmax(-1))


def test_without_numba_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    import numba.cuda

    monkeypatch.setattr(numba.cuda, "implementation", "Built-in")
    with pytest.raises(CodegenError, match=r"pip install graphopt\[numba-cuda\]"):
        NumbaRunner(None)
    with pytest.raises(CodegenError, match=r"on cuda was given .* on cpu"):
        numba_cuda.numba_cuda_kernel(regions.softmax("float32"))(torch.randn(2, 3))


@pytest.mark.parametrize(
    ("present", "expected"),
    [
        ({"cupy", "numba_cuda"}, CudaKernel),
        ({"cupy"}, CudaKernel),
        ({"numba_cuda"}, NumbaCudaKernel),
        (set(), CudaKernel),
    ],
)
def test_the_choice_of_a_backend(
    present: set[str], expected: type[CudaKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cupy", "numba_cuda"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name) if name in present else None)
    backends._only_numba.cache_clear()
    try:
        assert type(backends.gpu_kernel(regions.softmax("float32"))) is expected
    finally:
        backends._only_numba.cache_clear()


# --- texts -------------------------------------------------------------------------------------


def test_an_operator_that_the_backend_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    operators = {**region_module.OPS, "gamma": region_module.Op(1, "float")}
    monkeypatch.setattr(region_module, "OPS", operators)
    b = Builder()
    region = b.region(b.output("out", b.apply("gamma", b.input("x", "float32")), "float32"))
    with pytest.raises(CodegenError, match="Numba CUDA backend has no gamma"):
        NumbaCudaKernel(region)


def test_the_text_of_a_kernel() -> None:
    b = Builder()
    x = b.input("x", "bfloat16")
    region = b.region(b.output("out", x * b.max(x), "bfloat16"))
    assert write(region, Form(pack=2, team=64, teams=4)).text == TEXT


TEXT = """\
import math

import numpy as np
from numba import cuda

from graphopt.codegen.numba_cuda_primitives import NAMES

# x0: 'x', bfloat16, full
# y0: 'out', bfloat16, full
real = np.float32
one, zero, infinity = real(1), real(0), real(math.inf)
PACK, TEAM, TEAMS = 2, 64, 4
load_bfloat16_2 = NAMES["load_bfloat16_2"]
maximum = NAMES["maximum"]
store_bfloat16_2 = NAMES["store_bfloat16_2"]


def kernel(rows, columns, x0, x0_0, y0, y0_0):
    first = (cuda.blockIdx.y * TEAM + cuda.threadIdx.x) * PACK
    stride = cuda.gridDim.y * TEAM * PACK
    slots0 = cuda.shared.array(256, real)
    lane = cuda.threadIdx.x
    at = cuda.threadIdx.y * TEAM + lane
    groups = (rows + TEAMS - 1) // TEAMS
    for group in range(cuda.blockIdx.x, groups, cuda.gridDim.x):
        row = group * TEAMS + cuda.threadIdx.y
        live = row < rows
        row = row if live else rows - 1
        x0_row = x0 + row * x0_0
        y0_row = y0 + row * y0_0
        p1 = -infinity
        for j in range(first, columns, stride):
            v0_0, v0_1 = load_bfloat16_2(x0_row + j * 2, one)
            p1 = maximum(p1, v0_0)
            p1 = maximum(p1, v0_1)
        slots0[at] = p1
        cuda.syncthreads()
        step = TEAM // 2
        while step > 0:
            if lane < step:
                slots0[at] = maximum(slots0[at], slots0[at + step])
            cuda.syncthreads()
            step = step // 2
        v1 = slots0[at - lane]
        cuda.syncthreads()
        for j in range(first, columns, stride):
            v0_0, v0_1 = load_bfloat16_2(x0_row + j * 2, one)
            v2_0 = v0_0 * v1
            v2_1 = v0_1 * v1
            if live:
                store_bfloat16_2(y0_row + j * 2, (v2_0, v2_1))
"""
