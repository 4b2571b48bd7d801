"""Facts of an arena: which tensors of a graph lie where in one block of memory.

A pass writes them into the nodes of the tensors, under `SPOTS`. They change nothing of what a graph
computes: the memory model counts the block in place of the tensors, and lowering lets their operators
write into it.
"""

from dataclasses import dataclass

from torch import fx

SPOTS = "graphopt_spots"
ALIGNMENT = 64  # bytes: what torch's CPU allocator aligns tensors to, and kernels may count on


@dataclass(frozen=True)
class Block:
    """The memory that the arena of one step, or of a forward alone, lies in.

    A block that is kept (`keep`) is there between steps, too; otherwise it is there from the first tensor
    in it to the last, or, where the forward leaves nothing in it for the backward, once for each.
    """

    nbytes: int
    keep: bool


@dataclass(frozen=True)
class Spot:
    """A place in a block, from the byte `offset` on."""

    block: Block
    offset: int


def spots_of(node: fx.Node) -> tuple[Spot | None, ...]:
    """Where the storage of each tensor of a node's value lies, None for one that is allocated."""
    return node.meta.get(SPOTS, ())  # type: ignore[no-any-return]


def spot_of(node: fx.Node, number: int) -> Spot | None:
    """Where the storage of one tensor of a node's value lies."""
    spots = spots_of(node)
    return spots[number] if spots else None


def block_of(graph: fx.Graph) -> Block | None:
    """The block that tensors of `graph` lie in; None where all are allocated."""
    return next((spot.block for node in graph.nodes for spot in spots_of(node) if spot), None)
