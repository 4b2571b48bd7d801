"""The order of the backward: which of the operators that run once goes first, for a lower peak.

Autograd's order is one of many that respect what each operator reads. Where two gradients can be made
in either order, the one whose operands die sooner should come first. The search moves operators
across the moment of the peak, as only what ran before that moment decides what is alive there.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.cost_models.fast_schedule import Profile
from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.schedule import anchors

NEAR = 0.98  # of the peak: moments that count as being at it
Order = tuple[int, ...]


@dataclass(frozen=True)
class Precedence:
    """For each anchored operator, those that must run before it, and those that must run after."""

    before: dict[int, frozenset[int]]
    after: dict[int, frozenset[int]]

    @staticmethod
    def of(flow: Dataflow) -> "Precedence":
        """An operator follows the makers of what it reads; one with effects keeps its place."""
        order = anchors(flow)
        before: dict[int, set[int]] = {}
        memo: dict[int, frozenset[int]] = {}
        barrier: int | None = None
        since: list[int] = []
        for anchor in order:
            before[anchor] = set(_anchored_sources(flow, anchor, memo))
            if barrier is not None:
                before[anchor].add(barrier)
            if flow.operators[anchor].recomputable:
                since.append(anchor)
            else:
                before[anchor].update(since)
                barrier, since = anchor, []
        after: dict[int, set[int]] = {a: set() for a in order}
        for anchor, sources in before.items():
            for source in sources:
                after[source].add(anchor)
        return Precedence(
            {a: frozenset(s) for a, s in before.items()}, {a: frozenset(s) for a, s in after.items()}
        )


def _anchored_sources(flow: Dataflow, index: int, memo: dict[int, frozenset[int]]) -> frozenset[int]:
    """The anchored operators whose results `index` reads, directly or through others on demand."""
    if index in memo:
        return memo[index]
    found: set[int] = set()
    stack, seen = [index], {index}
    while stack:
        for value in flow.operators[stack.pop()].reads:
            producer = flow.values[value].producer
            if producer < 0 or producer in seen or not flow.operators[producer].backward:
                continue
            seen.add(producer)
            if flow.operators[producer].anchored:
                found.add(producer)
            else:
                stack.append(producer)
    memo[index] = frozenset(found)
    return memo[index]


def check_order(flow: Dataflow, order: Sequence[int]) -> str | None:
    """What is wrong with `order` as an order of the backward of `flow`, in words; None if nothing is.

    It may leave out operators; those that it names must be operators that run once.
    """
    if len(set(order)) < len(order) or not set(order) <= set(anchors(flow)):
        return "it names what is no operator of the backward, or one of them twice"
    place = {a: i for i, a in enumerate(order)}
    for anchor, sources in Precedence.of(flow).before.items():
        for source in sources:
            if anchor in place and place.get(source, -1) > place[anchor]:
                first, second = flow.operators[source].name, flow.operators[anchor].name
                return f"{second} comes before {first}, which it needs"
    return None


def completed(flow: Dataflow, order: Sequence[int]) -> Order:
    """`order` with the operators that it leaves out: before what needs them, or at the end.

    A plan made for the gradients that are likely is carried out where all are asked for, too.
    """
    before = Precedence.of(flow).before
    found: dict[int, None] = {}

    def add(anchor: int) -> None:
        for source in sorted(before[anchor]):
            if source not in found:
                add(source)
        found[anchor] = None

    for anchor in (*order, *anchors(flow)):
        if anchor not in found:
            add(anchor)
    return tuple(found)


def lower_order(
    order: Order, precedence: Precedence, run: Callable[[Order], Profile | None], enough: int = 0
) -> Order:
    """`order`, changed move by move while that lowers the peak of its profile.

    `run` simulates an order, and answers None when no more time is to be spent; the search ends at a
    peak of `enough` bytes.
    """
    profile = run(order)
    while profile is not None and profile.peak_bytes > enough:
        best: tuple[tuple[int, int], Order, Profile] | None = None
        height = _height(profile)
        for trial in _moves(order, precedence, _anchor_at_peak(order, profile)):
            found = run(trial)
            if found is None:
                break
            reached = _height(found, profile.peak_bytes)
            if reached < (best[0] if best else height):
                best = reached, trial, found
        if best is None:
            break
        _, order, profile = best
    return order


def _height(profile: Profile, peak: int | None = None) -> tuple[int, int]:
    top = profile.peak_bytes
    return top, int(np.count_nonzero(profile.during >= NEAR * (peak or top)))


def _anchor_at_peak(order: Order, profile: Profile) -> int:
    """The place in `order` of the operator that runs at the peak, or for which others run then."""
    mine = set(order)
    after = profile.operators[profile.during.argmax() :].tolist()
    return order.index(next((index for index in after if index in mine), order[-1]))


def _moves(order: Order, precedence: Precedence, peak: int) -> Iterator[Order]:
    """Orders in which one operator has crossed the place `peak`, with those that must go with it."""
    at_peak = order[peak]
    for place in range(peak - 1, -1, -1):
        group = _closure(order[place], order[place : peak + 1], precedence.after)
        if at_peak not in group:
            yield _shifted(order, group, peak + 1)
    for place in range(peak + 1, len(order)):
        group = _closure(order[place], order[peak : place + 1], precedence.before)
        if at_peak not in group:
            yield _shifted(order, group, peak)
            wider = _with_siblings(group, order, peak, precedence)
            if wider != group and at_peak not in wider:
                yield _shifted(order, wider, peak)
    for place in range(peak):
        group = _closure(at_peak, order[place : peak + 1], precedence.before)
        yield _shifted(order, group, place)
    for place in range(peak + 2, len(order) + 1):
        group = _closure(at_peak, order[peak:place], precedence.after)
        yield _shifted(order, group, place)


def _closure(start: int, within: Iterable[int], links: dict[int, frozenset[int]]) -> set[int]:
    """`start` and what is linked to it, over links that stay `within`."""
    allowed = set(within)
    found, stack = {start}, [start]
    while stack:
        for other in links[stack.pop()] & allowed:
            if other not in found:
                found.add(other)
                stack.append(other)
    return found


def _with_siblings(group: set[int], order: Order, peak: int, precedence: Precedence) -> set[int]:
    """`group` and all that reads what it reads and could run before the place `peak`, too.

    Only then do the operands of the group die there.
    """
    done = set(order[:peak]) | group
    sources = {s for member in group for s in precedence.before[member]}
    readers = {r for source in sources for r in precedence.after[source]}
    return group | {r for r in readers - done if precedence.before[r] <= done}


def _shifted(order: Order, group: set[int], place: int) -> Order:
    """`order` with `group` taken out and put before what stood at `place`."""
    left = tuple(a for a in order[:place] if a not in group)
    right = tuple(a for a in order[place:] if a not in group)
    return (*left, *(a for a in order if a in group), *right)
