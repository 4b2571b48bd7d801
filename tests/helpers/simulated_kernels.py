"""Numba CUDA kernels in Numba's simulator, which `NUMBA_ENABLE_CUDASIM=1` has to ask for before numba is
imported: tests for a process of their own, started by tests/codegen/test_numba_cuda.py.

The simulator has a Python thread for each of the GPU, so that blocks are small here, and so are tensors.
"""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_regions import UNARY, assert_no_worse, drawn_region, integers_and_bools
from torch import Tensor

from graphopt.codegen import numba_cuda, reference, regions
from graphopt.codegen.builder import Builder
from graphopt.codegen.cuda_form import Form, Size
from graphopt.codegen.cuda_source import Source
from graphopt.codegen.numba_cuda import NumbaCudaKernel, NumbaRunner
from graphopt.codegen.numba_cuda_primitives import SIMULATED
from graphopt.codegen.region import Dtype, Region

INFINITY = float("inf")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of divisions by zero


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert SIMULATED
    monkeypatch.setattr(numba_cuda, "THREADS", 8)
    sys.setswitchinterval(1e-4)  # the simulator polls its threads, which have to come to run meanwhile


def kernel_of(region: Region) -> NumbaCudaKernel:
    return NumbaCudaKernel(region, NumbaRunner(None))


def check(region: Region, *inputs: Any, size: float = 0.0) -> Form:
    """Compare, and give the form that was chosen."""
    kernel = kernel_of(region)
    assert_no_worse(region, inputs, kernel(*inputs), size)
    assert not kernel.broken
    (launch,) = kernel._launches.values()
    return launch.source.form


def random(dtype: Dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(getattr(torch, dtype))


# --- layers ------------------------------------------------------------------------------------


def rows_of(dtype: Dtype, columns: int) -> Tensor:
    """Six rows: usual numbers, large ones, and rows of -inf, with a NaN, with +inf, of zeros."""
    x = torch.randn(6, columns)
    x[1] *= 1e3
    if columns:
        x[2], x[3, columns // 2], x[4, 0], x[5] = -INFINITY, float("nan"), INFINITY, 0.0
    return x.to(getattr(torch, dtype))


@pytest.mark.parametrize(
    ("dtype", "columns", "pack"),
    [("bfloat16", 48, 8), ("float32", 0, 1), ("float32", 5, 1), ("float32", 24, 4)],
)
def test_layers_with_special_values(dtype: Dtype, columns: int, pack: int) -> None:
    x, other, weight = rows_of(dtype, columns), rows_of(dtype, columns).flip(0), random(dtype, columns)
    assert check(regions.softmax(dtype), x).pack == pack
    check(regions.rms_norm(dtype, True), x, other, 1e-6, weight)
    check(regions.layer_norm(dtype), x[:2], 1e-5, weight, weight)
    check(regions.bias_gelu_residual(dtype, "tanh"), x, weight, other)


def test_teams_and_blocks() -> None:
    """Rows that share a block, the last of them without a row; and rows that blocks take in turns."""
    form = check(regions.softmax("float32"), random("float32", 5, 8))
    assert (form.pack, form.team, form.teams) == (4, 2, 4)
    form = check(regions.rms_norm_backward("float32", True), *backward_inputs("float32", 5, 8))
    assert (form.team, form.teams) == (2, 4)
    x, weight = random("float32", 2, 260), random("float32", 260)
    kernel = Sized(regions.bias_gelu_residual("float32", "none"), NumbaRunner(None))
    assert_no_worse(kernel.region, (x, weight, x), kernel(x, weight, x))
    assert kernel.size.blocks == (2, 3)  # 4 packs of 4 columns for each of 8 threads
    few = Few(regions.rms_norm_backward("float32", True), NumbaRunner(None))
    inputs = backward_inputs("float32", 9, 36)
    assert_no_worse(few.region, inputs, few(*inputs))
    few = Few(regions.swiglu("float32"), NumbaRunner(None))
    assert_no_worse(few.region, (x, x), few(x, x))


class Sized(NumbaCudaKernel):
    """Keeps the size of its last launch."""

    size: Size

    def form_and_size(self, *given: Any) -> tuple[Form, Size]:
        form, self.size = super().form_and_size(*given)
        return form, self.size


class Few(NumbaCudaKernel):
    """One block does all rows."""

    def form_and_size(self, *given: Any) -> tuple[Form, Size]:
        form, size = super().form_and_size(*given)
        return form, replace(size, blocks=(1, 1), parts=min(size.parts, form.teams))


def backward_inputs(dtype: Dtype, rows: int, columns: int) -> tuple[Tensor, ...]:
    x, grad, weight = random(dtype, rows, columns), random(dtype, rows, columns), random(dtype, columns)
    scale = x.to(getattr(torch, regions.math_of(dtype))).square().mean(-1).rsqrt()
    return grad, x, scale, weight, grad


def test_sums_over_rows() -> None:
    check(regions.rms_norm_backward("bfloat16", True), *backward_inputs("bfloat16", 6, 16))
    x, weight = random("float32", 3, 10), random("float32", 10)
    check(regions.bias_gelu_residual_backward("float32", "none"), x, x, weight)
    empty = torch.empty(0, 8)
    found = kernel_of(regions.rms_norm_backward("float32", True))(
        empty, empty, empty[:, 0], torch.randn(8), empty
    )
    assert found[0].shape == (0, 8) and torch.equal(found[1], torch.zeros(8))


def test_pointwise() -> None:
    """Places one after the other are one long row; where they are not, rows keep their strides."""
    x, y = random("float16", 3, 40), random("float16", 3, 40)
    assert check(regions.swiglu("float16"), x, y).flat
    double = random("float64", 4, 3, 5)
    form = check(regions.swiglu("float64"), double.transpose(0, 1), double.transpose(0, 1)[:, :1])
    assert (form.flat, form.row_dims) == (False, 2)
    form = check(regions.swiglu("float32"), random("float32", 8, 6).t(), random("float32", 6, 1))
    assert form.strided == ("gate", "up")
    check(
        regions.rotary("float32"), *random("float32", 2, 3, 16).chunk(2, -1), *random("float32", 2, 1, 8)
    )
    numbers = (0.01, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1)
    moments = random("float32", 33), random("float32", 33).abs()
    check(regions.adamw("bfloat16"), *random("bfloat16", 2, 33), *moments, *numbers)


def test_cross_entropy_with_a_factor_on_the_device() -> None:
    x, target = random("float32", 5, 12), torch.tensor([0, 3, -100, 5, 11])
    factor = torch.tensor(0.25, dtype=torch.float64)
    form = check(regions.cross_entropy("float32", True), x, target, -100, factor)
    assert form.pointers == ("factor",)


def test_dropout_draws_what_the_reference_draws() -> None:
    check(regions.dropout("float32"), torch.ones(2, 60), -(2**40) + 5, 0.3)


def test_integers_and_bools() -> None:
    region = integers_and_bools()
    for columns in (9, 16):
        row_given = torch.tensor([0, 8, -1, columns], dtype=torch.int32)
        inputs = torch.randn(4, columns), torch.rand(4, columns) < 0.5, row_given
        for given_flag in (True, False):
            found = kernel_of(region)(*inputs, given_flag)
            torch.testing.assert_close(found, reference.run(region, *inputs, given_flag), rtol=0, atol=0)


def test_outputs_over_inputs() -> None:
    x, residual, weight = torch.randn(3, 24), torch.randn(3, 24), torch.randn(24)
    region = regions.rms_norm("float32", True)
    out, total = torch.empty(3, 24), x.clone()
    kernel_of(region)(total, residual, 1e-6, weight, out=(out, total))
    assert_no_worse(region, (x, residual, 1e-6, weight), (out, total))
    memory = torch.empty(5, 24)
    memory[:4] = start = torch.randn(4, 24)
    place = memory.view(-1)[12:108].view(4, 24)  # half a row past the input
    (found,) = kernel_of(regions.softmax("float32"))(memory[:4], out=(place,))
    torch.testing.assert_close(found, start.softmax(-1))


# --- operators and conversions -----------------------------------------------------------------


def test_every_operator() -> None:
    b = Builder()
    x, y = b.input("x", "float32"), b.input("y", "float32")
    names = (
        "neg",
        "abs",
        "reciprocal",
        "sqrt",
        "rsqrt",
        "exp",
        "expm1",
        "log",
        "log1p",
        "sigmoid",
        "tanh",
    )
    found = [b.apply(name, x) for name in (*names, "erf", "sin", "cos")]
    found += [b.apply(name, x, y) for name in ("add", "sub", "mul", "div", "maximum", "minimum", "pow")]
    compared = [b.apply(name, x, y) for name in ("eq", "ne", "lt", "le", "gt", "ge")]
    found += [b.apply("where", value, 1.0, 0.0) for value in compared]
    outputs = [b.output(f"f{n}", value, "float32") for n, value in enumerate(found)]
    nan = float("nan")
    x_given = torch.tensor([0.5, -0.5, 0.0, -0.0, 1.0, 90.0, -90.0, INFINITY, -INFINITY, nan, 1e-30, 1.0])
    y_given = torch.tensor([0.5, 2.0, 1.0, 0.0, nan, 0.5, 3.0, 1.0, 2.0, 1.0, 0.5, INFINITY])
    check(b.region(*outputs), x_given, y_given)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_conversions_are_those_of_torch(dtype: Dtype) -> None:
    """Some of the 65,536 halves, and floats that lie between them, in packs and apart."""
    kind = getattr(torch, dtype)
    every = torch.arange(-(2**15), 2**15, 61, dtype=torch.int32)[:1072].to(torch.int16)
    b = Builder()
    x = b.input("x", dtype)
    widened = b.region(b.output("out", x * 1.0, "float32"))
    b = Builder()
    y = b.input("x", "float32")
    rounded = b.output("rounded", b.round(y, dtype) * 1.0, "float32")
    narrowed = b.region(b.output("out", y * 1.0, dtype), rounded)
    for count in (1072, 1071):
        given_halves = every[:count].view(kind)
        (found,) = kernel_of(widened)(given_halves)
        torch.testing.assert_close(found, given_halves.float(), rtol=0, atol=0, equal_nan=True)
        between = (found + found.roll(1)) / 2
        out, again = kernel_of(narrowed)(between)
        torch.testing.assert_close(out, between.to(kind), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(again, between.to(kind).float(), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_random_regions(data: st.DataObject) -> None:
    region, inputs = drawn_region(data, [1, 7, 16], (*UNARY, "sin", "cos"))
    check(region, *inputs, size=1.0)


def test_a_missing_barrier_shows() -> None:
    """The simulator is worth something: without its barriers, a reduction goes wrong."""
    region, x = regions.softmax("float32"), torch.randn(2, 24)

    class Without(NumbaCudaKernel):
        def write(self, form: Form) -> Source:
            source = super().write(form)
            return replace(source, text=source.text.replace("cuda.syncthreads()", "pass"))

    (found,) = Without(region, NumbaRunner(None))(x)
    assert not torch.allclose(found, x.softmax(-1))
