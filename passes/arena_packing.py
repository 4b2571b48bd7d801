"""Packing of intervals: offsets for tensors of known lifetimes in one block, no two at once overlapping.

The problem is dynamic storage allocation, which is NP-hard (Garey and Johnson, "Computers and
Intractability", 1979, problem SR2). Tensors are taken largest first, each into the smallest gap that it
fits between those that are needed with it, as in Pisarchyk and Lee, "Efficient Memory Management for Deep
Neural Net Inference", 2020, section 5.2; other orders are tried where that misses the lower bound, the
most bytes that are needed at once.
"""

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from graphopt.arena_facts import ALIGNMENT


@dataclass(frozen=True)
class Interval:
    """Bytes that are needed from the moment `first` to the moment `last`, both included."""

    nbytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Packing:
    """An offset for each interval, None where it was left out; `nbytes` is where the last one ends."""

    offsets: tuple[int | None, ...]
    nbytes: int

    def placed_bytes(self, intervals: Sequence[Interval]) -> int:
        """The bytes of those that have an offset."""
        pairs = zip(intervals, self.offsets, strict=True)
        return sum(i.nbytes for i, offset in pairs if offset is not None)


def pack(intervals: Sequence[Interval], limit_bytes: int | None = None) -> Packing:
    """Offsets, multiples of `ALIGNMENT`; what does not end within `limit_bytes` is left out.

    >>> pack([Interval(128, 0, 1), Interval(64, 1, 2), Interval(128, 2, 3)])
    Packing(offsets=(0, 128, 0), nbytes=192)
    >>> pack([Interval(128, 0, 1), Interval(64, 1, 2)], limit_bytes=128).offsets
    (0, None)
    """
    least = alive_bytes(intervals)
    best: Packing | None = None
    for order in _ORDERS:
        found = _packed(intervals, sorted(range(len(intervals)), key=_key(order, intervals)), limit_bytes)
        if best is None or _rank(found, intervals) < _rank(best, intervals):
            best = found
        if best.nbytes <= least and None not in best.offsets:
            break
    assert best is not None
    return best


def alive_bytes(intervals: Sequence[Interval]) -> int:
    """The most bytes that are needed at one moment: no packing of all is smaller.

    >>> alive_bytes([Interval(128, 0, 1), Interval(64, 1, 2), Interval(128, 2, 3)])
    192
    """
    changes = sorted(
        (moment, change)
        for i in intervals
        for moment, change in ((i.first, i.nbytes), (i.last + 1, -i.nbytes))
    )
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


def filled(intervals: Sequence[Interval], packing: Packing) -> Packing:
    """`packing` with those that it left out where they fit into gaps of it.

    >>> two = [Interval(128, 0, 1), Interval(64, 2, 3)]
    >>> filled(two, Packing((0, None), 128))
    Packing(offsets=(0, 0), nbytes=128)
    """
    offsets = list(packing.offsets)
    placed = sorted((offset, n) for n, offset in enumerate(offsets) if offset is not None)
    left = [n for n, offset in enumerate(offsets) if offset is None]
    for number in sorted(left, key=lambda n: (-intervals[n].nbytes, n)):
        around = [(offset, intervals[n]) for offset, n in placed]
        offset = _best_gap(around, intervals[number], packing.nbytes)
        if offset is not None:
            offsets[number] = offset
            insort(placed, (offset, number))
    return Packing(tuple(offsets), packing.nbytes)


_Order = Callable[[Interval], tuple[int, ...]]
_ORDERS: tuple[_Order, ...] = (
    lambda i: (-i.nbytes, i.first),
    lambda i: (-i.nbytes, i.first - i.last),
    lambda i: (i.first, -i.nbytes),
    lambda i: (i.first - i.last, -i.nbytes),
    lambda i: (-i.last, -i.nbytes),
)


def _key(order: _Order, intervals: Sequence[Interval]) -> Callable[[int], tuple[int, ...]]:
    return lambda n: (*order(intervals[n]), n)


def _rank(packing: Packing, intervals: Sequence[Interval]) -> tuple[int, int]:
    return -packing.placed_bytes(intervals), packing.nbytes


def _packed(intervals: Sequence[Interval], order: Sequence[int], limit_bytes: int | None) -> Packing:
    offsets: list[int | None] = [None] * len(intervals)
    placed: list[tuple[int, Interval]] = []  # by offset
    total = 0
    for number in order:
        new = intervals[number]
        offset = _best_gap(placed, new, limit_bytes)
        if offset is not None:
            offsets[number] = offset
            insort(placed, (offset, new), key=lambda pair: pair[0])
            total = max(total, offset + new.nbytes)
    return Packing(tuple(offsets), total)


def _best_gap(
    placed: Sequence[tuple[int, Interval]], new: Interval, limit_bytes: int | None
) -> int | None:
    """Where `new` leaves least of a gap free; behind all needed with it if none is wide enough."""
    best: tuple[int, int] | None = None
    end = 0
    for offset, other in placed:
        if other.first > new.last or new.first > other.last:
            continue
        if offset - end >= new.nbytes and (best is None or offset - end < best[0]):
            best = offset - end, end
        end = max(end, -(-(offset + other.nbytes) // ALIGNMENT) * ALIGNMENT)
    found = end if best is None else best[1]
    return found if limit_bytes is None or found + new.nbytes <= limit_bytes else None
