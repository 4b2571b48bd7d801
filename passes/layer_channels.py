"""How weights come into a slot: read from a file by a thread, or copied from pinned memory on a stream.

A channel has one order: what is asked for first is done first. So a slot can be given away while a load
into it, which nobody wants any more, still runs.
"""

import functools
import queue
import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from graphopt.cost_models.link_costs import Line
from graphopt.errors import GraphoptError
from graphopt.passes.layer_file import LayerFile, Record
from graphopt.passes.transfer_thread import Request, Throttle, line_of, serve


class Load(Protocol):
    """A load that runs."""

    def wait(self) -> None:
        """Until the bytes are there for what computes next; raises what went wrong."""

    def give_up(self) -> None:
        """Nobody wants it any more."""


class Channel(Protocol):
    """Where the weights of blocks come from."""

    records: tuple[Record, ...]

    def load(self, index: int, slot: Tensor) -> Load:
        """Start to bring record `index` into the bytes `slot`, behind what uses them now."""

    def fetch(self, index: int) -> Tensor:
        """The bytes of record `index` in memory of their own, on the CPU."""

    def close(self) -> None:
        """End; nothing is loaded afterwards."""


# --- from a file --------------------------------------------------------------------------------


class _Read(Request):
    """Record `index`, into `memory`."""

    def __init__(self, index: int, memory: Tensor) -> None:
        super().__init__(memory, f"layer {index} could not be read")
        self.index = index


class FileChannel:
    """Reads records on a thread of its own, at most `bytes_per_s`.

    The first read of a record is compared with its hash. torch gives up Python's lock inside operators,
    so that reads run beside them.
    """

    def __init__(self, file: LayerFile, bytes_per_s: float | None = None) -> None:
        self.file, self.records = file, file.records
        self._reads: queue.SimpleQueue[_Read | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._throttle = Throttle(bytes_per_s)
        carry_out = functools.partial(_read, file, self._lock, self._throttle, set())
        arguments = (self._reads, carry_out)  # neither the channel nor the model: both can go
        self._thread = threading.Thread(target=serve, args=arguments, daemon=True, name="layer-reader")
        self._thread.start()

    def load(self, index: int, slot: Tensor) -> _Read:
        """Ask the thread for a record."""
        read = _Read(index, slot[: self.records[index].nbytes])
        self._reads.put(read)
        return read

    def fetch(self, index: int) -> Tensor:
        """Read and checked here and now."""
        into = torch.empty(self.records[index].nbytes, dtype=torch.uint8)
        with self._lock:
            self.file.read(index, 0, into.numpy().data)
        self.file.check(index, into)
        return into

    def close(self) -> None:
        """Ends the thread, and closes the file."""
        self._throttle.stop()
        self._reads.put(None)
        if threading.current_thread() is not self._thread:  # which may collect the last of a cycle
            self._thread.join()
        self.file.close()


def _read(
    file: LayerFile, lock: threading.Lock, throttle: Throttle, checked: set[int], read: _Read
) -> None:
    """Read a record, and compare it with its hash where it is not among those `checked`."""
    into = read.memory
    assert into is not None
    view, chunk = into.numpy().data, throttle.chunk
    with lock:
        for begin in range(0, len(view), chunk):
            if not read.is_wanted or throttle.is_stopped:
                raise GraphoptError("it was given up")
            part = view[begin : begin + chunk]
            throttle.take(len(part))
            file.read(read.index, begin, part)
    if read.index not in checked:
        file.check(read.index, into)
        checked.add(read.index)


def measured_read(file: LayerFile) -> Line:
    """The time of reads of the first record of `file`, from the file's device where that can be."""
    size = file.records[0].nbytes
    view = torch.empty(size, dtype=torch.uint8).numpy().data
    sizes = sorted({min(4096, size), size // 2, size})
    return line_of(lambda nbytes: file.read(0, 0, view[:nbytes]), sizes, file.forget)


# --- from pinned memory -------------------------------------------------------------------------


class _Copy:
    """One copy on the stream of a channel."""

    def __init__(self, event: "torch.cuda.Event", device: torch.device) -> None:
        self.event, self.device = event, device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def give_up(self) -> None:
        """A copy is not stopped; what is copied to the same place afterwards comes behind it."""


class PinnedChannel:
    """Copies records from pinned memory to a CUDA device, on a stream beside the one that computes."""

    def __init__(self, records: Sequence[Record], pinned: Sequence[Tensor], device: torch.device) -> None:
        self.records, self._pinned, self._device = tuple(records), list(pinned), device
        self._stream = torch.cuda.Stream(device)

    def load(self, index: int, slot: Tensor) -> _Copy:
        """Copy when all that computes now has ended: it may use the slot."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            source = self._pinned[index]
            slot[: len(source)].copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        return _Copy(event, self._device)

    def fetch(self, index: int) -> Tensor:
        """A copy in pageable memory."""
        return self._pinned[index].clone()

    def close(self) -> None:
        """Waits for copies, and lets go of the pinned memory."""
        self._stream.synchronize()
        self._pinned.clear()


def measured_copy(nbytes: int, device: torch.device) -> Line:
    """The time of copies of up to `nbytes` from pinned memory to a CUDA device."""
    source = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)

    def copy(size: int) -> None:
        target[:size].copy_(source[:size], non_blocking=True)
        torch.cuda.synchronize(device)

    copy(nbytes)
    return line_of(copy, sorted({min(4096, nbytes), nbytes // 2, nbytes}))
