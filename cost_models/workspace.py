"""Kernel scratch that follows from the shapes: what some CPU kernels allocate and free as they run.

`workspace_bytes` is a lower bound. It is exact for dropout and for batch norm's backward, whose
temporaries have the size of an argument. For convolutions it counts the copies into the layout in
blocks of channels that oneDNN computes in: mostly exact forward, and half to all of it backward,
where the routine that oneDNN picks for the CPU and the number of threads has scratch of its own.
Other ops count 0, also grouped and channels-last convolutions; few of them need much, but backward
through a grouped channels-last one can take a hundred times its outputs.
`graphopt.cost_models.measured.probe` finds the true figure of each.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.cost_models.streamed import is_streamed, scratch_bytes
from graphopt.cost_models.values import hint, operands, shape_of, strides_of

aten = torch.ops.aten


def workspace_bytes(node: fx.Node) -> int:
    """Bytes that the kernel of `node` holds on a CPU besides its inputs and outputs, at least."""
    if is_streamed(node):
        return scratch_bytes(node)
    rule = _RULES.get(node.target)
    if rule is None:
        return 0
    arguments, keywords = operands(node)
    if keywords or arguments[0].device.type != "cpu":
        return 0
    return rule(*arguments)


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(shape_of(tensor)) * tensor.element_size()


def _dropout(x: torch.Tensor, _probability: float, train: bool | None) -> int:
    """The mask is drawn in the dtype of x, then made boolean."""
    return _bytes(x) if train is not False else 0


def _dropout_backward(grad: torch.Tensor, *_: Any) -> int:
    """The mask becomes numbers of the dtype of grad."""
    return _bytes(grad)


def _batch_norm_backward(grad: torch.Tensor, x: torch.Tensor, *rest: Any) -> int:
    """One temporary like x where both have the same layout."""
    return _bytes(x) if rest[-1][0] and _layout(grad) == _layout(x) else 0


def _layout(tensor: torch.Tensor) -> torch.memory_format | None:
    """How a dense tensor is laid out, from the hints: asking the tensor would guard on symbols."""
    orders = [(torch.contiguous_format, [*range(tensor.dim())])]
    orders += [(torch.channels_last, [0, 2, 3, 1])] if tensor.dim() == 4 else []
    for layout, order in orders:
        step, dense = 1, True
        for size, stride in (strides_of(tensor)[dim] for dim in reversed(order)):
            dense = dense and (hint(size) == 1 or hint(stride) == step)
            step *= hint(size)
        if dense:
            return layout
    return None


def _convolution(x: torch.Tensor, weight: torch.Tensor, _bias: Any, *rest: Any) -> int:
    """Blocked copies of input and weight, then of the output."""
    stride, padding, dilation, transposed, _output_padding, groups = rest
    if not _is_blocked(x, weight, transposed, groups):
        return 0
    spatial = [
        (size + 2 * hint(pad) - hint(spread) * (kernel - 1) - 1) // hint(step) + 1
        for size, kernel, step, pad, spread in zip(
            shape_of(x)[2:], shape_of(weight)[2:], stride, padding, dilation, strict=True
        )
    ]
    out = shape_of(x)[0] * _padded(shape_of(weight)[0]) * math.prod(spatial) * x.element_size()
    return int(max(_copy(x) + _copy(weight), out))


def _convolution_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> int:
    """The largest of the moments of two convolutions in turn, each between blocked copies."""
    _bias, _stride, _padding, _dilation, transposed, _output_padding, groups, mask = rest
    if not _is_blocked(x, weight, transposed, groups) or not _is_plain(grad):
        return 0
    grad_x = _bytes(x) if mask[0] else 0
    outputs = grad_x + (_bytes(weight) if mask[1] else 0)
    peaks = [outputs]
    if mask[0]:
        peaks += [_copy(grad) + _copy(weight) + _copy(x), _copy(x) + _bytes(x)]
    if mask[1]:
        peaks += [grad_x + _copy(x) + _copy(grad) + _copy(weight), grad_x + 2 * _bytes(weight)]
    return max(peaks) - outputs


def _is_blocked(x: torch.Tensor, weight: torch.Tensor, transposed: bool, groups: int) -> bool:
    """True for the plain convolutions that torch hands to oneDNN in its own layout."""
    plain = _is_plain(x) and _is_plain(weight) and not transposed and hint(groups) == 1
    return plain and x.dtype is torch.float32 and x.dim() == 4 and shape_of(x)[0] > 1


def _is_plain(tensor: torch.Tensor) -> bool:
    return _layout(tensor) is torch.contiguous_format


def _copy(tensor: torch.Tensor) -> int:
    """Bytes of a copy [n, channels, ..] in blocks of channels; few channels are read in place."""
    channels = shape_of(tensor)[1]
    return _bytes(tensor) * _padded(channels) // channels if channels >= 8 else 0


def _padded(channels: int) -> int:
    """Channels rounded up to the float32 lanes of a vector register."""
    lanes = 16 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 8
    return -(-channels // lanes) * lanes


_RULES: dict[Any, Callable[..., int]] = {
    aten.native_dropout.default: _dropout,
    aten.native_dropout_backward.default: _dropout_backward,
    aten.native_batch_norm_backward.default: _batch_norm_backward,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}
