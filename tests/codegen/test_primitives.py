"""The elementary functions and the 16-bit conversions, over samples of all floats."""

import numpy as np
import pytest
import torch
from torch import Tensor

from graphopt.codegen import formulas, reference
from graphopt.codegen.builder import Builder
from graphopt.codegen.numba_cpu import compile_region
from graphopt.codegen.region import Dtype, Math, Region

LARGEST = torch.finfo(torch.float32).max
# Every 4099th of all floats, NaN and infinities among them; and what lies around the limits.
DENSE = torch.arange(0, 2**32, 4099).to(torch.int32).view(torch.float32)
EDGES = torch.tensor(
    [0.0, -0.0, 1e-45, -1e-45, 0.95, -1.0, 88.72, 89.0, -87.4, -103.9, -104.5, 1.0, LARGEST]
)
SAMPLES = torch.cat([DENSE, EDGES, -EDGES, torch.tensor([float("inf"), float("-inf"), float("nan")])])


def unary(op: str, math: Math = "float32") -> Region:
    b = Builder(math)
    return b.region(b.output("out", b.apply(op, b.input("x", math)), math))


def moved(target: Dtype, source: Dtype) -> Region:
    """A kernel that only loads and stores."""
    b = Builder("float64" if "float64" in (target, source) else "float32")
    return b.region(b.output("out", b.input("x", source), target))


def run(region: Region, *inputs: Tensor) -> Tensor:
    return compile_region(region, None)(*inputs)[0]


@pytest.mark.parametrize("op", formulas.TOLERANCE_ULP)
def test_error_in_units_of_the_last_place(op: str) -> None:
    found = run(unary(op), SAMPLES)
    (exact,) = reference.run(unary(op), SAMPLES, math=torch.float64, rounded=False)
    (eager,) = reference.run(unary(op), SAMPLES)
    size = exact.abs()
    normal = (size > formulas.TINY) & (size <= LARGEST)
    near = size.float()
    unit = (torch.nextafter(near, torch.tensor(float("inf"))) - near).double()
    error = ((found.double() - exact).abs() / unit)[normal]
    assert error.max() <= formulas.TOLERANCE_ULP[op], float(SAMPLES[normal][error.argmax()])
    small = size <= formulas.TINY
    assert ((found.double() - exact).abs()[small] <= formulas.TINY).all()
    special = ~(normal | small)
    assert torch.equal(found[special].isnan(), eager[special].isnan())
    assert torch.equal(found[special].nan_to_num(0.5), eager[special].nan_to_num(0.5))
    assert torch.equal(found.signbit()[size == 0], exact.signbit()[size == 0])


@pytest.mark.parametrize("op", ["exp", "expm1", "log1p", "tanh", "erf"])
def test_float64_functions(op: str) -> None:
    x = torch.linspace(-0.99, 20, 1001, dtype=torch.float64)
    torch.testing.assert_close(run(unary(op, "float64"), x), getattr(torch, op)(x), rtol=4e-16, atol=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_half_is_loaded_exactly(dtype: Dtype) -> None:
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(getattr(torch, dtype))
    found = run(moved("float32", dtype), halves)
    assert torch.equal(found.nan_to_num(1.5), halves.float().nan_to_num(1.5))
    assert torch.equal(found.signbit(), halves.signbit())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_floats_are_rounded_to_the_nearest_half(dtype: Dtype) -> None:
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(getattr(torch, dtype)).float()
    ties = (halves[1:] + halves[:-1]) / 2  # exactly between two
    x = torch.cat([SAMPLES, ties, torch.nextafter(ties, torch.tensor(0.0))])
    found, eager = run(moved(dtype, "float32"), x), x.to(getattr(torch, dtype))
    assert torch.equal(found.isnan(), eager.isnan())
    kept = ~eager.isnan()
    assert torch.equal(found.view(torch.int16)[kept], eager.view(torch.int16)[kept])


def test_doubles_are_rounded_once() -> None:
    halves = torch.arange(0, 0x7BFF).to(torch.int16).view(torch.float16).double()
    ties = (halves[1:] + halves[:-1]) / 2
    x = torch.cat([ties * (1 + d) for d in (-(2.0**-50), 0.0, 2.0**-50)])
    found = run(moved("float16", "float64"), x)
    np.testing.assert_array_equal(found.numpy(), x.numpy().astype(np.float16))
