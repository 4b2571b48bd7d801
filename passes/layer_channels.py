"""How weights come into a slot: read from a file by a thread, or copied from pinned memory on a stream.

A channel has one order: what is asked for first is done first. So a slot can be given away while a load
into it, which nobody wants any more, still runs.
"""

import queue
import threading
import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from graphopt.cost_models.link_costs import Line, fitted
from graphopt.errors import GraphoptError
from graphopt.passes.layer_file import LayerFile, Record

_CHUNK = 4 * 2**20  # bytes read at once; between them a load can be given up
_BURST_S = 0.005  # of a throttled reader: what it may catch up after it slept too long
_PROBES = 5


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


class _Read:
    """One read, asked for by one thread and done by another."""

    def __init__(self, index: int, into: Tensor) -> None:
        self.index, self.into = index, into
        self.is_wanted, self.is_done = True, threading.Event()
        self.error: BaseException | None = None

    def wait(self) -> None:
        self.is_done.wait()
        if self.error is not None:
            raise GraphoptError(f"layer {self.index} could not be read: {self.error}") from self.error

    def give_up(self) -> None:
        self.is_wanted = False


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
        arguments = (file, self._reads, self._lock, self._throttle)
        self._thread = threading.Thread(target=_serve, args=arguments, daemon=True, name="layer-reader")
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


def _serve(
    file: LayerFile,
    reads: "queue.SimpleQueue[_Read | None]",
    lock: threading.Lock,
    throttle: "Throttle",
) -> None:
    """The thread: holds neither the channel nor the model, so that both can go."""
    checked: set[int] = set()
    while (read := reads.get()) is not None:
        try:
            with lock:
                is_whole = _read(file, read, throttle)
            if not is_whole:
                read.error = GraphoptError("it was given up")
            elif read.index not in checked:
                file.check(read.index, read.into)
                checked.add(read.index)
        except BaseException as error:
            read.error = error
        read.is_done.set()
        del read  # or its slot would stay until the next one


def _read(file: LayerFile, read: _Read, throttle: "Throttle") -> bool:
    """Whether the whole record was read, or it was given up."""
    view = read.into.numpy().data
    chunk = throttle.chunk
    for begin in range(0, len(view), chunk):
        if not read.is_wanted or throttle.is_stopped:
            return False
        part = view[begin : begin + chunk]
        throttle.take(len(part))
        file.read(read.index, begin, part)
    return True


class Throttle:
    """A token bucket: bytes are allowed at `bytes_per_s`; None: at once."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate, self._ready = bytes_per_s, 0.0
        self._stopped = threading.Event()
        self.chunk = _CHUNK if bytes_per_s is None else int(min(_CHUNK, max(4096, bytes_per_s / 500)))

    def take(self, nbytes: int) -> None:
        """Wait until `nbytes` more have passed."""
        if self._rate is None:
            return
        self._ready = max(self._ready, time.perf_counter() - _BURST_S) + nbytes / self._rate
        if (rest := self._ready - time.perf_counter()) > 0:
            self._stopped.wait(rest)

    def stop(self) -> None:
        """Nobody waits any more."""
        self._stopped.set()

    @property
    def is_stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped.is_set()


def measured_read(file: LayerFile) -> Line:
    """The time of reads of the first record of `file`, from the file's device where that can be."""
    size = file.records[0].nbytes
    into = torch.empty(size, dtype=torch.uint8)
    samples = []
    for nbytes in sorted({min(4096, size), size // 2, size}):
        view, seconds = into.numpy().data[:nbytes], []
        for _ in range(_PROBES):
            file.forget()
            begin = time.perf_counter()
            file.read(0, 0, view)
            seconds.append(time.perf_counter() - begin)
        samples.append((nbytes, sorted(seconds)[_PROBES // 2]))
    return fitted(samples)


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
    samples = []
    for size in sorted({min(4096, nbytes), nbytes // 2, nbytes}):
        seconds = []
        for _ in range(_PROBES + 1):
            torch.cuda.synchronize(device)
            begin = time.perf_counter()
            target[:size].copy_(source[:size], non_blocking=True)
            torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begin)
        samples.append((size, sorted(seconds)[_PROBES // 2]))
    return fitted(samples)
