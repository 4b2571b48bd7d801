"""Gradients that are added to `.grad` while the backward runs, instead of when it ends.

A compiled backward returns all gradients together, so that a step that adds to the gradients of earlier
ones (gradient accumulation) holds each of them twice. Here a parameter's gradient is added as soon
as it is made, where autograd would add it in the same way afterwards and nobody watches.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.autograd.graph import get_gradient_edge

from graphopt import ops


class Accumulation:
    """Adds gradients to the parameters that the forward was called with.

    `positions`: those of the parameters among the arguments of the forward; the gradients have the same.
    """

    def __init__(self, positions: Sequence[int]) -> None:
        self.positions = tuple(positions)
        self._known: dict[int, weakref.ref[torch.Tensor]] = {}
        self._is_certain = True

    def note(self, arguments: Sequence[Any]) -> None:
        """See the arguments of a forward. Once parameters changed, it is open whose backward runs."""
        if not self._known:
            self._known = {i: weakref.ref(arguments[i]) for i in self.positions}
        elif self._is_certain:
            self._is_certain = all(self._known[i]() is arguments[i] for i in self.positions)

    def parameter(self, position: int) -> torch.Tensor | None:
        """The parameter of a gradient; None where it is not certain."""
        return self._known[position]() if self._is_certain and self._known else None

    def insert(self, module: fx.GraphModule) -> None:
        """Let the backward `module` add each gradient where it is made."""
        output = module.graph.output_node()
        results: list[Any] = list(output.args[0])  # type: ignore[arg-type]
        for position in self.positions:
            made = results[position]
            if isinstance(made, fx.Node) and made.op != "placeholder":
                _move_up(made)
                with module.graph.inserting_after(made):
                    added = module.graph.call_function(_Addition(self, position), (made,))
                added.meta = dict(made.meta)
                results[position] = added
        output.args = (tuple(results),)


class _Addition:
    """Adds one gradient."""

    def __init__(self, accumulation: Accumulation, position: int) -> None:
        self.__name__ = self.__qualname__ = "accumulated"
        self._accumulation, self._position = accumulation, position

    def __call__(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """None where `gradient` was added to its parameter's, else `gradient`, for autograd to add."""
        parameter = self._accumulation.parameter(self._position)
        if parameter is None or parameter.grad is None or not _would_be_added(parameter, gradient):
            return gradient
        parameter.grad.add_(gradient)
        return None


def _move_up(view: fx.Node) -> None:
    """Put a view, and those that it is made from, right after what they are views of."""
    chain = [view]
    while ops.is_view(chain[-1].target) and len(chain[-1].all_input_nodes) == 1:
        chain.append(chain[-1].all_input_nodes[0])
    for source, made in zip(chain[:0:-1], chain[-2::-1], strict=True):
        if source.op != "placeholder":
            source.append(made)


def _would_be_added(parameter: torch.Tensor, gradient: torch.Tensor) -> bool:
    """True where autograd would run `parameter.grad += gradient`, and neither a hook nor a graph sees it.

    Under torch.distributed, hooks may watch that Python does not see.
    """
    before = parameter.grad
    if before is None or type(before) is not torch.Tensor or type(gradient) is not torch.Tensor:
        return False
    alike = (before.shape, before.dtype, before.device, before.layout) == (
        *(gradient.shape, gradient.dtype, gradient.device, gradient.layout),
    )
    hooks = parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not alike or hooks or shared or torch.is_grad_enabled() or before.requires_grad:
        return False
    try:
        return torch._C._will_engine_execute_node(get_gradient_edge(parameter).node)
    except RuntimeError:  # autograd.grad, which returns the gradient
        return False
