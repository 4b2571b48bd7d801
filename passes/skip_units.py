"""What can be removed of a model one by one: its blocks, or the sublayers of its blocks."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt.passes.blocks import Batch, Forward, Stack, forwards
from graphopt.passes.sublayers import Branch, find_branches, stand_ins

GRANULARITIES = ("layers", "sublayers")


@dataclass(frozen=True, eq=False)
class Unit:
    """Something that can go: the modules that run it, and what they run when it is bypassed.

    `branch` is the residual branch that a sublayer is, None for a whole block.
    """

    name: str
    block: int
    forwards: Mapping[nn.Module, Forward]
    branch: Branch | None = None


def units_of(model: nn.Module, stack: Stack, granularity: str, batch: Batch) -> tuple[Unit, ...]:
    """The units of `model` in the order they run: "layers" or "sublayers"."""
    if granularity == "layers":
        return whole_blocks(stack)
    return tuple(_sublayer(stack, branch) for branch in find_branches(model, stack, batch))


def whole_blocks(stack: Stack) -> tuple[Unit, ...]:
    """Every block as a unit."""
    return tuple(_whole_block(stack, i) for i in range(len(stack.blocks)))


def _whole_block(stack: Stack, position: int) -> Unit:
    def straight(*args: Any, **kwargs: Any) -> Any:
        return stack.output(stack.hidden(args, kwargs))

    return Unit(str(position), position, {stack.blocks[position]: straight})


def _sublayer(stack: Stack, branch: Branch) -> Unit:
    block = stack.blocks[branch.block]
    functions = {block.get_submodule(path): new.forward for path, new in stand_ins(branch).items()}
    return Unit(branch.name, branch.block, functions, branch)


def empty_blocks(stack: Stack, units: Sequence[Unit], removed: frozenset[int]) -> frozenset[int]:
    """The blocks of which nothing stays; a norm behind a residual sum does."""
    gone = {p for i in removed for module in units[i].forwards for p in module.parameters()}
    touched = {units[i].block for i in removed}
    return frozenset(i for i in touched if gone.issuperset(stack.blocks[i].parameters()))


@contextlib.contextmanager
def bypassed(units: Sequence[Unit], removed: frozenset[int]) -> Iterator[None]:
    """The model runs as if the `removed` units were not there."""
    with forwards({module: f for i in removed for module, f in units[i].forwards.items()}):
        yield


@contextlib.contextmanager
def muted(units: Sequence[Unit], removed: frozenset[int]) -> Iterator[None]:
    """The same numbers in another way: the modules of removed sublayers run, and what their last adds
    to the hidden states is zero.
    """

    def silent(run: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = run(*args, **kwargs)
            if isinstance(output, tuple):
                return (torch.zeros_like(output[0]), *output[1:])
            return torch.zeros_like(output)

        return forward

    last = [list(units[i].forwards)[-1] for i in removed if units[i].branch is not None]
    whole = frozenset(i for i in removed if units[i].branch is None)
    with bypassed(units, whole), forwards({module: silent(module.forward) for module in last}):
        yield
