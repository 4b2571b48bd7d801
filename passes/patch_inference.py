"""Patch by patch inference: the spatially local prefix of a network on one piece of the image at a time.

Lin et al., "MCUNetV2: Memory-Efficient Patch-based Inference for Tiny Deep Learning" (2021): the first
layers of a convolutional network make its largest maps, and each element of what they lead to depends
on a window of the image only.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.errors import PlanError
from graphopt.passes.base import Pass
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.local_windows import COLUMNS, ROWS
from graphopt.passes.patch_region import Prefix, Region
from graphopt.passes.patch_rewrite import with_patches
from graphopt.passes.patch_search import Patching, Search, forward_flops, forward_peak
from graphopt.plan import Plan
from graphopt.program import Program

Window = tuple[int, int, int, int]  # first row, one past the last; first column, one past the last


@dataclass(frozen=True)
class PatchInferencePlan(Plan):
    """Where the prefix ends, and where its last map is cut; `end` is "" for no patches at all.

    `rows` and `columns` are the cuts, from 0 to the size of the map. `windows` gives what each patch
    reads of the image, row by row of patches: first row, one past the last, the same for columns; it
    follows from the cuts. Peaks are bytes, parameters and inputs included; `extra_flops` is what
    the overlap of the windows costs. `remark` says what ended the search for a longer prefix.
    """

    end: str
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    windows: tuple[Window, ...]
    budget_bytes: int | None
    peak_bytes: int
    baseline_bytes: int
    step_flops: int
    extra_flops: int
    remark: str = ""

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across; (0, 0) for none."""
        return max(0, len(self.rows) - 1), max(0, len(self.columns) - 1)

    def __str__(self) -> str:
        if not self.end:
            return f"no patches{': ' if self.remark else ''}{self.remark}"
        more = self.extra_flops / self.step_flops if self.step_flops else 0.0
        return (
            f"{self.grid[0]} x {self.grid[1]} patches up to {self.end}: peak "
            f"{format_bytes(self.peak_bytes)} instead of {format_bytes(self.baseline_bytes)} for "
            f"{more:.1%} more FLOPs"
        )


@dataclass(frozen=True)
class PatchInference(Pass):
    """Run the first layers of a convolutional network patch by patch (inference, compiler="eager").

    `memory` bounds the peak of the forward: parameters, inputs, activations. It is bytes, a size like
    "64MiB", a share of the plain peak like 0.4, "min", or None for the lowest peak at no more than a
    tenth of the FLOPs added. `activations` instead bounds what the forward allocates.
    """

    name: ClassVar[str] = "patch-inference"

    memory: Budget = None
    activations: Budget = None

    def __post_init__(self) -> None:
        check_budget(self.memory)
        check_budget(self.activations, "activations")
        if self.memory is not None and self.activations is not None:
            raise PlanError("give one of memory= and activations=, not both")

    def plan(self, program: Program, costs: Costs) -> PatchInferencePlan:
        """The prefix and the grid; PlanError with `reachable_bytes` where the budget is too small.

        A program with a backward, and one without a spatially local prefix, gets no patches.
        """
        if program.is_joint:
            why = "the program has a backward; run the model under torch.no_grad()"
            return self._without(program, costs, why, forward_only=False)
        if costs.fused:
            why = 'Inductor runs a forward as it is; patches need compiler="eager"'
            return self._without(program, costs, why)
        prefix = Prefix.of(program)
        search = Search(program, costs, prefix)
        baseline = forward_peak(search.flow)
        budget = self._budget_bytes(baseline, search.flow.static_bytes)
        if budget is not None and baseline <= budget:
            return self._without(program, costs, "the plain forward is within the budget")
        if budget is not None:
            found = search.within(budget)
            if found is None:
                raise _unreachable(budget, baseline, search)
        else:
            found = search.least if "min" in (self.memory, self.activations) else search.light()
        if found is None or found.peak_bytes >= baseline:
            return self._without(program, costs, prefix.remark or "no patches lower the peak")
        return _plan(found, budget, baseline, search)

    def apply(self, program: Program, plan: PatchInferencePlan) -> Program:
        """The forward with the prefix written out once for each patch."""
        if not plan.end:
            return program.copy()
        region = Prefix.of(program).region(plan.end)
        if region is None or program.is_joint:
            raise PlanError(
                f"the plan was made for another program: no spatially local prefix ends at {plan.end!r}"
            )
        _check_cuts("rows", plan.rows, region.size[0])
        _check_cuts("columns", plan.columns, region.size[1])
        if plan.windows != windows_of(region, plan.rows, plan.columns):
            raise PlanError("the plan's windows are not those that its rows and columns need")
        return with_patches(program, region, plan.rows, plan.columns)[0]

    def _without(
        self, program: Program, costs: Costs, remark: str, forward_only: bool = True
    ) -> PatchInferencePlan:
        """The plan without patches; the peak of a step with a backward is not this pass's to bound."""
        flow = costs.dataflow(program)
        peak = forward_peak(flow)
        budget = self._budget_bytes(peak, flow.static_bytes)
        if budget is not None and peak > budget:
            raise PlanError(
                f"no patches keep the forward within {format_bytes(budget)}: {remark}",
                reachable_bytes=peak if forward_only else None,
            )
        return PatchInferencePlan("", (), (), (), budget, peak, peak, forward_flops(flow), 0, remark)

    def _budget_bytes(self, baseline_bytes: int, static_bytes: int) -> int | None:
        if self.activations is None:
            return resolve_budget(self.memory, baseline_bytes)
        budget = resolve_budget(self.activations, baseline_bytes - static_bytes, "activations")
        return None if budget is None else budget + static_bytes


def windows_of(region: Region, rows: tuple[int, ...], columns: tuple[int, ...]) -> tuple[Window, ...]:
    """What each patch reads of the image; PlanError where one would lie in the padding alone."""
    found = []
    for row in pairwise(rows):
        for column in pairwise(columns):
            needed = region.windows(row, ROWS), region.windows(column, COLUMNS)
            if needed[0] is None or needed[1] is None:
                raise PlanError(f"the patch of rows {row} and columns {column} reads only padding")
            found.append((*needed[0][region.image], *needed[1][region.image]))
    return tuple(found)


def _check_cuts(name: str, given: tuple[int, ...], size: int) -> None:
    rising = all(a < b for a, b in pairwise(given))
    if len(given) < 2 or given[0] != 0 or given[-1] != size or not rising:
        raise PlanError(f"{name}={given} does not cut 0 to {size} into patches")


def _plan(found: Patching, budget: int | None, baseline: int, search: Search) -> PatchInferencePlan:
    return PatchInferencePlan(
        end=found.region.end.name,
        rows=found.rows,
        columns=found.columns,
        windows=windows_of(found.region, found.rows, found.columns),
        budget_bytes=budget,
        peak_bytes=found.peak_bytes,
        baseline_bytes=baseline,
        step_flops=forward_flops(search.flow),
        extra_flops=found.extra_flops,
        remark=search.prefix.remark,
    )


def _unreachable(budget: int, baseline: int, search: Search) -> PlanError:
    least = search.least
    reachable = baseline if least is None else min(baseline, least.peak_bytes)
    why = f" ({search.prefix.remark})" if search.prefix.remark else ""
    return PlanError(
        f"no patches keep the forward within {format_bytes(budget)}; the smallest peak found is "
        f"{format_bytes(reachable)} ({reachable} bytes), of which "
        f"{format_bytes(search.flow.static_bytes)} are parameters, buffers and inputs{why}",
        reachable_bytes=reachable,
    )
