"""How many operations a node takes.

`node_flops` counts matrix products, convolutions and attention, two operations per multiply-add;
all other ops count 0. `pointwise_ops` counts the elements that those others work on.

The formulas are those registered with `torch.utils.flop_counter`, so that one registered there for
a custom op counts here too, and the ones below for what is missing there. One is replaced: the
weight gradient of a grouped convolution counts there as if it were not grouped.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import flop_counter

from graphopt.cost_models.values import (
    element_bounds,
    is_view,
    numel,
    operands,
    output_tensors,
    shape_of,
)

aten = torch.ops.aten


def _product(a: torch.Tensor, b: torch.Tensor) -> int:
    """a [.., m, k] @ b [.., k, n], as `torch.matmul` broadcasts them; vectors are allowed."""
    *a_batch, m, k = shape_of(a) if a.dim() > 1 else (1, *shape_of(a))
    *b_batch, _, n = shape_of(b) if b.dim() > 1 else (*shape_of(b), 1)
    batch = int(math.prod(torch.broadcast_shapes(tuple(a_batch), tuple(b_batch))))
    return 2 * batch * m * k * n


def _linear(x: torch.Tensor, weight: torch.Tensor) -> int:
    """x [.., k], weight [n, k] or [k]."""
    return 2 * numel(x) * (shape_of(weight)[0] if weight.dim() > 1 else 1)


def _grouped(a: torch.Tensor, b: torch.Tensor) -> int:
    """Groups along a dimension that only one of them has: each row of a meets one group of b.

    a [m, k] or [groups, m, k], b [k, n] or [groups, k, n]; two 3-d operands repeat the product.
    """
    groups = shape_of(a)[0] if a.dim() == b.dim() == 3 else 1
    return 2 * groups * math.prod(shape_of(a)[-2:]) * shape_of(b)[-1]


def _convolution(weight: torch.Tensor, spatial: torch.Tensor) -> int:
    """Every weight meets every position of `spatial` [batch, channels, ..] once.

    That is the output of a convolution, and the input of a transposed one. weight [out, in/groups,
    ..], so groups are already counted.
    """
    dims = weight.dim() - 2
    shape = shape_of(spatial)
    batch = shape[0] if spatial.dim() == weight.dim() else 1
    return 2 * numel(weight) * batch * math.prod(shape[len(shape) - dims :])


def _convolution_backward(grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> int:
    """As much as the forward for each of the gradients of input and weight."""
    *_, transposed, _output_padding, _groups, mask = rest
    return _convolution(weight, x if transposed else grad) * (bool(mask[0]) + bool(mask[1]))


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """query [.., s, d], key [.., t, d], value [.., t, e]: scores, and scores times values."""
    *batch, s, d = shape_of(query)
    t, e = shape_of(value)[-2:]
    return 2 * math.prod(batch) * s * t * (d + e)


def _attention_backward(
    _grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> int:
    """Five products: the scores again, and the gradients of weights, values, queries and keys."""
    *batch, s, d = shape_of(query)
    t, e = shape_of(value)[-2:]
    return 2 * math.prod(batch) * s * t * (3 * d + 2 * e)


# op -> operations from its arguments by position, and its output. Before torch's own formulas.
_FORMULAS: dict[Any, Callable[..., int]] = {
    aten.matmul: lambda out, a, b: _product(a, b),
    aten.mv: lambda out, a, b: _product(a, b),
    aten.dot: lambda out, a, b: _product(a, b),
    aten.vdot: lambda out, a, b: _product(a, b),
    aten._int_mm: lambda out, a, b: _product(a, b),
    aten.addmv: lambda out, c, a, b: _product(a, b),
    aten.addbmm: lambda out, c, a, b: _product(a, b),
    aten._addmm_activation: lambda out, c, a, b: _product(a, b),
    aten.linear: lambda out, x, weight, *_: _linear(x, weight),
    aten._grouped_mm: lambda out, a, b, *_: _grouped(a, b),
    aten._scaled_grouped_mm: lambda out, a, b, *_: _grouped(a, b),
    aten._scaled_grouped_mm_v2: lambda out, a, b, *_: _grouped(a, b),
    aten._scaled_mm_v2: lambda out, a, b, *_: _product(a, b),
    aten.conv1d: lambda out, x, weight, *_: _convolution(weight, out),
    aten.conv2d: lambda out, x, weight, *_: _convolution(weight, out),
    aten.conv3d: lambda out, x, weight, *_: _convolution(weight, out),
    aten.conv_transpose1d: lambda out, x, weight, *_: _convolution(weight, x),
    aten.conv_transpose2d: lambda out, x, weight, *_: _convolution(weight, x),
    aten.conv_transpose3d: lambda out, x, weight, *_: _convolution(weight, x),
    aten.mkldnn_convolution: lambda out, x, weight, *_: _convolution(weight, out),
    aten.convolution_backward: lambda out, *arguments: _convolution_backward(*arguments),
    aten.scaled_dot_product_attention: lambda out, q, k, v, *_: _attention(q, k, v),
    aten._scaled_dot_product_attention_math: lambda out, q, k, v, *_: _attention(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu: lambda out, q, k, v, *_: _attention(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda out, grad, q, k, v, *_: _attention_backward(grad, q, k, v)
    ),
    aten._scaled_dot_product_fused_attention_overrideable: (lambda out, q, k, v, *_: _attention(q, k, v)),
    aten._scaled_dot_product_fused_attention_overrideable_backward: (
        lambda out, grad, q, k, v, *_: _attention_backward(grad, q, k, v)
    ),
}


def node_flops(node: fx.Node) -> int:
    """Operations of the matrix products in `node`; 0 where it has none."""
    packet = _packet(node.target)
    if packet in _FORMULAS:
        arguments, keywords = operands(node)
        named = [keywords[name] for name in _positional(node.target) if name in keywords]
        return _FORMULAS[packet](node.meta["val"], *arguments, *named)
    formula = flop_counter.flop_registry.get(packet)
    if formula is None:
        return 0
    # On meta tensors of the hinted sizes: a formula compares sizes, which would guard on symbols.
    arguments, keywords = torch.utils._pytree.tree_map_only(torch.Tensor, _meta, operands(node))
    out = torch.utils._pytree.tree_map_only(torch.Tensor, _meta, node.meta["val"])
    return int(formula(*arguments, **keywords, out_val=out))


def has_flops(node: fx.Node) -> bool:
    """True where `node` is one of the ops that `node_flops` counts."""
    packet = _packet(node.target)
    return packet in _FORMULAS or packet in flop_counter.flop_registry


def pointwise_ops(node: fx.Node) -> int:
    """One operation per element of the largest tensor that `node` reads or writes.

    For a pointwise op that is its output, for a reduction its input; 0 for views and for the ops
    that `node_flops` counts.
    """
    return max(map(min, pointwise_bounds(node)), default=0)


def pointwise_bounds(node: fx.Node) -> list[tuple[int, ...]]:
    """For each tensor that `pointwise_ops` looks at, bounds of its elements: the least of them counts."""
    if node.op != "call_function" or is_view(node) or has_flops(node):
        return []
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    read = [bounds for _, bounds in element_bounds(node)]
    return [*read, *((numel(tensor),) for tensor in output_tensors(node))]


def _packet(target: Any) -> Any:
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def _positional(target: Any) -> list[str]:
    return [argument.name for argument in target._schema.arguments if not argument.kwarg_only]


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape_of(tensor), dtype=tensor.dtype, device="meta")
