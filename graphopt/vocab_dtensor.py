"""DTensors at the ends of a vocabulary that is split over ranks.

Hidden rows, indices and targets come replicated, and so do results go back. A weight is sharded by its
rows over one dimension of its mesh, as `ColwiseParallel` shards a projection, and replicated over the
others; its rank's rows are `torch.chunk`'s: all of one size but the last.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.vocab_shard import Shard

T = TypeVar("T", Tensor, Tensor | None)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Layout(NamedTuple):
    """Where the parts of a DTensor are."""

    mesh: "DeviceMesh"
    placements: tuple[Any, ...]

    @property
    def is_replicated(self) -> bool:
        """True where every rank has the whole."""
        return all(p.is_replicate() for p in self.placements)


def layout_of(*values: Any) -> Layout | None:
    """The layout of the first of `values` that is a DTensor."""
    if not torch.distributed.is_available():
        return None
    for value in values:
        if hasattr(value, "device_mesh"):  # only a DTensor has one; its class is slow to import
            return Layout(value.device_mesh, tuple(value.placements))
    return None


def local(tensor: T, what: str = "x") -> T:
    """`tensor`, or the whole of it that this rank has of a replicated DTensor."""
    layout = layout_of(tensor)
    if layout is None or tensor is None:
        return tensor
    if not layout.is_replicated:
        raise GraphoptError(f"{what} is a DTensor {layout.placements}: it must be replicated")
    return tensor.to_local(grad_placements=layout.placements)  # type: ignore


def replicated(tensor: Tensor, like: Layout | None) -> Tensor:
    """`tensor`, the same on every rank, as a DTensor on the mesh of `like`; itself where that is None."""
    if like is None:
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate()] * like.mesh.ndim
    return DTensor.from_local(tensor, like.mesh, placements, run_check=False)


def placed(whole: Tensor, layout: Layout | None) -> Tensor:
    """`whole`, the same on every rank, in a layout; itself where that is None."""
    if layout is None:
        return whole
    made: Any = replicated(whole, layout)
    return made.redistribute(layout.mesh, layout.placements)  # type: ignore[no-any-return]


def shard_of(weight: Tensor) -> Shard | None:
    """This rank's part of the rows of a DTensor, or None where it is none or replicated.

    GraphoptError where it is sharded otherwise than by rows over one dimension of its mesh.
    """
    layout = layout_of(weight)
    if layout is None or layout.is_replicated:
        return None
    dims = [i for i, p in enumerate(layout.placements) if not p.is_replicate()]
    if len(dims) != 1 or not layout.placements[dims[0]].is_shard(0):
        raise GraphoptError(f"a weight {layout.placements} is not sharded by rows over one dimension")
    group = layout.mesh.get_group(dims[0])
    return Shard(weight.shape[0], group.rank(), group.size(), group.group_name, True)


def own_rows(tensor: T, shard: Shard) -> T:
    """This rank's rows of a weight: of a DTensor its local part, and of plain rows all that is there."""
    layout = layout_of(tensor)
    if layout is None or tensor is None:
        return tensor
    if shard_of(tensor) != shard:
        raise GraphoptError(f"a weight {layout.placements} has not the rows of {shard}")
    return tensor.to_local(grad_placements=layout.placements)  # type: ignore


def part_of(whole: Tensor, shard: Shard) -> Tensor:
    """This rank's rows of a whole tensor, in whatever layout that is."""
    if layout_of(whole) is None:
        return shard.part(whole)
    if shard_of(whole) == shard:
        return own_rows(whole, shard)
    return shard.part(whole.full_tensor())  # type: ignore[attr-defined]


def gathered(weight: Tensor) -> Tensor:
    """`weight`, a sharded DTensor as a replicated one; every rank must take part."""
    layout = layout_of(weight)
    if layout is None or layout.is_replicated:
        return weight
    return replicated(weight.detach().full_tensor(), layout)  # type: ignore[attr-defined]
