"""In which passes over a row a region is evaluated, and what is kept from one pass to the next.

Neutral between backends. A full value of an early stage that a later one needs is computed again where
that takes few instructions, and is kept in a buffer of one row where it takes many.
"""

import functools
import itertools
from dataclasses import dataclass, replace

from graphopt.codegen.region import Apply, Extent, Gather, Input, Reduce, Region, cost, operands

# Instructions for one number above which it is kept rather than computed again: about what a store and
# a load in the second-level cache take, beside a load in the first for each input.
RECOMPUTE_COST = 12
RECOMPUTE_ALL = 1_000_000  # more than any number takes


@dataclass(frozen=True)
class Online:
    """A maximum and the sum of exponentials below it, found in one pass over the row.

    Positions of `peak = max(v)`, `shifted = v - peak`, `exponential = exp(shifted)` and `total`, the sum
    of those. Block by block, the sum so far is scaled to the new maximum (Milakov and Gimelshein, "Online
    normalizer calculation for softmax", 2018). A kept exponential is relative to the maximum that was
    known at its block.
    """

    peak: int
    shifted: int
    exponential: int
    total: int


@dataclass(frozen=True)
class Stage:
    """One pass over the columns of a row; positions of values, in order of evaluation.

    `rows`: row and scalar values made before the pass. `places`: full and column values made at each
    place, loads included. `fetched`: full values read from buffers instead. `kept`: those of `places`
    that go to buffers. `reductions` are ended by this pass; `sums_of_rows` continue from row to row.
    `outputs` are positions in `Region.outputs` of what the pass stores, and `row_outputs` of what is
    stored before it. With `online`, the pass does what the next stage's would, whose `kept` it has.
    """

    rows: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    fetched: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    reductions: tuple[int, ...] = ()
    sums_of_rows: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    row_outputs: tuple[int, ...] = ()
    online: Online | None = None


@functools.lru_cache(maxsize=4096)
def stages(
    region: Region, recompute_cost: int = RECOMPUTE_COST, online: bool = True
) -> tuple[Stage, ...]:
    """The passes of a region, the first of stage 0.

    The last may be one of rows alone. Without `online`, a maximum and the sum of exponentials below it
    take two passes.

    >>> from graphopt.codegen.builder import Builder
    >>> b = Builder()
    >>> e = b.apply("exp", b.input("x", "float32"))
    >>> for stage in stages(b.region(b.output("out", e / b.sum(e), "float32"))):
    ...     print(stage.places, stage.fetched, stage.kept, stage.reductions, stage.outputs)
    (0, 1) () (1,) (2,) ()
    (3,) (1,) () () (0,)
    """
    found = list(_Planner(region, recompute_cost).plan())
    for n, (stage, after) in enumerate(itertools.pairwise(found)):
        both = _online(region, stage, after) if online else None
        if both is not None:
            found[n] = replace(stage, online=both, kept=after.kept)
            found[n + 1] = Stage(rows=after.rows, row_outputs=after.row_outputs)
    return tuple(found)


def may_overwrite(
    region: Region, number: int, output: int, passes: tuple[Stage, ...] | None = None
) -> bool:
    """Whether an output may lie over an input, place for place: it is stored when that was last read.

    `number` counts `Region.inputs`, `output` counts `Region.outputs`. In the pass that stores it, the
    output has to be made of the input, so that no order of loads and stores can change the result.
    `passes` are those of the kernel, by default `stages(region)`.
    """
    named, value = region.inputs[number], region.outputs[output].value
    at = region.values.index(named)
    if region.facts[value].extent is not named.extent or named.extent is not Extent.FULL:
        return False
    passes = stages(region) if passes is None else passes
    reads = [n for n, stage in enumerate(passes) if at in (*stage.places, *_sources(region, stage))]
    stores = next(n for n, stage in enumerate(passes) if output in stage.outputs)
    if any(n > stores for n in reads):
        return False
    return stores not in reads or at in _made_of_in(region, value, {*passes[stores].places})


def _sources(region: Region, stage: Stage) -> list[int]:
    """Inputs from which the stage gathers."""
    values = (region.values[i] for i in stage.rows)
    return [value.source for value in values if isinstance(value, Gather)]


def _made_of_in(region: Region, value: int, places: set[int]) -> set[int]:
    """What a value is made of among the `places` of one pass."""
    found: set[int] = set()
    ahead = [value]
    while ahead:
        i = ahead.pop()
        if i in places and i not in found:
            found.add(i)
            ahead += operands(region.values[i])
    return found


def _online(region: Region, stage: Stage, after: Stage) -> Online | None:
    """How two passes can be one, where the first finds a maximum and the second that sum alone."""
    alone = stage.outputs or after.outputs or stage.sums_of_rows or after.sums_of_rows or stage.kept
    if alone or len(stage.reductions) != 1 or len(after.reductions) != 1:
        return None
    (peak,), (total,) = stage.reductions, after.reductions
    first, last = region.values[peak], region.values[total]
    assert isinstance(first, Reduce) and isinstance(last, Reduce)
    new = [i for i in after.places if i not in stage.places]
    if stage.fetched or after.fetched or len(new) != 2 or (first.op, last.op) != ("max", "sum"):
        return None
    shifted, exponential = new
    shapes = Apply("sub", (first.arg, peak)), Apply("exp", (shifted,))
    if (region.values[shifted], region.values[exponential]) != shapes or last.arg != exponential:
        return None
    return Online(peak, shifted, exponential, total) if {*after.kept} <= {exponential} else None


class _Planner:
    def __init__(self, region: Region, recompute_cost: int) -> None:
        self.region = region
        self.facts = region.facts
        self.limit = recompute_cost
        self.kept: set[int] = set()
        self.needed_rows: set[int] = set()
        self.count = 1 + max((fact.stage for fact in self.facts), default=0)

    def plan(self) -> tuple[Stage, ...]:
        """From the last pass to the first, as a pass says what earlier ones have to keep."""
        found = [self._stage(stage) for stage in reversed(range(self.count))][::-1]
        self._need_rows([out.value for out in self.region.outputs])
        return tuple(self._with_rows(number, stage) for number, stage in enumerate(found))

    def _stage(self, number: int) -> Stage:
        values, facts = self.region.values, self.facts
        reductions: list[int] = []
        sums: list[int] = []
        for i in self._live_reductions():
            value = values[i]
            if isinstance(value, Reduce) and facts[i].stage == number + 1:
                (reductions if value.over == "columns" else sums).append(i)
        outputs = [
            k
            for k, out in enumerate(self.region.outputs)
            if facts[out.value].extent.by_row
            and facts[out.value].extent.by_column
            and facts[out.value].stage == number
        ]
        kept = sorted(k for k in self.kept if facts[k].stage == number)
        roots = [operands(values[i])[0] for i in (*reductions, *sums)]
        roots += [self.region.outputs[k].value for k in outputs] + kept
        places, fetched = self._places(roots, number)
        return Stage(
            places=places,
            fetched=fetched,
            kept=tuple(kept),
            reductions=tuple(reductions),
            sums_of_rows=tuple(sums),
            outputs=tuple(outputs),
        )

    def _live_reductions(self) -> list[int]:
        live = self._cone([out.value for out in self.region.outputs])
        return [i for i in sorted(live) if isinstance(self.region.values[i], Reduce)]

    def _cone(self, roots: list[int]) -> set[int]:
        """All values that `roots` are made of."""
        seen: set[int] = set()
        ahead = [*roots]
        while ahead:
            i = ahead.pop()
            if i not in seen:
                seen.add(i)
                ahead += operands(self.region.values[i])
        return seen

    def _places(self, roots: list[int], number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What pass `number` evaluates at each place, and what it fetches."""
        places: set[int] = set()
        fetched: set[int] = set()
        ahead = [*roots]
        while ahead:
            i = ahead.pop()
            if i in places or i in fetched or not self.facts[i].extent.by_column:
                continue
            if self._is_kept(i, number):
                self.kept.add(i)
                fetched.add(i)
            else:
                places.add(i)
                ahead += (
                    [] if isinstance(self.region.values[i], Reduce) else operands(self.region.values[i])
                )
        return tuple(sorted(places)), tuple(sorted(fetched))

    def _is_kept(self, i: int, number: int) -> bool:
        fact = self.facts[i]
        if fact.stage == number or fact.kind != "float" or not fact.extent.by_row:
            return False
        if isinstance(self.region.values[i], Input):
            return False
        again = (j for j in self._cone([i]) if self.facts[j].extent.by_column)
        return sum(cost(self.region.values[j]) for j in again) > self.limit

    def _need_rows(self, roots: list[int]) -> None:
        self.needed_rows = {
            i
            for i in self._cone(roots)
            if not self.facts[i].extent.by_column and not isinstance(self.region.values[i], Reduce)
        }

    def _with_rows(self, number: int, stage: Stage) -> Stage:
        rows = tuple(i for i in sorted(self.needed_rows) if self.facts[i].stage == number)
        row_outputs = tuple(
            k
            for k, out in enumerate(self.region.outputs)
            if not self.facts[out.value].extent.by_column and self.facts[out.value].stage == number
        )
        return replace(stage, rows=rows, row_outputs=row_outputs)
