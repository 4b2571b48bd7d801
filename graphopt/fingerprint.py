"""What tells one traced graph from another, as a short text: a hash of its operators and edges."""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from graphopt.program import Program, Role, tensors_of

_PLAIN = (str, int, float, complex, torch.dtype, torch.device, torch.layout, torch.memory_format)


def fingerprint(program: Program) -> str:
    """The SHA-256 of `program`, in hex: 64 characters.

    Hashed is one line for each node, in order: its name, the role of an input, its operator, its
    arguments (other nodes by name), and the dtype, shape, strides and kind of device of each of its
    tensors. Graphs inside of higher-order operators are part of it. Names are, since plans call nodes by
    them; what the user calls a parameter, values of constants and lines of the model's source are not.
    Equal in another process and for weights on the meta device; another version of torch may capture the
    same model as another graph.

    >>> from graphopt.tracing import trace
    >>> double = [fingerprint(trace(lambda x: x * 2, torch.ones(n), training=False)) for n in (3, 3, 4)]
    >>> len(double[0]), double[0] == double[1], double[0] == double[2]
    (64, True, False)
    """
    lines = [
        f"{program.num_forward_outputs} outputs of the forward",
        *_lines(program.graph, program.roles),
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _lines(graph: fx.Graph, roles: Mapping[str, Role]) -> Iterator[str]:
    for node in graph.nodes:
        role = roles[node.name].value if node.name in roles else node.op
        yield f"{node.name}: {role} {_argument(node.args)} {_argument(node.kwargs)} {_tensors(node)}"
        if node.op == "get_attr":
            yield from _held(node)
        elif node.op not in ("placeholder", "output"):
            yield _target(node.target)


def _held(node: fx.Node) -> Iterator[str]:
    """What a `get_attr` node gives: a graph, or a constant."""
    owner = node.graph.owning_module
    value: Any = owner
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    if isinstance(value, fx.GraphModule):
        yield from _lines(value.graph, {})
    else:
        yield type(value).__name__


def _target(target: Any) -> str:
    if isinstance(target, (torch._ops.OpOverload, str)):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', type(target).__name__)}"


def _tensors(node: fx.Node) -> str:
    facts = (
        "-" if t is None else f"{t.dtype}{list(t.shape)}{list(t.stride())}@{t.device.type}"
        for t in (tensors_of(node) if node.op != "output" else ())
    )
    return " ".join(facts)


def _argument(value: Any) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}={_argument(v)}" for key, v in sorted(value.items())) + "}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_argument, value))}]"
    if value is None or isinstance(value, _PLAIN):
        return repr(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return str(value)
    return type(value).__qualname__
