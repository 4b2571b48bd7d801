"""Training steps of eager PyTorch and of optimized models, and their comparison bit for bit."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import graphopt
from graphopt.passes.replay import RECOMPUTE_OF
from graphopt.program import leaves


@dataclass(frozen=True)
class Outcome:
    """What one training step left behind, copied."""

    loss: torch.Tensor
    gradients: Mapping[str, torch.Tensor | None]
    buffers: Mapping[str, torch.Tensor]


def total(output: Any) -> torch.Tensor:
    """A loss of everything differentiable in `output`: each element weighs differently."""
    if isinstance(output, torch.Tensor):
        if not output.requires_grad:
            return torch.zeros(())
        flat = output.float().flatten()
        return (flat * torch.linspace(0.5, 1.5, flat.numel())).sum()
    parts = output.values() if isinstance(output, Mapping) else output
    return sum((total(p) for p in parts if p is not None), torch.zeros(()))


def step(
    model: nn.Module,
    *args: Any,
    loss: Callable[[Any], torch.Tensor] = total,
    seed: int = 0,
    zero: bool = True,
    **kwargs: Any,
) -> Outcome:
    """Forward and backward of `model` from one seed of the generator."""
    if zero:
        model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    value = loss(model(*args, **kwargs))
    value.backward()
    gradients = {
        n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters()
    }
    return Outcome(value.detach(), gradients, {n: b.clone() for n, b in model.named_buffers()})


def assert_same(got: Outcome, want: Outcome) -> None:
    """Bit for bit, and None where None."""
    assert torch.equal(got.loss, want.loss), f"loss {got.loss} instead of {want.loss}"
    assert got.gradients.keys() == want.gradients.keys()
    for name, gradient in want.gradients.items():
        mine = got.gradients[name]
        assert (mine is None) is (gradient is None), f"gradient of {name}: None or not"
        if gradient is not None:
            assert torch.equal(mine, gradient), f"gradient of {name}"
    for name, buffer in want.buffers.items():
        assert torch.equal(got.buffers[name], buffer), f"buffer {name}"


def twin(model: nn.Module, *args: Any, steps: int = 2, **options: Any) -> Any:
    """An optimized copy of `model`, after `steps` steps of both that agreed bit for bit.

    Options of `optimize` are taken by name; the others go to `step`.
    """
    mine = {k: options.pop(k) for k in ("memory", "activations", "passes") if k in options}
    if not mine:
        mine = {"memory": "min"}
    model = copy.deepcopy(model)  # running statistics of the caller's stay
    small = graphopt.optimize(copy.deepcopy(model), device="cpu-generic", **mine)
    for seed in range(steps):
        want = step(model, *args, seed=seed, **options)
        assert_same(step(small, *args, seed=seed, **options), want)
    return small


def records(optimized: Any) -> list[Any]:
    """The graphs that were compiled for `optimized`."""
    return optimized._graphopt.log.records  # type: ignore[no-any-return]


def recomputed(optimized: Any) -> int:
    """How many operators of the forward the backwards of `optimized` run again, views left out."""
    after = (n for r in records(optimized) for n in r.after.graph.nodes)
    return sum(RECOMPUTE_OF in n.meta and any(x.alias is None for x in leaves(n)) for n in after)
