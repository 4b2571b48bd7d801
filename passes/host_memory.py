"""Host memory for a device's data, and the transfers between both, one channel for each direction.

For a model on the CPU it is a file, mapped into memory for what works on it where it is, with a thread
for each direction; for a model on CUDA it is pinned memory, with a stream for each direction. A channel
does first what is asked for first. A transfer that is asked for begins when what computes now has ended.
"""

import functools
import io
import mmap
import os
import queue
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from graphopt.cost_models.devices import format_bytes
from graphopt.errors import GraphoptError
from graphopt.passes.transfer_thread import Request, Throttle, serve

Parts = Sequence[tuple[Tensor, int]]  # tensors of the device without gaps, and their place in host memory


class Transfer(Protocol):
    """A transfer that runs."""

    @property
    def is_ready(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> None:
        """What computes next comes after it; raises what went wrong."""

    def synchronize(self) -> None:
        """Stand still until it is done; raises what went wrong."""


class HostMemory(Protocol):
    """Bytes of the host, zero at first, that another device cannot compute on.

    `bytes` is what the host itself sees of them, uint8[nbytes].
    """

    bytes: Tensor

    def fetch(self, parts: Parts) -> Transfer:
        """Start to bring bytes from their places into the tensors."""

    def put(self, parts: Parts) -> Transfer:
        """Start to bring the tensors' bytes to their places."""

    def close(self) -> None:
        """End; nothing is transferred afterwards."""


def raw(tensor: Tensor) -> Tensor:
    """The memory of a tensor without gaps, uint8[bytes]."""
    size = tensor.element_size()
    memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    begin, count = tensor.storage_offset() * size, tensor.numel() * size
    return memory.set_(tensor.untyped_storage(), begin, (count,), (1,))


# --- a file -------------------------------------------------------------------------------------


class _Move(Request):
    """Bytes to or from places of a file."""

    def __init__(self, parts: Parts, is_put: bool) -> None:
        what = "written to its file" if is_put else "read back"
        super().__init__(torch.empty(0), f"the optimizer's state could not be {what}")
        self.parts: Parts = parts
        self.asked_s = time.perf_counter()

    def synchronize(self) -> None:
        """The same as to wait: what computes is the thread that waits."""
        self.wait()


class FileMemory:
    """A file in `folder` (None: the system's for temporary files), without a name where that can be.

    Each direction moves `bytes_per_s` at most. GraphoptError where there is no room for it.
    """

    def __init__(self, nbytes: int, folder: str | None, bytes_per_s: float | None) -> None:
        where = folder or tempfile.gettempdir()
        try:
            file = tempfile.TemporaryFile(buffering=0, dir=where, prefix="graphopt-host-")  # noqa: SIM115
            if hasattr(os, "posix_fallocate"):  # or writes to the mapping could find the disk full
                os.posix_fallocate(file.fileno(), 0, max(1, nbytes))
            else:
                file.truncate(max(1, nbytes))
        except OSError as error:
            raise GraphoptError(f"no {format_bytes(nbytes)} can be kept in {where}: {error}") from error
        self.bytes = torch.frombuffer(mmap.mmap(file.fileno(), max(1, nbytes)), dtype=torch.uint8)
        self._throttles = Throttle(bytes_per_s), Throttle(bytes_per_s)
        self._queues: list[queue.SimpleQueue[_Move | None]] = [queue.SimpleQueue() for _ in range(2)]
        for is_put, (requests, throttle) in enumerate(zip(self._queues, self._throttles, strict=True)):
            carry_out = functools.partial(_carry_out, file, throttle, bool(is_put))
            name = "host-put" if is_put else "host-fetch"
            arguments = (requests, carry_out)  # not the memory itself, which can go
            threading.Thread(target=serve, args=arguments, daemon=True, name=name).start()
        self._end = weakref.finalize(self, _end, self._throttles, self._queues)
        self._end.atexit = False

    def fetch(self, parts: Parts) -> _Move:
        """Read by the first thread."""
        return self._ask(parts, is_put=False)

    def put(self, parts: Parts) -> _Move:
        """Written by the second thread."""
        return self._ask(parts, is_put=True)

    def _ask(self, parts: Parts, is_put: bool) -> _Move:
        move = _Move(parts, is_put)
        self._queues[is_put].put(move)
        return move

    def close(self) -> None:
        """Ends both threads."""
        self._end()


def _end(throttles: Sequence[Throttle], queues: Sequence["queue.SimpleQueue[_Move | None]"]) -> None:
    for throttle, requests in zip(throttles, queues, strict=True):
        throttle.stop()
        requests.put(None)


def _carry_out(file: io.FileIO, throttle: Throttle, is_put: bool, move: _Move) -> None:
    parts, move.parts = move.parts, ()
    throttle.begin(move.asked_s)
    for tensor, place in parts:
        view, done = raw(tensor).numpy().data, 0
        while done < len(view):
            if throttle.is_stopped:
                raise GraphoptError("it was closed")
            some = view[done : done + throttle.chunk]
            throttle.take(len(some))
            if is_put:
                count = os.pwrite(file.fileno(), some, place + done)
            else:
                count = os.preadv(file.fileno(), [some], place + done)
            if not count:
                raise GraphoptError("the file ends too early")
            done += count


# --- pinned memory ------------------------------------------------------------------------------


class _Copies:
    """Copies on a stream, up to an event."""

    is_ready = True  # what computes waits on its own stream

    def __init__(self, event: "torch.cuda.Event", device: torch.device) -> None:
        self.event, self.device = event, device

    def wait(self) -> None:
        torch.cuda.current_stream(self.device).wait_event(self.event)

    def synchronize(self) -> None:
        self.event.synchronize()


class PinnedMemory:
    """Pinned memory, and a stream for each direction beside the one that computes."""

    def __init__(self, nbytes: int, device: torch.device) -> None:
        self.bytes = torch.zeros(nbytes, dtype=torch.uint8, pin_memory=True)
        self._device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)]

    def fetch(self, parts: Parts) -> _Copies:
        """Copied on the first stream."""
        return self._copy(parts, is_put=False)

    def put(self, parts: Parts) -> _Copies:
        """Copied on the second stream."""
        return self._copy(parts, is_put=True)

    def _copy(self, parts: Parts, is_put: bool) -> _Copies:
        stream = self._streams[is_put]
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for tensor, place in parts:
                memory = raw(tensor)
                there = self.bytes[place : place + len(memory)]
                target, source = (there, memory) if is_put else (memory, there)
                target.copy_(source, non_blocking=True)
            event = torch.cuda.Event()
            event.record(stream)
        return _Copies(event, self._device)

    def close(self) -> None:
        """Waits for copies."""
        for stream in self._streams:
            stream.synchronize()


# --- what computes on the host ------------------------------------------------------------------


class Work(Request):
    """Something to be computed by a `HostWorker`."""

    def __init__(self, run: Callable[[], object]) -> None:
        super().__init__(torch.empty(0), "an update on the host failed")
        self.run: Callable[[], object] | None = run


class HostWorker:
    """A thread that computes beside the device what it is asked for, in order.

    `throttle` counts elements.
    """

    def __init__(self, elements_per_s: float | None = None) -> None:
        self.throttle = Throttle(elements_per_s)
        self._works: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
        arguments = (self._works, _work)
        threading.Thread(target=serve, args=arguments, daemon=True, name="host-worker").start()
        self._end = weakref.finalize(self, self._works.put, None)
        self._end.atexit = False

    def ask(self, run: Callable[[], object]) -> Work:
        """Put `run` behind what it computes already."""
        work = Work(run)
        self._works.put(work)
        return work

    def close(self) -> None:
        """Ends the thread."""
        self.throttle.stop()
        self._end()


def _work(work: Work) -> None:
    run, work.run = work.run, None
    assert run is not None
    with torch.no_grad():
        run()


@dataclass(frozen=True)
class Host:
    """What the host is for parameters on the CPU: its folder, and rates that it is held to.

    For parameters on CUDA it is what it is.
    """

    folder: str | None = None
    bytes_per_s: float | None = None
    elements_per_s: float | None = None

    def memory(self, nbytes: int, device: torch.device) -> HostMemory:
        """Host memory for data of `device`."""
        if device.type == "cuda":
            return PinnedMemory(nbytes, device)
        return FileMemory(nbytes, self.folder, self.bytes_per_s)

    def worker(self) -> HostWorker:
        """What computes there."""
        return HostWorker(self.elements_per_s)
