"""The step cut at its narrow places: spans of the forward, and the part of the backward that needs each.

A *cut* is a position in the forward where few bytes cross. The values that cross every chosen cut are
kept; then a span of the forward between two cuts can be recomputed alone, and its part of the
backward depends on nothing else that the plan decides. This works on any graph: what crosses is
whatever is alive there, be it a residual stream, an encoder's output or a skip connection.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.cost_models.schedule import anchors

RISE = 1.25  # how much wider than its surroundings a place may be and still be a cut


@dataclass(frozen=True)
class Spans:
    """A cut forward. Span k runs the operators from `cuts[k]` to `cuts[k + 1]`.

    `crossing[k]` are the values that cross into span k; `anchors[k]` the operators of the backward
    that belong to it, in order. `pinned` are values that some operator of the backward reads outside
    the span that makes them: they are always kept.
    """

    cuts: tuple[int, ...]
    crossing: tuple[frozenset[int], ...]
    anchors: tuple[tuple[int, ...], ...]
    pinned: frozenset[int]

    def __len__(self) -> int:
        return len(self.cuts) - 1


def spans(flow: Dataflow) -> Spans:
    """Cut the forward of `flow` at its local minima and give each span its part of the backward."""
    last = _last_forward_reads(flow)
    cuts = _cuts(_crossing_bytes(flow, last), _within_blocks(flow))
    crossing = _crossing(flow, last, cuts)
    first = _span_of_positions(cuts)
    lives = {
        v: (first[flow.values[v].producer], first[last.get(v, flow.values[v].producer)])
        for v in _forward_values(flow)
    }
    order = anchors(flow)
    reads = deep_reads(flow, order)
    place = _assign(flow, reads, lives, len(cuts) - 1)
    groups: list[list[int]] = [[] for _ in range(len(cuts) - 1)]
    pinned: set[int] = set()
    for anchor, span, values in zip(order, place, reads, strict=True):
        groups[span].append(anchor)
        pinned.update(v for v in values if not lives[v][0] <= span <= lives[v][1])
    return Spans(tuple(cuts), tuple(crossing), tuple(map(tuple, groups)), frozenset(pinned))


def deep_reads(flow: Dataflow, order: Sequence[int]) -> list[tuple[int, ...]]:
    """The forward values each operator needs, directly or through operators that run on demand."""
    memo: dict[int, tuple[int, ...]] = {}
    found = []
    for anchor in order:
        found.append(_expand(flow, flow.operators[anchor].reads, memo))
    return found


def _expand(flow: Dataflow, reads: Sequence[int], memo: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    needed: dict[int, None] = {}
    for value in reads:
        producer = flow.values[value].producer
        if producer == NO_PRODUCER:
            continue
        operator = flow.operators[producer]
        if not operator.backward:
            needed[value] = None
        elif not operator.anchored:
            if producer not in memo:
                memo[producer] = _expand(flow, operator.reads, memo)
            needed.update(dict.fromkeys(memo[producer]))
    return tuple(needed)


def _forward_values(flow: Dataflow) -> list[int]:
    end = flow.forward.stop
    return [i for i, v in enumerate(flow.values) if NO_PRODUCER < v.producer < end]


def _last_forward_reads(flow: Dataflow) -> dict[int, int]:
    last: dict[int, int] = {}
    for index in flow.forward:
        for value in flow.operators[index].reads:
            if flow.values[value].producer != NO_PRODUCER:
                last[value] = index
    return last


def _crossing_bytes(flow: Dataflow, last: dict[int, int]) -> np.ndarray:
    """Bytes that cross each position of the forward; position t lies before operator t."""
    change = np.zeros(len(flow.forward) + 2, dtype=np.int64)
    for value, reader in last.items():
        change[flow.values[value].producer + 1] += flow.values[value].nbytes
        change[reader + 1] -= flow.values[value].nbytes
    return np.cumsum(change)[: len(flow.forward) + 1]


def _within_blocks(flow: Dataflow) -> np.ndarray:
    """For each position of the forward, whether it lies between operators of one block."""
    blocks = [flow.operators[i].block for i in flow.forward]
    within = np.zeros(len(blocks) + 1, dtype=bool)
    for block in set(blocks) - {None}:
        first, after_last = blocks.index(block), len(blocks) - blocks[::-1].index(block)
        within[first + 1 : after_last] = True
    return within


def _cuts(width: np.ndarray, forbidden: np.ndarray) -> list[int]:
    """Local minima of `width` that are not `forbidden`, with a rise of at least `RISE` between them."""
    end = len(width) - 1
    cuts = [0]
    lowest, highest, falling = 0, 0, False
    for t in range(1, end):
        if forbidden[t]:
            continue
        if falling:
            if width[t] < width[lowest]:
                lowest = t
            elif width[t] > RISE * width[lowest]:
                cuts.append(lowest)
                falling, highest = False, t
        elif width[t] > width[highest]:
            highest = t
        elif RISE * width[t] < width[highest]:
            falling, lowest = True, t
    return [*cuts, end] if end > cuts[-1] or len(cuts) == 1 else cuts


def _crossing(flow: Dataflow, last: dict[int, int], cuts: Sequence[int]) -> list[frozenset[int]]:
    return [
        frozenset(v for v, reader in last.items() if flow.values[v].producer < cut <= reader)
        for cut in cuts
    ]


def _span_of_positions(cuts: Sequence[int]) -> list[int]:
    return [k for k in range(len(cuts) - 1) for _ in range(cuts[k], cuts[k + 1])]


def _assign(
    flow: Dataflow,
    reads: Sequence[Sequence[int]],
    lives: dict[int, tuple[int, int]],
    count: int,
) -> list[int]:
    """A span for each operator of the backward, never rising, with the fewest bytes read outside.

    A forward value made in span s and last read in span e is at hand in the spans s to e.
    """
    total = np.zeros(count)
    choices = np.zeros((len(reads), count), dtype=np.int64)
    for row, values in enumerate(reads):
        # Best predecessor of span k: the cheapest span at or after it; ties go to the latest.
        tail = np.minimum.accumulate(total[::-1])[::-1]
        is_best = total == tail
        index = np.where(is_best, np.arange(count), count)
        choices[row] = np.minimum.accumulate(index[::-1])[::-1]
        total = tail.copy()
        for value in values:
            born, died = lives[value]
            cost = flow.values[value].nbytes + 1
            total[:born] += cost
            total[died + 1 :] += cost
    place = [0] * len(reads)
    span = count - 1 - int(np.argmin(total[::-1]))
    for row in range(len(reads) - 1, -1, -1):
        place[row] = span
        span = int(choices[row][span])
    return place
