"""A program as Python that can be read, compared line by line, and run."""

import math
from collections.abc import Iterator
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.arena_facts import spots_of
from graphopt.origin import Origin, origin_of
from graphopt.program import Program, leaves, tensors_of


def program_lines(program: Program, *, origins: bool = True) -> list[str]:
    """One function `step`, one line for each node, with the dtype and shape of what it makes.

    With `origins` comments name the lines of the model. Where a graph holds constants, the function takes
    the module that has them as `self`. Generated kernels and other functions are called by name.

    >>> from graphopt.tracing import trace
    >>> program = trace(lambda x: torch.relu(x) * 2, torch.ones(3), training=False)
    >>> print("\\n".join(program_lines(program, origins=False)))
    import torch
    aten = torch.ops.aten
    def step(
        arg0_1,  # input x float32[3]
    ):
        relu = aten.relu.default(arg0_1)  # float32[3]
        mul = aten.mul.Tensor(relu, 2)  # float32[3]
        return (mul,)
    """
    nodes = list(program.graph.nodes)
    namespaces = sorted({n for node in nodes for n in _namespaces(node)})
    lines = ["import torch", *(f"{name} = torch.ops.{name}" for name in namespaces), "def step("]
    if any(node.op == "get_attr" for node in nodes):
        lines.append("    self,")
    facts = {node.name: _facts(node) for node in nodes if node.op != "output"}
    lines += [f"    {i.name},  # {i.role.value} {i.label} {facts[i.name]}" for i in program.inputs]
    lines.append("):")
    last = Origin("", "", "")
    for node in program.operators():
        origin = origin_of(node)
        if origins and origin.place and origin != last:
            lines.append(f"    # {origin.place}: {origin.code}")
            last = origin
        lines.append(f"    {node.name} = {_call(node)}  # {facts[node.name]}")
    results = "".join(f"{_text(output)}, " for output in program.outputs).strip()
    return [*lines, f"    return ({results})"]


def _namespaces(node: fx.Node) -> Iterator[str]:
    for target in (node.target, *node.args):
        if isinstance(target, torch._ops.OpOverload):
            yield target.namespace
        elif isinstance(target, torch._ops.HigherOrderOperator):
            yield "higher_order"


def _facts(node: fx.Node) -> str:
    tensors = (t for t in tensors_of(node) if t is not None)
    shapes = (f"{str(t.dtype).removeprefix('torch.')}[{', '.join(map(str, t.shape))}]" for t in tensors)
    places = (
        f"at byte {spot.offset} of the arena"
        for spot, leaf in zip(spots_of(node), leaves(node), strict=False)
        if spot is not None and leaf.alias is None
    )
    return " ".join([", ".join(shapes), *places])


def _call(node: fx.Node) -> str:
    if node.target is getitem:
        return f"{_text(node.args[0])}[{_text(node.args[1])}]"
    arguments = [*map(_text, node.args), *(f"{k}={_text(v)}" for k, v in node.kwargs.items())]
    return f"{_text(node.target)}({', '.join(arguments)})"


def _text(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"self.{value.target}" if value.op == "get_attr" else value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(_text, value))
        return f"({inner},)" if isinstance(value, tuple) else f"[{inner}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_text(v)}" for key, v in value.items()) + "}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"float('{value}')"
    if isinstance(value, torch.device):
        return f"torch.device('{value}')"
    if isinstance(value, torch._ops.OpOverload):
        return str(value)
    if isinstance(value, torch._ops.HigherOrderOperator):
        return f"higher_order.{value.name()}"
    return str(getattr(value, "__name__", None) or repr(value)) if callable(value) else repr(value)
