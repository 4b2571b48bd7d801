"""Capture: from what torch.compile hands a backend to a `Program` with roles and storages.

A backend sees the graph twice: as Dynamo's FX graph, whose placeholders know the user's names, and
in AOTAutograd's partition function as a joint graph of ATen operators. `Frame` keeps the first for
the second.
"""

import logging
import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import (
    InputMutationAOTOutput,
    PlainAOTInput,
    SubclassGetAttrAOTInput,
    TangentAOTInput,
)

from graphopt.program import Input, Program, Role, record_leaves

# Logging breaks a graph and changes no result. The last two are what transformers adds to loggers.
_LOGGING_METHODS = (
    *("debug", "info", "warning", "error", "exception", "critical", "log", "isEnabledFor"),
    *("warning_once", "info_once", "warning_advice"),
)


_MANY_SHAPES = 4096  # graphs of one callable that Dynamo keeps, one for each combination of shapes


@dataclass(frozen=True)
class Frame:
    """One graph of a captured callable: what each input is, and where the graph was broken, if it was."""

    inputs: tuple[tuple[str, Role], ...]
    broken_at: str | None


def frame_of(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Frame:
    """The Frame of a graph that Dynamo captured."""
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs = tuple(
        (_label(node), _role(node, value))
        for node, value in zip(placeholders, example_inputs, strict=True)
    )
    return Frame(inputs, _break_of(module))


def _label(node: fx.Node) -> str:
    """What the user calls the input: `transformer.wte.weight`, `input_ids`."""
    name = _source_name(node)
    if name is None:
        return str(node.target)
    keys = re.findall(r"\['([^']*)'\]|\.([A-Za-z_]\w*)|\[(\d+)\]", name)
    parts = [next(p for p in key if p) for key in keys]
    held = {"_modules", "_parameters", "_buffers"}
    hidden = held | {"self", "kwargs", "args"}
    if parts[:1] == ["fn"]:  # Dynamo's own wrapper around a module of torch.nn
        parts = parts[1:]
    if "__self__" in parts:  # a method; what it is called says nothing about its module
        parts = parts[parts.index("__self__") + 1 :]
    after = zip(["", *parts], parts, strict=False)  # a module may well be called `self`
    label = ".".join(p for before, p in after if p not in hidden or before in held) or name
    return f"args[{label}]" if label.isdigit() else label


def _source_name(node: fx.Node) -> str | None:
    argument = node.meta.get("grapharg")
    source = getattr(argument, "source", None) or getattr(node, "_dynamo_source", None)
    if source is None:
        return None
    return str(source.name if isinstance(source.name, str) else source.name())


def _role(node: fx.Node, value: Any) -> Role:
    if isinstance(value, torch.nn.Parameter):
        return Role.PARAMETER
    return Role.BUFFER if "_buffers" in (_source_name(node) or "") else Role.INPUT


def _break_of(module: fx.GraphModule) -> str | None:
    reason = getattr(module, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return None
    text = str(reason.reason).strip().splitlines()[0]
    if not reason.user_stack:
        return text
    line = reason.user_stack[-1]
    return f"{line.filename}:{line.lineno}: {text}"


def program_of(module: fx.GraphModule, num_forward_outputs: int, frame: Frame) -> Program:
    """The Program of a forward or joint graph that AOTAutograd traced from the graph of `frame`."""
    module.graph.eliminate_dead_code()
    record_leaves(module.graph)
    described = module.graph.output_node().meta.get("desc", ())
    mutated = {d.mutated_input for d in described if isinstance(d, InputMutationAOTOutput)}
    inputs = tuple(
        _input_of(node, frame, mutated) for node in module.graph.nodes if node.op == "placeholder"
    )
    breaks = (frame.broken_at,) if frame.broken_at else ()
    return Program(module, num_forward_outputs, inputs, breaks)


def _input_of(node: fx.Node, frame: Frame, mutated: set[Any]) -> Input:
    origin, part = node.meta.get("desc"), ""
    while isinstance(origin, SubclassGetAttrAOTInput):  # the local tensor of a DTensor, or its mesh
        part, origin = f".{origin.attr}{part}", origin.base
    if part and not isinstance(node.meta.get("val"), torch.Tensor):
        return Input(node.name, Role.INPUT, f"{node.name}{part}")
    if isinstance(origin, TangentAOTInput) or (origin is None and "tangents" in str(node.target)):
        return Input(node.name, Role.TANGENT, node.name)
    if isinstance(origin, PlainAOTInput) and origin.idx < len(frame.inputs):
        label, role = frame.inputs[origin.idx]
        return Input(node.name, role, label, origin in mutated)
    return Input(node.name, Role.INPUT, node.name, origin in mutated)


class CaptureSettings:
    """A context in which Dynamo captures for graphopt: logging breaks no graph, no shape is refused.

    Entering costs some microseconds, so that it can surround every call. It may be nested.
    """

    def __init__(self) -> None:
        named = (getattr(logging.Logger, name, None) for name in _LOGGING_METHODS)
        self._ignored = {method for method in named if method is not None} | {warnings.warn}
        self._before = threading.local()  # the settings are each thread's own, too

    def __enter__(self) -> None:
        config = torch._dynamo.config
        before = (
            config.ignore_logging_functions,
            config.recompile_limit,
            config.accumulated_recompile_limit,
        )
        self._before.__dict__.setdefault("stack", []).append(before)
        config.ignore_logging_functions = before[0] | self._ignored
        config.recompile_limit = config.accumulated_recompile_limit = _MANY_SHAPES

    def __exit__(self, *exception: object) -> None:
        config = torch._dynamo.config
        (
            config.ignore_logging_functions,
            config.recompile_limit,
            config.accumulated_recompile_limit,
        ) = self._before.stack.pop()
