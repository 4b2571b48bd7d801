"""The choices of a launch, measured: what the rules choose beside what is near it, in turns.

    tuned = tune(kernel, x, residual, eps, weight)
    print(tuned.table())

Every candidate changes one thing of the default. In each round all of them run, the order reversed from
round to round, and each time is compared with that of the default in the same round, so that a machine
that slows down for a while slows both. A candidate is **better** where the median of these ratios is
below 1 by more than `MARGIN`, and three quarters of them are below 1. The best one, and all better ones
together, are then measured again: only who is better there too is chosen, so that the best of many
measurements is not merely the luckiest. In all other cases the default stays.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from graphopt.codegen.choices import Choice
from graphopt.codegen.tuned_choices import TunedChoices
from graphopt.errors import CodegenError

MARGIN = 0.03
ROUNDS = 11
_SAMPLE_S = 1e-3  # short launches are repeated until a sample takes about as long
_MOST_REPEATS = 1000


class Bench(Protocol):
    """A kernel with its inputs, ready to run in any way: what a backend offers to `tune`.

    `layout` and `device` are the keys of what is kept in `choices`.
    """

    default: Any
    candidates: list[Any]
    layout: str
    device: str
    choices: TunedChoices[Any]

    def fits(self, choice: Any) -> bool:
        """Whether a choice is right for these inputs."""

    def seconds(self, choice: Any, count: int) -> float:
        """The mean time of `count` launches one after the other; CodegenError where it has no code."""

    def use(self, choice: Any) -> None:
        """Plan launches anew from now on."""


@dataclass(frozen=True)
class Trial:
    """Times of one choice: the median in seconds, and quartiles of its ratio to the default.

    `ratios` are the lower quartile, the median and the upper quartile.
    """

    choice: Choice
    seconds: float
    ratios: tuple[float, float, float]

    @property
    def better(self) -> bool:
        """Whether it beats the default by more than the noise."""
        return self.ratios[1] <= 1 - MARGIN and self.ratios[2] < 1


@dataclass(frozen=True)
class Tuned:
    """What was measured for one region, layout and device, and what was chosen.

    `trials` begin with the default. `finals`, if any candidate was better, are the second measurement,
    the default first again.
    """

    layout: str
    device: str
    chosen: Choice
    trials: tuple[Trial, ...]
    finals: tuple[Trial, ...] = ()

    @property
    def default(self) -> Choice:
        """What the rules choose."""
        return self.trials[0].choice

    @property
    def ratio(self) -> float:
        """The time of the chosen launch over that of the default: 1 where this is kept."""
        return next((t.ratios[1] for t in self.finals if t.choice == self.chosen), 1.0)

    @property
    def seconds(self) -> tuple[float, float]:
        """Those of the default and of the choice, from the last measurement."""
        last = self.finals or self.trials
        return last[0].seconds, next(t.seconds for t in last if t.choice == self.chosen)

    def __str__(self) -> str:
        words = self.chosen.beside(self.default)
        gain = (
            "is kept" if self.chosen == self.default else f"takes {self.ratio:.2f} of the default's time"
        )
        return f"{self.layout}: {words} {gain}"

    def rows(self) -> list[tuple[str, ...]]:
        """A head, and every candidate with its time, and the ratio to the default with its quartiles."""
        rows: list[tuple[str, ...]] = [("choice", "us", "of the default", "quartiles", "")]
        for trials, last in ((self.trials, False), (self.finals, True)):
            rows += [self._row(trial, last) for trial in trials]
        return rows

    def table(self) -> str:
        """`rows` as text."""
        rows = self.rows()
        widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join(lines)

    def _row(self, trial: Trial, last: bool) -> tuple[str, ...]:
        low, middle, high = trial.ratios
        words = ["again"] if last else []
        words += ["chosen"] if trial.choice == self.chosen and last == bool(self.finals) else []
        return (
            trial.choice.beside(self.default),
            f"{trial.seconds * 1e6:.1f}",
            f"{middle:.3f}",
            f"{low:.3f}-{high:.3f}",
            ", ".join(words),
        )

    def to_data(self) -> dict[str, Any]:
        """As JSON has it."""
        rows = {name: [_trial_data(t) for t in getattr(self, name)] for name in ("trials", "finals")}
        return {"layout": self.layout, "device": self.device, "chosen": vars(self.chosen), **rows}

    @staticmethod
    def from_data(data: Any, kind: type[Choice]) -> "Tuned":
        """What `to_data` wrote; CodegenError where it is none."""
        try:
            rows = [[_trial(row, kind) for row in data[name]] for name in ("trials", "finals")]
            chosen = kind.from_data(data["chosen"])
            return Tuned(data["layout"], data["device"], chosen, tuple(rows[0]), tuple(rows[1]))
        except (KeyError, TypeError, ValueError) as error:
            raise CodegenError(f"not a measurement: {error}") from error


def _trial_data(trial: Trial) -> dict[str, Any]:
    return {"choice": vars(trial.choice), "seconds": trial.seconds, "ratios": trial.ratios}


def _trial(row: dict[str, Any], kind: type[Choice]) -> Trial:
    low, middle, high = row["ratios"]
    return Trial(kind.from_data(row["choice"]), float(row["seconds"]), (low, middle, high))


class Tunable(Protocol):
    """A kernel of a backend that can be tuned."""

    def bench(self, *inputs: Any, out: Any = None) -> Bench:
        """The kernel with these inputs, which a call would take."""


def tune(
    kernel: Tunable, *inputs: Any, out: Any = None, rounds: int = ROUNDS, again: bool = True
) -> Tuned:
    """Measure the launches of `kernel` on these inputs, and keep the best for all later ones like it.

    Results are written to `out`, or to tensors made once, over and over. What is chosen is kept in the
    folder of compiled kernels (`graphopt.codegen.tuned_choices`) for the kernel's region, the class of
    layouts of these inputs and this kind of device; launches that were planned before, by other objects,
    stay as they are. Without `again`, what was kept there earlier is given back and nothing runs.
    """
    bench = kernel.bench(*inputs, out=out)
    record = None if again else bench.choices.record(bench.layout, bench.device)
    if record is not None:
        try:
            return Tuned.from_data(record, bench.choices.kind)
        except CodegenError:
            pass  # an entry without its measurements: they are made again
    found = search(bench, rounds)
    bench.choices.keep(bench.layout, bench.device, found.to_data())
    bench.use(found.chosen)
    return found


def search(bench: Bench, rounds: int) -> Tuned:
    """Measure the default and the candidates, and the best of them again."""
    trials = measured(bench, [bench.default, *bench.candidates], rounds)
    better = [t.choice for t in sorted(trials[1:], key=lambda t: t.ratios[1]) if t.better]
    if not better:
        return Tuned(bench.layout, bench.device, bench.default, tuple(trials))
    finalists = [better[0], bench.default.with_best_of(better)]
    finalists = [c for c in dict.fromkeys(finalists) if bench.fits(c)]
    finals = measured(bench, [bench.default, *finalists], rounds)
    best = min((t for t in finals if t.better), key=lambda t: t.ratios[1], default=finals[0])
    return Tuned(bench.layout, bench.device, best.choice, tuple(trials), tuple(finals))


def measured(bench: Bench, choices: Sequence[Any], rounds: int) -> list[Trial]:
    """The trials of `choices`, the default first; those without code are left out."""
    ready = [choice for choice in choices if choice == choices[0] or _runs(bench, choice)]
    least = min(bench.seconds(ready[0], 1) for _ in range(2))
    repeats = min(max(round(_SAMPLE_S / max(least, 1e-9)), 1), _MOST_REPEATS)
    seconds: list[list[float]] = [[] for _ in ready]
    for number in range(rounds):
        order = range(len(ready))
        for n in order if number % 2 == 0 else reversed(order):
            bench.seconds(ready[n], 1)  # caches as this choice leaves them
            seconds[n].append(bench.seconds(ready[n], repeats))
    return [trial(choice, own, seconds[0]) for choice, own in zip(ready, seconds, strict=True)]


def trial(choice: Choice, own: Sequence[float], default: Sequence[float]) -> Trial:
    """From the times of a choice and of the default, round by round."""
    ratios = [a / b for a, b in zip(own, default, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Trial(choice, statistics.median(own), (low, middle, high))


def _runs(bench: Bench, choice: Any) -> bool:
    try:
        bench.seconds(choice, 1)
    except CodegenError:
        return False
    return True


def timed(clock: Callable[[], float], run: Callable[[], None], count: int) -> float:
    """The mean time of `count` runs by a clock."""
    begin = clock()
    for _ in range(count):
        run()
    return (clock() - begin) / count
