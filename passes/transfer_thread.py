"""Transfers that one thread asks for and another does, in order, at most at some speed."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from torch import Tensor

from graphopt.cost_models.link_costs import Line, fitted
from graphopt.errors import GraphoptError

_CHUNK = 4 * 2**20  # bytes moved at once; between them a transfer can be given up
_BURST_S = 0.005  # of a throttled thread: what it may catch up after it slept too long
_PROBES = 5


class Request:
    """One transfer from or to `memory`, which it holds until it is done.

    `failure` says in an error what did not work. The `bell` of somebody who waits for the first of
    several is set when it is done.
    """

    def __init__(self, memory: Tensor, failure: str) -> None:
        self.memory: Tensor | None = memory
        self.is_wanted, self.is_done = True, threading.Event()
        self.bell: threading.Event | None = None
        self.error: BaseException | None = None
        self._failure = failure

    def wait(self) -> None:
        """Until it is done; raises what went wrong."""
        self.is_done.wait()
        if self.error is not None:
            raise GraphoptError(f"{self._failure}: {self.error}") from self.error

    def give_up(self) -> None:
        """Nobody wants it any more."""
        self.is_wanted = False

    @property
    def is_ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self.is_done.is_set()


R = TypeVar("R", bound=Request)


def serve(requests: "queue.SimpleQueue[R | None]", carry_out: Callable[[R], None]) -> None:
    """What the thread runs until it is given None; it holds no request between two."""
    while (request := requests.get()) is not None:
        try:
            carry_out(request)
        except BaseException as error:
            request.error = error
        request.memory = None  # it may go as soon as somebody has waited
        request.is_done.set()
        if request.bell is not None:
            request.bell.set()
        del request  # or its memory would stay until the next one


class Throttle:
    """A token bucket: bytes are allowed at `bytes_per_s`; None: at once."""

    def __init__(self, bytes_per_s: float | None) -> None:
        self._rate, self._ready = bytes_per_s, 0.0
        self._stopped = threading.Event()
        self.chunk = _CHUNK if bytes_per_s is None else int(min(_CHUNK, max(4096, bytes_per_s / 500)))

    def begin(self, asked_s: float) -> None:
        """What was asked for at `asked_s` of the clock begins: there was nothing to do before that."""
        self._ready = max(self._ready, asked_s)

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


def line_of(
    move: Callable[[int], object], sizes: Iterable[int], ready: Callable[[], object] = lambda: None
) -> Line:
    """What `move` takes for so many bytes: the line through the medians; `ready` comes before each."""
    samples = []
    for nbytes in sizes:
        seconds = []
        for _ in range(_PROBES):
            ready()
            begin = time.perf_counter()
            move(nbytes)
            seconds.append(time.perf_counter() - begin)
        samples.append((nbytes, sorted(seconds)[_PROBES // 2]))
    return fitted(samples)
