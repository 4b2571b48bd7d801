"""Collectives run on a real process group: how long each takes, and how much it slows down computing."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from graphopt.cost_models.contention import ENOUGH, Contention, Repetition, contention, undisturbed
from graphopt.cost_models.devices import Cluster
from graphopt.cost_models.link_costs import LinkCosts, Samples
from graphopt.errors import PlanError
from graphopt.ranks import largest, outside_tracing, size_of

LARGEST_BYTES = 2**26  # put in; larger transfers follow the line through the smaller ones
_SIZES = 5
_REPEATS = 9
_BATCHES = 3  # of repetitions that show how much a transfer slows down computing
_SIDE = 256  # of the matrices that are multiplied beside a transfer


def measured_links(
    group: str, wanted: Mapping[str, Iterable[int]], device: torch.device, cluster: Cluster
) -> LinkCosts:
    """What collectives of the kinds and sizes `wanted` (bytes that a rank puts in) take on `group`.

    Every rank of the group has to call it with the same arguments. Times are medians of a few runs in
    turn: the least one is of a link that had been idle, whose token bucket or buffers were empty. Two
    sizes at least are measured for each kind. PlanError where a rank stopped, or where the group cannot
    do what is asked.
    """
    try:
        with outside_tracing():
            samples = _samples(group, wanted, device)
            found = _contention(group, samples, device) if samples else Contention(0.0, 0.0, 0)
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(f"the links of group {group} could not be measured: {reason}") from error
    return LinkCosts(cluster, samples, found.share, found.spread)


def _samples(group: str, wanted: Mapping[str, Iterable[int]], device: torch.device) -> dict[str, Samples]:
    """Bytes and seconds of each kind of collective, by size."""
    chosen = [(kind, n) for kind, sizes in wanted.items() for n in _sizes(sizes)]
    runs = [_transfer(_starter(kind, n, group, device), device) for kind, n in chosen]
    found: dict[str, Samples] = {}
    for (kind, nbytes), seconds in zip(chosen, _in_turn(runs), strict=True):
        found[kind] = (*found.get(kind, ()), (nbytes, seconds))
    return found


def _sizes(wanted: Iterable[int]) -> list[int]:
    """A few of the sizes, the least and the largest among them."""
    found = sorted({min(LARGEST_BYTES, n) for n in wanted})
    if len(found) > _SIZES:
        found = [found[round(i * (len(found) - 1) / (_SIZES - 1))] for i in range(_SIZES)]
    return found if len(found) > 1 else [max(1, found[0] // 4), found[0]]


def _starter(kind: str, nbytes: int, group: str, device: torch.device) -> Callable[[], Any]:
    """A call that starts a collective in which each rank puts in about `nbytes`."""
    ops: Any = torch.ops._c10d_functional
    ranks = size_of(group)
    part = max(1, nbytes // 4 // ranks)
    numbers = torch.zeros(part * ranks, device=device)
    return {
        "all_reduce": lambda: ops.all_reduce(numbers, "sum", group),
        "all_gather": lambda: ops.all_gather_into_tensor(numbers, ranks, group),
        "reduce_scatter": lambda: ops.reduce_scatter_tensor(numbers, "sum", ranks, group),
        "all_to_all": lambda: ops.all_to_all_single(numbers, [part] * ranks, [part] * ranks, group),
        "broadcast": lambda: ops.broadcast(numbers, 0, group),
    }[kind]


def _transfer(
    start: Callable[[], Any], device: torch.device, work: Callable[[], None] | None = None
) -> Callable[[], float]:
    """A call that gives the seconds from the start of a collective to its end, `work` beside it."""

    def run() -> float:
        torch.ops._c10d_functional.wait_tensor(start())  # the ranks begin together
        _synchronize(device)
        begin = time.perf_counter()
        begun = start()
        if work is not None:
            work()
        torch.ops._c10d_functional.wait_tensor(begun)
        _synchronize(device)
        return time.perf_counter() - begin

    return run


def _in_turn(runs: Sequence[Callable[[], float]]) -> list[float]:
    """The median of what each of `runs` gives, one after the other in each round."""
    rounds = [[run() for run in runs] for _ in range(_REPEATS + 1)]  # the first sets up connections
    return [statistics.median(column) for column in zip(*rounds[1:], strict=True)]


def _contention(group: str, samples: Mapping[str, Samples], device: torch.device) -> Contention:
    """k, from the largest transfer beside matrix products that take about as long.

    All ranks repeat it as often: until each has enough repetitions, or `_BATCHES` batches of them.
    """
    kind, (nbytes, sent_s) = _largest_of(samples)
    square = torch.zeros(_SIDE, _SIDE, device=device)
    times = 1

    def multiply() -> None:
        for _ in range(times):
            square @ square
        _synchronize(device)

    work = _Work(multiply, on_processor=device.type == "cpu")
    times = max(1, round(sent_s / _in_turn([work.alone])[0]))
    start = _starter(kind, nbytes, group, device)
    transfer, both = _transfer(start, device), _transfer(start, device, work)
    found: list[Repetition] = []
    for _ in range(_BATCHES):
        for _ in range(ENOUGH):
            compute_s, held = work.alone(), work.held
            sent_s, both_s = transfer(), both()
            found.append(Repetition(compute_s, sent_s, both_s, min(held, work.held)))
        if not any(largest([group], [len(undisturbed(found)) < ENOUGH], "whether to repeat")):
            break
    return contention(found)


def _largest_of(samples: Mapping[str, Samples]) -> tuple[str, tuple[int, float]]:
    """The kind of the most bytes, the first of them on every rank; seconds differ between ranks."""
    return max(((kind, max(s)) for kind, s in samples.items()), key=lambda item: item[1][0])


class _Work:
    """Something to compute, and which share of the processor the process `held` when it last did."""

    def __init__(self, compute: Callable[[], None], *, on_processor: bool) -> None:
        self._compute, self._on_processor, self.held = compute, on_processor, 1.0

    def __call__(self) -> None:
        self.alone()

    def alone(self) -> float:
        """Compute; the seconds it took. Threads of a process group count as the process does."""
        begin, own = time.perf_counter(), time.process_time()
        self._compute()
        seconds, own = time.perf_counter() - begin, time.process_time() - own
        self.held = min(1.0, own / seconds) if self._on_processor and seconds > 0 else 1.0
        return seconds


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
