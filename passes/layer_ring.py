"""A ring of slots for the weights of blocks, filled in the order in which blocks run, step after step."""

import threading
import weakref
from collections import deque
from typing import NoReturn

import torch
from torch import Tensor, nn

from graphopt.errors import GraphoptError
from graphopt.passes.layer_channels import Channel, Load
from graphopt.passes.layer_file import Part

NAME = "stream-layers"


class Single:
    """What is there once: it cannot be copied or pickled."""

    def __deepcopy__(self, memo: object) -> NoReturn:
        refuse("copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        refuse("pickled")


class LayerRing(Single):
    """`slots` places, each for the weights of one block; loads begin at once, from record 0 on.

    One block is in use at a time, `take` to `give_back`, by one thread. Where another block is asked for
    than comes next (after an exception in a forward, say), the loads begin anew with that one.
    """

    def __init__(self, channel: Channel, slots: int, device: torch.device) -> None:
        size = max(record.nbytes for record in channel.records)
        self._channel, self._count = channel, len(channel.records)
        self._slots = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._views = [[_parameters(r.parts, slot) for r in channel.records] for slot in self._slots]
        self._free = deque(range(slots))
        self._coming: deque[tuple[int, int, Load]] = deque()  # record, slot, load
        self._next, self._used = 0, 0  # the record to be loaded next, and the slot in use
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, channel.close)
        self._fill()

    def take(self, record: int) -> tuple[nn.Parameter, ...]:
        """The parameters of a record, in the order of its parts, when they are there."""
        self._check_open()
        if not self._lock.acquire(blocking=False):
            raise GraphoptError(f"{NAME}: one thread at a time can run a model that streams layers")
        try:
            if all(coming != record for coming, _, _ in self._coming):
                self._drop(len(self._coming))
                self._next = record
                self._fill()
            while self._coming[0][0] != record:
                self._drop(1)
            self._coming[0][2].wait()
        except BaseException:
            self._drop(len(self._coming))
            self._lock.release()
            raise
        _, self._used, _ = self._coming.popleft()
        return self._views[self._used][record]

    def give_back(self) -> None:
        """What `take` gave is not used any more: its slot is filled again."""
        self._free.append(self._used)
        self._fill()
        self._lock.release()

    def tensors(self, record: int) -> dict[str, Tensor]:
        """The tensors of a record in memory of their own, by name."""
        self._check_open()
        stored = self._channel.fetch(record)
        return {part.name: part.of(stored).clone() for part in self._channel.records[record].parts}

    def close(self) -> None:
        """End loading, and remove a temporary file."""
        self._end()

    @property
    def nbytes(self) -> int:
        """Of all slots."""
        return sum(slot.numel() for slot in self._slots)

    def _check_open(self) -> None:
        if not self._end.alive:
            raise GraphoptError(f"{NAME}: the model was closed; its layers are gone")

    def _fill(self) -> None:
        while self._free and self._end.alive:
            slot = self._free.popleft()
            self._coming.append((self._next, slot, self._channel.load(self._next, self._slots[slot])))
            self._next = (self._next + 1) % self._count

    def _drop(self, count: int) -> None:
        """Give up the first `count` loads; the channel does later ones into their slots behind them."""
        for _ in range(count):
            _, slot, load = self._coming.popleft()
            load.give_up()
            self._free.append(slot)


def refuse(what: str) -> NoReturn:
    """The model cannot be `what`."""
    raise GraphoptError(
        f"{NAME}: a model that streams its layers cannot be {what}; do so before the pass, or take its "
        "state_dict(), which is whole"
    )


def _parameters(parts: tuple[Part, ...], slot: Tensor) -> tuple[nn.Parameter, ...]:
    with torch.inference_mode(False):
        return tuple(nn.Parameter(part.of(slot), requires_grad=False) for part in parts)
