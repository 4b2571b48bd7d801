"""Regions of drawn operators, and inputs of drawn layouts for them."""

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from graphopt.codegen import reference
from graphopt.codegen.builder import Builder, Expression
from graphopt.codegen.region import Dtype, Extent, Region

INFINITY = float("inf")
UNARY = ("neg", "abs", "tanh", "sigmoid", "erf", "exp", "expm1", "sqrt", "log1p")
BINARY = ("add", "sub", "mul", "maximum", "minimum")
FLOATS: list[Dtype] = ["float32", "float64", "bfloat16", "float16"]


class Draw:
    """A region, built of drawn choices; comparisons are of inputs only, which both sides know exactly.

    `unary`: the operators of one operand to draw from.
    """

    def __init__(self, data: st.DataObject, unary: Sequence[str] = UNARY) -> None:
        self.data, self.unary = data, unary
        self.b = Builder(data.draw(st.sampled_from(["float32", "float32", "float64"])))
        extents = [Extent.FULL, *data.draw(st.lists(st.sampled_from(Extent), max_size=3))]
        dtypes = [data.draw(st.sampled_from(FLOATS)) for _ in extents]
        self.inputs = [
            self.b.input(f"x{n}", *given) for n, given in enumerate(zip(dtypes, extents, strict=True))
        ]
        self.values = [*self.inputs]
        for _ in range(data.draw(st.integers(1, 8))):
            self.values.append(self.step())

    def one_of(self, values: list[Expression]) -> Expression:
        return self.data.draw(st.sampled_from(values))

    def step(self) -> Expression:
        b, x, y = self.b, self.one_of(self.values), self.one_of(self.values)
        kind = self.data.draw(st.sampled_from(["unary", "binary", "where", "reduce", "round", "index"]))
        if kind == "unary":
            op = self.data.draw(st.sampled_from(self.unary))
            bounded = op in ("exp", "expm1", "log1p", "sin", "cos")
            return b.apply(op, b.apply("tanh", x) if bounded else x)
        if kind == "binary":
            return b.apply(self.data.draw(st.sampled_from(BINARY)), x, y)
        if kind == "where":
            op = self.data.draw(st.sampled_from(["lt", "ge", "eq"]))
            return b.apply("where", b.apply(op, self.one_of(self.inputs), 0.25), x, y)
        if kind == "round":
            return b.round(x, "bfloat16")
        if kind == "index":
            return x + b.apply("to_float", b.apply("lt", b.apply("column_index"), 3))
        return self.data.draw(st.sampled_from([b.mean, b.max, b.min]))(x + self.inputs[0])

    def region(self) -> Region:
        math = self.b.math
        outputs = [self.b.output("last", self.values[-1] + self.inputs[0], math)]
        dtype = self.data.draw(st.sampled_from(FLOATS))
        outputs.append(self.b.output("other", self.one_of(self.values) * self.inputs[0], dtype))
        if self.data.draw(st.booleans()):
            row = self.b.mean(self.one_of(self.values) + self.inputs[0])
            outputs.append(self.b.output("row", row, math))
        return self.b.region(*outputs)


def tensor_of(data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor of drawn strides, sometimes with a NaN or an infinity in it."""
    layout = data.draw(st.sampled_from(["plain", "transposed", "sliced", "expanded"]))
    if layout == "transposed" and len(shape) > 1:
        x = torch.randn(shape[::-1]).to(dtype).permute(*reversed(range(len(shape))))
    elif layout == "sliced":
        x = torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(dtype)[..., 1::2]
    elif layout == "expanded":
        x = torch.randn(1, *shape[1:]).to(dtype).expand(shape)
    else:
        x = torch.randn(shape).to(dtype)
    if x.numel() and data.draw(st.integers(0, 3)) == 0:
        x = x.clone()
        x[(0,) * len(shape)] = data.draw(st.sampled_from([float("nan"), INFINITY, -INFINITY]))
    return x


def drawn_region(
    data: st.DataObject, columns: Sequence[int], unary: Sequence[str] = UNARY
) -> tuple[Region, list[Any]]:
    """A region, and inputs for it on a grid with one of these numbers of `columns`."""
    region = Draw(data, unary).region()
    rows = st.sampled_from([(5,), (2, 3), (1, 1)])
    wide = data.draw(st.sampled_from(columns))
    shape = (*data.draw(rows), wide)
    own = {Extent.FULL: shape, Extent.ROW: shape[:-1], Extent.COLUMN: shape[-1:]}
    inputs = [
        0.75
        if value.extent is Extent.SCALAR
        else tensor_of(data, own[value.extent], getattr(torch, value.dtype))
        for value in region.inputs
    ]
    return region, inputs


def assert_no_worse(
    region: Region, inputs: Sequence[Any], found: Sequence[Tensor], size: float = 0.0
) -> None:
    """Errors of `found` at most twice those of eager, or some units of the last place.

    Of numbers of a `size` whose sum may cancel, units are those of that size at least.
    """
    exact = reference.run(region, *inputs, math=torch.float64, rounded=False)
    eager = reference.run(region, *inputs)
    for name, f, e, x in zip((o.name for o in region.outputs), found, eager, exact, strict=True):
        assert (f.shape, f.dtype) == (e.shape, e.dtype), name
        finite = e.isfinite() & x.isfinite()
        torch.testing.assert_close(f[~finite], e[~finite], equal_nan=True, msg=name)
        if not finite.any():
            continue
        eps = torch.finfo(e.dtype).eps if e.is_floating_point() else 0.0
        errors = [(v.double() - x.double())[finite].abs().max() for v in (f, e)]
        bound = 2 * errors[1] + 4 * eps * x[finite].abs().max().clamp(min=size)
        assert errors[0] <= bound, f"{name}: error {errors[0]:.2e}, eager {errors[1]:.2e}"


def integers_and_bools() -> Region:
    """All that can be done with numbers that are no floats: inputs x, mask, row (by row) and flag."""
    b = Builder()
    x, mask = b.input("x", "float32"), b.input("mask", "bool")
    row, flag = b.input("row", "int32", Extent.ROW), b.input("flag", "bool", Extent.SCALAR)
    either = b.apply("logical_or", b.apply("logical_not", mask), flag)
    kept = b.apply("where", b.apply("logical_and", mask, either), x, b.apply("to_float", row))
    at = b.apply("where", b.apply("lt", b.apply("column_index"), row), row, 0)
    return b.region(
        b.output("kept", kept, "float32"),
        b.output("mask_too", either, "bool"),
        b.output("at", b.apply("where", either, at, at), "int64"),
        b.output("picked", b.gather(x, row), "float32"),
        b.output("seen", b.gather(mask, row), "bool"),
        b.output("row_too", row, "int32"),
    )
