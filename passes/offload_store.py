"""Where values go that are offloaded: places in a file, written and read by one thread, in order.

A channel (a file and its thread) is there as long as a place in it is. The file has no name from the
moment it is open, where the system allows that: nothing of it stays, however the process ends. What is
asked for first is done first, so that a place can be given away while a write into it that nobody wants
any more still waits.
"""

import contextlib
import queue
import tempfile
import threading
import time
import weakref
from functools import cache, partial
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.cost_models.link_costs import Line
from graphopt.errors import GraphoptError
from graphopt.passes.layer_file import PAGE
from graphopt.passes.transfer_thread import Request, Throttle, line_of, serve

_PROBE_BYTES = (2**16, 2**20, 2**23)


class _Transfer(Request):
    """A write or read of a value's bytes, at `offset` of the file."""

    def __init__(self, is_write: bool, offset: int, value: Tensor) -> None:
        what = "written" if is_write else "read back"
        super().__init__(bytes_of(value), f"an offloaded value could not be {what}")
        self.is_write, self.offset = is_write, offset
        self.asked_s = time.perf_counter()


class Place:
    """The bytes of one value in a channel's file; given back when nobody holds it any more.

    `numpy.asarray(place)` is an array of one number, by which `place_of` finds the place. The array, and
    so a tensor made of it, holds the place.
    """

    def __init__(self, channel: "OffloadChannel", offset: int, value: Tensor) -> None:
        self.channel, self.offset = channel, offset
        self.number = np.array([next(_NUMBERS)], dtype=np.int64)
        self.nbytes = value.untyped_storage().nbytes()
        self.written = channel.ask(_Transfer(True, offset, value))
        self.reads: dict[int, _Transfer] = {}
        finalizer = weakref.finalize(self, _give_back, channel.freed, offset, self.written)
        finalizer.atexit = False
        _PLACES[int(self.number[0])] = self

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self.number.__array_interface__

    def handle(self) -> Tensor:
        """A tensor, int64[1], that holds this place."""
        return torch.from_numpy(np.asarray(self))

    def fetch(self, into: Tensor) -> None:
        """Start to read the value into the memory of `into`."""
        self.written.wait()
        self.reads[into.data_ptr()] = self.channel.ask(_Transfer(False, self.offset, into))

    def wait(self, into: Tensor) -> None:
        """Until the value that was asked for is there."""
        read = self.reads.pop(into.data_ptr(), None)
        if read is not None:
            read.wait()


_NUMBERS = count(1)
_PLACES: "weakref.WeakValueDictionary[int, Place]" = weakref.WeakValueDictionary()


def place_of(handle: Tensor) -> Place:
    """The place behind a handle; GraphoptError where nobody holds it any more."""
    place = _PLACES.get(int(handle))
    if place is None:
        raise GraphoptError(
            "an offloaded value is gone: its handle was copied, as hooks on saved tensors do, and the "
            "original dropped"
        )
    return place


def _give_back(freed: "queue.SimpleQueue[int]", offset: int, write: _Transfer) -> None:
    write.give_up()
    freed.put(offset)  # a lock taken here could be one that this very thread holds


class OffloadChannel:
    """A file without a name, and the thread that writes and reads it at most at `bytes_per_s`."""

    def __init__(self, folder: str | None, bytes_per_s: float | None) -> None:
        self.freed: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._requests: queue.SimpleQueue[_Transfer | None] = queue.SimpleQueue()
        self._taken: dict[int, int] = {}  # bytes by offset
        self._lock = threading.Lock()
        file = _unnamed(folder)
        arguments = (file, self._requests, Throttle(bytes_per_s))
        thread = threading.Thread(target=_serve, args=arguments, daemon=True, name="offload")
        thread.start()
        weakref.finalize(self, self._requests.put, None).atexit = False

    def write(self, value: Tensor) -> Place:
        """Start to write the memory of `value` to a place of its own."""
        with self._lock:
            self._drop_freed()
            offset = self._free_offset(nbytes := value.untyped_storage().nbytes())
            self._taken[offset] = nbytes
        return Place(self, offset, value)

    def ask(self, request: _Transfer) -> _Transfer:
        """Put `request` behind those that wait."""
        self._requests.put(request)
        return request

    @property
    def taken_bytes(self) -> int:
        """The bytes of the places that somebody holds."""
        with self._lock:
            self._drop_freed()
            return sum(self._taken.values())

    def _drop_freed(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                del self._taken[self.freed.get_nowait()]

    def _free_offset(self, nbytes: int) -> int:
        """The first gap between places that is wide enough, or the end."""
        end = 0
        for offset in sorted(self._taken):
            if offset - end >= nbytes:
                break
            end = -(-(offset + self._taken[offset]) // PAGE) * PAGE
        return end


_CHANNELS: "weakref.WeakValueDictionary[tuple[str, float | None], OffloadChannel]"
_CHANNELS = weakref.WeakValueDictionary()
_OPENING = threading.Lock()


def channel_of(folder: str | None, bytes_per_s: float | None) -> OffloadChannel:
    """The channel to files of `folder` (None: the system's temporary folder) at this speed."""
    key = (folder or tempfile.gettempdir(), bytes_per_s)
    with _OPENING:
        channel = _CHANNELS.get(key)
        if channel is None:
            channel = _CHANNELS[key] = OffloadChannel(*key)
        return channel


def bytes_of(value: Tensor) -> Tensor:
    """The whole memory behind `value`, uint8[nbytes]."""
    memory = torch.empty(0, dtype=torch.uint8, device=value.device)
    return memory.set_(value.untyped_storage())


def _unnamed(folder: str | None) -> Any:
    try:
        return tempfile.TemporaryFile(buffering=0, dir=folder, prefix="graphopt-offload-")
    except OSError as error:
        raise GraphoptError(f"values cannot be offloaded to {folder}: {error}") from error


def _serve(file: Any, requests: "queue.SimpleQueue[_Transfer | None]", throttle: Throttle) -> None:
    """The thread: holds no place and no channel, so that they can go."""
    with file:
        serve(requests, partial(_carry_out, file, throttle))


def _carry_out(file: Any, throttle: Throttle, request: _Transfer) -> None:
    assert request.memory is not None
    throttle.begin(request.asked_s)
    view = request.memory.numpy().data
    begin = 0
    while begin < len(view) and request.is_wanted:
        part = view[begin : begin + throttle.chunk]
        throttle.take(len(part))
        file.seek(request.offset + begin)
        done = file.write(part) if request.is_write else file.readinto(part)
        if not done:
            raise GraphoptError("the file ends too early")
        begin += done


# --- what it takes ------------------------------------------------------------------------------


def lines_of(folder: str | None, bytes_per_s: float | None) -> tuple[Line, Line]:
    """What writes and reads take: at the speed that is given, else as measured in `folder`."""
    if bytes_per_s is None:
        return measured_lines(folder)
    return Line(0.0, 1 / bytes_per_s), Line(0.0, 1 / bytes_per_s)


@cache
def measured_lines(folder: str | None) -> tuple[Line, Line]:
    """What writes and reads of a file in `folder` take, the system's cache included; measured once."""
    with _unnamed(folder) as file:
        data = np.ones(_PROBE_BYTES[-1], dtype=np.uint8).data
        write = line_of(lambda nbytes: file.write(data[:nbytes]), _PROBE_BYTES)  # each to a new part
        file.seek(0)
        return write, line_of(lambda nbytes: file.readinto(data[:nbytes]), _PROBE_BYTES)
