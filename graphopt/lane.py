"""Work that runs beside the caller, in the order in which it was begun."""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")
Work = Callable[[], None]


class Promise(Generic[T]):
    """What will come out of work that was begun."""

    def __init__(self) -> None:
        self._future: Future[tuple[T, Any]] = Future()

    def result(self) -> T:
        """Wait for it; raises what went wrong. On CUDA the caller's stream waits, not the caller."""
        value, done = self._future.result()
        if done is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(done)
            pytree.tree_map_only(Tensor, lambda t: t.record_stream(stream), value)
        return value

    def keep(self, run: Callable[[], tuple[T, Any]]) -> None:
        """Run it, and have what comes out."""
        try:
            self._future.set_result(run())
        except BaseException as error:
            self._future.set_exception(error)


class Lane:
    """A thread and, on CUDA, a stream of its own. No gradients are recorded there.

    The thread ends with the lane, and does not keep a process from ending.

    >>> lane = Lane(torch.device("cpu"))
    >>> lane.begin(torch.add, torch.ones(()), 2).result()
    tensor(3.)
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._works: SimpleQueue[Work | None] = SimpleQueue()
        threading.Thread(target=_carry_out, args=(self._works,), daemon=True).start()
        weakref.finalize(self, self._works.put, None)

    def begin(self, run: Callable[..., T], *given: Any) -> Promise[T]:
        """Call `run` with what is given, after all that was begun before, and after the caller's work."""
        promise, stream = Promise[T](), self._stream
        ready = None if stream is None else torch.cuda.current_stream().record_event()
        self._works.put(lambda: promise.keep(lambda: _called(run, given, stream, ready)))
        return promise


def _carry_out(works: "SimpleQueue[Work | None]") -> None:
    while (work := works.get()) is not None:
        work()
        del work  # or what it holds would stay until the next one


@torch.no_grad()
def _called(run: Callable[..., T], given: tuple[Any, ...], stream: Any, ready: Any) -> tuple[T, Any]:
    if stream is None:
        return run(*given), None
    with torch.cuda.stream(stream):
        stream.wait_event(ready)
        return run(*given), stream.record_event()
