"""The gradients of a convolution one after the other, so that its input can go in between.

`aten.convolution_backward` makes the gradients of weight and input together, and holds the input beside
its gradient. They are two products that libraries compute apart anyway, and the second reads only the
shape of the input. So it is asked for with something else of that shape, or as the convolution that it
is: transposed, or, for kernels of one element, with the channels of the weight exchanged.
"""

from collections.abc import Callable
from operator import getitem
from typing import Any, cast

import torch
from torch import fx

from graphopt.program import insert_call

aten = torch.ops.aten
BACKWARD = aten.convolution_backward.default
MASK = 10  # the position of the mask that says which gradients are wanted
Arguments = tuple[Any, ...]
Call = Callable[..., fx.Node]  # inserts a call of a target on arguments
_FORMATS = {4: (torch.contiguous_format, torch.channels_last), 5: (torch.contiguous_format,)}


def separate_convolution_gradients(graph: fx.Graph) -> None:
    """Take `aten.convolution_backward` apart where it makes the gradients of weight and input.

    Left are transposed convolutions, sparse or symbolic shapes, and tensors that are not dense.
    """
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is BACKWARD and _is_separable(node):
            _separate(graph, node)


def _is_separable(node: fx.Node) -> bool:
    arguments = cast(Arguments, node.args)
    operands = [argument.meta["val"] for argument in arguments[:3]]
    taken = [user.args[1] for user in node.users if user.target is getitem]
    return (
        arguments[MASK][0]
        and arguments[MASK][1]
        and not arguments[7]  # transposed
        and 0 in taken
        and len(taken) == len(node.users)
        and len(arguments[4]) == operands[0].dim() - 2
        and all(map(_is_dense, operands))
    )


def _is_dense(tensor: torch.Tensor) -> bool:
    if not all(type(size) is int for size in tensor.shape):
        return False
    formats = _FORMATS.get(tensor.dim(), (torch.contiguous_format,))
    return any(tensor.is_contiguous(memory_format=f) for f in formats)


def _separate(graph: fx.Graph, node: fx.Node) -> None:
    mask: Any = node.args[MASK]
    with graph.inserting_before(node):
        arguments = (*node.args[:MASK], [False, *mask[1:]])
        rest = insert_call(graph, node, BACKWARD, arguments, name=f"{node.name}_weight")
        for user in list(node.users):
            if user.args[1] == 0:
                user.replace_all_uses_with(_gradient_of_input(graph, node, user))
                graph.erase_node(user)
            else:
                user.replace_input_with(node, rest)
    graph.erase_node(node)


def _gradient_of_input(graph: fx.Graph, node: fx.Node, made: fx.Node) -> fx.Node:
    """A node for the first result of `node`, which `made` takes; it reads the input only if it must."""

    def call(target: Callable[..., Any], *arguments: Any) -> fx.Node:
        return insert_call(graph, made, target, arguments, name=f"{made.name}_alone")

    forms = (form(node, call) for form in _FORMS)
    layout = made.meta["val"].stride()
    return next(f for f in forms if f is not None and f.meta["val"].stride() == layout)


def _as_pointwise(node: fx.Node, call: Call) -> fx.Node | None:
    """Kernels of one element: products for each element that was read, spread over the input's zeros."""
    gradient, source, weight, _, stride, padding, dilation, _, _, groups, _ = cast(Arguments, node.args)
    x, g, w = (argument.meta["val"] for argument in (source, gradient, weight))
    spread = set(stride) != {1}
    if {*w.shape[2:]} != {1} or any(padding) or groups != 1 or not (spread or x.numel() > g.numel()):
        return None
    exchanged = call(aten.transpose.int, weight, 0, 1)
    ones, zeros = [1] * len(stride), [0] * len(stride)
    found = call(
        aten.convolution.default, gradient, exchanged, None, ones, zeros, dilation, False, zeros, 1
    )
    for dimension in reversed(range(2, x.dim()) if spread else ()):
        shape = [*found.meta["val"].shape]
        shape[dimension] = x.shape[dimension]
        step = stride[dimension - 2]
        found = call(aten.slice_backward.default, found, shape, dimension, 0, 2**63 - 1, step)
    return found


def _with_a_view(node: fx.Node, call: Call) -> fx.Node | None:
    """The same operator, given a view of the incoming gradient in the place of the input."""
    gradient, source = node.args[0], node.args[1]
    x, g = source.meta["val"], gradient.meta["val"]  # type: ignore[union-attr]
    if x.numel() > g.numel():
        return None
    view = call(aten.as_strided.default, gradient, list(x.shape), list(x.stride()))
    arguments = (gradient, view, *node.args[2:MASK], [True, False, False])
    return call(getitem, call(BACKWARD, *arguments), 0)


def _transposed(node: fx.Node, call: Call) -> fx.Node | None:
    """The transposed convolution; where a stride leaves elements over, they are its output's padding."""
    gradient, source, weight, _, stride, padding, dilation, _, _, groups, _ = cast(Arguments, node.args)
    shapes = (argument.meta["val"].shape[2:] for argument in (source, gradient, weight))
    left = [
        i - ((o - 1) * s - 2 * p + d * (k - 1) + 1)
        for i, o, k, s, p, d in zip(*shapes, stride, padding, dilation, strict=True)
    ]
    settings = (None, stride, padding, dilation, True, left, groups)
    return call(aten.convolution.default, gradient, weight, *settings)


def _as_it_was(node: fx.Node, call: Call) -> fx.Node | None:
    """The same operator, with the input."""
    return call(getitem, call(BACKWARD, *node.args[:MASK], [True, False, False]), 0)


_FORMS = (_as_pointwise, _with_a_view, _transposed, _as_it_was)
