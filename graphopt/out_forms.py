"""Operators that can write their result into a given tensor, and how they are called to do so.

Listed are operators whose `out=` form is the kernel itself, with the same bits, and allocates nothing of
its own. Many others of ATen have an `out=` that calls the plain operator and copies ("autogen" in ATen's
native_functions.yaml): these save nothing. Reductions over drawn dimensions are left out, since they may
add in another order into a tensor that is there already.
"""

import functools
from typing import Any

import torch
from torch import fx

from graphopt.fused_ops import FusedCall

aten = torch.ops.aten

_WITH_OUT = frozenset(
    {
        aten.mm.default,
        aten.bmm.default,
        aten.addmm.default,
        aten.baddbmm.default,
        aten._softmax.default,
        aten._log_softmax.default,
        aten._softmax_backward_data.default,
        aten._log_softmax_backward_data.default,
        aten.cat.default,
        aten.index_select.default,
        aten.gather.default,
        aten.where.self,
        aten.tril.default,
        aten.triu.default,
        aten.add.Tensor,
        aten.sub.Tensor,
        aten.mul.Tensor,
        aten.div.Tensor,
        aten.addcmul.default,
        aten.addcdiv.default,
        aten.maximum.default,
        aten.minimum.default,
        aten.clamp.default,
        aten.clamp_min.default,
        aten.pow.Tensor_Scalar,
        aten.pow.Tensor_Tensor,
        aten.neg.default,
        aten.abs.default,
        aten.exp.default,
        aten.log.default,
        aten.sqrt.default,
        aten.rsqrt.default,
        aten.reciprocal.default,
        aten.sin.default,
        aten.cos.default,
        aten.erf.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.gelu.default,
        aten.silu.default,
        aten.elu.default,
        aten.leaky_relu.default,
        aten.softplus.default,
        aten.mish.default,
        aten.hardtanh.default,
        aten.hardswish.default,
        aten.hardsigmoid.default,
        aten.tanh_backward.default,
        aten.sigmoid_backward.default,
        aten.gelu_backward.default,
        aten.silu_backward.default,
        aten.elu_backward.default,
        aten.leaky_relu_backward.default,
        aten.softplus_backward.default,
        aten.hardtanh_backward.default,
        aten.threshold_backward.default,
        aten.eq.Scalar,
        aten.eq.Tensor,
        aten.ne.Scalar,
        aten.ne.Tensor,
        aten.lt.Scalar,
        aten.lt.Tensor,
        aten.le.Scalar,
        aten.le.Tensor,
        aten.gt.Scalar,
        aten.gt.Tensor,
        aten.ge.Scalar,
        aten.ge.Tensor,
        aten.logical_not.default,
        aten.logical_and.default,
        aten.logical_or.default,
        aten.bitwise_not.default,
        aten.bitwise_and.Tensor,
        aten.bitwise_or.Tensor,
    }
)

# Operators that copy, with the number of a tensor's elements or more than one dtype in play.
_COPIES = frozenset({aten.clone.default, aten._to_copy.default})


@functools.cache
def out_form(target: Any) -> tuple[Any, str] | None:
    """The form of `target` that takes the tensor to write, and the keyword for it; None where none is.

    >>> out_form(aten.mm.default)
    (<OpOverload(op='aten.mm', overload='out')>, 'out')
    """
    if target not in _WITH_OUT:
        return None
    given = [(a.name, str(a.type)) for a in target._schema.arguments]
    packet = target.overloadpacket
    for overload in packet.overloads():
        form = getattr(packet, overload)
        out = [a.name for a in form._schema.arguments if a.is_out]
        others = [(a.name, str(a.type)) for a in form._schema.arguments if not a.is_out]
        if len(out) == 1 and others == given:
            return form, out[0]
    raise AssertionError(f"{target} has no form that writes into a tensor")


def can_write_into(node: fx.Node) -> bool:
    """True where `node`, as lowered, can make its results in given tensors, with the same bits."""
    if isinstance(node.target, FusedCall) or out_form(node.target) is not None:
        return True
    if node.target not in _COPIES:
        return False
    source, made = node.args[0], node.meta.get("val")
    if not isinstance(source, fx.Node) or not isinstance(made, torch.Tensor):
        return False
    given = source.meta["val"]
    return bool(made.device == given.device and made.shape == given.shape)


def written_into(node: fx.Node, given: dict[int, fx.Node]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Target, arguments and keywords of `node` that writes its tensors into those `given` by number."""
    if isinstance(node.target, FusedCall):
        into = tuple(given.get(n) for n in range(len(node.target.fused.made)))
        return node.target, node.args, {**node.kwargs, "into": into}
    found = out_form(node.target)
    if found is None:
        return aten.copy_.default, (given[0], node.args[0]), {}
    form, keyword = found
    return form, node.args, {**node.kwargs, keyword: given[0]}
