"""A node's op as a call that can be made: layouts for tensors, and tensors made up for them."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.cost_models.nodes import runs_kernel
from graphopt.cost_models.values import hint, operands, output_tensors, shape_of

aten = torch.ops.aten

# The arguments of convolutions that are images, or their gradients.
_IMAGES = {aten.convolution.default: (0,), aten.convolution_backward.default: (0, 1)}
_PATTERN = 4096  # made-up floating tensors repeat so many random numbers


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A strided tensor without its values."""

    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    device: torch.device

    def __repr__(self) -> str:
        """`float32[2, 3]{3, 1}@cpu`: part of the key under which a probe is kept."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}{list(self.sizes)}{{{str(list(self.strides))[1:-1]}}}@{self.device}"

    @property
    def elements(self) -> int:
        """Elements from the first to the last in memory."""
        if 0 in self.sizes:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.sizes, self.strides, strict=True))


@dataclass(frozen=True, slots=True)
class Call:
    """An op with its arguments, a `TensorSpec` in place of each tensor."""

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device

    @property
    def key(self) -> str:
        """What tells distinct calls apart, as text."""
        arguments = [repr(argument) for argument in self.args]
        arguments += [f"{name}={value!r}" for name, value in sorted(self.kwargs.items())]
        return f"{self.op}({', '.join(arguments)})@{self.device}"

    @property
    def specs(self) -> list[TensorSpec]:
        """The tensors among the arguments."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, TensorSpec)]


def call_of(node: fx.Node, channels_last: bool = False) -> Call | None:
    """The op of `node` with specs for its tensors; None where it cannot be run alone.

    That are views, collectives, higher-order ops, custom ops (nothing is known of the values they
    allow), and ops whose output sizes depend on values. With `channels_last` convolutions get images in
    that layout, whatever the trace says.
    """
    if not runs_kernel(node) or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target.namespace not in ("aten", "prims") or _sizes_depend_on_data(node.target):
        return None
    if not all("val" in argument.meta for argument in node.all_input_nodes):
        return None
    try:
        args, kwargs = pytree.tree_map(_spec, operands(node))
    except _UnknownValue:
        return None
    if channels_last and node.target in _IMAGES:
        images = _IMAGES[node.target]
        args = [_channels_last(a) if i in images else a for i, a in enumerate(args)]
    device = output_tensors(node)[0].device
    return Call(node.target, tuple(args), kwargs, device)


def _channels_last(spec: TensorSpec) -> TensorSpec:
    if len(spec.sizes) != 4:
        return spec
    _, channels, height, width = spec.sizes
    strides = (channels * height * width, 1, width * channels, channels)
    return replace(spec, strides=strides)


def _sizes_depend_on_data(op: torch._ops.OpOverload) -> bool:
    return bool({torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output} & set(op.tags))


class _UnknownValue(Exception):
    """An argument of which the trace tells too little to make one up."""


def _spec(value: Any) -> Any:
    """What stands for an argument in a `Call`."""
    if isinstance(value, torch.SymInt):
        return hint(value)
    if isinstance(value, (torch.SymFloat, torch.SymBool, torch.Generator, torch.ScriptObject)):
        raise _UnknownValue
    if not isinstance(value, torch.Tensor):
        return value
    if value.layout is not torch.strided or value.is_quantized:
        raise _UnknownValue
    strides = tuple(hint(step) for step in value.stride())
    return TensorSpec(value.dtype, shape_of(value), strides, value.device)


def make(value: Any) -> Any:
    """A tensor for a spec: numbers in [0, 1) where floating, else zeros, valid as indices."""
    if not isinstance(value, TensorSpec):
        return value
    memory = torch.empty(value.elements, dtype=value.dtype, device=value.device)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        numbers = torch.rand(_PATTERN, generator=torch.Generator().manual_seed(0))
        filled = min(_PATTERN, value.elements)
        memory[:filled].copy_(numbers[:filled])
        while filled < value.elements:
            step = min(filled, value.elements - filled)
            memory[filled : filled + step].copy_(memory[:step])
            filled += step
    else:
        memory.zero_()
    return memory.as_strided(value.sizes, value.strides)
