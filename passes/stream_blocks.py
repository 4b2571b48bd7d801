"""Wide blocks in parts of their tokens, or heads: what is wide inside never exists for all tokens.

Once a loss is streamed, what recomputing a block holds is mostly its MLP: values several times as wide as
the residual stream, in the forward and for the gradients. The gradients of a function of separate tokens
are sums over tokens, so that a part of them can be recomputed and differentiated at a time, exactly: this
is what StreamBP does along the sequence (Luo et al., "StreamBP: Memory-Efficient Exact
Backpropagation for Long Sequence Training of LLMs", arXiv 2506.03077, 2025, section 3). Here regions
of such operators are found on the captured graph (`graphopt.passes.token_regions`).

An attention whose scores are in memory, as models write it by hand, is a region as well: its heads
compute apart from each other. The fused kernels never hold their scores, and are left alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.errors import PlanError
from graphopt.passes.base import Pass
from graphopt.passes.block_parts import Parts, of_least_peak, parts_of, within
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.checkpoint import Checkpoint, CheckpointPlan
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.passes.pipeline import PassStep, run_passes
from graphopt.passes.token_regions import Regions, regions_of
from graphopt.passes.token_rewrite import CannotJoin, in_parts
from graphopt.plan import Plan
from graphopt.program import Program


@dataclass(frozen=True)
class StreamBlocksPlan(Plan):
    """In how many `parts` the tokens of each block go through it; 1 leaves the step as it is.

    `blocks` are the regions, each by the name of its first widening product; `remarks` say which others
    are left alone, and why. Peaks are bytes of the whole step where only what crosses its narrow places
    is kept and all else is recomputed; `baseline_bytes` is that with the blocks as they were. Seconds are
    of the step's operators, with the blocks' own recomputation, and without that by `Checkpoint`.
    """

    parts: int
    blocks: tuple[str, ...]
    remarks: tuple[str, ...]
    budget_bytes: int | None
    peak_bytes: int
    baseline_bytes: int
    seconds: float
    baseline_seconds: float

    def __str__(self) -> str:
        if not self.blocks or self.parts == 1:
            return "; ".join(("no block is streamed", *self.remarks))
        more = self.seconds / self.baseline_seconds - 1 if self.baseline_seconds else 0.0
        peak, before = format_bytes(self.peak_bytes), format_bytes(self.baseline_bytes)
        return (
            f"{len(self.blocks)} blocks in {self.parts} parts for {more:.1%} more time; "
            f"all recomputed, the peak is {peak} instead of {before}"
        )


@dataclass(frozen=True)
class StreamBlocks(Pass):
    """Recompute and differentiate wide blocks a part of their tokens, or heads, at a time.

    To be followed by `Checkpoint`, which plans the rest. `parts` is a number, or "auto": then `memory`,
    in the forms of `Checkpoint` (a share is of the plain peak), asks for the number with which
    `Checkpoint` meets it in the least time, 1 included; with "min" or None it is the smallest number
    beyond which the peak of a step that recomputes everything hardly falls.

    Losses and gradients are those of the step before up to the rounding of sums over tokens. Blocks with
    random operators (dropout) among what is wide are left alone, and so are attentions with a mask of
    each text's own.
    """

    name: ClassVar[str] = "stream-blocks"

    parts: int | str = "auto"
    memory: Budget = None

    def __post_init__(self) -> None:
        check_budget(self.memory)
        is_number = isinstance(self.parts, int) and not isinstance(self.parts, bool)
        if self.parts != "auto" and not (is_number and self.parts >= 1):  # type: ignore[operator]
            raise PlanError(f'parts={self.parts!r} is neither a positive number nor "auto"')
        if self.parts != "auto" and self.memory is not None:
            raise PlanError("give one of parts= and memory=, not both")

    def plan(self, program: Program, costs: Costs) -> StreamBlocksPlan:
        """The number of parts; PlanError with `reachable_bytes` where none meets the budget."""
        found = _joinable(program)
        regions = found.regions
        plain = parts_of(program, (), costs, 1)
        flow = costs.dataflow(program)
        budget = resolve_budget(
            self.memory, flow.static_bytes + step_of(flow, everything(flow)).peak_bytes
        )
        if not regions:
            chosen = plain
        elif isinstance(self.parts, int):
            chosen = parts_of(program, regions, costs, self.parts)
        elif budget is None:
            chosen = of_least_peak(program, regions, costs)
        else:
            chosen = within(program, regions, costs, budget)
        return _plan(found, budget, plain, chosen)

    def apply(self, program: Program, plan: StreamBlocksPlan) -> Program:
        """A program with the blocks of `plan` in parts; PlanError for one that is not there."""
        if plan.parts == 1 or not plan.blocks:
            return program.copy()
        regions = {r.name: r for r in regions_of(program).regions}
        if missing := [name for name in plan.blocks if name not in regions]:
            raise PlanError(f"{missing[0]} begins no block that can be streamed here")
        return in_parts(program, [regions[name] for name in plan.blocks], plan.parts)


def run_or_stream(
    program: Program,
    passes: Sequence[Pass],
    costs_of: Callable[[Program], Costs],
    clock: Callable[[], float],
) -> tuple[Program, tuple[PassStep, ...]]:
    """`run_passes`, with `StreamBlocks` before a `Checkpoint`, alone in `passes`, where that is better.

    It is tried where the budget is missed, or met only by recomputing some values several times.
    """
    try:
        found = run_passes(program, passes, costs_of, clock)
    except PlanError as missed:
        if (streamed := _with_blocks(passes, missed.budget_bytes)) is None:
            raise
        return run_passes(program, streamed, costs_of, clock)
    plan = found[1][-1].plan if found[1] else None
    if not isinstance(plan, CheckpointPlan) or not plan.forget:
        return found
    if (streamed := _with_blocks(passes, plan.budget_bytes)) is None:
        return found
    try:
        other = run_passes(program, streamed, costs_of, clock)
    except PlanError:
        return found
    return min(found, other, key=lambda result: _seconds(result[1][-1].plan))


def _with_blocks(passes: Sequence[Pass], budget: int | None) -> tuple[Pass, ...] | None:
    """Streamed blocks, then the only pass of `passes`; None where that is no `Checkpoint` with memory."""
    alone = passes[0] if len(passes) == 1 else None
    if not isinstance(alone, Checkpoint) or alone.memory is None or budget is None:
        return None
    return StreamBlocks(memory=budget), replace(alone, memory=budget)


def _seconds(plan: Any) -> float:
    """Of the step and all that its `CheckpointPlan` recomputes."""
    return float(plan.step_seconds + plan.recompute_seconds)


def _joinable(program: Program) -> Regions:
    """The regions of `program` whose operators take parts."""
    found = regions_of(program)
    while found.regions:
        try:
            in_parts(program, found.regions, 2)
        except CannotJoin as reason:
            left = tuple(r for r in found.regions if r.name != reason.name)
            found = replace(
                found, regions=left, remarks=(*found.remarks, f"{reason.name} is left alone: {reason}")
            )
        else:
            break
    return found


def _plan(found: Regions, budget: int | None, plain: Parts, chosen: Parts) -> StreamBlocksPlan:
    return StreamBlocksPlan(
        chosen.number,
        tuple(r.name for r in found.regions),
        found.remarks,
        budget,
        chosen.peak_bytes,
        plain.peak_bytes,
        chosen.seconds,
        plain.seconds,
    )
