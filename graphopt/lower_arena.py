"""Lowering of arenas: operators whose results have a spot write them there, instead of allocating.

What is planned on a program is checked again here, on the graph that runs: no two tensors that are alive
at once may share a byte.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import fx

from graphopt.allocations import Allocation, allocations
from graphopt.arena_blocks import Blocks, Placed, SameBlock, TakeBlock
from graphopt.arena_facts import SPOTS, spot_of
from graphopt.errors import VerifyError
from graphopt.out_forms import written_into
from graphopt.program import LEAVES, Leaf, leaves, tensors_of


class Placement(NamedTuple):
    """A tensor in an arena: its name, where it lies, and the first and last moment that it is needed."""

    name: str
    offset: int
    nbytes: int
    first: int
    last: int


def place(module: fx.GraphModule, blocks: Blocks) -> int:
    """Rewrite a lowered `module` in place; the number of tensors that it makes in one of `blocks`."""
    every = [a for a in allocations(module.graph).values() if spot_of(a.node, a.number) is not None]
    made = [a for a in every if a.node.op != "placeholder"]
    if not made:
        return 0
    _check(module.graph, every)
    by_node: dict[fx.Node, list[int]] = {}
    for allocation in made:
        by_node.setdefault(allocation.node, []).append(allocation.number)
    given = next((a for a in every if a.node.op == "placeholder"), None)
    arena = _arena(module.graph, made[0], given, blocks)
    for node, numbers in by_node.items():
        _write_there(module.graph, node, numbers, arena)
    module.recompile()
    return len(made)


def check_apart(placements: Iterable[Placement], block_bytes: int) -> None:
    """VerifyError where two that are needed at once share a byte, or one does not end in the block."""
    alive: list[Placement] = []
    for new in sorted(placements, key=lambda p: p.first):
        if new.offset + new.nbytes > block_bytes:
            raise VerifyError(f"{new.name} does not end in its arena")
        alive = sorted((*(p for p in alive if p.last >= new.first), new), key=lambda p: p.offset)
        for low, high in pairwise(alive):
            if low.offset + low.nbytes > high.offset:
                raise VerifyError(f"{low.name} and {high.name} are needed at once and share bytes")


def _check(graph: fx.Graph, every: Sequence[Allocation]) -> None:
    """As `check_apart`; what is returned is needed to the end, inputs of one place are views of one."""
    found: dict[object, Placement] = {}
    block_bytes = 0
    for a in every:
        spot = spot_of(a.node, a.number)
        assert spot is not None
        block_bytes = spot.block.nbytes
        placement = Placement(a.node.name, spot.offset, a.nbytes, a.first, a.last)
        key: object = (a.node, a.number)
        if a.node.op == "placeholder":
            key = (spot.offset, a.nbytes)
            before = found.get(key, placement)
            placement = placement._replace(first=0, last=max(before.last, a.last))
        found[key] = placement
    try:
        check_apart(found.values(), block_bytes)
    except VerifyError as error:
        raise VerifyError(f"{error} of an arena: did a pass behind Arena move them?") from None


def _arena(graph: fx.Graph, first: Allocation, given: Allocation | None, blocks: Blocks) -> fx.Node:
    """The node that has the block: that of `given`, which came in with something in it, or a free one."""
    spot, tensor = spot_of(first.node, first.number), tensors_of(first.node)[first.number]
    assert spot is not None and tensor is not None
    with graph.inserting_before(first.node):
        if given is None:
            arena = graph.call_function(TakeBlock(blocks, spot.block, tensor.device), ())
        else:
            arena = graph.call_function(SameBlock(blocks, spot.block, tensor.device), (given.node,))
    arena.meta[LEAVES] = ()
    return arena


def _write_there(graph: fx.Graph, node: fx.Node, numbers: Sequence[int], arena: fx.Node) -> None:
    given: dict[int, fx.Node] = {}
    own = [*leaves(node)]
    with graph.inserting_before(node):
        for number in numbers:
            spot, tensor = spot_of(node, number), tensors_of(node)[number]
            assert spot is not None and tensor is not None
            sizes, strides = tuple(tensor.shape), tuple(tensor.stride())
            made = Placed(spot.offset, tensor.dtype, sizes, strides)
            given[number] = graph.call_function(made, (arena,))
            given[number].meta = {"val": tensor, LEAVES: (Leaf(own[number].nbytes, None),)}
        target, args, kwargs = written_into(node, given)
        new = graph.call_function(target, args, kwargs)
    for number, place_of in given.items():
        own[number] = Leaf(own[number].nbytes, (new.all_input_nodes.index(place_of), 0))
    new.meta = {**node.meta, LEAVES: tuple(own)}
    new.meta.pop(SPOTS, None)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
