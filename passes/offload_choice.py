"""Which saved values are offloaded: enough of them for the memory, in the least time of the step.

Values that are idle where memory is highest are added one by one, then those that are not needed are
taken out again, and single ones exchanged. Few values are tried in all subsets. Values made early are
idle for longest, so that their transfers hide best: Beaumont et al., "Efficient Combination of
Rematerialization and Offloading for Training DNNs", NeurIPS 2021, offload in that order, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from graphopt.passes.offload_schedule import Candidate, OffloadProblem, Transfers

FEW = 7  # values of which all subsets are tried
EXCHANGES = 60  # simulations that exchanges may take
Key = Callable[[OffloadProblem, Candidate], float]
_KEYS: tuple[Key, ...] = (
    lambda problem, c: problem.idle_seconds(c),
    lambda problem, c: problem.idle_seconds(c) * c.nbytes,
    lambda problem, c: c.nbytes,
)


@dataclass(frozen=True)
class OffloadChoice:
    """What is offloaded, and when."""

    offloaded: tuple[Candidate, ...]
    transfers: Transfers


def least_bytes(problem: OffloadProblem) -> int:
    """The lowest peak by offloading, static bytes excluded."""
    return int(problem.heights(problem.candidates).max(initial=0))


def choose_offloads(problem: OffloadProblem, room: int) -> OffloadChoice | None:
    """The quickest found within `room` bytes, static ones excluded; None: there is none."""
    if (nothing := _choice(problem, (), room)) is not None:
        return nothing
    if least_bytes(problem) > room:
        return None
    if len(problem.candidates) <= FEW:
        sizes = range(1, len(problem.candidates) + 1)
        return _quickest(problem, [s for n in sizes for s in combinations(problem.candidates, n)], room)
    found = _quickest(problem, [_pruned(problem, _added(problem, room, k), room) for k in _KEYS], room)
    return None if found is None else _exchanged(problem, found, room)


def _choice(problem: OffloadProblem, offloaded: Sequence[Candidate], room: int) -> OffloadChoice | None:
    transfers = problem.scheduled(offloaded, room)
    return None if transfers is None else OffloadChoice(tuple(offloaded), transfers)


def _quickest(
    problem: OffloadProblem, subsets: Sequence[Sequence[Candidate]], room: int
) -> OffloadChoice | None:
    found = (_choice(problem, subset, room) for subset in subsets)
    return min((c for c in found if c is not None), key=_cost, default=None)


def _cost(choice: OffloadChoice) -> tuple[float, int]:
    return choice.transfers.seconds, sum(c.nbytes for c in choice.offloaded)


def _added(problem: OffloadProblem, room: int, key: Key) -> list[Candidate]:
    """Values by `key`, each idle at the highest place when it was added, until the rest fits."""
    rest = sorted(problem.candidates, key=lambda c: -key(problem, c))
    taken: list[Candidate] = []
    while True:
        heights = problem.heights(taken)
        over = int(heights.max(initial=0)) - room
        top = int(heights.argmax())
        idle = [c for c in rest if c.last < top < c.first]
        if over <= 0 or not idle:
            return taken
        for candidate in idle:  # that many are needed here, whatever else is
            taken.append(candidate)
            rest.remove(candidate)
            over -= candidate.nbytes
            if over <= 0:
                break


def _pruned(problem: OffloadProblem, taken: Sequence[Candidate], room: int) -> tuple[Candidate, ...]:
    """Without those that are not needed, the least idle first."""
    kept = list(taken)
    for candidate in sorted(taken, key=problem.idle_seconds):
        fewer = [c for c in kept if c is not candidate]
        if problem.heights(fewer).max(initial=0) <= room:
            kept = fewer
    return tuple(kept)


def _exchanged(problem: OffloadProblem, best: OffloadChoice, room: int) -> OffloadChoice:
    """Better by exchanges of one value for another, the ones that are idle shortest for longer ones."""
    compute = float(problem.begins[-1])
    tries = EXCHANGES
    for candidate in sorted(best.offloaded, key=problem.idle_seconds):
        if best.transfers.seconds <= compute:
            break
        others = [c for c in problem.candidates if c not in best.offloaded]
        for other in sorted(others, key=problem.idle_seconds, reverse=True):
            if tries == 0 or problem.idle_seconds(other) <= problem.idle_seconds(candidate):
                break
            tries -= 1
            subset = [other if c is candidate else c for c in best.offloaded]
            found = _choice(problem, subset, room)
            if found is not None and _cost(found) < _cost(best):
                best = found
                break
    return best
