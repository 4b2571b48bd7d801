"""Generated CUDA C, run on the CPU by emulation: the same results as the reference, for any form.

What is compared is the text that a GPU gets. Errors are judged as those of the CPU kernels are.
"""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_regions import UNARY, assert_no_worse, drawn_region
from torch import Tensor

from graphopt.codegen import cuda_emulation, cuda_form, regions
from graphopt.codegen.builder import Builder
from graphopt.codegen.cuda_emulation import Emulator
from graphopt.codegen.cuda_form import Form
from graphopt.codegen.cuda_launch import CudaKernel
from graphopt.codegen.cuda_source import write
from graphopt.codegen.cuda_text import head
from graphopt.codegen.region import Dtype, Region
from graphopt.errors import CodegenError

INFINITY = float("inf")
needs_compiler = pytest.mark.skipif(cuda_emulation.compiler() is None, reason="no C++ compiler")


def check(region: Region, *inputs: Any, falling: bool = False, size: float = 0.0) -> Form:
    """Compare, and give the form that was chosen."""
    kernel = CudaKernel(region, Emulator(falling))
    assert_no_worse(region, inputs, kernel(*inputs), size)
    assert not kernel.broken
    (launch,) = kernel._launches.values()
    return launch.source.form


def random(dtype: Dtype, *shape: int) -> Tensor:
    return torch.randn(shape).to(getattr(torch, dtype))


# --- forms -------------------------------------------------------------------------------------


@needs_compiler
def test_teams_and_loops() -> None:
    """From a part of a warp to a block, in registers and in a loop."""
    region, norm = regions.softmax("bfloat16"), regions.rms_norm("float32", True)
    assert check(region, random("bfloat16", 70, 24)) == Form(pack=8, team=4, teams=64, held=1)
    x, weight = random("float32", 3, 2000), random("float32", 2000)
    assert check(norm, x, x, 1e-6, weight, falling=True) == Form(pack=4, team=128, held=4)
    x = random("bfloat16", 2, 40000)
    assert check(region, x) == Form(pack=8, team=1024, held=6, lean=True)
    x = random("bfloat16", 2, 66000)
    assert check(region, x, falling=True) == Form(pack=8, team=512)


@needs_compiler
def test_packs() -> None:
    """Columns are taken one at a time where rows are not aligned, and the last pack may be cut."""
    region = regions.softmax("float32")
    assert check(region, random("float32", 4, 33)).pack == 1
    assert check(region, random("float32", 4, 34)).pack == 2
    padded = random("float32", 4, 40)[:, :33]
    kernel = CudaKernel(region, Emulator())
    (found,) = kernel(padded, out=(torch.empty(4, 40)[:, :33],))
    torch.testing.assert_close(found, padded.softmax(-1))
    form = next(iter(kernel._launches.values())).source.form
    assert (form.pack, form.tail) == (4, True)
    memory = torch.randn(4 * 32 + 1)[1:].view(4, 32)  # not on 16 bytes
    assert check(region, memory).pack == 1
    assert check(regions.swiglu("bfloat16"), *(random("bfloat16", 3, 11) for _ in range(2))).flat


@needs_compiler
def test_sums_over_rows() -> None:
    x, weight = random("bfloat16", 300, 48), random("bfloat16", 48)
    scale = x.float().square().mean(-1).rsqrt()
    check(regions.rms_norm_backward("bfloat16", True), x, x, scale, weight, x)
    check(regions.bias_gelu_residual_backward("bfloat16", "none"), x, x, weight)
    long, weight = random("float32", 3, 33000), random("float32", 33000)
    region = regions.layer_norm_backward("float32")
    assert check(region, long, long, long.mean(-1), long.std(-1), weight).held == 0


@needs_compiler
def test_scalars_on_the_device() -> None:
    """A factor in memory is read there, so that nothing waits for it."""
    region, x = regions.cross_entropy("float32", True), torch.randn(5, 40)
    target = torch.tensor([0, 3, -100, 5, 39])
    form = check(region, x, target, -100, torch.tensor(0.25, dtype=torch.float64))
    assert form.pointers == ("factor",)
    assert check(region, x, target, -100, 0.25).pointers == ()


# --- random regions ----------------------------------------------------------------------------

CUDA_UNARY = (*UNARY, "sin", "cos")


def random_region(data: st.DataObject) -> None:
    region, inputs = drawn_region(data, [1, 7, 64, 130, 4100], CUDA_UNARY)
    loops = data.draw(st.booleans())  # rows that would fit, read again all the same
    limits = dict.fromkeys(cuda_form.HELD_BYTES, 0) if loops else cuda_form.HELD_BYTES
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_form, "HELD_BYTES", limits)
        check(region, *inputs, falling=data.draw(st.booleans()), size=1.0)


@needs_compiler
@settings(max_examples=6, deadline=None, phases=[Phase.explicit, Phase.generate])  # each is compiled
@given(st.data())
def test_random_regions(data: st.DataObject) -> None:
    random_region(data)


@needs_compiler
@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_many_random_regions(data: st.DataObject) -> None:
    random_region(data)


# --- special values and sizes ------------------------------------------------------------------


def rows_of(dtype: Dtype, columns: int) -> Tensor:
    """Six rows: usual numbers, large ones, and rows of -inf, with a NaN, with +inf, of zeros."""
    x = torch.randn(6, columns)
    x[1] *= 1e3
    if columns:
        x[2], x[3, columns // 2], x[4, 0], x[5] = -INFINITY, float("nan"), INFINITY, 0.0
    return x.to(getattr(torch, dtype))


@needs_compiler
@pytest.mark.parametrize("loops", [False, True])
def test_special_values(loops: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if loops:
        monkeypatch.setattr(cuda_form, "HELD_BYTES", dict.fromkeys(cuda_form.HELD_BYTES, 0))
    target = torch.tensor([0, 3, 1, -100, 2, 0])
    for columns in (0, 5, 3000):
        x = rows_of("bfloat16", columns)
        aims = target.clamp(max=columns - 1)
        assert check(regions.cross_entropy("bfloat16", True), x, aims, -100, 0.25).held == (
            0 if loops else {0: 1, 5: 1, 3000: 3}[columns]
        )


@needs_compiler
def test_no_rows() -> None:
    x = torch.empty(0, 8)
    found = CudaKernel(regions.rms_norm_backward("float32", True), Emulator())(
        x, x, x[:, 0], torch.randn(8), x
    )
    assert found[0].shape == (0, 8) and torch.equal(found[1], torch.zeros(8))


@needs_compiler
def test_conversions_are_those_of_torch() -> None:
    """All 65,536 halves, both kinds, and floats that lie between them."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in ("float16", "bfloat16"):
        kind = getattr(torch, dtype)
        b = Builder()
        widened = b.region(b.output("out", b.input("x", dtype) * 1.0, "float32"))
        (found,) = CudaKernel(widened, Emulator())(every.view(kind))
        torch.testing.assert_close(found, every.view(kind).float(), rtol=0, atol=0, equal_nan=True)
        b = Builder()
        narrowed = b.region(b.output("out", b.input("x", "float32") * 1.0, dtype))
        x = torch.cat([found, found * 1.0004, found * 0.9997, found * 1e-3, torch.randn(4096) * 1e-7])
        x = torch.cat([x, found.nextafter(found * 2), (found + found.roll(1)) / 2])
        (result,) = CudaKernel(narrowed, Emulator())(x)
        torch.testing.assert_close(result, x.to(kind), rtol=0, atol=0, equal_nan=True)


@needs_compiler
def test_dropout_draws_what_the_reference_draws() -> None:
    check(regions.dropout("float32"), torch.ones(8, 100), -(2**40) + 5, 0.3)


@needs_compiler
@pytest.mark.slow
def test_sanitizers() -> None:
    """The same kernels under address and undefined-behaviour sanitizers, in a process of their own."""
    found = cuda_emulation.compiler()
    library = subprocess.run(
        [str(found), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    variables = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", SANITIZED]
    import os

    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | variables, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "heap-buffer-overflow" in _broken(variables)


SANITIZED = """
import torch
from graphopt.codegen import reference, regions
from graphopt.codegen.cuda_emulation import Emulator
from graphopt.codegen.cuda_launch import CudaKernel
runner = Emulator(sanitizers=("address", "undefined"))
for dtype in ("float32", "bfloat16"):
    for columns in (7, 64, 3000, 66000):
        x = torch.randn(5, columns).to(getattr(torch, dtype))
        w = torch.randn(columns).to(x.dtype)
        for region, inputs in (
            (regions.rms_norm(dtype, True), (x, x, 1e-6, w)),
            (regions.rms_norm_backward(dtype, True), (x, x, x[:, 0].float(), w, x)),
            (regions.cross_entropy(dtype, True), (x, torch.arange(5), -100, 0.5)),
            (regions.swiglu(dtype), (x, x)),
        ):
            found = CudaKernel(region, runner)(*inputs)
            for f, e in zip(found, reference.run(region, *inputs), strict=True):
                torch.testing.assert_close(f, e, rtol=2e-2, atol=2e-2)
"""


def _broken(variables: dict[str, str]) -> str:
    """What the sanitizer says of a kernel that is told of one row too many."""
    import os

    text = """
import torch
from graphopt.codegen import regions
from graphopt.codegen.cuda_emulation import Emulator
from graphopt.codegen.cuda_launch import CudaKernel
class Wrong(Emulator):
    def prepare(self, source, size, fixed):
        return super().prepare(source, size, (fixed[0] + 1, *fixed[1:]))
CudaKernel(regions.softmax("float32"), Wrong(sanitizers=("address",)))(torch.randn(5, 4096))
"""
    command = [sys.executable, "-c", text]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | variables, check=False
    )
    return done.stderr


# --- texts -------------------------------------------------------------------------------------


@needs_compiler
def test_a_missing_barrier_shows() -> None:
    """The emulation is worth something: without its barrier, a reduction goes wrong."""
    region, x = regions.softmax("float32"), torch.randn(2, 4000)

    class Without(Emulator):
        def prepare(self, source: Any, size: Any, fixed: Any) -> Any:
            text = source.text.replace("    __syncthreads();\n", "")
            assert text != source.text
            return super().prepare(replace(source, text=text), size, fixed)

    (found,) = CudaKernel(region, Without())(x)
    assert not torch.allclose(found, x.softmax(-1))


def test_an_operator_that_the_backend_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.codegen import region as module

    monkeypatch.setattr(module, "OPS", {**module.OPS, "gamma": module.Op(1, "float")})
    b = Builder()
    region = b.region(b.output("out", b.apply("gamma", b.input("x", "float32")), "float32"))
    with pytest.raises(CodegenError, match="no gamma"):
        CudaKernel(region)


def test_the_text_of_a_kernel() -> None:
    b = Builder()
    x = b.input("x", "bfloat16")
    region = b.region(b.output("out", x * b.max(x), "bfloat16"))
    text = write(region, Form(pack=8, team=128, held=4)).text
    first, body = text.split(head())
    assert body.strip() == TEXT
    assert first == FIRST


FIRST = """\
// x0: x, bfloat16, full
// y0: out, bfloat16, full
typedef float real;
enum { TEAM = 128, TEAMS = 1 };
enum { PACK = 8, HELD = 4 };

"""
TEXT = """\
extern "C" __global__ void __launch_bounds__(128) kernel(
    long long rows,
    long long columns,
    const char* x0,
    long long x0_0,
    char* y0,
    long long y0_0) {
  const long long first = (long long)threadIdx.x * PACK;
  __shared__ real slots[2][1][32];
  int turn = 0;
  for (long long group = blockIdx.x; group * TEAMS < rows; group += gridDim.x) {
    const long long row = group;
    const char* const x0_row = x0 + row * x0_0;
    char* const y0_row = y0 + row * y0_0;
    Pack<dtype_bfloat16, PACK> x0_pack[HELD];
    EACH for (int e = 0; e < HELD; ++e) {
      const long long j = first + e * (TEAM * PACK);
      if (j < columns) {
        x0_pack[e].load<false>(x0_row + j * 2, columns - j);
      }
    }
    real p1 = Max::start();
    EACH for (int e = 0; e < HELD; ++e) {
      const long long j = first + e * (TEAM * PACK);
      if (j < columns) {
        EACH for (int k = 0; k < PACK; ++k) {
          const real v0 = (real)x0_pack[e].get(k);
          p1 = Max::join(p1, v0);
        }
      }
    }
    const real v1 = reduce<Max, TEAM>(p1, slots[turn][0]);
    EACH for (int e = 0; e < HELD; ++e) {
      const long long j = first + e * (TEAM * PACK);
      if (j < columns) {
        Pack<dtype_bfloat16, PACK> y0_pack; y0_pack.clear();
        EACH for (int k = 0; k < PACK; ++k) {
          const real v0 = (real)x0_pack[e].get(k);
          const real v2 = v0 * v1;
          y0_pack.set(k, v2);
        }
        y0_pack.store<false>(y0_row + j * 2, columns - j);
      }
    }
    turn ^= 1;
  }
}"""
