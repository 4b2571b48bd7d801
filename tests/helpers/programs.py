"""Programs run on real tensors: node by node, and as the runtime runs them."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from tiny_models import MODELS
from torch import nn

import graphopt
from graphopt.lower import boxed, overwrite_dead_operands
from graphopt.program import Program, Role
from graphopt.split import backward_module, forward_module, saved_nodes


@functools.cache
def traced(name: str) -> tuple[Program, nn.Module, dict[str, torch.Tensor]]:
    """A tiny model by name: its joint program, the model, and inputs for it. Change none of them."""
    torch.manual_seed(0)
    model, inputs = MODELS[name]()
    return graphopt.trace(model, inputs), model, inputs


def arguments(program: Program, model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Real tensors for the graph inputs of `program`, which are no tangents, by node name."""
    known = {**dict(model.named_parameters()), **dict(model.named_buffers()), **inputs}
    return {i.name: known[i.label].detach() for i in program.inputs if i.role is not Role.TANGENT}


def run_split(program: Program, given: Mapping[str, torch.Tensor], seed: int = 0) -> list[Any]:
    """Outputs and gradients of a joint `program`, run as the runtime would run it.

    Tangents are ones where the output is a scalar, else a ramp.
    """
    saved = saved_nodes(program)
    forward = forward_module(program, saved)
    backward = backward_module(program, [n.name for n in saved])
    for module in (forward, backward):
        overwrite_dead_operands(module)
    torch.manual_seed(seed)
    copies = [given[i.name].clone() for i in program.inputs if i.role is not Role.TANGENT]
    with torch.no_grad():
        results = list(boxed(forward)(copies))
        count = program.num_forward_outputs
        tangents = [ramp(n.meta["val"]) for n in tangent_nodes(program)]
        gradients = boxed(backward)([*results[count:], *tangents])
    return [*results[:count], *gradients]


def run_joint(program: Program, given: Mapping[str, torch.Tensor], seed: int = 0) -> list[Any]:
    """Outputs and gradients of a joint `program`, its graph run node by node as it stands."""
    torch.manual_seed(seed)
    values = [
        ramp(n.meta["val"]) if n in tangent_nodes(program) else given[n.name].clone()
        for n in program.graph.nodes
        if n.op == "placeholder"
    ]
    with torch.no_grad():
        return list(torch.fx.Interpreter(program.module).run(*values))


def tangent_nodes(program: Program) -> list[torch.fx.Node]:
    """The placeholders for incoming gradients."""
    names = [i.name for i in program.inputs if i.role is Role.TANGENT]
    return [n for n in program.graph.nodes if n.name in names]


def ramp(like: torch.Tensor) -> torch.Tensor:
    """A gradient of the layout of `like` (which is fake) with no two elements the same."""
    values = torch.linspace(0.5, 1.5, like.numel()) if like.numel() != 1 else torch.ones(1)
    result = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    return result.copy_(values.reshape(like.shape))
