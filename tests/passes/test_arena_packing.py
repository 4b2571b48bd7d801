"""Offsets in a block: never two at once in one place, close to the least that is possible."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.arena_facts import ALIGNMENT
from graphopt.errors import VerifyError
from graphopt.lower_arena import Placement, check_apart
from graphopt.passes.arena_choice import Candidates, choose
from graphopt.passes.arena_packing import Interval, Packing, alive_bytes, filled, pack


@st.composite
def intervals(draw: st.DrawFn, most: int = 12, unit: int = ALIGNMENT) -> list[Interval]:
    found = []
    for _ in range(draw(st.integers(0, most))):
        first = draw(st.integers(0, 9))
        found.append(Interval(unit * draw(st.integers(1, 6)), first, first + draw(st.integers(0, 5))))
    return found


def check(given: list[Interval], packing: Packing, limit: int | None = None) -> None:
    """No two share a byte at one moment, by comparing every pair."""
    placed = [(o, i) for o, i in zip(packing.offsets, given, strict=True) if o is not None]
    for n, (offset, one) in enumerate(placed):
        assert offset % ALIGNMENT == 0 and offset + one.nbytes <= packing.nbytes
        for other_offset, other in placed[:n]:
            apart_in_time = one.last < other.first or other.last < one.first
            apart = offset + one.nbytes <= other_offset or other_offset + other.nbytes <= offset
            assert apart_in_time or apart
    ends = [offset + i.nbytes for offset, i in placed]
    assert packing.nbytes == max(ends, default=0)
    assert limit is None or packing.nbytes <= limit
    names = [Placement(str(n), o, i.nbytes, i.first, i.last) for n, (o, i) in enumerate(placed)]
    check_apart(names, packing.nbytes)


@given(intervals(unit=40), st.none() | st.integers(0, 900))
@settings(deadline=None)
def test_no_two_at_once_in_one_place(drawn: list[Interval], limit: int | None) -> None:
    """Also for sizes that are no multiples of the alignment, and in what was filled up."""
    packing = pack(drawn, limit)
    check(drawn, packing, limit)
    assert limit is not None or None not in packing.offsets
    less = Packing(tuple(o if n % 2 else None for n, o in enumerate(packing.offsets)), packing.nbytes)
    more = filled(drawn, less)
    assert all(a in (None, b) for a, b in zip(less.offsets, more.offsets, strict=True))
    check(drawn, Packing(more.offsets, max([0, *_ends(drawn, more)])))


def _ends(drawn: list[Interval], packing: Packing) -> list[int]:
    return [o + i.nbytes for o, i in zip(packing.offsets, drawn, strict=True) if o is not None]


@given(intervals(most=7))
@settings(deadline=None)
def test_the_lower_bound(drawn: list[Interval]) -> None:
    """Moment by moment."""
    needed = [sum(i.nbytes for i in drawn if i.first <= t <= i.last) for t in range(20)]
    assert alive_bytes(drawn) == max(needed) <= pack(drawn).nbytes


@given(intervals(most=5))
@settings(deadline=None, max_examples=60)
def test_beside_the_best(drawn: list[Interval]) -> None:
    """First fit in some order of the intervals is optimal: all orders are tried.

    Five kinds of order are not all, so that a block may be larger, by a fifth at most here.
    """
    best = min(first_fit([drawn[n] for n in order]) for order in permutations(range(len(drawn))))
    assert best <= pack(drawn).nbytes <= 1.2 * best


def first_fit(order: list[Interval]) -> int:
    placed: list[tuple[int, Interval]] = []
    for new in order:
        alive = sorted((o, i.nbytes) for o, i in placed if i.first <= new.last and new.first <= i.last)
        offset = 0
        for other, nbytes in alive:
            if other - offset >= new.nbytes:
                break
            offset = max(offset, other + nbytes)
        placed.append((offset, new))
    return max((o + i.nbytes for o, i in placed), default=0)


@given(intervals(most=10), intervals(most=6), st.integers(0, 12))
@settings(deadline=None)
def test_the_choice_keeps_to_the_limit(inside: list[Interval], others: list[Interval], more: int) -> None:
    """The peak is that of the block and what lies beside it, counted moment by moment."""
    candidates = Candidates(tuple(inside), tuple(others))

    def peak_of(packing: Packing) -> int:
        left = [i for o, i in zip(packing.offsets, inside, strict=True) if o is None]
        return packing.nbytes + alive_bytes([*left, *others])

    before = alive_bytes([*inside, *others])
    limit = before + more * ALIGNMENT
    packing, peak = choose(candidates, peak_of, before, limit)
    check(inside, Packing(packing.offsets, max([0, *_ends(inside, packing)])))
    assert peak == peak_of(packing) <= limit
    whole = pack(inside)
    assert peak_of(whole) > limit or packing == whole


def test_faults_are_found() -> None:
    rows = [Placement("a", 0, 64, 0, 3), Placement("b", 32, 64, 3, 4)]
    with pytest.raises(VerifyError, match="a and b are needed at once and share bytes"):
        check_apart(rows, 128)
    with pytest.raises(VerifyError, match="b does not end in its arena"):
        check_apart(rows[1:], 64)
    check_apart([rows[0], Placement("b", 32, 64, 4, 4)], 128)
