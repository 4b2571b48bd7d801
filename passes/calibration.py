"""Gradients of some batches, from which a pass learns which parameters matter."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn


def calibration_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    loss: Callable[..., torch.Tensor] | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """For each batch, the gradient of every parameter of `model` that has one, by its name.

    A batch is a tensor, a tuple of positional arguments or a mapping of keyword arguments. The loss
    is the model's result, the `loss` of that, or `loss(result, target)` for batches (inputs, target).
    The model's gradients are as before afterwards; its mode and its buffers are the caller's matter.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> found = calibration_gradients(model, [torch.ones(3, 2)], torch.sum)
    >>> [g["weight"].tolist() for g in found]
    [[[3.0, 3.0]]]
    """
    for batch in batches:
        every = model.named_parameters(remove_duplicate=False)  # a tied one has several names
        named = {name: p for name, p in every if p.requires_grad}
        unique = list({id(p): p for p in named.values()}.values())
        with torch.enable_grad():
            value = _loss(model, batch, loss)
            found = torch.autograd.grad(value, unique, allow_unused=True)
        by_parameter = {id(p): g for p, g in zip(unique, found, strict=True) if g is not None}
        yield {name: by_parameter[id(p)] for name, p in named.items() if id(p) in by_parameter}


def _loss(model: nn.Module, batch: Any, loss: Callable[..., torch.Tensor] | None) -> torch.Tensor:
    if isinstance(batch, Mapping):
        result = model(**batch)
    elif isinstance(batch, tuple):
        *given, last = batch
        if loss is not None and given:
            return loss(model(*given), last)
        result = model(*batch)
    else:
        result = model(batch)
    if loss is not None:
        return loss(result)
    return result if isinstance(result, torch.Tensor) else result.loss
