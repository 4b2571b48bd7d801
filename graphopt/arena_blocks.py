"""The memory behind arenas: blocks that a compiled graph keeps for its next call, one for each at a time.

A block is in use as long as anything refers to its storage, a tensor in it or the graph that runs. So a
second call of the same graph, from another thread or before the first has ended, takes memory of
its own, and one that failed gives its block back.
"""

import threading
from typing import Any

import torch
from torch import Tensor

from graphopt.arena_facts import Block
from graphopt.codegen.huge_pages import advise

_UNUSED = 1  # references to a storage that nothing but `Blocks` knows


class Blocks:
    """What one compiled graph keeps between calls: a block for each device, and for each stream of it.

    A copy or a pickle of it is empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[tuple[torch.device, int], torch.UntypedStorage] = {}

    def take(self, block: Block, device: torch.device) -> Tensor:
        """Memory for `block`, uint8[nbytes]: the one that is kept, where nobody has it, or new."""
        if not block.keep:
            return _allocated(block.nbytes, device)
        key = device, _stream(device)
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                new = _allocated(block.nbytes, device)
                if device.type == "cpu":  # for a block that is freed again, finding huge pages costs more
                    advise(new.data_ptr(), block.nbytes)
                self._kept[key] = new.untyped_storage()
                return new
            if torch._C._storage_Use_Count(kept._cdata) == _UNUSED and kept.nbytes() == block.nbytes:
                return _over(kept)
        return _allocated(block.nbytes, device)

    def __reduce__(self) -> Any:
        return Blocks, ()


class TakeBlock:
    """As a function of a graph: the memory of its arena."""

    def __init__(self, blocks: Blocks, block: Block, device: torch.device) -> None:
        self.blocks, self.block, self.device = blocks, block, device
        self.__name__ = self.__qualname__ = "arena"

    def __call__(self) -> Tensor:
        """uint8[nbytes]"""
        return self.blocks.take(self.block, self.device)


class SameBlock:
    """As a function of a graph: the memory of the arena that a tensor lies in since the forward."""

    def __init__(self, blocks: Blocks, block: Block, device: torch.device) -> None:
        self.otherwise = TakeBlock(blocks, block, device)
        self.__name__ = self.__qualname__ = "same_arena"

    def __call__(self, tensor: Tensor) -> Tensor:
        """uint8[nbytes]; other memory where a hook on saved tensors brought a copy of `tensor`."""
        storage = tensor.untyped_storage()
        if storage.nbytes() == self.otherwise.block.nbytes:
            return _over(storage)
        return self.otherwise()


class Placed:
    """As a function of a graph: a tensor at one place of an arena, which fills `strides` densely.

    It is no view of the arena for autograd: both have versions of their own.
    """

    def __init__(
        self, offset: int, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...]
    ) -> None:
        self.offset, self.dtype, self.sizes, self.strides = offset, dtype, sizes, strides
        self._first = offset // dtype.itemsize
        self.__name__ = self.__qualname__ = "placed"

    def __call__(self, arena: Tensor) -> Tensor:
        """Uninitialised."""
        made = torch.empty(0, dtype=self.dtype, device=arena.device)
        return made.set_(arena.untyped_storage(), self._first, self.sizes, self.strides)


def _allocated(nbytes: int, device: torch.device) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, device=device)


def _over(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _stream(device: torch.device) -> int:
    """Work on a block that was given back may still be waiting on the stream that it was given to."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
