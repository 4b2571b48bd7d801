"""What can be done with one span: its Pareto set of kept bytes, peak of its backward, and time.

Candidates come from thresholds on what a byte saved costs to recompute, and from coordinate descent
on weighted sums of the three; every candidate is simulated. The order of the span's backward is
searched for the lowest peak, and then the labels again under the new order.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from graphopt.cost_models.fast_schedule import FastBackward, Profile
from graphopt.cost_models.schedule import Step, anchors, simulate
from graphopt.passes.backward_order import Order, Precedence, lower_order
from graphopt.passes.local_problem import LocalProblem

SMALL = 0.004  # a value below this share of the span's largest is kept without being considered
THRESHOLDS = 7
SIMULATED_STEPS = 60_000  # bounds the work of the search on one span
ORDERING_STEPS = 40_000  # the same for the order of its backward
WEIGHTS = (
    (0.0, 0.1),
    (0.1, 0.1),
    (0.0, 1.0),
    (0.3, 0.3),
    (1.0, 1.0),
    (0.3, 3.0),
    (3.0, 3.0),
    (9.0, 9.0),
)


@dataclass(frozen=True)
class Option:
    """One way to treat a span; values are the local problem's.

    `kept_bytes` stay from the forward of the span to its backward; `backward_bytes` and
    `forward_bytes` are the peaks of its two parts, its borders excluded; `seconds` and `flops` are
    what it recomputes. A kept value stays, an ephemeral one is recomputed for each use. `order` is
    that of the operators of the backward that run once.
    """

    keep: frozenset[int]
    ephemeral: frozenset[int]
    order: Order
    kept_bytes: int
    backward_bytes: int
    forward_bytes: int
    seconds: float
    flops: int


Labels = tuple[frozenset[int], frozenset[int], Order]  # kept, recomputed for each use, order


@dataclass(frozen=True)
class Freedom:
    """What a search may do: make values ephemeral (`repeat`), change the backward's order (`reorder`)."""

    repeat: bool = True
    reorder: bool = True


ANY = Freedom()


def options(
    problem: LocalProblem, freedom: Freedom = ANY, seeds: Iterable[Labels] = ()
) -> tuple[Option, ...]:
    """The options of `problem` that none other beats in kept bytes, peak and time at once.

    The search also starts from `seeds`.
    """
    return _Search(problem, freedom).run(seeds)


def everything_kept(problem: LocalProblem) -> Option:
    """The option that recomputes nothing."""
    search = _Search(problem, ANY)
    keep = search._forward(search.asked.intersection(search.choices))
    found = search._try((keep, frozenset(), search.order))
    assert found is not None  # the first try is always within the work allowed
    return found


class _Search:
    def __init__(self, problem: LocalProblem, freedom: Freedom) -> None:
        self.problem = problem
        self.freedom = freedom
        self.flow = problem.flow
        self.order = tuple(anchors(problem.flow))
        self.found: dict[Labels, Option] = {}
        self.budget = SIMULATED_STEPS
        self.asked = {v for a in self.order for v in self.flow.operators[a].reads}
        self.choices = self._choices()
        self.always = problem.must_keep | self._small()
        self.density = {v: self._density(v) for v in self.choices}
        self.backward = _backward(problem)

    def run(self, seeds: Iterable[Labels]) -> tuple[Option, ...]:
        """Thresholds and seeds first, then descents from the best of what was found."""
        allowed = frozenset(self.choices)
        for keep, ephemeral, order in seeds:
            self._try((self._forward(keep & allowed), ephemeral & allowed - keep, order))
        for keep, ephemeral in self._threshold_choices():
            self._try((keep, ephemeral, self.order))
        if self.choices:
            for kept_weight, peak_weight in WEIGHTS:
                self._descend(kept_weight, peak_weight)
        if self.freedom.reorder and self.found:
            self._reorder()
        good = pareto(self.found.values())
        heights = {keep: forward_bytes(self.problem, keep) for keep in {o.keep for o in good}}
        return tuple(replace(o, forward_bytes=heights[o.keep]) for o in good)

    def _choices(self) -> list[int]:
        """Values made inside that could be recomputed, and are large enough to matter."""
        largest = max((v.nbytes for v in self.flow.values), default=0)
        return [
            i
            for i, v in enumerate(self.flow.values)
            if v.producer >= 0
            and v.nbytes > SMALL * largest
            and i not in self.problem.must_keep
            and not self.flow.operators[v.producer].anchored
            and (self.flow.operators[v.producer].block is None or i in self.asked)
        ]

    def _small(self) -> frozenset[int]:
        chosen = set(self.choices)
        return frozenset(
            i
            for i, v in enumerate(self.flow.values)
            if v.producer >= 0 and not self.flow.operators[v.producer].backward and i not in chosen
        )

    def _bytes(self, values: Iterable[int]) -> int:
        return sum(self.flow.values[v].nbytes for v in values)

    def _density(self, value: int) -> float:
        """Seconds to run the maker again, per byte that this frees."""
        made = self.flow.values[value]
        return self.flow.operators[made.producer].seconds / max(1, made.nbytes)

    def _forward(self, values: Iterable[int]) -> frozenset[int]:
        return frozenset(
            v for v in values if not self.flow.operators[self.flow.values[v].producer].backward
        )

    def _threshold_choices(self) -> Iterable[tuple[frozenset[int], frozenset[int]]]:
        ranked = sorted(set(self.density.values()))
        picks = sorted({round(i * (len(ranked) - 1) / THRESHOLDS) for i in range(THRESHOLDS + 1)})
        bars = [0.0, *(ranked[i] * (1 + 1e-9) for i in picks)] if ranked else [0.0]
        yield self._forward(self.asked.intersection(self.choices)), frozenset()
        for bar in bars:
            keep = self._forward(v for v in self.choices if self.density[v] >= bar)
            yield keep, frozenset()
            for below in bars:
                if below > 0 and self.freedom.repeat:
                    rest = frozenset(self.choices) - keep
                    yield keep, frozenset(v for v in rest if self.density[v] <= below)

    def _simulated(self, labels: Labels) -> Profile:
        keep, ephemeral, order = labels
        profile = self.backward.run(keep | self.always, ephemeral, order)
        self.budget -= len(profile.operators)
        return profile

    def _try(self, labels: Labels) -> Option | None:
        if labels[1] and not self.freedom.repeat:
            return None
        if labels in self.found:
            return self.found[labels]
        if self.budget < 0:
            return None
        option = _option(self.problem, self._simulated(labels), labels)
        self.found[labels] = option
        return option

    def _reorder(self) -> None:
        """Better orders for the options of the lowest peak; then every good option under them."""
        spared, self.budget = self.budget, ORDERING_STEPS
        precedence = Precedence.of(self.flow)
        orders = {self.order}
        good = pareto(self.found.values())
        for wish in (_peak_bytes, _all_bytes):
            option = min(good, key=wish)
            orders.add(self._lower_order(option, option.ephemeral, precedence))
            if self.freedom.repeat:
                orders.add(self._lower_order(option, frozenset(self.choices) - option.keep, precedence))
        self.budget = max(0, self.budget) + max(0, spared)
        for order in orders - {self.order}:
            for option in good:
                self._try((option.keep & frozenset(self.choices), option.ephemeral, order))
        if len(orders) > 1 and self.choices:
            for kept_weight, peak_weight in WEIGHTS:
                self._descend(kept_weight, peak_weight)

    def _lower_order(self, option: Option, ephemeral: frozenset[int], precedence: Precedence) -> Order:
        keep = option.keep & frozenset(self.choices)

        def run(order: Order) -> Profile | None:
            return None if self.budget < 0 else self._simulated((keep, ephemeral, order))

        return lower_order(option.order, precedence, run)

    def _descend(self, kept_weight: float, peak_weight: float) -> None:
        """Coordinate descent on seconds + weighted kept bytes + weighted peak, one label at a time."""
        total = sum(self.flow.operators[i].seconds for i in self.flow.forward)
        unit = total / max(1, self._bytes(self.choices))

        def value(option: Option) -> float:
            weighted = kept_weight * option.kept_bytes + peak_weight * option.backward_bytes
            return option.seconds + unit * weighted

        best = min(self.found.values(), key=value)
        improved = True
        while improved and self.budget > 0:
            improved = False
            for choice in self.choices:
                for keep, ephemeral in _relabelled(best, choice, self._is_forward(choice)):
                    option = self._try((keep & frozenset(self.choices), ephemeral, best.order))
                    if option is not None and value(option) < value(best) * (1 - 1e-9):
                        best, improved = option, True

    def _is_forward(self, value: int) -> bool:
        return not self.flow.operators[self.flow.values[value].producer].backward


def forward_bytes(problem: LocalProblem, keep: frozenset[int]) -> int:
    """The peak of the forward that keeps `keep`, borders excluded."""
    steps = [Step(i, problem.flow.operators[i].writes) for i in problem.flow.forward]
    end = problem.borders | problem.leaving_forward | keep
    timeline = simulate(problem.flow, steps, problem.borders, end)
    return timeline.peak_bytes - _border_bytes(problem)


def nothing_kept(problem: LocalProblem, found: Iterable[Option]) -> tuple[Option, ...]:
    """The backwards of `found` with nothing kept for them: all that they need is made while they run."""
    backward = _backward(problem)
    tried = []
    for labels in {(problem.must_keep, o.ephemeral, o.order) for o in found}:
        tried.append(_option(problem, backward.run(*labels), labels))
    height = forward_bytes(problem, problem.must_keep)
    return tuple(replace(o, forward_bytes=height) for o in pareto(tried))


def _backward(problem: LocalProblem) -> FastBackward:
    return FastBackward(
        problem.flow,
        problem.borders | problem.entering,
        problem.must_keep,
        problem.borders | problem.leaving,
        problem.entering,
    )


def _border_bytes(problem: LocalProblem) -> int:
    return sum(problem.flow.values[v].nbytes for v in problem.borders)


def _option(problem: LocalProblem, profile: Profile, labels: Labels) -> Option:
    return Option(
        profile.kept,
        labels[1],
        labels[2],
        profile.kept_bytes,
        max(profile.peak_bytes, profile.start_bytes) - _border_bytes(problem),
        0,
        profile.seconds,
        profile.flops,
    )


def _peak_bytes(option: Option) -> int:
    return option.backward_bytes


def _all_bytes(option: Option) -> int:
    return option.kept_bytes + option.backward_bytes


def _relabelled(
    option: Option, value: int, may_keep: bool
) -> list[tuple[frozenset[int], frozenset[int]]]:
    """The labels of `option` with the other two labels for `value`."""
    keep, ephemeral = option.keep - {value}, option.ephemeral - {value}
    found = []
    if may_keep and value not in option.keep:
        found.append((keep | {value}, ephemeral))
    if value in option.keep or value in option.ephemeral:
        found.append((keep, ephemeral))
    if value not in option.ephemeral:
        found.append((keep, ephemeral | {value}))
    return found


def pareto(candidates: Iterable[Option], slack: float = 0.005) -> list[Option]:
    """Those that no other beats, up to `slack`, in kept bytes, peak, and seconds."""
    chosen: list[Option] = []
    for option in sorted(candidates, key=lambda o: (o.seconds, o.kept_bytes, o.backward_bytes)):
        if not any(
            c.kept_bytes <= option.kept_bytes * (1 + slack)
            and c.backward_bytes <= option.backward_bytes * (1 + slack)
            for c in chosen
        ):
            chosen.append(option)
    return chosen
