"""Which blocks of a stack stay in memory and how many slots the others share: the fastest that fits.

Candidates have as many blocks resident as fit beside the slots, and those that are loaded evenly spread
over the time of a step; then single blocks change places. All are ranked by simulating steps in a row
(`graphopt.cost_models.layer_pipeline`). The search ends when the time is at its lower bound.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.layer_pipeline import LayerCosts, Pipeline, simulated
from graphopt.errors import PlanError

_SAME = 1e-6  # of the time: what is no faster by more than that is as fast
_OFFSETS = 4  # ways to spread the loaded blocks evenly
_TRIALS = 160  # exchanges that are tried at most, for each of the `_STARTS` best candidates
_STARTS = 3


@dataclass(frozen=True, eq=False)
class PipelineChoice:
    """The best pipeline found, the lower bound of a step in seconds, and how many were simulated."""

    pipeline: Pipeline
    bound_seconds: float
    tried: int


class _Search:
    """The simulations so far, each choice once."""

    def __init__(self, costs: LayerCosts, memory_bytes: int) -> None:
        self.costs, self.memory_bytes = costs, memory_bytes
        self.known: dict[tuple[frozenset[int], int], Pipeline] = {}

    def fits(self, resident: frozenset[int], slots: int) -> bool:
        return self.costs.peak_bytes(resident, slots) <= self.memory_bytes

    def bound(self, slots: int | None) -> float:
        return self.costs.bound_seconds(self.memory_bytes, slots)

    def add(self, resident: frozenset[int], slots: int) -> Pipeline:
        if (resident, slots) not in self.known:
            self.known[resident, slots] = simulated(self.costs, resident, slots)
        return self.known[resident, slots]

    def best(self, count: int = 1) -> list[Pipeline]:
        """The fastest; among equals those of fewer slots, then of less memory, first."""

        def key(found: Pipeline) -> tuple[float, int, int]:
            unit = _SAME * max(self.costs.step_seconds, 1e-9)
            peak = self.costs.peak_bytes(found.resident, found.slots)
            return round(found.seconds / unit), found.slots, peak

        return sorted(self.known.values(), key=key)[:count]


def choose_pipeline(costs: LayerCosts, memory_bytes: int, seed: int = 0) -> PipelineChoice:
    """The pipeline of least seconds within `memory_bytes`; the same for the same arguments.

    PlanError with `reachable_bytes` where not even one slot and nothing resident fit.
    """
    count = len(costs.block_bytes)
    search = _Search(costs, memory_bytes)
    bound = search.bound(None)
    if search.fits(frozenset(range(count)), 0):
        return PipelineChoice(search.add(frozenset(range(count)), 0), bound, 1)
    if not search.fits(frozenset(), 1):
        least = costs.peak_bytes(frozenset(), 1)
        raise PlanError(
            f"no pipeline fits {format_bytes(memory_bytes)}: with one block in memory at a time the peak "
            f"is {format_bytes(least)} ({least} bytes)",
            reachable_bytes=least,
            budget_bytes=memory_bytes,
        )
    for slots in range(1, count + 1):
        if search.known and search.best()[0].seconds <= search.bound(slots) * (1 + _SAME):
            continue  # no faster, and with more slots
        for resident in _spread(search, slots):
            search.add(resident, slots)
    random = np.random.default_rng(seed)
    for start in search.best(_STARTS):
        _improve(search, start, random)
    return PipelineChoice(search.best()[0], bound, len(search.known))


def _spread(search: _Search, slots: int) -> Iterator[frozenset[int]]:
    """For a number of slots, as few loaded blocks as fit: evenly spread, first, last, or by size."""
    count = len(search.costs.block_bytes)
    seen: set[frozenset[int]] = set()
    for offset in range(_OFFSETS + 2):
        for loaded in range(slots, count + 1):
            resident = _resident(search.costs, loaded, offset)
            if search.fits(resident, slots):
                seen.add(_filled(search, resident, slots))
                break
    sizes = search.costs.block_bytes
    for order in (sorted(range(count), key=lambda i: s * sizes[i]) for s in (1, -1)):
        seen.add(_filled(search, frozenset(), slots, order))
    yield from sorted((found for found in seen if search.fits(found, slots)), key=sorted)


def _filled(
    search: _Search, resident: frozenset[int], slots: int, order: Sequence[int] | None = None
) -> frozenset[int]:
    """`resident` with more blocks, by load or in `order`, while that fits and every slot is needed."""
    loads = search.costs.load_seconds
    for block in order or sorted(range(len(loads)), key=lambda i: -loads[i]):
        more = resident | {block}
        if len(loads) - len(more) >= slots and search.fits(more, slots):
            resident = more
    return resident


def _resident(costs: LayerCosts, loaded: int, offset: int) -> frozenset[int]:
    """All blocks but `loaded` ones: the first, the last, or those at equal distances in time."""
    count = len(costs.block_bytes)
    if offset >= _OFFSETS:
        return frozenset(range(loaded, count) if offset == _OFFSETS else range(count - loaded))
    begins = np.concatenate([[0.0], np.cumsum(costs.compute_seconds)])[:-1]
    wanted = (np.arange(loaded) + offset / _OFFSETS) / loaded * costs.step_seconds
    free, chosen = set(range(count)), set[int]()
    for moment in wanted:
        nearest = min(free, key=lambda i: (abs(begins[i] - moment), i))
        free.remove(nearest)
        chosen.add(nearest)
    return frozenset(range(count)) - chosen


def _improve(search: _Search, start: Pipeline, random: np.random.Generator) -> None:
    """Exchange a resident and a loaded block while that is faster, in a random order."""
    best, tried, slots = start, 0, start.slots
    enough = max(search.bound(slots), search.bound(None)) * (1 + _SAME)
    is_better = True
    while is_better and best.seconds > enough and search.best()[0].seconds > enough:
        is_better = False
        pairs = [*itertools.product(sorted(best.resident), search.costs.streamed(best.resident))]
        random.shuffle(pairs)
        for out, into in pairs:
            resident = best.resident - {out} | {into}
            if not search.fits(resident, slots):
                continue
            resident = _filled(search, resident, slots)
            tried += 1
            if tried > _TRIALS:
                return
            found = search.add(resident, slots)
            if found.seconds < best.seconds * (1 - _SAME):
                best, is_better = found, True
                break
