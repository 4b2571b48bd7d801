"""One rank's part of a vocabulary, and the collectives between the parts.

The collectives are functional (`torch.ops._c10d_functional`): they return new tensors, run with gloo and
NCCL, and every rank of the group must call them in the same order.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

collectives = torch.ops._c10d_functional


@dataclass(frozen=True)
class Shard:
    """The words [start, stop) of `words`, on rank `rank` of `ranks` of the process group `group`.

    Parts are balanced: their sizes differ by one word at most. Where `chunked` they are those of
    `torch.chunk` and DTensor: of one size, but for the last.
    """

    words: int
    rank: int
    ranks: int
    group: str
    chunked: bool = False

    def __post_init__(self) -> None:
        if self.bounds(self.ranks - 1)[0] >= self.words or self.words < self.ranks:
            raise GraphoptError(
                f"a vocabulary of {self.words} words cannot be split over {self.ranks} ranks"
            )

    @classmethod
    def on_group(cls, words: int, group: "ProcessGroup") -> "Shard":
        """This process's part of `words` words over `group`."""
        if group.rank() < 0:
            raise GraphoptError("this process is not a rank of the group that splits the vocabulary")
        return cls(words, group.rank(), group.size(), group.group_name)

    @classmethod
    def on_mesh(cls, words: int, mesh: "DeviceMesh", dim: str | None = None) -> "Shard":
        """This process's part of `words` words over one dimension of `mesh`: `dim`, or the only one."""
        return cls.on_group(words, group_of(mesh, dim))

    def within(self, group: "ProcessGroup") -> "Shard":
        """The same part, with `group`, of the same ranks, for its collectives."""
        return replace(self, group=group.group_name)

    def bounds(self, rank: int) -> tuple[int, int]:
        """The first word of a rank, and the first behind.

        >>> [Shard(10, 0, 4, "").bounds(rank) for rank in range(4)]
        [(0, 2), (2, 5), (5, 7), (7, 10)]
        >>> [Shard(10, 0, 4, "", chunked=True).bounds(rank) for rank in range(4)]
        [(0, 3), (3, 6), (6, 9), (9, 10)]
        """
        if self.chunked:
            size = math.ceil(self.words / self.ranks)
            return min(rank * size, self.words), min((rank + 1) * size, self.words)
        return rank * self.words // self.ranks, (rank + 1) * self.words // self.ranks

    @property
    def start(self) -> int:
        """The first word of this part."""
        return self.bounds(self.rank)[0]

    @property
    def stop(self) -> int:
        """The first word behind this part."""
        return self.bounds(self.rank)[1]

    @property
    def size(self) -> int:
        """The number of words of this part."""
        return self.stop - self.start

    def part(self, whole: Tensor) -> Tensor:
        """The rows of `whole` (V, ..) that are this part's."""
        if whole.shape[0] != self.words:
            raise GraphoptError(f"{whole.shape[0]} rows are not a vocabulary of {self.words} words")
        return whole[self.start : self.stop]


def group_of(mesh: "DeviceMesh", dim: str | None = None) -> "ProcessGroup":
    """The process group of one dimension of `mesh`; GraphoptError where it is not clear which."""
    names = mesh.mesh_dim_names or ()
    if dim is None and mesh.ndim == 1:
        return mesh.get_group()
    if dim is None:
        raise GraphoptError(f"the mesh has {mesh.ndim} dimensions {names}: name the one that splits")
    if dim not in names:
        raise GraphoptError(f"the mesh has no dimension {dim!r}, only {names}")
    return mesh.get_group(dim)


def start_gather(tensor: Tensor, shard: Shard) -> Tensor:
    """Begin to gather `tensor` (n, ..) of all ranks (ranks, n, ..); `finished` ends it."""
    gathered = collectives.all_gather_into_tensor(tensor.contiguous(), shard.ranks, shard.group)
    return gathered  # type: ignore[no-any-return]


def start_sum(tensor: Tensor, shard: Shard) -> Tensor:
    """Begin to sum `tensor` over all ranks; `finished` ends it."""
    return collectives.all_reduce(tensor.contiguous(), "sum", shard.group)  # type: ignore[no-any-return]


def finished(tensor: Tensor) -> Tensor:
    """The result of a collective that was begun."""
    return collectives.wait_tensor(tensor)  # type: ignore[no-any-return]


def sum_over(tensor: Tensor, shard: Shard) -> Tensor:
    """The sum of `tensor` over all ranks, the same bits on each."""
    return finished(start_sum(tensor, shard))


def max_over(tensor: Tensor, shard: Shard) -> Tensor:
    """The maximum of `tensor` over all ranks."""
    return finished(collectives.all_reduce(tensor.contiguous(), "max", shard.group))


def gather_rows(part: Tensor, shard: Shard) -> Tensor:
    """All parts (V_i, ..), one below the other (V, ..)."""
    sizes = [stop - start for start, stop in map(shard.bounds, range(shard.ranks))]
    padded = part.new_zeros((max(sizes), *part.shape[1:]))
    padded[: part.shape[0]] = part
    every: Sequence[Tensor] = finished(start_gather(padded, shard)).split(max(sizes))
    return torch.cat([rows[:size] for rows, size in zip(every, sizes, strict=True)])
