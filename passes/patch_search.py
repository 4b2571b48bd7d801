"""The choice of a prefix and a patch grid by predicted peak, as MCUNetV2 makes it.

Lin et al., "MCUNetV2: Memory-Efficient Patch-based Inference for Tiny Deep Learning" (2021), section
3.1: patches shrink the maps of the prefix, at the price of the halos, which neighbours compute twice.
Every candidate is first estimated by the values of its largest patch, scaled by area; the promising
ones are then written out and simulated to the byte.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import fx

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.schedule import Step, forward_steps, simulate
from graphopt.passes.lean_forms import use_lean_forms
from graphopt.passes.local_windows import COLUMNS, ROWS
from graphopt.passes.patch_region import Prefix, Region, grid_of
from graphopt.passes.patch_rewrite import with_patches
from graphopt.program import Program

COUNTS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)  # patches along one dimension
EXAMINED = 4  # candidates that are written out and simulated, at most
MOST_NODES = 6000  # of all patches together
LIGHT_SHARE = 0.1  # of the FLOPs: what halos may cost where no budget is given


@dataclass(frozen=True)
class Patching:
    """A prefix and its grid: where the last map is cut, the peak in bytes and the FLOPs it adds.

    `largest` is the place of the largest patch in the grid. `peak_bytes` may be an estimate; see
    `exact`.
    """

    region: Region
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    peak_bytes: int
    extra_flops: int
    largest: tuple[int, int]


def forward_peak(flow: Dataflow) -> int:
    """The peak of a forward in bytes, parameters and inputs included."""
    return flow.static_bytes + simulate(flow, forward_steps(flow, ()), (), flow.outputs).peak_bytes


def forward_flops(flow: Dataflow) -> int:
    """FLOPs of a forward."""
    return sum(o.flops for o in flow.operators)


def exact(program: Program, costs: Costs, found: Patching, every: bool = True) -> Patching:
    """`found` with the peak to the byte; with `every` false, as far as its largest patch has it.

    Of patches that are alike but for their place, one is simulated.
    """
    rows = found.region.distinct(found.rows, ROWS)
    columns = found.region.distinct(found.columns, COLUMNS)
    some = {(i, j) for i in rows for j in columns} if every else {found.largest}
    patched, new = with_patches(program, found.region, found.rows, found.columns, some=some)
    return replace(found, peak_bytes=forward_peak(costs.with_nodes(new).dataflow(patched)))


def cuts(size: int, count: int) -> tuple[int, ...]:
    """`count` nearly equal intervals of `size`, as the places between them.

    >>> cuts(10, 3)
    (0, 3, 7, 10)
    """
    return tuple(round(size * i / count) for i in range(count + 1))


@dataclass(frozen=True)
class Search:
    """The candidates of one program and the exact figures of the promising ones."""

    program: Program
    costs: Costs
    prefix: Prefix

    @cached_property
    def least(self) -> Patching | None:
        """The lowest peak found; None where there is no candidate."""
        return self._lowest(self.estimates)

    def light(self) -> Patching | None:
        """The lowest peak found for few FLOPs more; None where there is no candidate."""
        most = LIGHT_SHARE * forward_flops(self.flow)
        return self._lowest([e for e in self.estimates if e.extra_flops <= most])

    def _lowest(self, allowed: Sequence[Patching]) -> Patching | None:
        best: Patching | None = None
        for estimate in _different_ends(sorted(allowed, key=_rank)):
            found = exact(self.program, self.costs, estimate, every=False)
            if best is None or _rank(found) < _rank(best):
                best = found
        return None if best is None else exact(self.program, self.costs, best)

    def within(self, budget_bytes: int) -> Patching | None:
        """The fewest extra FLOPs under the budget; None where nothing that was examined fits."""
        optimism = 1.0  # measured scratch can make the true peak larger than the estimate
        left = sorted(self.estimates, key=lambda e: (e.extra_flops, e.peak_bytes))
        for _ in range(EXAMINED):
            static = self.flow.static_bytes
            fitting = (e for e in left if (e.peak_bytes - static) * optimism + static <= budget_bytes)
            estimate = next(fitting, None)
            if estimate is None:
                break
            found = exact(self.program, self.costs, estimate, every=False)
            if found.peak_bytes <= budget_bytes:
                found = exact(self.program, self.costs, estimate)
            if found.peak_bytes <= budget_bytes:
                return found
            ratio = (found.peak_bytes - static) / max(1, estimate.peak_bytes - static)
            optimism = max(optimism, ratio)
            left.remove(estimate)
        least = self.least
        return least if least is not None and least.peak_bytes <= budget_bytes else None

    @cached_property
    def flow(self) -> Dataflow:
        """The program as it is, with its costs."""
        return self.costs.dataflow(self.program)

    @cached_property
    def estimates(self) -> tuple[Patching, ...]:
        """Every candidate: prefixes at each resolution, and grids of 2 to 256 patches."""
        program = self.program.copy()
        lean = use_lean_forms(program.graph)
        flow = self.costs.with_nodes(lean.new).dataflow(program)
        candidates = self.prefix.candidates()
        return tuple(
            p for region in candidates for p in _Estimator(flow, region, lean.instead_of).patchings()
        )


def _rank(found: Patching) -> tuple[int, int]:
    return found.peak_bytes, found.extra_flops


def _different_ends(ranked: Sequence[Patching]) -> Iterator[Patching]:
    """The first candidates, at most half of them with the same end of the prefix."""
    count: dict[fx.Node, int] = {}
    given = 0
    for found in ranked:
        end = found.region.end
        if given < EXAMINED and count.get(end, 0) < EXAMINED // 2:
            count[end] = count.get(end, 0) + 1
            given += 1
            yield found


class _Estimator:
    """Estimates for one prefix: the largest patch of a grid has the values scaled by area.

    What lives while an operator runs is the same for every grid; `alive` [step, value] says it once.
    """

    def __init__(self, flow: Dataflow, region: Region, instead_of: Mapping[str, str]) -> None:
        self.flow = flow
        self.region = region
        place = {n.name: i for i, n in enumerate(region.rules)}
        node_of = [place.get(instead_of.get(o.name, o.name)) for o in flow.operators]
        self.areas = np.array([float(np.prod(grid_of(n))) for n in region.rules])
        self.flops = np.zeros(len(self.areas))
        self.nbytes = np.zeros(len(self.areas))
        for operator, node in zip(flow.operators, node_of, strict=True):
            if node is not None:
                self.flops[node] += operator.flops
                self.nbytes[node] += sum(flow.sizes[v] for v in operator.writes)
        renamed = {old: new for new, old in instead_of.items()}
        end = flow.value_of[renamed.get(region.end.name, region.end.name)]
        self.end_bytes = sum(flow.sizes[v] for v in end)
        steps = forward_steps(flow, ())
        inside = [s for s in steps if node_of[s.operator] is not None]
        rest = [s for s in steps if node_of[s.operator] is None]
        self.rest_peak = _peak(flow, rest, end, flow.outputs)
        self.alive = _alive(flow, inside, end)
        self.scratch = np.array([flow.operators[s.operator].workspace_bytes for s in inside], float)
        self.step_node = np.array([node_of[s.operator] for s in inside], dtype=int)
        made_by = {v: node_of[s.operator] for s in inside for v in s.makes}
        self.value_node = np.array([made_by[v] for v in made_by], dtype=int)
        self.value_bytes = np.array([flow.sizes[v] for v in made_by], float)

    def patchings(self) -> Iterator[Patching]:
        """One estimate for each grid that is possible."""
        height, width = self.region.size
        lengths = [self._lengths(height, ROWS), self._lengths(width, COLUMNS)]
        most = MOST_NODES / len(self.region.rules)
        for p, rows in lengths[0].items():
            for q, columns in lengths[1].items():
                if 1 < p * q <= most and max(p, q) <= 4 * min(p, q):
                    largest, share, extra = self._largest(rows, columns)
                    peak = self.flow.static_bytes + max(self.rest_peak, self._patch_peak(share))
                    cut = cuts(height, p), cuts(width, q)
                    yield Patching(self.region, *cut, peak, extra, largest)

    def _lengths(self, size: int, dimension: int) -> dict[int, NDArray[np.float64]]:
        """By count of patches: how long each patch's window is at each node, [patch, node]."""
        found = {}
        for count in COUNTS:
            if count > size:
                break
            windows = [self.region.windows(cut, dimension) for cut in pairwise(cuts(size, count))]
            if all(windows):
                lengths = [[w[n][1] - w[n][0] for n in self.region.rules] for w in windows if w]
                found[count] = np.array(lengths, dtype=float)
        return found

    def _largest(
        self, rows: NDArray[np.float64], columns: NDArray[np.float64]
    ) -> tuple[tuple[int, int], NDArray[np.float64], int]:
        """The place of the largest patch, its share of each node's map, and the FLOPs of the halos."""
        total = (rows * (self.nbytes / self.areas)) @ columns.T
        i, j = divmod(int(total.argmax()), total.shape[1])
        computed = rows.sum(axis=0) * columns.sum(axis=0) / self.areas
        extra = round(float(((computed - 1) * self.flops).sum()))
        return (i, j), rows[i] * columns[j] / self.areas, extra

    def _patch_peak(self, share: NDArray[np.float64]) -> int:
        """The peak of a patch, with the buffer that it is copied into."""
        scratch = self.scratch * share[self.step_node]
        during = self.alive @ (self.value_bytes * share[self.value_node]) + scratch
        return self.end_bytes + int(during.max(initial=0.0))


def _peak(flow: Dataflow, steps: Sequence[Step], given: Collection[int], end: Collection[int]) -> int:
    """The peak of `steps`, before which the values `given` were made; what else they read stays."""
    made = {v for s in steps for v in s.makes}
    outside = {v for s in steps for v in flow.own_reads[s.operator]} - made
    return simulate(flow, steps, outside, {*end, *(outside - set(given))}).peak_bytes


def _alive(flow: Dataflow, steps: Sequence[Step], end: Collection[int]) -> NDArray[np.float64]:
    """1 where a value, in the order in which `steps` make them, takes memory during a step."""
    column = {v: i for i, v in enumerate(v for s in steps for v in s.makes)}
    timeline = simulate(flow, steps, (), end)
    alive = np.zeros((len(steps), len(column)))
    live: set[int] = set()
    for row, (step, reused) in enumerate(zip(steps, timeline.reused, strict=True)):
        live |= {column[v] for v in step.makes}
        alive[row, sorted(live)] = 1.0
        if reused is not None:  # the result takes its place
            alive[row, column[reused]] = 0.0
        live -= {column[v] for v in timeline.last_read[row] if v in column}
    return alive
