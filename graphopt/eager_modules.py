"""Captured modules as they run in eager order: lowered, in their arenas, and boxed."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.accumulation import Accumulation
from graphopt.arena_blocks import Blocks
from graphopt.arena_facts import spots_of
from graphopt.lower import boxed, overwrite_dead_operands
from graphopt.lower_arena import place
from graphopt.program import copied

Boxed = Callable[[list[Any]], Sequence[Any]]


def eager(
    module: fx.GraphModule, blocks: Blocks | None, accumulation: Accumulation | None = None
) -> Boxed:
    """`module` rewritten in place, and boxed; without `blocks` everything in it is allocated."""
    overwrite_dead_operands(module)
    if blocks is not None:
        place(module, blocks)
    if accumulation is not None:
        accumulation.insert(module)
    return boxed(module)


def eager_backward(module: fx.GraphModule, blocks: Blocks, accumulation: Accumulation) -> Boxed:
    """The backward `module` in its arena, but where autograd keeps what is saved for another backward.

    In the arena, the backward writes over what the forward saved there as soon as it has read it.
    """
    if not any(map(spots_of, module.graph.nodes)):
        return eager(module, None, accumulation)
    plain = fx.GraphModule(module, copied(module.graph))
    usual = eager(module, blocks, accumulation)
    again: list[Boxed] = []

    def run(arguments: list[Any]) -> Sequence[Any]:
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            return usual(arguments)
        if not again:
            again.append(eager(plain, None, accumulation))
        return again[0](arguments)

    return run
