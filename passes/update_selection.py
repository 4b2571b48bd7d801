"""Which parameters to update: the most contribution that fits, with the true peak asked for each set.

The peak of a set is no sum over its members: a weight gradient high in the network is nearly free
once one below it is wanted. Each step of the greedy choice therefore takes what adds most contribution
per byte that the peak grows by, asked anew when its turn comes; the best of several such choices
is refined by additions and exchanges, then by branch and bound, which ends with the optimum where
there are few groups.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

Chosen = frozenset[int]

OWN_SHARE = 0.05  # of a group's own bytes: what it is taken to cost where the peak does not grow
EXCHANGES = 400  # peaks that the refinement may ask for
BRANCHES = 400  # and those that branch and bound may


@dataclass(frozen=True)
class Group:
    """Parameters that are updated together.

    `score` is their contribution and `own_bytes` those of their gradients and of the optimizer's
    state.
    """

    names: tuple[str, ...]
    score: float
    own_bytes: int


class Selection:
    """A search over sets of `groups`, in the order of the network, by the peak of each set in bytes."""

    def __init__(self, groups: Sequence[Group], peak_of: Callable[[Chosen], int]) -> None:
        self.groups = groups
        self.limit_bytes = 0
        self._peak_of = peak_of
        self._peaks: dict[Chosen, int] = {}

    def best(self, limit_bytes: int) -> Chosen:
        """The set of most contribution found; the empty set where no single group fits."""
        self.limit_bytes = limit_bytes
        starts = [self._by_density(), self._in_order(self._by_score()), self._in_order(self._from_top())]
        return self._bounded(self._refined(max(starts, key=self.score)))

    def score(self, chosen: Chosen) -> float:
        """The sum of contributions."""
        return sum(self.groups[i].score for i in sorted(chosen))

    def peak(self, chosen: Chosen) -> int:
        """The peak of a set, asked once."""
        if chosen not in self._peaks:
            self._peaks[chosen] = self._peak_of(chosen)
        return self._peaks[chosen]

    def _fits(self, chosen: Chosen) -> bool:
        return self.peak(chosen) <= self.limit_bytes

    def _by_density(self) -> Chosen:
        """Lazy greedy: the densities of a smaller set are asked again before they are believed."""
        chosen: Chosen = frozenset()
        heap = [(-self._density(chosen, i), i) for i in range(len(self.groups)) if self.groups[i].score]
        heapq.heapify(heap)
        waiting: list[int] = []
        while heap:
            _, i = heapq.heappop(heap)
            if not self._fits(chosen | {i}):
                waiting.append(i)
                continue
            density = self._density(chosen, i)
            if heap and density < -heap[0][0]:
                heapq.heappush(heap, (-density, i))
            else:
                chosen |= {i}
        return self._filled(chosen, waiting)

    def _density(self, chosen: Chosen, i: int) -> float:
        growth = max(0, self.peak(chosen | {i}) - self.peak(chosen))
        return self.groups[i].score / (growth + OWN_SHARE * self.groups[i].own_bytes + 1)

    def _by_score(self) -> list[int]:
        return sorted(range(len(self.groups)), key=lambda i: -self.groups[i].score)

    def _from_top(self) -> list[int]:
        return list(range(len(self.groups)))[::-1]

    def _in_order(self, order: Sequence[int]) -> Chosen:
        return self._filled(frozenset(), order)

    def _filled(self, chosen: Chosen, order: Sequence[int]) -> Chosen:
        """`chosen` and all of `order` that still fits, one after the other."""
        for i in order:
            if i not in chosen and self.groups[i].score and self._fits(chosen | {i}):
                chosen |= {i}
        return chosen

    def _refined(self, chosen: Chosen) -> Chosen:
        """Additions, and exchanges of one for a larger contribution, until none helps."""
        asked = len(self._peaks)
        improved = True
        while improved and len(self._peaks) - asked < EXCHANGES:
            improved = False
            chosen = self._filled(chosen, self._by_score())
            for i in self._by_score():
                if i in chosen or len(self._peaks) - asked >= EXCHANGES:
                    continue
                out = self._exchange(chosen, i)
                if out is not None:
                    chosen, improved = (chosen - {out}) | {i}, True
        return chosen

    def _exchange(self, chosen: Chosen, i: int) -> int | None:
        """The smallest contribution of `chosen` that makes room for the larger one of `i`."""
        lesser = [j for j in chosen if self.groups[j].score < self.groups[i].score]
        for j in sorted(lesser, key=lambda j: self.groups[j].score):
            if self._fits((chosen - {j}) | {i}):
                return j
        return None

    def _bounded(self, best: Chosen) -> Chosen:
        """The optimum, or the best set met until it gives up; a superset is taken to need no less."""
        order = [i for i in self._by_score() if self.groups[i].score]
        rest = [0.0, *accumulate(self.groups[i].score for i in reversed(order))][::-1]
        asked, most = len(self._peaks), self.score(best)
        stack: list[tuple[int, Chosen]] = [(0, frozenset())]
        while stack and len(self._peaks) - asked < BRANCHES:
            depth, chosen = stack.pop()
            score = self.score(chosen)
            if score > most:
                best, most = chosen, score
            if depth < len(order) and score + rest[depth] > most:
                stack.append((depth + 1, chosen))
                with_next = chosen | {order[depth]}
                if self._fits(with_next):
                    stack.append((depth + 1, with_next))
        return best
