"""The updates of torch's optimizers, as functions of flat pieces of parameters and their state.

Each is the sequence of operators of torch's single-tensor code (torch/optim/adam.py and sgd.py), which is
what those optimizers run on the CPU by default, with results written over scratch. As all of them work
element by element, a parameter can be updated in pieces, with the same results.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from graphopt.errors import PlanError

Group = Mapping[str, Any]  # a parameter group: its options by name
SCRATCH = 2  # tensors of the size of a piece that an update writes over
_SPLITTABLE = (torch.float32, torch.float64)  # others are rounded once, behind the last operator

Update = Callable[[Group, int, Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], None]


@dataclass(frozen=True)
class Rule:
    """How one kind of optimizer updates a piece; `step` counts from 1, and all tensors have one shape.

    `states` names the tensors of a parameter's state, by the options of its group, as `state_dict` does.
    `update(group, step, value, gradient, states, scratch)` changes `value` and `states`. In two parts:
    `direct(group, step, value, gradient, states, scratch)` changes `states`, and `gradient` to what
    `move(group, value, gradient)` then changes `value` by, without the state. Where `needs_value` of a
    group is False, `direct` does not read `value`.
    """

    name: str
    counts_steps: bool
    states: Callable[[Group], tuple[str, ...]]
    update: Update
    direct: Update
    move: Callable[[Group, Tensor, Tensor], None]

    def needs_value(self, group: Group) -> bool:
        """Whether the weight decay is part of the gradient."""
        return bool(group["weight_decay"] and not group.get("decoupled_weight_decay"))


def is_splittable(dtype: torch.dtype) -> bool:
    """Whether both parts of an update round as the whole does."""
    return dtype in _SPLITTABLE


def rule_of(optimizer: Optimizer) -> Rule:
    """The rule of a plain `Adam`, `AdamW` or `SGD`; PlanError for others, and for options that differ."""
    found = _RULES.get(type(optimizer))
    if found is None:
        known = ", ".join(kind.__name__ for kind in _RULES)
        raise PlanError(f"{type(optimizer).__name__}: the state of {known} can be offloaded")
    for number, group in enumerate(optimizer.param_groups):
        for option in ("fused", "differentiable", "capturable"):
            if group.get(option):
                raise PlanError(
                    f"{option}=True in group {number} of {found.name}: an offloaded update is torch's "
                    "single-tensor one; leave that option out"
                )
    return found


def in_chunks(
    scratch: Tensor, tensors: Sequence[Tensor]
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Equal parts of `tensors` beside scratch of their shape; tensors that are not flat at once.

    `scratch` is uint8[bytes].
    """
    first = tensors[0]
    size = scratch.numel() // SCRATCH // first.element_size()
    parts = [scratch.view(first.dtype)[i * size : (i + 1) * size] for i in range(SCRATCH)]
    if first.dim() != 1:
        shape, stride = first.shape, first.stride()
        shaped = (part[: first.numel()].as_strided(shape, stride) for part in parts)
        yield tuple(tensors), tuple(shaped)
        return
    for some in zip(*(tensor.split(size) for tensor in tensors), strict=True):
        yield some, tuple(part[: len(some[0])] for part in parts)


def _rate(group: Group) -> Any:
    """The learning rate, a number or a tensor without dimensions."""
    rate = group["lr"]
    return rate.squeeze() if isinstance(rate, Tensor) else rate


def _adam_states(group: Group) -> tuple[str, ...]:
    more = ("max_exp_avg_sq",) if group.get("amsgrad") else ()
    return ("exp_avg", "exp_avg_sq", *more)


def _adam_moments(
    group: Group,
    step: int,
    value: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    scratch: Sequence[Tensor],
) -> tuple[Tensor, Tensor, float]:
    """Change the moments; what the value is moved by is the first, by the second, times the third."""
    (beta1, beta2), decay = group["betas"], group["weight_decay"]
    denominator, spare = scratch
    if group.get("maximize"):
        gradient = torch.neg(gradient, out=spare)
    if decay != 0 and not group.get("decoupled_weight_decay"):
        gradient = torch.add(gradient, value, alpha=decay, out=spare)
    average, square = states[:2]
    average.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    if group.get("amsgrad"):
        square = torch.maximum(states[2], square, out=states[2])
    torch.sqrt(square, out=denominator)
    denominator.div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    return average, denominator, -float(_rate(group) / (1 - beta1**step))


def _adam(
    group: Group,
    step: int,
    value: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    scratch: Sequence[Tensor],
) -> None:
    average, denominator, factor = _adam_moments(group, step, value, gradient, states, scratch)
    _adam_decay(group, value)
    value.addcdiv_(average, denominator, value=factor)


def _adam_direct(
    group: Group,
    step: int,
    value: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    scratch: Sequence[Tensor],
) -> None:
    average, denominator, factor = _adam_moments(group, step, value, gradient, states, scratch)
    torch.mul(average, factor, out=gradient).div_(denominator)  # as addcdiv has it


def _adam_move(group: Group, value: Tensor, direction: Tensor) -> None:
    _adam_decay(group, value)
    value.add_(direction)


def _adam_decay(group: Group, value: Tensor) -> None:
    if group["weight_decay"] != 0 and group.get("decoupled_weight_decay"):
        value.mul_(1 - _rate(group) * group["weight_decay"])


def _sgd_states(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] else ()


def _sgd_direct(
    group: Group,
    step: int,
    value: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    scratch: Sequence[Tensor],
) -> None:
    gradient.copy_(_sgd_direction(group, step, value, gradient, states, scratch[0]))


def _sgd_direction(
    group: Group,
    step: int,
    value: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    spare: Tensor,
) -> Tensor:
    momentum, decay = group["momentum"], group["weight_decay"]
    if group.get("maximize"):
        gradient = torch.neg(gradient, out=spare)
    if decay != 0:
        gradient = torch.add(gradient, value, alpha=float(decay), out=spare)
    if not momentum:
        return gradient
    (buffer,) = states
    if step == 1:
        buffer.copy_(gradient)
    else:
        buffer.mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
    return torch.add(gradient, buffer, alpha=momentum, out=spare) if group.get("nesterov") else buffer


def _sgd(
    group: Group,
    step: int,
    value: Tensor,
    gradient: Tensor,
    states: Sequence[Tensor],
    scratch: Sequence[Tensor],
) -> None:
    _sgd_move(group, value, _sgd_direction(group, step, value, gradient, states, scratch[0]))


def _sgd_move(group: Group, value: Tensor, direction: Tensor) -> None:
    value.add_(direction, alpha=-float(_rate(group)))


_RULES: Mapping[type, Rule] = {
    Adam: Rule("Adam", True, _adam_states, _adam, _adam_direct, _adam_move),
    AdamW: Rule("AdamW", True, _adam_states, _adam, _adam_direct, _adam_move),
    SGD: Rule("SGD", False, _sgd_states, _sgd, _sgd_direct, _sgd_move),
}
