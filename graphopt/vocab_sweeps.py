"""The two halves of a split loss, for passes of a pipeline: numbers first, gradients some time later.

Between them a sweep holds what it needs for the second half: `Streamed` the hidden rows only, so that
logits are made again (4 N D V_i FLOPs in all for the numbers and the gradient of the weight, 8 with that
of x); `Kept` the softmax of this rank's words (N, V_i), for 6.
"""

from typing import Protocol

import torch
from torch import Tensor

from graphopt.stream_plans import RowNumbers, attention, statistics
from graphopt.streamed import Coefficients, Operands, Tile, spans, statistics_of


class WeightGradients:
    """Where the gradients of a head go: they are added to `.grad`, times `scale`."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float) -> None:
        self.scale = scale
        self.weight = gradient_of(weight) if weight.requires_grad else None
        self.bias = gradient_of(bias) if bias is not None and bias.requires_grad else None

    def add(self, tile: Tile, gradient: Tensor, x: Tensor, span: slice) -> None:
        """Those of some words, from the gradient of their raw scores (N, c) and x (N, D)."""
        if self.weight is not None:
            self.weight[span].addmm_(gradient.t(), x, alpha=self.scale)
        if self.bias is not None:
            self.bias[span].add_(tile.summed(gradient).to(self.bias.dtype), alpha=self.scale)


def gradient_of(parameter: Tensor) -> Tensor:
    """Its `.grad`, zeros where it had none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class Sweep(Protocol):
    """A loss between its halves.

    `own` are the numbers of this rank's words. `mean` (N, D), where it was asked for, is the sum of
    exp(z - base) over them times their rows of the weight, in which the gradient of x is linear.
    """

    operands: Operands
    own: RowNumbers
    mean: Tensor | None
    base: Tensor

    def finish(self, lse: Tensor, by: Coefficients, into: WeightGradients, with_x: bool) -> Tensor | None:
        """Adds the gradients of weight and bias; that of x (N, D) if asked for."""


class Streamed:
    """A sweep that makes the logits again, in blocks of so many words."""

    def __init__(self, operands: Operands, block: int, with_mean: bool) -> None:
        self.operands, self._block = operands, block
        self.mean: Tensor | None = None
        if with_mean:
            self.own, self.mean = attention(operands, block)
        else:
            self.own = statistics(operands, block)
        self.base = self.own.lse

    def finish(self, lse: Tensor, by: Coefficients, into: WeightGradients, with_x: bool) -> Tensor | None:
        """As of any sweep."""
        operands = self.operands
        x, words = operands.x, operands.weight.shape[0]
        dx = torch.zeros_like(x, dtype=operands.dtype) if with_x else None
        tile = Tile(operands, x.shape[0], min(self._block, words))
        for span in spans(words, self._block):
            part = operands.columns(span)
            tile.logits(part)
            gradient = tile.gradient(part, lse, by)
            if dx is not None:
                dx += torch.mm(gradient, part.weight)
            into.add(tile, gradient, x, span)
        return None if dx is None else dx.to(x.dtype)


class Kept:
    """A sweep that keeps exp(z - base) of this rank's words."""

    def __init__(self, operands: Operands, with_mean: bool) -> None:
        self.operands = operands
        self._tile = Tile(operands, operands.x.shape[0], operands.weight.shape[0])
        self._softmax = self._tile.logits(operands)
        self._slope = self._tile.slope_of(operands)
        found = statistics_of(self._softmax, operands.targets, operands.mix, operands.summed)
        self.own, self.base, self.mean = RowNumbers.of(found), found.peak, None
        if with_mean:
            product = torch.mm(self._tile.lowered(self._softmax), operands.weight)
            self.mean = product.to(operands.dtype)

    def finish(self, lse: Tensor, by: Coefficients, into: WeightGradients, with_x: bool) -> Tensor | None:
        """As of any sweep; once, as it overwrites the softmax."""
        operands, words = self.operands, self.operands.weight.shape[0]
        mine = by.rebased(self.base, lse)
        gradient = self._tile.finished(operands, self._softmax, mine, self._slope)
        into.add(self._tile, gradient, operands.x, slice(0, words))
        return torch.mm(gradient, operands.weight) if with_x else None
