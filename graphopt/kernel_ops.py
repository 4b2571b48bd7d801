"""The operators behind `graphopt.kernels`: what they run, their shapes without data, their gradients.

Each runs as generated kernels, `graphopt.codegen.backends` says which; nothing waits for a GPU.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen import regions
from graphopt.codegen.backends import kernel_on
from graphopt.codegen.region import Region

ops = torch.ops.graphopt
Pair = tuple[Tensor, Tensor]
Triple = tuple[Tensor, Tensor, Tensor]


# --- what the operators run --------------------------------------------------------------------


def _dtype(x: Tensor) -> Any:
    return str(x.dtype).removeprefix("torch.")


def _run(region: Region, *inputs: Any) -> tuple[Tensor, ...]:
    """The outputs of a region, on the device of its first input."""
    return kernel_on(region, inputs[0].device)(*inputs)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _present(*inputs: Any) -> list[Any]:
    return [x for x in inputs if x is not None]


def _rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> Triple:
    region = regions.rms_norm(_dtype(x), residual is not None, weight is not None, saved=True)
    found = _run(region, *_present(x, residual, eps, weight))
    out, *total, scale = found
    return out, total[0] if total else x.new_empty(0), scale


def _rms_norm_like(x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float) -> Triple:
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(x.shape), total, x.new_empty(x.shape[:-1], dtype=_wide(x))


def _rms_norm_backward(
    grad: Tensor, h: Tensor, scale: Tensor, weight: Tensor | None, dsum: Tensor | None
) -> Pair:
    region = regions.rms_norm_backward(_dtype(h), dsum is not None, weight is not None)
    found = _run(region, *_present(grad, h, scale, weight, dsum))
    return found[0], found[1].to(h.dtype) if weight is not None else h.new_empty(0)


def _rms_norm_backward_like(grad: Tensor, h: Tensor, *more: Any) -> Pair:
    weight = more[1]
    return h.new_empty(h.shape), h.new_empty(0 if weight is None else weight.shape)


def _layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Triple:
    region = regions.layer_norm(_dtype(x))
    return _run(region, x, eps, weight, bias)  # type: ignore[return-value]


def _layer_norm_like(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Triple:
    row = x.new_empty(x.shape[:-1], dtype=_wide(x))
    return x.new_empty(x.shape), row, torch.empty_like(row)


def _layer_norm_backward(grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor) -> Triple:
    dx, dweight, dbias = _run(regions.layer_norm_backward(_dtype(x)), grad, x, mean, scale, weight)
    return dx, dweight.to(x.dtype), dbias.to(x.dtype)


def _layer_norm_backward_like(
    grad: Tensor, x: Tensor, mean: Tensor, scale: Tensor, weight: Tensor
) -> Triple:
    return x.new_empty(x.shape), torch.empty_like(weight), torch.empty_like(weight)


def _softmax(x: Tensor) -> Tensor:
    return _run(regions.softmax(_dtype(x)), x)[0]


def _softmax_backward(grad: Tensor, out: Tensor) -> Tensor:
    return _run(regions.softmax_backward(_dtype(out)), grad, out)[0]


def _cross_entropy(logits: Tensor, target: Tensor, factor: Tensor, ignore: int, wanted: bool) -> Pair:
    if target.device.type == "cpu":
        wrong = (target != ignore) & ((target < 0) | (target >= logits.shape[-1]))
        if bool(wrong.any()):
            raise IndexError(f"Target {int(target[wrong][0])} is out of bounds.")
    region = regions.cross_entropy(_dtype(logits), wanted)
    found = _run(region, logits, target, ignore, *([factor] if wanted else []))
    loss = (found[0].sum(dtype=torch.float64) * factor).to(logits.dtype)
    return loss, found[1] if wanted else logits.new_empty(0)


def _cross_entropy_like(
    logits: Tensor, target: Tensor, factor: Tensor, ignore: int, wanted: bool
) -> Pair:
    return logits.new_empty(()), logits.new_empty(logits.shape if wanted else 0)


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return _run(regions.swiglu(_dtype(gate)), gate, up)[0]


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Pair:
    return _run(regions.swiglu_backward(_dtype(gate)), grad, gate, up)  # type: ignore[return-value]


def _bias_gelu_residual(x: Tensor, bias: Tensor, residual: Tensor, approximate: Any) -> Tensor:
    return _run(regions.bias_gelu_residual(_dtype(x), approximate), x, bias, residual)[0]


def _bias_gelu_residual_backward(grad: Tensor, x: Tensor, bias: Tensor, approximate: Any) -> Pair:
    region = regions.bias_gelu_residual_backward(_dtype(x), approximate)
    dx, dbias = _run(region, grad, x, bias)
    return dx, dbias.to(x.dtype)


def _rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x.new_empty(x.shape)
    kernel = kernel_on(regions.rotary(_dtype(x)), x.device)
    kernel(*x.chunk(2, -1), cos, sin, out=out.chunk(2, -1))
    return out


def _dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    return _run(regions.dropout(_dtype(x)), x, seed, p)[0]


def _adamw_(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    step: int,
) -> None:
    region = regions.adamw(_dtype(parameter), _dtype(first))
    correction = (1 - beta2**step) ** 0.5
    numbers = (1 - lr * decay, beta2, 1 - beta1, 1 - beta2, eps, correction, lr / (1 - beta1**step))
    out = (parameter, first, second)
    kernel_on(region, parameter.device)(parameter, gradient, first, second, *numbers, out=out)
    torch.autograd.graph.increment_version(out)


def _nothing(*_: Any) -> None: ...


def _first_like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _two_like(grad: Tensor, x: Tensor, y: Tensor, *_: Any) -> Pair:
    return x.new_empty(x.shape), y.new_empty(y.shape)


# --- gradients ---------------------------------------------------------------------------------


def _rms_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, residual, weight, _ = inputs
    _, total, scale = output
    ctx.save_for_backward(x if residual is None else total, scale, weight)
    ctx.added = residual is not None
    ctx.mark_non_differentiable(scale)
    ctx.set_materialize_grads(False)


def _rms_norm_gradient(ctx: Any, grad: Tensor | None, dsum: Tensor | None, _: Any) -> Any:
    h, scale, weight = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(h)
    dh, dweight = ops.kernel_rms_norm_backward(grad, h, scale, weight, dsum if ctx.added else None)
    return dh, dh if ctx.added else None, None if weight is None else dweight, None


def _layer_norm_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, output[1], output[2], weight)
    ctx.mark_non_differentiable(output[1], output[2])


def _layer_norm_gradient(ctx: Any, grad: Tensor, *_: Any) -> Any:
    return *ops.kernel_layer_norm_backward(grad, *ctx.saved_tensors), None


def _softmax_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output)


def _softmax_gradient(ctx: Any, grad: Tensor) -> Any:
    return ops.kernel_softmax_backward(grad, *ctx.saved_tensors)


def _cross_entropy_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


def _cross_entropy_gradient(ctx: Any, grad: Tensor, _: Any) -> Any:
    (gradient,) = ctx.saved_tensors
    if gradient.numel() == 0:
        raise RuntimeError("the loss was made without its gradient; ask for it with requires_grad")
    unit = type(grad) is Tensor and grad.device.type == "cpu" and bool(grad == 1)  # else it is traced
    return gradient if unit else gradient * grad, None, None, None, None


def _swiglu_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_gradient(ctx: Any, grad: Tensor) -> Any:
    return tuple(ops.kernel_swiglu_backward(grad, *ctx.saved_tensors))


def _bias_gelu_residual_setup(ctx: Any, inputs: Any, output: Any) -> None:
    x, bias, _, ctx.approximate = inputs
    ctx.save_for_backward(x, bias)


def _bias_gelu_residual_gradient(ctx: Any, grad: Tensor) -> Any:
    dx, dbias = ops.kernel_bias_gelu_residual_backward(grad, *ctx.saved_tensors, ctx.approximate)
    return dx, dbias, grad, None


def _rotary_setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:])


def _rotary_gradient(ctx: Any, grad: Tensor) -> Any:
    cos, sin = ctx.saved_tensors
    return ops.kernel_rotary(grad, cos, -sin), None, None


def _dropout_setup(ctx: Any, inputs: Any, output: Any) -> None:
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _dropout_gradient(ctx: Any, grad: Tensor) -> Any:
    """The same numbers drawn again."""
    return ops.kernel_dropout(grad, *ctx.saved_tensors, ctx.p), None, None


# --- registration ------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")
Function = Callable[..., Any]


def _register(name: str, schema: str, body: Function, like: Function, *gradient: Function) -> None:
    """Define `kernel_<name>`; `gradient` is what saves values for the backward, and the backward."""
    name = f"kernel_{name}"
    _LIBRARY.define(name + schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")(body)
    torch.library.register_fake(f"graphopt::{name}", like, lib=_LIBRARY)
    if gradient:
        setup, backward = gradient
        full = f"graphopt::{name}"
        torch.library.register_autograd(full, backward, setup_context=setup, lib=_LIBRARY)


_register(
    "rms_norm",
    "(Tensor x, Tensor? residual, Tensor? weight, float eps) -> (Tensor out, Tensor total, Tensor scale)",
    _rms_norm,
    _rms_norm_like,
    _rms_norm_setup,
    _rms_norm_gradient,
)
_register(
    "rms_norm_backward",
    "(Tensor grad, Tensor h, Tensor scale, Tensor? weight, Tensor? dsum) -> (Tensor dh, Tensor dweight)",
    _rms_norm_backward,
    _rms_norm_backward_like,
)
_register(
    "layer_norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor out, Tensor mean, Tensor scale)",
    _layer_norm,
    _layer_norm_like,
    _layer_norm_setup,
    _layer_norm_gradient,
)
_register(
    "layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor mean, Tensor scale, Tensor weight) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    _layer_norm_backward,
    _layer_norm_backward_like,
)
_register("softmax", "(Tensor x) -> Tensor", _softmax, _first_like, _softmax_setup, _softmax_gradient)
_register("softmax_backward", "(Tensor grad, Tensor out) -> Tensor", _softmax_backward, _first_like)
_register(
    "cross_entropy",
    "(Tensor logits, Tensor target, Tensor factor, int ignore, bool wanted) "
    "-> (Tensor loss, Tensor gradient)",
    _cross_entropy,
    _cross_entropy_like,
    _cross_entropy_setup,
    _cross_entropy_gradient,
)
_swiglu_parts = (_swiglu, _first_like, _swiglu_setup, _swiglu_gradient)
_register("swiglu", "(Tensor gate, Tensor up) -> Tensor", *_swiglu_parts)
_register(
    "swiglu_backward",
    "(Tensor grad, Tensor gate, Tensor up) -> (Tensor dgate, Tensor dup)",
    _swiglu_backward,
    _two_like,
)
_register(
    "bias_gelu_residual",
    "(Tensor x, Tensor bias, Tensor residual, str approximate) -> Tensor",
    _bias_gelu_residual,
    _first_like,
    _bias_gelu_residual_setup,
    _bias_gelu_residual_gradient,
)
_register(
    "bias_gelu_residual_backward",
    "(Tensor grad, Tensor x, Tensor bias, str approximate) -> (Tensor dx, Tensor dbias)",
    _bias_gelu_residual_backward,
    _two_like,
)
_rotary_parts = (_rotary, _first_like, _rotary_setup, _rotary_gradient)
_register("rotary", "(Tensor x, Tensor cos, Tensor sin) -> Tensor", *_rotary_parts)
_dropout_parts = (_dropout, _first_like, _dropout_setup, _dropout_gradient)
_register("dropout", "(Tensor x, Tensor seed, float p) -> Tensor", *_dropout_parts)
_register(
    "adamw_",
    "(Tensor(a!) parameter, Tensor gradient, Tensor(b!) first, Tensor(c!) second, float lr, float beta1, "
    "float beta2, float eps, float decay, SymInt step) -> ()",
    _adamw_,
    _nothing,
)
