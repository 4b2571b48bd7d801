"""Fused layers as functions and as operators of a graph: `torch.ops.graphopt.kernel_*`.

Each runs as one generated kernel: Numba's on CPU tensors, CUDA C on those of a GPU, torch operators
elsewhere, and after one warning where a kernel cannot be made. It has gradients, and can be traced,
compiled and exported. Numbers are computed in float32 (float64 for float64) and rounded once, when a
result is stored.

Tensors of one call have one dtype: float32, float64, bfloat16 or float16. Under `torch.autocast` they
may differ: as that does for these layers on a GPU, norms, `softmax` and cross-entropies take float32
then, the others the widest dtype of what they are given. float64 is never cast.
"""

import functools
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt import kernel_ops  # registers the operators
from graphopt.errors import CodegenError

ops = kernel_ops.ops
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# --- functions ---------------------------------------------------------------------------------


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, residual: Tensor | None = None
) -> Any:
    """`x` (.., D) over its root mean square, times `weight` (D,).

    With `residual`, of the shape of `x`: that of `x + residual`, and this sum.

    >>> out, total = rms_norm(torch.ones(2, 8), torch.ones(8), residual=torch.ones(2, 8))
    >>> out.shape, float(total[0, 0])
    (torch.Size([2, 8]), 2.0)
    """
    x, weight, residual = _alike("rms_norm", torch.float32, x=x, weight=weight, residual=residual)
    out, total, _ = ops.kernel_rms_norm(x, residual, weight, eps)
    return out if residual is None else (out, total)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`x` (.., D) less its mean, over its deviation, times `weight` (D,), plus `bias` (D,)."""
    given = _alike("layer_norm", torch.float32, x=x, weight=weight, bias=bias)
    out: Tensor = ops.kernel_layer_norm(*given, eps)[0]
    return out


def softmax(x: Tensor) -> Tensor:
    """The softmax over the last dimension."""
    out: Tensor = ops.kernel_softmax(*_alike("softmax", torch.float32, x=x))
    return out


def cross_entropy(
    logits: Tensor, target: Tensor, ignore_index: int = -100, reduction: Literal["mean", "sum"] = "mean"
) -> Tensor:
    """The cross-entropy of `logits` (N, V) and targets (N,) of int64, of the dtype of the logits.

    Where a gradient will be asked for, the same sweep over the logits makes it. Targets that are no
    column raise IndexError on a CPU; on a GPU, where looking would wait for it, they count as a logit
    of 0.
    """
    (logits,) = _alike("cross_entropy", torch.float32, logits=logits)
    wanted = logits.requires_grad and torch.is_grad_enabled()
    factor = _factor(target, ignore_index, reduction)
    loss: Tensor = ops.kernel_cross_entropy(logits, target, factor, ignore_index, wanted)[0]
    return loss


def cross_entropy_with_gradient(
    logits: Tensor, target: Tensor, ignore_index: int = -100, reduction: Literal["mean", "sum"] = "mean"
) -> tuple[Tensor, Tensor]:
    """The cross-entropy of `logits` (N, V) and targets (N,), and its gradient (N, V)."""
    (logits,) = _alike("cross_entropy_with_gradient", torch.float32, logits=logits)
    factor = _factor(target, ignore_index, reduction)
    loss, gradient = ops.kernel_cross_entropy(logits.detach(), target, factor, ignore_index, True)
    return loss, gradient


def _factor(target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """What the sum of the losses is multiplied by; it stays on the device."""
    if reduction == "sum":
        return torch.ones((), dtype=torch.float64, device=target.device)
    return (target != ignore_index).sum(dtype=torch.float64).reciprocal()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, both of one shape."""
    out: Tensor = ops.kernel_swiglu(*_alike("swiglu", gate=gate, up=up))
    return out


def bias_gelu_residual(
    x: Tensor, bias: Tensor, residual: Tensor, approximate: Literal["none", "tanh"] = "none"
) -> Tensor:
    """`gelu(x + bias) + residual`: x and residual (.., D), bias (D,)."""
    given = _alike("bias_gelu_residual", x=x, bias=bias, residual=residual)
    out: Tensor = ops.kernel_bias_gelu_residual(*given, approximate)
    return out


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves of `x` (.., D) turned by angles whose `cos` and `sin` broadcast to (.., D / 2).

    `cos` and `sin` may have D columns, where both halves are the same. They get no gradient.
    """
    x, cos, sin = _alike("rotary", x=x, cos=cos, sin=sin)
    half = x.shape[-1] // 2
    out: Tensor = ops.kernel_rotary(x, cos[..., :half], sin[..., :half])
    return out


def dropout(x: Tensor, p: float = 0.5, seed: Tensor | int | None = None) -> Tensor:
    """`x`, each number 0 with probability `p`, the others over `1 - p`; the same for the same `seed`.

    The backward draws the same numbers again, so that no mask is kept. A `seed` is an integer, or a
    tensor of one int64; without one, torch's generator of the device gives it.

    >>> x = torch.ones(4, 8)
    >>> bool((dropout(x, 0.5, seed=3) == dropout(x, 0.5, seed=3)).all())
    True
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout with probability {p}: it is between 0 and 1")
    (x,) = _alike("dropout", x=x)
    if seed is None:
        seed = torch.randint(2**63 - 1, (), device=x.device)
    elif not isinstance(seed, Tensor):
        seed = torch.tensor(seed)
    out: Tensor = ops.kernel_dropout(x, seed, p)
    return out


# --- one step of an optimizer ------------------------------------------------------------------


def adamw_(
    parameter: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> None:
    """Step number `step`, from 1 on, of AdamW: `parameter` and its moments change, read and written once.

    All four are of one shape, and of one dtype, but for moments in float32 of a narrower parameter.
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", 2019.
    """
    _alike("adamw_", parameter=parameter, gradient=gradient)
    _alike("adamw_", first=first, second=second)
    if (
        first.dtype not in (parameter.dtype, torch.float32)
        or parameter.dtype == torch.float64 != first.dtype
    ):
        raise CodegenError(f"adamw_: moments in {first.dtype} of a parameter in {parameter.dtype}")
    shapes = {x.shape for x in (parameter, gradient, first, second)}
    if len(shapes) != 1:
        raise CodegenError(f"adamw_: tensors of different shapes: {[*map(tuple, shapes)]}")
    ops.kernel_adamw_(parameter, gradient, first, second, lr, *betas, eps, weight_decay, step)


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` with one kernel for each parameter, without `amsgrad` and `maximize`.

    Its state is that of torch's, so that either goes on from a checkpoint of the other.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """As any optimizer's: change all parameters that have a gradient; gives what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["amsgrad"] or group["maximize"]:
                raise CodegenError("AdamW: neither amsgrad nor maximize")
            options = {name: group[name] for name in ("betas", "eps", "weight_decay")}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                moments, step = (state["exp_avg"], state["exp_avg_sq"]), int(state["step"])
                adamw_(p, p.grad, *moments, step, lr=float(group["lr"]), **options)
        return loss


# --- dtypes ------------------------------------------------------------------------------------


def _alike(name: str, autocast: torch.dtype | None = None, **given: Tensor | None) -> list[Any]:
    """The tensors, all of one dtype; CodegenError names them where that is not so.

    Under autocast they are cast: to the dtype `autocast`, or else to the widest of theirs.
    """
    tensors = {key: x for key, x in given.items() if x is not None}
    first, *others = [x.dtype for x in tensors.values()]
    if torch.is_autocast_enabled(next(iter(tensors.values())).device.type):
        to = autocast or functools.reduce(torch.promote_types, others, first)
        given = {k: x if x is None or x.dtype == torch.float64 else x.to(to) for k, x in given.items()}
        first, *others = [x.dtype for x in given.values() if x is not None]
    if first not in _DTYPES or any(dtype != first for dtype in others):
        names = ", ".join(f"{key} is {str(x.dtype)[6:]}" for key, x in tensors.items())
        raise CodegenError(f"{name}: {names}; tensors of one call have one dtype, of floats")
    return [*given.values()]
