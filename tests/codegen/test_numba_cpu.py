"""Generated kernels against the reference in float64: never much worse than eager in their own dtype."""

import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_regions import assert_no_worse, drawn_region, integers_and_bools
from torch import Tensor

from graphopt import kernels
from graphopt.codegen import native, numba_choice, reference, regions
from graphopt.codegen.builder import Builder
from graphopt.codegen.numba_cpu import NumbaKernel, compile_region
from graphopt.codegen.numba_forms import Form
from graphopt.codegen.numba_source import write
from graphopt.codegen.region import Dtype, Region
from graphopt.errors import CodegenError

INFINITY = float("inf")


def check(region: Region, *inputs: Any) -> None:
    assert_no_worse(region, inputs, compile_region(region, None)(*inputs))


# --- random regions ----------------------------------------------------------------------------


@settings(max_examples=10, phases=[Phase.explicit, Phase.generate])  # each compiles a kernel
@given(st.data())
def test_random_regions(data: st.DataObject) -> None:
    region, inputs = drawn_region(data, [1, 7, 64, 130])
    check(region, *inputs)


# --- the common regions ------------------------------------------------------------------------


def rows_of(dtype: torch.dtype, columns: int) -> Tensor:
    """Six rows: usual numbers, large ones, and rows of -inf, with a NaN, with +inf, of zeros."""
    x = torch.randn(6, columns)
    x[1] *= 1e3
    if columns:
        x[2], x[3, columns // 2], x[4, 0], x[5] = -INFINITY, float("nan"), INFINITY, 0.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_special_values_and_sizes(dtype: Dtype) -> None:
    kind = getattr(torch, dtype)
    target = torch.tensor([0, 3, 1, -100, 2, 0])
    for columns in (0, 1, 300, 5000):
        x, other, weight = (
            rows_of(kind, columns),
            rows_of(kind, columns).flip(0),
            torch.randn(columns).to(kind),
        )
        check(regions.rms_norm(dtype, True), x, other, 1e-6, weight)
        check(regions.softmax(dtype), x)
        aims = target.clamp(max=columns - 1)
        check(regions.cross_entropy(dtype, True), x, aims, -100, 0.25)
        check(regions.bias_gelu_residual(dtype, "tanh"), x, weight, other)


@pytest.mark.parametrize("rows", [(0,), (3, 0)])
def test_no_rows(rows: tuple[int, ...]) -> None:
    x = torch.empty(*rows, 8)
    check(regions.rms_norm("float32", True), x, x, 1e-6, torch.randn(8))
    check(regions.rms_norm_backward("float32", True), x, x, x[..., 0], torch.randn(8), x)


def test_float16_and_float64() -> None:
    for dtype in (torch.float16, torch.float64):
        name: Any = str(dtype).removeprefix("torch.")
        x, y, w = (torch.randn(s).to(dtype) for s in ((4, 33), (4, 33), (33,)))
        check(regions.layer_norm(name), x, 1e-5, w, w)
        check(regions.swiglu(name), x, y)


def test_backwards() -> None:
    x, grad, w = torch.randn(2, 5, 40), torch.randn(2, 5, 40), torch.randn(40)
    mean, scale = x.mean(-1), x.var(-1).rsqrt()
    check(regions.layer_norm_backward("float32"), grad, x, mean, scale, w)
    check(regions.rms_norm_backward("float32", True), grad, x, scale, w, grad)
    check(regions.bias_gelu_residual_backward("float32", "none"), grad, x, w)


@pytest.mark.parametrize("columns", [7, 24, 70])
def test_rows_in_several_dimensions(columns: int) -> None:
    """Runs of rows that lie apart, cut anywhere by the parts of a sum over them."""
    x = torch.randn(3, 37, 2, columns).transpose(1, 2)
    grad = torch.randn(2, 37, columns).expand(3, 2, 37, columns)
    scale, w = torch.rand(3, 1, 37).expand(3, 2, 37) + 0.5, torch.randn(columns)
    check(regions.rms_norm_backward("float32", True), grad, x, scale, w, x)
    check(regions.swiglu("float32"), grad, x)
    check(regions.dropout("float32"), x, 3, 0.5)


def rotary() -> Region:
    """Halves of a row, turned by the angles of two tables."""
    b = Builder()
    x, y, cos, sin = (b.input(name, "float32") for name in ("x", "y", "cos", "sin"))
    return b.region(
        b.output("first", x * cos - y * sin, "float32"), b.output("second", y * cos + x * sin, "float32")
    )


@pytest.mark.parametrize("columns", [8, 16, 48, 64])
def test_short_rows_become_vectors(columns: int) -> None:
    kernel = NumbaKernel(rotary(), None)
    x = torch.randn(2, 5, 3, 2 * columns).transpose(1, 2)
    halves = x[..., :columns], x[..., columns:]
    tables = torch.randn(5, columns).cos(), torch.randn(5, columns).sin()
    assert_no_worse(kernel.region, (*halves, *tables), kernel(*halves, *tables))
    ((form, compiled),) = kernel._compiled.items()
    assert (form.columns, form.row_dims) == (columns, 3)
    text = str(native.optimized(compiled.source))
    assert re.search(r"fmul <\d+ x float>", text) and not re.search(r"fmul float", text)


def test_integers_and_bools() -> None:
    region = integers_and_bools()
    inputs = torch.randn(4, 9), torch.rand(4, 9) < 0.5, torch.tensor([0, 8, -1, 9], dtype=torch.int32)
    for flag_given in (True, False):
        found = compile_region(region, None)(*inputs, flag_given)
        torch.testing.assert_close(found, reference.run(region, *inputs, flag_given), rtol=0, atol=0)


def test_optimizer_in_place() -> None:
    start = [torch.randn(3000) for _ in range(4)]
    start[3].abs_()
    numbers = (0.999, 0.99, 0.1, 0.01, 1e-8, 0.1, 0.1)
    region = regions.adamw("float32")
    p, g, m, v = (x.clone() for x in start)
    compile_region(region, None)(p, g, m, v, *numbers, out=(p, m, v))
    assert_no_worse(region, (*start, *numbers), (p, m, v))


def test_outputs_that_overlap_what_is_read_later() -> None:
    x = torch.randn(4, 65)
    region = regions.softmax("float32")
    memory = torch.empty(5, 65)
    for first in (0, 1):  # onto the input itself, and half a row past it
        memory[:4] = x
        place = memory.view(-1)[first * 30 : first * 30 + 260].view(4, 65)
        (found,) = compile_region(region, None)(memory[:4], out=(place,))
        torch.testing.assert_close(found, x.softmax(-1))


def test_sum_over_an_input() -> None:
    x, residual, w = torch.randn(3, 70), torch.randn(3, 70), torch.randn(70)
    region, total, out = regions.rms_norm("float32", True), x.clone(), torch.empty(3, 70)
    compile_region(region, None)(total, residual, 1e-6, w, out=(out, total))
    assert_no_worse(region, (x, residual, 1e-6, w), (out, total))


def test_dropout_draws_the_same_again() -> None:
    x = torch.ones(64, 1000)
    region = regions.dropout("float32")
    (first,), (again,), (other,) = (compile_region(region, None)(x, seed, 0.3) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    check(region, x, -(2**40) + 5, 0.3)
    kept = first != 0
    assert abs(kept.float().mean() - 0.7) < 0.01
    assert abs((kept & (other != 0)).float().mean() - 0.49) < 0.01  # seeds are independent
    assert abs((kept[1:] & kept[:-1]).float().mean() - 0.49) < 0.01


@pytest.mark.parametrize("first", [0, 3])
def test_streamed_outputs(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_choice, "STREAM_BYTES", 0)
    kernel = NumbaKernel(regions.rms_norm("float32", True), None)
    x, w = torch.randn(5, 2080), torch.randn(2080)
    out = [torch.zeros(5 * 2080 + 16)[first : first + 5 * 2080].view(5, 2080) for _ in range(2)]
    kernel(x, x, 1e-6, w, out=out)
    streamed = {form.streamed for form in kernel._compiled}
    assert streamed == {("out", "sum") if first == 0 else ()}
    assert_no_worse(kernel.region, (x, x, 1e-6, w), out)
    monkeypatch.setattr(numba_choice, "STREAM_COST", numba_choice.STREAM_ALL)
    kernel = NumbaKernel(regions.swiglu("float32"), None)
    (flat,) = kernel(x[0, :2079], x[1, :2079])
    assert [form.streamed for form in kernel._compiled] == [("out",)]
    torch.testing.assert_close(flat, torch.nn.functional.silu(x[0, :2079]) * x[1, :2079])


# --- what cannot be done -----------------------------------------------------------------------


@pytest.mark.parametrize("op", ["sin", "cos", "pow"])
def test_an_operator_that_the_backend_lacks(op: str) -> None:
    b = Builder()
    x = b.input("x", "float32")
    region = b.region(b.output("out", b.apply(op, *[x] * (2 if op == "pow" else 1)), "float32"))
    with pytest.raises(CodegenError, match=f"no {op}"):
        compile_region(region, None)
    x_abs = torch.rand(3, 4)
    (expected,) = reference.run(region, x_abs)
    torch.testing.assert_close(expected, x_abs**x_abs if op == "pow" else getattr(torch, op)(x_abs))


def test_tensors_that_a_kernel_is_not_for() -> None:
    kernel = compile_region(regions.softmax("float32"), None)
    with pytest.raises(CodegenError, match=r"float32 on cpu was given torch\.float64"):
        kernel(torch.randn(2, 3, dtype=torch.float64))
    with pytest.raises(CodegenError, match="on meta"):
        kernel(torch.randn(2, 3, device="meta"))


def test_a_broken_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise OSError("no code can be made here")

    monkeypatch.setattr("numba.njit", broken)
    region, x = regions.softmax("float32"), torch.randn(3, 4)
    kernel = NumbaKernel(region, None)
    with pytest.warns(UserWarning, match="runs by torch operators") as remarks:
        (first,), (second,) = kernel(x), kernel(x)
    assert len(remarks) == 1
    torch.testing.assert_close(first, x.softmax(-1))
    assert torch.equal(first, second)


# --- processes and threads ---------------------------------------------------------------------

FORK = """
import os, threading
import numpy as np
import torch
from graphopt.codegen import native, regions
from graphopt.codegen.numba_cpu import NumbaKernel
torch.set_num_threads(2)
kernel = NumbaKernel(regions.rms_norm_backward("float32", True), None)
x, w = torch.randn(300, 500), torch.randn(500)
serial = native.Kernel.__call__
chunks = []
def seen(self, count, *more):
    chunks.append(count)
    return serial(self, count, *more)
native.Kernel.__call__ = seen
args = (x, x * 2, x[:, 0], w, x)
parallel = kernel(*args)
threads = [threading.Thread(target=kernel, args=args) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert {*chunks} == {2}, chunks
chunks.clear()
child = os.fork()
if child == 0:
    forked = kernel(*args)
    same = all(np.allclose(a.numpy(), b.numpy(), 1e-5, 1e-3) for a, b in zip(forked, parallel))
    os._exit(0 if same and chunks == [1] else 1)  # torch's own threads would wait for ever here
assert os.waitpid(child, 0)[1] == 0
"""


def test_parallel_calls_threads_and_forks() -> None:
    command = [sys.executable, "-c", FORK]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("openmp", [True, False])
def test_chunks_are_shared_by_threads(openmp: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's OpenMP, and where that cannot be found with Python's threads."""
    if not openmp:
        monkeypatch.setattr(native, "_openmp", lambda: None)
    region = regions.rms_norm_backward("float32", True)
    args = (
        torch.randn(300, 500),
        torch.randn(300, 500),
        torch.rand(300),
        torch.randn(500),
        torch.ones(300, 500),
    )
    alone = NumbaKernel(region, None)(*args)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(20):
            for x, y in zip(NumbaKernel(region, None)(*args), alone, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)
    finally:
        torch.set_num_threads(before)


def test_the_text_of_a_kernel() -> None:
    b = Builder()
    x = b.input("x", "float32")
    region = b.region(b.output("out", x * b.max(x), "bfloat16"))
    text = write(region, Form(strided=("x",))).text
    body = text[text.index("def rows") :].strip()
    assert body == TEXT


TEXT = """\
def rows(begin, end, columns, buffer, pitch, sums, x0, x0_0, x0_step, y0, y0_0):
    one, zero = real(1), real(0)
    for row in range(begin, end):
        x0_row = x0 + row * x0_0
        y0_row = y0 + row * y0_0
        v1 = -infinity
        for start in range(0, columns, 2048):
            stop = min(start + 2048, columns)
            p1 = -infinity
            for j in range(start, stop):
                v0 = load_float32(x0_row, j * x0_step, 0, one)
                p1 = maximum(p1, v0)
            v1 = maximum(v1, p1)
        for start in range(0, columns, 2048):
            stop = min(start + 2048, columns)
            for j in range(start, stop):
                v0 = load_float32(x0_row, j * x0_step, 0, one)
                v2 = v0 * v1
                store_bfloat16(y0_row, j, v2, 1)"""


def test_large_resident_outputs_on_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.codegen.numba_cpu.resident", lambda *_: True)
    x, residual, weight = torch.randn(2048, 2048), torch.randn(2048, 2048), torch.randn(2048)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found, total = kernels.rms_norm(x, weight, eps=1e-6, residual=residual)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(total, x + residual)
    expected = torch.nn.functional.rms_norm((x + residual).double(), (2048,), weight.double(), 1e-6)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=2e-6)
