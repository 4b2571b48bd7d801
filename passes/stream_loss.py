"""Losses over a vocabulary without their logits.

The logits (N tokens, V words) and their gradient are the largest tensors of most steps that train a
language model. `StreamLoss` finds projections onto a vocabulary that end in a loss, and makes loss and
gradients in blocks, exactly: `graphopt.streamed` has the algebra, `graphopt.passes.loss_rules` what is
recognised, `graphopt.passes.loss_variants` the ways to run it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.errors import PlanError
from graphopt.passes.base import Pass
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.loss_choice import Candidate, best, candidates, plain_candidate
from graphopt.passes.loss_rewrite import RETURNS, streamed
from graphopt.passes.loss_variants import VARIANTS, put
from graphopt.plan import Plan
from graphopt.program import Program


@dataclass(frozen=True)
class StreamLossPlan(Plan):
    """How each projection runs: the name of its product, the variant, and the size of its blocks.

    A block is rows (tokens) of the variant "tokens", and columns (words) of the others. With `in_place`
    gradients that the forward made are scaled where they are. `remarks` say which projections are left
    alone, and why. Peaks are bytes of the whole step, everything else kept; seconds are of its operators.
    """

    heads: tuple[tuple[str, str, int], ...]
    drop_ignored: bool
    in_place: bool
    returns: str
    remarks: tuple[str, ...]
    budget_bytes: int | None
    peak_bytes: int
    baseline_bytes: int
    seconds: float
    baseline_seconds: float

    def __str__(self) -> str:
        if not self.heads:
            return "; ".join(("no loss is streamed", *self.remarks))
        ways = ", ".join(f"{name} {variant} in blocks of {block}" for name, variant, block in self.heads)
        return (
            f"{ways}: peak {format_bytes(self.peak_bytes)} instead of {format_bytes(self.baseline_bytes)}"
        )


@dataclass(frozen=True)
class StreamLoss(Pass):
    """Make losses over a vocabulary, and their gradients, without the logits.

    `memory` bounds the peak of the step with everything else kept, in the forms of `Checkpoint`: then the
    fastest way that fits is taken; "min" takes the one of least memory, and None the fastest of those
    that come close to it. `variant` and `block` fix the way instead. `drop_ignored` leaves out the tokens
    whose target is the ignore index first. `returns` says what becomes of logits that the model returns:
    "logits" makes them, "lazy" makes them when they are first used, "loss" drops them.

    Where logits are returned, the rows of x (N, D) stay for a gradient of theirs that may arrive: that is
    not part of the peak planned for the variant "tokens".
    """

    name: ClassVar[str] = "stream-loss"

    memory: Budget = None
    variant: str | None = None
    block: int | None = None
    drop_ignored: bool = False
    returns: str = "logits"

    def __post_init__(self) -> None:
        check_budget(self.memory)
        if self.variant not in (None, *VARIANTS):
            raise PlanError(f"variant={self.variant!r} is none of {', '.join(VARIANTS)}")
        if self.returns not in RETURNS:
            raise PlanError(f"returns={self.returns!r} is none of {', '.join(RETURNS)}")
        if self.block is not None and self.block < 1:
            raise PlanError(f"block={self.block} must be positive")

    def plan(self, program: Program, costs: Costs) -> StreamLossPlan:
        """The fastest way within the budget; PlanError with `reachable_bytes` where there is none."""
        plain = plain_candidate(program, costs)
        budget = resolve_budget(self.memory, plain.peak_bytes)
        empty = StreamLossPlan(
            (),
            self.drop_ignored,
            not costs.fused,
            self.returns,
            (),
            budget,
            plain.peak_bytes,
            plain.peak_bytes,
            plain.seconds,
            plain.seconds,
        )
        base = streamed(program, returns=self.returns)
        empty = replace(empty, remarks=base.remarks)
        if not base.heads:
            return empty
        drop = self.drop_ignored and all(h.only_nll and h.ignore is not None for h in base.heads)
        empty = replace(empty, drop_ignored=drop)
        tried = candidates(base, costs, self.variant, self.block, drop, empty.in_place)
        if not tried:
            return replace(empty, remarks=(*base.remarks, f"no head can run as {self.variant}"))
        chosen = tried[0] if self._is_fixed else best([plain, *tried], self.memory, budget)
        return _plan(empty, chosen)

    @property
    def _is_fixed(self) -> bool:
        return self.variant is not None and self.block is not None

    def apply(self, program: Program, plan: StreamLossPlan) -> Program:
        """A program in which the heads of `plan` run as it says; PlanError for one that is not there."""
        if not plan.heads:
            return program.copy()
        found = streamed(program, [name for name, _, _ in plan.heads], plan.returns)
        heads = {h.linear.name: h for h in found.heads}
        for name, variant, block in plan.heads:
            if name not in heads:
                raise PlanError(f"{name} is no projection whose loss can be streamed here")
            put(found.program, heads[name], variant, block, plan.drop_ignored, plan.in_place)
        found.program.module.recompile()  # or the module still runs what stood there before
        return found.program


def _plan(empty: StreamLossPlan, chosen: Candidate) -> StreamLossPlan:
    return replace(empty, heads=chosen.heads, peak_bytes=chosen.peak_bytes, seconds=chosen.seconds)
