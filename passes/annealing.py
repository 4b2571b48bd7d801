"""Labels changed at random, with repairs: what no change of one label at a time finds.

Simulated annealing (Kirkpatrick, Gelatt and Vecchi, Science 220, 1983). Where memory is tightest hardly
any label can change alone. So a change that takes too much memory is followed by repairs: of what only
waits at the peak, something is made again instead of kept, or forgotten meanwhile and made again later.
"""

from collections import defaultdict
from dataclasses import dataclass, replace

import numpy as np

from graphopt.cost_models.fast_schedule import Profile
from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.passes.chain_solver import Choice
from graphopt.passes.label_search import Found, LabelSearch
from graphopt.passes.segments import deep_reads

WORK = 4_000_000  # steps of backwards that may be simulated
CALL = 200  # as many steps is taken to be what a simulation takes beside its own
RUNS = 100  # for each value that may change, at each temperature
HEATS = (0.1, 0.03, 0.01)  # of the step's seconds: the temperatures that annealing begins at, in turn
REPAIRS = 6  # of one change, at most
_EPSILON = 1e-12


def annealed(search: LabelSearch, best: Found) -> Found:
    """`best`, or a choice with less recomputation that fits."""
    search.left = WORK
    annealing = _Annealing(search, best)
    if annealing.values.size and best.seconds > 0:
        for number, heat in enumerate(HEATS):
            work = search.left // (len(HEATS) - number)
            annealing.cool(heat, work)
    return annealing.best


@dataclass(frozen=True)
class _Labels:
    """Which values are kept, and which are made for each use, bool[2, values]; and what is forgotten.

    `forget` are pairs of a place in the order of the backward and a value, as place * values + value.
    """

    masks: np.ndarray
    forget: frozenset[int]

    @staticmethod
    def of(search: LabelSearch, choice: Choice) -> "_Labels":
        count = len(search.flow.values)
        masks = np.zeros((2, count), np.bool_)
        masks[0, list(choice.keep)] = masks[1, list(choice.ephemeral)] = True
        pairs = ((search.place_of[a], v) for a, values in choice.forget for v in values)
        return _Labels(masks, frozenset(place * count + value for place, value in pairs))

    def changed(self, value: int, label: int, *, forgets: bool = True) -> "_Labels":
        """`value` kept (0), made for each use (1) or once (2); and never forgotten, unless `forgets`."""
        masks = self.masks.copy()
        masks[:, value] = label == 0, label == 1
        count = masks.shape[1]
        forget = self.forget if forgets else frozenset(f for f in self.forget if f % count != value)
        return _Labels(masks, forget)

    def forgetting(self, place: int, value: int) -> "_Labels":
        return replace(self, forget=self.forget | {place * self.masks.shape[1] + value})

    def pairs(self) -> np.ndarray:
        """Places, rising, and values; int64[2, n]."""
        sorted_ = np.sort(np.fromiter(self.forget, np.int64, len(self.forget)))
        return np.stack(np.divmod(sorted_, self.masks.shape[1]))

    def choice(self, like: Choice) -> Choice:
        keep, ephemeral = (frozenset(np.flatnonzero(mask).tolist()) for mask in self.masks)
        forget: dict[int, list[int]] = defaultdict(list)
        for place, value in self.pairs().T.tolist():
            forget[like.order[place]].append(value)
        pairs = tuple((anchor, tuple(values)) for anchor, values in forget.items())
        return replace(like, keep=keep, ephemeral=ephemeral, forget=pairs)


class _Annealing:
    """The best choice so far, and the values that may change."""

    def __init__(self, search: LabelSearch, best: Found) -> None:
        self.search, self.best = search, best
        self.random = np.random.default_rng(0)
        flow = search.flow
        read = {v for values in deep_reads(flow, best.choice.order) for v in values}
        self.values = np.array(sorted(v for v in read if _can_change(flow, v)), np.int64)
        self.may_change = np.zeros(len(flow.values), np.bool_)
        self.may_change[self.values] = True

    def cool(self, heat: float, work: int) -> None:
        """Anneal from the best choice: also to what takes more time, the less so the later."""
        search, end = self.search, self.search.left - work
        labels, now = _Labels.of(search, self.best.choice), self.best.seconds
        heat *= sum(o.seconds for o in search.flow.operators)
        runs = RUNS * len(self.values)
        for number in range(runs):
            if search.left <= end:
                break
            progress = max(number / runs, 1 - (search.left - end) / work)
            allowed = now - heat * (1 - progress) ** 2 * np.log(self.random.random())
            found = self._repaired(self._changed(labels), allowed)
            if found is None:
                continue
            labels, profile = found
            now = profile.seconds
            if now < self.best.seconds - _EPSILON:
                whole = Found(labels.choice(self.best.choice), profile)
                self.best = search.accepted(whole) or self.best

    def _changed(self, labels: _Labels) -> _Labels:
        """A few labels changed at random."""
        for _ in range(self._below(3) + 1):
            value = int(self.values[self._below(len(self.values))])
            labels = labels.changed(value, self._below(3), forgets=self._below(2) == 1)
        return labels

    def _below(self, count: int) -> int:
        """A number from 0 to before `count`."""
        return int(self.random.random() * count)

    def _repaired(self, labels: _Labels, allowed: float) -> tuple[_Labels, Profile] | None:
        """`labels` with so much made again that they fit; None where that takes longer than `allowed`."""
        for _ in range(REPAIRS):
            profile = self._run(labels)
            if profile.seconds > allowed:
                return None
            if profile.peak_bytes <= self.search.limit:
                fits = self.search.fast.forward_peak(profile.kept) <= self.search.limit
                return (labels, profile) if fits else None
            repaired = self._lowered(labels, profile)
            if repaired is None:
                return None
            labels = repaired
        return None

    def _run(self, labels: _Labels) -> Profile:
        search = self.search
        keep, ephemeral = labels.masks
        profile = search.fast.run(keep, ephemeral, search.order, labels.pairs())
        search.left -= len(profile.operators) + CALL
        return profile

    def _lowered(self, labels: _Labels, profile: Profile) -> _Labels | None:
        """One value given up that only waits at the peak, at random; None where there is none."""
        fast, peak = self.search.fast, int(profile.during.argmax())
        idle = fast.idle(profile, peak)
        place = int(fast.arrays.anchored[profile.operators[:peak]].sum())
        is_kept = labels.masks[0]
        waiting = (idle > -2) & self.may_change & (fast.arrays.nbytes > 0)
        options = np.flatnonzero(waiting & (is_kept | ((idle >= 0) & (idle < place))))
        if not options.size:
            return None
        value = int(options[self._below(len(options))])
        can_forget = 0 <= idle[value] < place
        if is_kept[value] and not (can_forget and self._below(2)):
            return labels.changed(value, 1 + self._below(2))
        return labels.forgetting(int(idle[value]), value)


def _can_change(flow: Dataflow, value: int) -> bool:
    producer = flow.values[value].producer
    if producer == NO_PRODUCER:
        return False
    operator = flow.operators[producer]
    return operator.recomputable and not operator.backward
