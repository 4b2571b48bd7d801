"""Spatially local operators: which window of its input an operator needs for a window of its output.

A feature map is a tensor [batch, channels, rows, columns]. A local operator computes element i of a
spatial dimension from the elements i*stride - padding + dilation*[0, kernel) of its input; elements
beyond the image hold `fill`. This is the arithmetic of receptive fields (Araujo, Norris and Sim,
"Computing Receptive Fields of Convolutional Neural Networks", Distill 2019).
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.program import tensors_of

aten = torch.ops.aten
ROWS, COLUMNS = 2, 3  # dimensions of a feature map
Interval = tuple[int, int]  # the first index, and one past the last


@dataclass(frozen=True)
class Reach:
    """How far an operator reads along one spatial dimension, in elements of its input."""

    kernel: int = 1
    stride: int = 1
    dilation: int = 1
    padding: int = 0

    @property
    def span(self) -> int:
        """Elements from the first to the last that one output reads."""
        return self.dilation * (self.kernel - 1) + 1

    def source(self, wanted: Interval) -> Interval:
        """What the outputs `wanted` read; it may lie beyond the image on both sides.

        >>> Reach(kernel=3, stride=2, padding=1).source((0, 4)), Reach().source((2, 5))
        ((-1, 8), (2, 5))
        """
        first = wanted[0] * self.stride - self.padding
        return first, (wanted[1] - 1) * self.stride - self.padding + self.span

    def own_padding(self, size: int, before: int, after: int, count: int) -> int | None:
        """The padding on both sides that gives `count` outputs of a window of `size`, if one does.

        The outputs may read at most `before` and `after` elements beyond it, the former exactly.
        """
        found = (size + 2 * before - self.span) // self.stride + 1
        return before if after <= before and found == count else None


@dataclass(frozen=True)
class LocalRule:
    """A local operator: its reach, what stands beyond the image, and its call with other padding.

    `pads` says that the node is nothing but padding; `call` gives target and arguments for the
    symmetric padding (rows, columns), and is None where the operator takes no padding.
    """

    rows: Reach = Reach()
    columns: Reach = Reach()
    fill: float = 0.0
    pads: bool = False
    call: Callable[[fx.Node, list[int]], tuple[Any, ...]] | None = None

    def reach(self, dimension: int) -> Reach:
        """Along `ROWS` or `COLUMNS`."""
        return self.rows if dimension == ROWS else self.columns


class NotLocal(Exception):
    """Why an operator is not spatially local; the text follows its name in a sentence."""


SAME = LocalRule()


def map_shape(node: fx.Node) -> tuple[int, ...] | None:
    """[batch, channels, rows, columns] of the (first) tensor of `node`; None where it is no such."""
    tensors = tensors_of(node)
    if not tensors or tensors[0] is None or tensors[0].dim() != 4:
        return None
    shape = tensors[0].shape
    return tuple(shape) if all(isinstance(size, int) for size in shape) else None


def local_rule(node: fx.Node, maps: Sequence[fx.Node]) -> LocalRule:
    """The rule of `node`, whose operands `maps` are feature maps of the image.

    Raises NotLocal with the reason where the node needs more than a window of them.
    """
    if map_shape(node) is None:
        raise NotLocal("makes no feature map [batch, channels, rows, columns] of known size")
    if ops.mutates(node.target) or ops.is_random(node):
        raise NotLocal("writes to an operand or is random")
    rule = _RULES.get(node.target)
    if rule is not None:
        return rule(node, maps)
    if ops.is_elementwise(node):
        return _pointwise(node, maps)
    raise NotLocal("is not known to be spatially local")


def _pointwise(node: fx.Node, maps: Sequence[fx.Node]) -> LocalRule:
    """Elementwise, with operands of the same grid or broadcast over all of it."""
    grid = _grid(node)
    for source in node.all_input_nodes:
        if source in maps:
            if _grid(source) != grid:
                raise NotLocal(f"combines the grids {_grid(source)} and {grid}")
            continue
        for tensor in tensors_of(source):
            if tensor is not None and any(size != 1 for size in tensor.shape[-2:]):
                raise NotLocal(f"reads {source.name}, which differs from place to place")
    return SAME


def _norm(node: fx.Node, maps: Sequence[fx.Node]) -> LocalRule:
    """A batch norm in inference: the statistics are constants."""
    if list(maps) != [node.args[0]]:
        raise NotLocal("takes its statistics from the image")
    return SAME


def _result(node: fx.Node, _maps: Sequence[fx.Node]) -> LocalRule:
    """The first result of a norm or a pool; the others are indices into the whole image."""
    if node.args[1] != 0 or len(node.all_input_nodes[0].users) > 1:
        raise NotLocal("is not the only result of its operator")
    return SAME


def _cat(node: fx.Node, maps: Sequence[fx.Node]) -> LocalRule:
    dimension = node.args[1] if len(node.args) > 1 else 0
    if dimension not in (1, -3):
        raise NotLocal(f"joins along dimension {dimension}, not along channels")
    if set(node.all_input_nodes) != set(maps):
        raise NotLocal("joins the image with something else")
    return SAME


def _convolution(node: fx.Node, maps: Sequence[fx.Node]) -> LocalRule:
    _image, weight, _bias, stride, padding, dilation, transposed = node.args[:7]
    if transposed:
        raise NotLocal("is a transposed convolution")
    if list(maps) != [node.args[0]] or not isinstance(weight, fx.Node):
        raise NotLocal("has weights that are made from the image")
    kernel = tensors_of(weight)[0].shape[2:]  # type: ignore[union-attr]

    def call(node: fx.Node, padding: list[int]) -> tuple[Any, ...]:
        return (*node.args[:4], padding, *node.args[5:])

    return LocalRule(*_reaches(kernel, stride, padding, dilation), call=call)


def _max_pool(node: fx.Node, _maps: Sequence[fx.Node]) -> LocalRule:
    if not tensors_of(node)[0].dtype.is_floating_point:  # type: ignore[union-attr]
        raise NotLocal("pools integers, of which none stands for minus infinity")
    given = (*node.args[1:], *_MAX_POOL_DEFAULTS[len(node.args) - 1 :])
    kernel, stride, padding, dilation, _ceil = given
    stride = stride or kernel

    def call(node: fx.Node, padding: list[int]) -> tuple[Any, ...]:
        return (node.args[0], kernel, stride, padding, dilation, False)

    return LocalRule(*_reaches(kernel, stride, padding, dilation), fill=float("-inf"), call=call)


def _avg_pool(node: fx.Node, _maps: Sequence[fx.Node]) -> LocalRule:
    given = (*node.args[1:], *_AVG_POOL_DEFAULTS[len(node.args) - 1 :])
    kernel, stride, padding, ceil_mode, counts_padding, divisor = given
    stride = stride or kernel
    if ceil_mode:
        raise NotLocal("averages over cut-off windows (ceil_mode)")
    if not counts_padding and any(_pair(padding)):
        raise NotLocal("divides by another number at the border (count_include_pad=False)")

    def call(node: fx.Node, padding: list[int]) -> tuple[Any, ...]:
        return (node.args[0], kernel, stride, padding, False, counts_padding, divisor)

    return LocalRule(*_reaches(kernel, stride, padding, 1), call=call)


def _pad(node: fx.Node, _maps: Sequence[fx.Node]) -> LocalRule:
    arguments: tuple[Any, ...] = node.args
    amounts = [int(amount) for amount in arguments[1]]
    if any(amounts[4:]) or any(amount < 0 for amount in amounts):
        raise NotLocal("pads other dimensions than rows and columns, or cuts")
    left, _, top, _ = (amounts + [0] * 4)[:4]
    fill = float(arguments[2]) if len(arguments) > 2 else 0.0
    return LocalRule(Reach(padding=top), Reach(padding=left), fill, pads=True)


def _same(_node: fx.Node, _maps: Sequence[fx.Node]) -> LocalRule:
    return SAME


def _reaches(kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[Reach, Reach]:
    rows, columns = zip(*map(_pair, (kernel, stride, dilation, padding)), strict=True)
    return Reach(*rows), Reach(*columns)


def _pair(value: Any) -> tuple[int, int]:
    """One number for both dimensions, or two."""
    numbers = [value] if isinstance(value, int) else list(value)
    return int(numbers[0]), int(numbers[-1])


def _grid(node: fx.Node) -> tuple[int, ...]:
    shape = map_shape(node)
    return () if shape is None else (shape[0], *shape[2:])


# What follows the image among the arguments, where it is left out.
_MAX_POOL_DEFAULTS: tuple[Any, ...] = (None, [], 0, 1, False)
_AVG_POOL_DEFAULTS: tuple[Any, ...] = (None, [], 0, False, True, None)

_RULES: dict[Any, Callable[[fx.Node, Sequence[fx.Node]], LocalRule]] = {
    aten.convolution.default: _convolution,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.avg_pool2d.default: _avg_pool,
    aten.constant_pad_nd.default: _pad,
    aten._native_batch_norm_legit_no_training.default: _norm,
    aten.cat.default: _cat,
    aten._to_copy.default: _same,
    aten.detach.default: _same,
    aten.hardswish.default: _pointwise,  # elementwise, and not tagged so
    aten._prelu_kernel.default: _pointwise,
    operator.getitem: _result,
}
