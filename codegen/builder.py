"""Regions written as formulas.

>>> b = Builder()
>>> x, weight = b.input("x", "bfloat16"), b.input("weight", "float32", Extent.COLUMN)
>>> scale = b.apply("rsqrt", b.mean(x * x) + 1e-6)
>>> region = b.region(b.output("out", x * scale * weight, "bfloat16"))
>>> [value.name for value in region.inputs], len(region.values)
(['x', 'weight'], 11)

Equal values are kept once. A pass over a graph uses it the same way: `input` for what the region reads,
`apply` for each ATen operator (the table `OPS` has their names), `output` for what others read.
"""

from dataclasses import dataclass
from typing import Literal

from graphopt.codegen.region import (
    Apply,
    Constant,
    Dtype,
    Extent,
    Gather,
    Input,
    Math,
    Output,
    Reduce,
    Region,
    Round,
    Uniform,
    Value,
)

Number = bool | int | float


@dataclass(frozen=True)
class Expression:
    """A value of a region that is being built; `+ - * /` and the methods of the builder make more."""

    builder: "Builder"
    position: int

    def __add__(self, other: "Expression | float") -> "Expression":
        return self.builder.apply("add", self, other)

    def __radd__(self, other: float) -> "Expression":
        return self.builder.apply("add", other, self)

    def __sub__(self, other: "Expression | float") -> "Expression":
        return self.builder.apply("sub", self, other)

    def __rsub__(self, other: float) -> "Expression":
        return self.builder.apply("sub", other, self)

    def __mul__(self, other: "Expression | float") -> "Expression":
        return self.builder.apply("mul", self, other)

    def __rmul__(self, other: float) -> "Expression":
        return self.builder.apply("mul", other, self)

    def __truediv__(self, other: "Expression | float") -> "Expression":
        return self.builder.apply("div", self, other)

    def __rtruediv__(self, other: float) -> "Expression":
        return self.builder.apply("div", other, self)

    def __neg__(self) -> "Expression":
        return self.builder.apply("neg", self)


class Builder:
    """Collects the values of one region; `math` is the dtype that it computes in."""

    def __init__(self, math: Math = "float32") -> None:
        self.math = math
        self._values: list[Value] = []
        self._known: dict[Value, int] = {}

    def _add(self, value: Value) -> Expression:
        position = self._known.setdefault(value, len(self._values))
        if position == len(self._values):
            self._values.append(value)
        return Expression(self, position)

    def input(self, name: str, dtype: Dtype, extent: Extent = Extent.FULL) -> Expression:
        """Numbers from memory; the same name means the same numbers."""
        return self._add(Input(name, dtype, extent))

    def constant(self, number: Number) -> Expression:
        """A number; its type (bool, int, float) is its kind."""
        return self._add(Constant(number))

    def apply(self, op: str, *args: Expression | Number) -> Expression:
        """An operator of `OPS`; a number among `args` is a constant."""
        given = (a if isinstance(a, Expression) else self.constant(a) for a in args)
        return self._add(Apply(op, tuple(a.position for a in given)))

    def round(self, x: Expression, dtype: Dtype) -> Expression:
        """`x` as a store in `dtype` and a load of it would leave it."""
        return self._add(Round(x.position, dtype))

    def sum(self, x: Expression, over: Literal["columns", "rows"] = "columns") -> Expression:
        """The sum of each row, or of each column."""
        return self._add(Reduce("sum", x.position, over))

    def max(self, x: Expression) -> Expression:
        """The maximum of each row."""
        return self._add(Reduce("max", x.position))

    def min(self, x: Expression) -> Expression:
        """The minimum of each row."""
        return self._add(Reduce("min", x.position))

    def mean(self, x: Expression) -> Expression:
        """The sum of each row over the number of columns."""
        return self.sum(x) / self.apply("columns")

    def gather(self, source: Expression, index: Expression) -> Expression:
        """Of each row of the full input `source`, the number in column `index`."""
        return self._add(Gather(source.position, index.position))

    def uniform(self, seed: Expression) -> Expression:
        """A random number in [0, 1) for each place."""
        return self._add(Uniform(seed.position))

    def output(self, name: str, x: Expression, dtype: Dtype) -> Output:
        """`x`, to be stored in `dtype`."""
        return Output(name, x.position, dtype)

    def region(self, *outputs: Output) -> Region:
        """What was built, with these outputs, in the order in which the kernel returns them."""
        return Region(tuple(self._values), outputs, self.math)
