"""Which tensors lie in an arena, under a bound on the peak of the step.

A block takes its memory all the time, what is left out of it only while it is needed. A block for
everything has the most bytes that are needed at once; where it meets the gradients that pile up beside
it, it must be smaller, and some tensors that are needed when it is fullest stay outside.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphopt.passes.arena_packing import Interval, Packing, filled, pack

_SIZES = 8  # of the block, that are tried where the one for everything is too large
_CORRECTIONS = 3  # of the room for each, where the packing wastes some


@dataclass(frozen=True)
class Candidates:
    """`intervals` of what can be placed; `others` are those of all else that the step allocates."""

    intervals: tuple[Interval, ...]
    others: tuple[Interval, ...]

    def heights(self, intervals: Sequence[Interval]) -> NDArray[np.int64]:
        """Bytes of `intervals` that are needed, int64[moment]."""
        ends = [i.last for i in (*self.intervals, *self.others)]
        changes = np.zeros(max(ends, default=0) + 2, dtype=np.int64)
        for i in intervals:
            changes[i.first] += i.nbytes
            changes[i.last + 1] -= i.nbytes
        return np.cumsum(changes)


def choose(
    candidates: Candidates, peak_of: Callable[[Packing], int], before: int, limit: int
) -> tuple[Packing, int]:
    """The packing of most bytes with a peak within `limit`, and its peak; all in bytes.

    `peak_of` is the peak of the step with a packing, `before` that without, which is at most `limit`.
    """
    whole = pack(candidates.intervals)
    peak = peak_of(whole)
    if peak <= limit:
        return whole, peak
    best, best_peak = pack(candidates.intervals, limit_bytes=0), before
    total = candidates.heights([*candidates.intervals, *candidates.others])
    room = int(total.max()) + limit - before
    for step in range(_SIZES, 0, -1):
        found, peak = _fitting(candidates, step / _SIZES, room, peak_of, limit)
        if found is not None and _bytes(candidates, found) > _bytes(candidates, best):
            best, best_peak = found, peak
    return best, best_peak


def _bytes(candidates: Candidates, packing: Packing) -> int:
    return packing.placed_bytes(candidates.intervals)


def _fitting(
    candidates: Candidates, share: float, room: int, peak_of: Callable[[Packing], int], limit: int
) -> tuple[Packing | None, int]:
    """A packing into a `share` of what there is room for, with a peak within `limit`, and its peak."""
    slack = 0
    for _ in range(_CORRECTIONS):
        found = _packed(candidates, share, room - slack)
        peak = peak_of(found)
        if peak <= limit:
            return found, peak
        slack += peak - limit
    return None, 0


def _packed(candidates: Candidates, share: float, room: int) -> Packing:
    """A packing that leaves out what does not fit, so that block and all else take at most `room`.

    Where most is needed in the block, one tensor is left out after another: the one for which the block
    need be least smaller than it is, then the one whose last use comes first.
    """
    outside, inside = candidates.heights(candidates.others), candidates.heights(candidates.intervals)
    size = int(max(room - int(outside.max()), 0) * share)
    kept = dict(enumerate(candidates.intervals))
    while inside.max() > size:
        moment = int(inside.argmax())
        best: tuple[int, int, int, int] | None = None
        for number, i in kept.items():
            if i.first <= moment <= i.last:
                possible = room - int(outside[i.first : i.last + 1].max()) - i.nbytes
                new = -min(size, possible), i.last, -i.nbytes, number
                best = new if best is None or new < best else best
        assert best is not None
        out, size = kept.pop(best[-1]), max(-best[0], 0)
        outside[out.first : out.last + 1] += out.nbytes
        inside[out.first : out.last + 1] -= out.nbytes
    found = pack([*kept.values()], size)
    offsets: list[int | None] = [None] * len(candidates.intervals)
    for number, offset in zip(kept, found.offsets, strict=True):
        offsets[number] = offset
    return filled(candidates.intervals, Packing(tuple(offsets), found.nbytes))
