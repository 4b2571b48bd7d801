"""Checkpoint subsets of a chain of states: the published problem, its revision, and two baselines.

A chain makes the states x_1 .. x_n one from another; x_0, the input, is always there. A subset of
them, the checkpoints, stays from the forward; the backward goes through the segments between them
from the last to the first, and makes the states of each again from the checkpoint before it. Which
subset gives the least peak is the problem of Hong, Tsai, Wang, Liu and Wu, "GPU Memory Usage
Optimization for Backward Propagation in Deep Network Training", arXiv 2502.12499.

Of that paper the abstract is known to us, and its first objective from a review: a dynamic programme
in O(n^3) for it, then "a more accurate description" with an objective "revised based on the tracing"
and an algorithm in O(n). The recurrences, the pruning, the revised objective and the O(n) pass below
are our own derivations for those statements; they may differ from the paper's text.

Only the bytes of states, and of gradients and workspace where given, are counted. The forward's own
working set (two neighbours beside the checkpoints so far) is not: neither objective has it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.compiled import compiled
from graphopt.errors import PlanError


@dataclass(frozen=True, eq=False)
class StateChain:
    """A chain of n states; operator t makes x_t from x_(t-1), operator n+1 is the loss.

    `sizes`: bytes of x_1 .. x_n, shape (n,). `gradients`: bytes of the gradients of x_0 .. x_n, shape
    (n+1,). `workspace`: what the backwards of the operators 1 .. n+1 need while they run, in bytes, shape
    (n+1,); an operator whose backward reads its result counts that here. `seconds`: of the operators
    1 .. n, shape (n,). What is None is zero.
    """

    sizes: np.ndarray
    gradients: np.ndarray | None = None
    workspace: np.ndarray | None = None
    seconds: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.sizes)
        for name, array, length in (
            ("sizes", self.sizes, n),
            ("gradients", self.gradients, n + 1),
            ("workspace", self.workspace, n + 1),
            ("seconds", self.seconds, n),
        ):
            if array is not None and (array.shape != (length,) or (array < 0).any()):
                raise PlanError(f"{name} of a chain of {n} states: {length} numbers, none negative")

    def __len__(self) -> int:
        return len(self.sizes)

    def prefix(self) -> np.ndarray:
        """D_0 .. D_n, the bytes of the states up to each, shape (n+1,)."""
        return np.concatenate(([0], np.cumsum(self.sizes, dtype=np.int64)))

    def extents(self) -> np.ndarray:
        """E_1 .. E_(n+1), shape (n+1,): E_t - D_i bytes are alive in the backward of operator t.

        That is beside the checkpoints up to x_i, where x_i is the last one before x_t: the states from
        x_(i+1) to x_(t-1), the gradients of x_t and x_(t-1), and the workspace.
        """
        found = self.prefix()
        if self.gradients is not None:
            after = np.append(self.gradients[1:], 0)
            found = found + self.gradients.astype(np.int64) + after.astype(np.int64)
        if self.workspace is not None:
            found = found + self.workspace.astype(np.int64)
        return found


@dataclass(frozen=True)
class Selection:
    """Checkpoints (numbers from 1 to n, rising) and what they cost.

    `objective_bytes` is what the solver minimised, `peak_bytes` the `true_peak`. `recompute_seconds`
    counts each state once that is made again; the last segment is not, its backward comes first.
    """

    checkpoints: tuple[int, ...]
    objective_bytes: int
    peak_bytes: int
    recompute_seconds: float


def true_peak(chain: StateChain, checkpoints: Sequence[int]) -> int:
    """Bytes alive at the worst moment of the backward: objective B, with gradients where given.

    While a segment is worked on, the checkpoints after it are consumed. With the checkpoints
    c_1 < .. < c_m, c_0 = 0 and c_(m+1) = n+1, this is the maximum over k of d_(c_1) + .. + d_(c_k) and
    the bytes of the states strictly between c_k and c_(k+1). Derived by us.

    >>> true_peak(StateChain(np.array([4, 1, 4, 1, 4])), (2, 4))
    6
    """
    cuts, prefix = np.array((0, *checkpoints)), chain.prefix()
    held = np.cumsum(np.diff(prefix, prepend=0)[cuts])
    return int((held + np.maximum.reduceat(chain.extents(), cuts) - prefix[cuts]).max())


def first_objective(chain: StateChain, checkpoints: Sequence[int]) -> int:
    """All checkpoints and the heaviest segment, in bytes: objective A of arXiv 2502.12499.

    It is an upper bound of what is alive, as though every checkpoint stayed to the end.

    >>> first_objective(StateChain(np.array([4, 1, 4, 1, 4])), (2, 4))
    6
    """
    prefix = chain.prefix()
    cuts = np.array((0, *checkpoints, len(chain) + 1))
    segments = prefix[cuts[1:] - 1] - prefix[cuts[:-1]]
    return int(np.sum(chain.sizes[cuts[1:-1] - 1]) + segments.max())


def dp(chain: StateChain) -> Selection:
    """The subset of the least objective A, in O(n^3) at worst; gradients and workspace do not count.

    For a bound M on the heaviest segment the least weight of checkpoints g(j) = d_j + min g(i), over
    i < j with no more than M bytes between, takes O(n) with a queue; the best M is one of the O(n^2)
    sums of adjacent sizes. As the weight never rises with M, a range of bounds whose lowest, with the
    weight at its highest, is no better than the best so far is passed over. The complexity is the
    paper's (abstract), recurrence and pruning are ours.
    """
    prefix = chain.prefix()
    count = len(chain)
    ends = (prefix[j - 1] - prefix[:j] for j in range(1, count + 2))
    bounds = np.unique(np.concatenate(list(ends)))
    weight = compiled(_least_weight)
    bound = compiled(_best_bound)(prefix, bounds, weight)
    origin = np.empty(count + 2, np.int64)
    weight(prefix, bound, np.empty(count + 2, np.int64), np.empty(count + 2, np.int64), origin)
    checkpoints = _trail(origin)
    return _selection(chain, checkpoints, first_objective(chain, checkpoints))


def linear(chain: StateChain) -> Selection:
    """The subset of the least true peak (objective B), in O(n) for each of O(log) budgets tried.

    The budget is bisected; a budget that fails moves the lower end up to the next one at which the pass
    differs, one that fits moves the upper end down to the peak found. See `linear_within` for the pass.

    >>> linear(StateChain(np.ones(16, dtype=int))).peak_bytes
    5
    """
    prefix, extents = chain.prefix(), chain.extents()
    origin = np.empty(len(chain) + 2, np.int64)
    high = sqrt(chain).peak_bytes
    budget = compiled(_least_budget)(prefix, extents, high, origin, compiled(_least_held))
    compiled(_least_held)(prefix, extents, budget, origin, *_rows(len(chain)))
    return _selection(chain, _trail(origin), int(budget))


def linear_within(chain: StateChain, budget_bytes: int) -> Selection | None:
    """A subset whose true peak is at most `budget_bytes`, with the least held bytes; None: there is none.

    One pass in O(n). The least held bytes with a checkpoint at j are h(j) = d_j + min h(i), over the
    i < j with h(i) + E_t - D_i <= budget for every t from i+1 to j. An i that fails once has failed for
    good. Among the i that have not, h(i) - D_i never rises with i: h(j) - D_j = m - D_(j-1), where m is
    the least of their h, and m - (h(i) - d_i) <= d_i <= D_(j-1) - D_(i-1). So those that fail are the
    oldest, a newer i with no larger h replaces an older one, and a queue does. Derived by us; the
    abstract of arXiv 2502.12499 states O(n) for a revised objective that we know no more of.
    `objective_bytes` are the held bytes.
    """
    prefix, extents = chain.prefix(), chain.extents()
    origin = np.empty(len(chain) + 2, np.int64)
    held, _ = compiled(_least_held)(prefix, extents, budget_bytes, origin, *_rows(len(chain)))
    return None if held < 0 else _selection(chain, _trail(origin), int(held))


def sqrt(chain: StateChain) -> Selection:
    """Equal segments, sqrt(n) of them whatever the sizes: Chen et al., 2016, section 4.1.

    >>> sqrt(StateChain(np.ones(100, dtype=int))).peak_bytes
    18
    """
    segments = max(1, round(math.sqrt(len(chain))))
    places = {round(k * (len(chain) + 1) / segments) for k in range(1, segments)}
    checkpoints = tuple(sorted(places))
    return _selection(chain, checkpoints, true_peak(chain, checkpoints))


def periodic(chain: StateChain) -> Selection:
    """Every k-th state, with the k of the least true peak.

    Without gradients and workspace the peaks of all k take O(n log n) together; they bound those with
    them from below, and only a k that may be better is looked at in full.
    """
    bounds = compiled(_periodic_peaks)(chain.prefix())
    best: tuple[int, int] | None = None
    for index in np.argsort(bounds, kind="stable"):
        if best is not None and bounds[index] >= best[0]:
            break
        step = int(index) + 1
        peak = true_peak(chain, range(step, len(chain) + 1, step))
        best = (peak, step) if best is None or peak < best[0] else best
    assert best is not None  # there is at least the period without any checkpoint
    return _selection(chain, tuple(range(best[1], len(chain) + 1, best[1])), best[0])


def _selection(chain: StateChain, checkpoints: tuple[int, ...], objective: int) -> Selection:
    seconds = 0.0
    if chain.seconds is not None and checkpoints:
        again = np.ones(checkpoints[-1], dtype=bool)
        again[np.array(checkpoints) - 1] = False
        seconds = float(chain.seconds[: checkpoints[-1]][again].sum())
    return Selection(checkpoints, objective, true_peak(chain, checkpoints), seconds)


def _trail(origin: np.ndarray) -> tuple[int, ...]:
    """The checkpoints, from the predecessors of each: shape (n+2,), the last entry is the end."""
    found = []
    place = int(origin[-1])
    while place > 0:
        found.append(place)
        place = int(origin[place])
    return tuple(reversed(found))


def _rows(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.empty(count + 2, np.int64), np.empty(count + 2, np.int64)


# --- compiled: `held`, `queue` and `origin` have n+2 entries -------------------------------------


def _least_weight(prefix: Any, bound: Any, weight: Any, queue: Any, origin: Any) -> Any:
    """The least weight of checkpoints between which at most `bound` bytes lie."""
    count = len(prefix) - 1
    weight[0], queue[0] = 0, 0
    head, tail = 0, 1
    for j in range(1, count + 2):
        while prefix[j - 1] - prefix[queue[head]] > bound:
            head += 1
        origin[j] = queue[head]
        size = prefix[j] - prefix[j - 1] if j <= count else 0
        weight[j] = weight[queue[head]] + size
        while tail > head and weight[queue[tail - 1]] >= weight[j]:
            tail -= 1
        queue[tail] = j
        tail += 1
    return weight[count + 1]


def _best_bound(prefix: Any, bounds: Any, least_weight: Any) -> Any:
    """The bound that with its least weight is lowest; `bounds` rise, and weights fall with them."""
    rows = len(prefix) + 1
    weight, queue = np.empty(rows, np.int64), np.empty(rows, np.int64)
    origin = np.empty(rows, np.int64)
    found = np.empty(len(bounds), np.int64)
    last = len(bounds) - 1
    best, at = np.int64(-1), 0
    stack = [(-1, -1), (0, last)]
    for k in (0, last):
        found[k] = least_weight(prefix, bounds[k], weight, queue, origin)
        if best < 0 or bounds[k] + found[k] < best:
            best, at = bounds[k] + found[k], k
    while len(stack) > 1:
        low, high = stack.pop()
        if high - low < 2 or bounds[low + 1] + found[high] >= best:
            continue
        middle = (low + high) // 2
        found[middle] = least_weight(prefix, bounds[middle], weight, queue, origin)
        if bounds[middle] + found[middle] < best:
            best, at = bounds[middle] + found[middle], middle
        stack.append((middle, high))
        stack.append((low, middle))
    return bounds[at]


def _least_held(prefix: Any, extents: Any, budget: Any, origin: Any, held: Any, queue: Any) -> Any:
    """The least bytes of checkpoints under `budget` (-1: it is too small), and the next budget to try."""
    count = len(prefix) - 1
    held[0], queue[0] = 0, 0
    head, tail = 0, 1
    least_failed = np.int64(2**62)
    for j in range(1, count + 2):
        while head < tail:
            alive = held[queue[head]] + extents[j - 1] - prefix[queue[head]]
            if alive <= budget:
                break
            least_failed = min(least_failed, alive)
            head += 1
        if head == tail:
            return np.int64(-1), least_failed
        origin[j] = queue[head]
        held[j] = held[queue[head]] + (prefix[j] - prefix[j - 1] if j <= count else 0)
        while tail > head and held[queue[tail - 1]] >= held[j]:
            tail -= 1
        queue[tail] = j
        tail += 1
    return held[count + 1], least_failed


def _least_budget(prefix: Any, extents: Any, high: Any, origin: Any, least_held: Any) -> Any:
    """The least budget for which there are checkpoints; there are some for `high`."""
    rows = len(prefix) + 1
    held, queue = np.empty(rows, np.int64), np.empty(rows, np.int64)
    low = np.int64(0)
    while low < high:
        middle = (low + high) // 2
        found, least_failed = least_held(prefix, extents, middle, origin, held, queue)
        if found < 0:
            low = max(middle + 1, least_failed)
            continue
        high, stop, start = np.int64(0), rows - 1, origin[rows - 1]
        while True:
            alive = held[start] - prefix[start] + extents[start:stop].max()
            high = max(high, alive)
            if start == 0:
                break
            stop, start = start, origin[start]
    return high


def _periodic_peaks(prefix: Any) -> Any:
    """The peak with every k-th state as a checkpoint, k from 1 to n+1; shape (n+1,)."""
    count = len(prefix) - 1
    peaks = np.empty(count + 1, np.int64)
    for step in range(1, count + 2):
        held, peak, start = np.int64(0), np.int64(0), 0
        while start <= count:
            stop = min(start + step, count + 1)
            peak = max(peak, held + prefix[stop - 1] - prefix[start])
            start = stop
            if start <= count:
                held += prefix[start] - prefix[start - 1]
        peaks[step - 1] = peak
    return peaks
