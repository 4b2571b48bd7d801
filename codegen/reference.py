"""A region run by torch operators: slow, on any device, and what every backend is tested against."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.layout import grid_shape, output_shape
from graphopt.codegen.region import (
    Apply,
    Constant,
    Extent,
    Gather,
    Input,
    Reduce,
    Region,
    Round,
    Uniform,
    Value,
)

_MASK = 0xFFFFFFFF
_FUNCTIONS: dict[str, Any] = {
    "sub": torch.sub,
    "eq": torch.eq,
    "where": torch.where,
    "rsqrt": torch.rsqrt,
    **{name: getattr(torch, name) for name in ("add", "mul", "div", "neg", "abs", "reciprocal", "sqrt")},
    **{name: getattr(torch, name) for name in ("exp", "expm1", "log", "log1p", "sigmoid", "tanh", "erf")},
    **{name: getattr(torch, name) for name in ("sin", "cos", "pow", "maximum", "minimum")},
    **{name: getattr(torch, name) for name in ("ne", "lt", "le", "gt", "ge")},
    **{name: getattr(torch, name) for name in ("logical_and", "logical_or", "logical_not")},
}


def run(
    region: Region, *inputs: Tensor | float, math: torch.dtype | None = None, rounded: bool = True
) -> tuple[Tensor, ...]:
    """The outputs of a region, each in its dtype, computed in `math` (by default the region's).

    `inputs` are in the order of `Region.inputs`, and broadcast. Not `rounded`: outputs and `Round`
    stay in `math`, so that with float64 the exact result can be compared with.
    """
    return _Run(region, inputs, math or getattr(torch, region.math), rounded).outputs()


class _Run:
    """Values as tensors of the grid's dimensions; a row value has one column."""

    def __init__(
        self, region: Region, inputs: Sequence[Tensor | float], math: torch.dtype, rounded: bool
    ) -> None:
        self.region, self.math, self.rounded = region, math, rounded
        tensors = [x for x in inputs if isinstance(x, Tensor)]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        self.given = {v.name: x for v, x in zip(region.inputs, inputs, strict=True)}
        extents = [v.extent for v in region.inputs]
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else () for x in inputs]
        self.shape = grid_shape(extents, shapes)
        self.found: list[Tensor] = []
        for value in region.values:
            self.found.append(self._value(value))

    def outputs(self) -> tuple[Tensor, ...]:
        """The outputs, as new tensors."""
        result = []
        for out in self.region.outputs:
            extent, value = self.region.facts[out.value].extent, self.found[out.value]
            if extent is Extent.ROW:
                value = value.squeeze(-1)
            value = value.expand(output_shape(extent, self.shape))
            wide = not self.rounded and value.is_floating_point()
            result.append(value.to(self.math if wide else getattr(torch, out.dtype), copy=True))
        return tuple(result)

    def _value(self, value: Value) -> Tensor:
        match value:
            case Input():
                return self._input(value)
            case Constant():
                dtype = self.math if isinstance(value.number, float) else None
                return torch.tensor(value.number, dtype=dtype, device=self.device)
            case Apply():
                return self._applied(value.op, [self.found[a] for a in value.args])
            case Round():
                x = self.found[value.arg]
                return x.to(getattr(torch, value.dtype)).to(self.math) if self.rounded else x
            case Reduce():
                return self._reduced(value)
            case Gather():
                return self._gathered(self.found[value.source], self.found[value.index])
        return self._uniform(value)

    def _input(self, value: Input) -> Tensor:
        x = self.given[value.name]
        if not isinstance(x, Tensor):
            x = torch.tensor(x, dtype=getattr(torch, value.dtype), device=self.device)
        x = x.to(self.device)
        if value.extent is Extent.ROW:
            x = x.unsqueeze(-1)
        if value.extent is Extent.SCALAR:
            x = x.reshape(())
        return x.to(self.math) if "float" in value.dtype else x

    def _applied(self, op: str, args: list[Tensor]) -> Tensor:
        if op == "to_float":
            return args[0].to(self.math)
        if op == "columns":
            return torch.tensor(float(self.shape[-1]), dtype=self.math, device=self.device)
        if op == "column_index":
            return torch.arange(self.shape[-1], device=self.device)
        found: Tensor = _FUNCTIONS[op](*args)
        return found

    def _reduced(self, value: Reduce) -> Tensor:
        x = self.found[value.arg]
        if value.over == "rows":
            return x.expand(self.shape).reshape(-1, self.shape[-1]).sum(0)
        shape = torch.broadcast_shapes(x.shape, (self.shape[-1],))
        x = x.expand(shape)
        if value.op == "sum":
            return x.sum(-1, keepdim=True)
        if shape[-1] == 0:
            limit = float("-inf") if value.op == "max" else float("inf")
            return x.new_full((*shape[:-1], 1), limit)
        return x.amax(-1, keepdim=True) if value.op == "max" else x.amin(-1, keepdim=True)

    def _gathered(self, source: Tensor, index: Tensor) -> Tensor:
        source = source.expand(self.shape)
        index = index.expand(*self.shape[:-1], 1).long()
        inside = (index >= 0) & (index < self.shape[-1])
        if self.shape[-1] == 0:
            return source.new_zeros(index.shape)
        found = source.gather(-1, index.where(inside, torch.zeros_like(index)))
        return found.where(inside, torch.zeros_like(found))

    def _uniform(self, value: Uniform) -> Tensor:
        seed = self.found[value.seed].long()
        place = torch.arange(torch.Size(self.shape).numel(), device=self.device).view(self.shape)
        h = _mix((place & _MASK) ^ (seed & _MASK))
        h = _mix((h + (place >> 32) * 0x9E3779B9 + ((seed >> 32) & _MASK)) & _MASK)
        return (h >> 8).to(self.math) * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
