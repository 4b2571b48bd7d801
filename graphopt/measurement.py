"""Measured peak memory: what the allocator handed out while a callable ran."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class Measurement:
    """Bytes that the allocator held above what was live at the start.

    `peak_bytes` counts everything; `activation_bytes` leaves out the storages named to `measure` as
    gradients. `result` is what the callable returned.
    """

    peak_bytes: int
    activation_bytes: int
    result: Any = None


def measure(
    step: Callable[[], Any],
    *,
    gradients: Callable[[], Iterable[torch.Tensor]] | None = None,
    device: torch.device | str = "cpu",
) -> Measurement:
    """Run `step` once and read its peak memory from the allocator.

    On the CPU the allocator's events come from the profiler; on CUDA the figure is
    `torch.cuda.max_memory_allocated`. `gradients` is asked, after the step, for the tensors that
    `activation_bytes` leaves out (CPU only; on CUDA their total is subtracted).

    >>> import torch
    >>> x = torch.ones(1 << 20)
    >>> measure(lambda: (x.exp() + 1).sum()).peak_bytes // 2**20
    8
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        return _measure_cuda(step, gradients, torch.device(device))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
    left_out = {_address(t) for t in gradients()} if gradients else set()
    events = _allocator_events(profiler)
    return Measurement(_peak(events, set()), _peak(events, left_out), result)


def _measure_cuda(
    step: Callable[[], Any],
    gradients: Callable[[], Iterable[torch.Tensor]] | None,
    device: torch.device,
) -> Measurement:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = step()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    held = {_address(t): t.untyped_storage().nbytes() for t in gradients()} if gradients else {}
    return Measurement(peak, peak - sum(held.values()), result)


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _allocator_events(profiler: profile) -> list[tuple[int, int]]:
    """(address, signed bytes) of every allocation and release, in order of time."""
    raw = profiler.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    found: list[tuple[int, int, int]] = []
    stack = list(raw)
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            fields = event.extra_fields
            found.append((event.start_time_ns, int(fields.ptr), int(fields.alloc_size)))
    found.sort(key=lambda item: item[0])
    return [(address, size) for _, address, size in found]


def _peak(events: list[tuple[int, int]], left_out: set[int]) -> int:
    """Greatest running sum of `events`, without the last lives of the addresses in `left_out`."""
    last = {address: i for i, (address, size) in enumerate(events) if size > 0}
    skipped = {last[address] for address in left_out if address in last}
    live = peak = 0
    born: set[int] = set()
    for i, (address, size) in enumerate(events):
        if i in skipped:
            continue
        if size < 0 and address not in born:
            continue
        born.add(address) if size > 0 else born.discard(address)
        live += size
        peak = max(peak, live)
    return peak
