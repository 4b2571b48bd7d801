"""Forms of operators of an inference that take less memory, where their place in the graph allows them.

A batch norm writes over its operand where nothing else reads it: the kernel is the same, and so is
every bit. A convolution of one element by stride s reads every s-th element of its input; told so,
libraries copy only those into their own layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.cost_models.memory import may_overwrite
from graphopt.program import insert_call, leaves, set_value, tensors_of

aten = torch.ops.aten
NORM = aten._native_batch_norm_legit_no_training.default


@dataclass(frozen=True)
class Rewritten:
    """The nodes that are new in a graph, and the names of those that other nodes were replaced by."""

    new: tuple[fx.Node, ...]
    instead_of: Mapping[str, str]


def use_lean_forms(graph: fx.Graph) -> Rewritten:
    """Rewrite the nodes of `graph`, a forward, that have such a form. A norm keeps its name."""
    new: list[fx.Node] = []
    instead_of: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.target is NORM and _is_free(node):
            new += _write_in_place(graph, node)
        elif node.target is aten.convolution.default and _skips(node):
            made = _step_over(graph, node)
            instead_of[made[-1].name] = node.name
            new += made
    return Rewritten(tuple(new), instead_of)


def _is_free(node: fx.Node) -> bool:
    """True for a norm whose operand fills a storage of its own, of the result's layout, and dies."""
    operand = node.args[0]
    results = list(node.users)
    return (
        isinstance(operand, fx.Node)
        and operand.op == "call_function"
        and list(operand.users) == [node]
        and all(leaf.alias is None for leaf in leaves(operand))
        and [r.args[1] for r in results if r.target is getitem] == [0]
        and may_overwrite(results[0], operand)
    )


def _write_in_place(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Let the norm write over its operand; the empty statistics that it asks for."""
    x, weight, bias, mean, variance, momentum, epsilon = node.args
    assert isinstance(x, fx.Node)
    tensor = tensors_of(x)[0]
    assert tensor is not None
    kind = {"dtype": tensor.dtype, "device": tensor.device}
    with graph.inserting_before(node):
        saved = [
            insert_call(graph, node, aten.empty.memory_format, ([0],), kind, f"{node.name}_{i}")
            for i in (1, 2)
        ]
    node.target = aten.native_batch_norm.out
    node.args = (x, weight, bias, mean, variance, False, momentum, epsilon)
    node.kwargs = {"out": x, "save_mean": saved[0], "save_invstd": saved[1]}
    set_value(node, (tensor, *(s.meta["val"] for s in saved)))
    set_value(next(iter(node.users)), tensor)
    return saved


def _skips(node: fx.Node) -> bool:
    """True for a plain convolution with a kernel of one element that leaves elements out."""
    arguments: tuple[Any, ...] = node.args
    _image, weight, _bias, stride, padding, _dilation, transposed = arguments[:7]
    kernel = tensors_of(weight)[0]
    return (
        kernel is not None
        and all(size == 1 for size in kernel.shape[2:])
        and len(stride) == kernel.dim() - 2
        and any(step != 1 for step in stride)
        and not any(padding)
        and not transposed
    )


def _step_over(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """The same convolution of every s-th element, in the place of `node`; all nodes made."""
    arguments: tuple[Any, ...] = node.args
    image, weight, bias, strides, *others = arguments
    made: list[fx.Node] = []
    with graph.inserting_before(node):
        for dimension, step in enumerate(strides, start=2):
            given = (image, dimension, 0, 2**63 - 1, step)
            image = insert_call(graph, node, aten.slice.Tensor, given, name=f"{node.name}_elements")
            made.append(image)
        given = (image, weight, bias, [1] * len(strides), *others)
        name = f"{node.name}_stepped"
        made.append(insert_call(graph, node, aten.convolution.default, given, name=name))
    node.replace_all_uses_with(made[-1])
    graph.erase_node(node)
    return made
