"""Checkpoint selection: which tensors the forward keeps for the backward, and which are recomputed.

The choice is made at the true peak of the step, forward and backward with the recomputations inside,
as `graphopt.cost_models.schedule` simulates it. The idea of trading time for memory by keeping a
subset is Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; the search over spans
is described in `graphopt.passes.chain_solver`.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.memory import Dataflow, dataflow
from graphopt.errors import PlanError
from graphopt.passes.base import Pass
from graphopt.passes.bounded_choice import bounded
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint_choice import (
    Search,
    bytes_made,
    check_choice,
    everything,
    fitting,
    holding_outputs,
    names_of,
    order_named,
    order_names,
    states_needed,
    step_of,
    steps_of,
    values_named,
    without_gradient_bytes,
)
from graphopt.passes.forgetting import ForgetNames, forget_named, forget_names
from graphopt.passes.nested_choice import choose_best, choose_nested
from graphopt.passes.replay import with_recomputation
from graphopt.passes.span_options import Freedom
from graphopt.passes.subset_choice import SOLVERS, subset_choice
from graphopt.plan import Plan
from graphopt.program import Program


@dataclass(frozen=True)
class CheckpointPlan(Plan):
    """What the forward keeps, by the name of the node that makes it, and what that costs.

    `ephemeral` values are recomputed for each use, every other value that the backward needs once.
    `order` names the operators of the backward that run once, in order; it is empty for autograd's.
    `forget` names some of those operators, each with values that are given up after it: what reads them
    later makes them again.
    Peaks are bytes of the whole step, parameters and inputs included; `baseline_bytes` is the peak
    with everything kept. The step's own seconds and FLOPs do not count what `recompute_seconds` and
    `recompute_flops` add. `least_recompute_seconds` is a lower bound for every plan of this order under
    the budget (under this peak where there is none), if one was asked for.
    """

    keep: tuple[str, ...]
    ephemeral: tuple[str, ...]
    order: tuple[str, ...]
    budget_bytes: int | None
    peak_bytes: int
    baseline_bytes: int
    step_seconds: float
    recompute_seconds: float
    step_flops: int
    recompute_flops: int
    least_recompute_seconds: float | None = None
    forget: ForgetNames = ()

    def __str__(self) -> str:
        text = (
            f"keep {len(self.keep)} tensors: peak {format_bytes(self.peak_bytes)} instead of "
            f"{format_bytes(self.baseline_bytes)} for {self._share(self.recompute_seconds)} more time"
        )
        if self.least_recompute_seconds is None:
            return text
        return f"{text}, at least {self._share(self.least_recompute_seconds)} by any plan"

    def _share(self, seconds: float) -> str:
        return f"{seconds / self.step_seconds if self.step_seconds else 0.0:.1%}"


@dataclass(frozen=True)
class Checkpoint(Pass):
    """Keep as much as fits, recompute the rest.

    `memory` bounds the peak of the step: parameters, inputs, gradients, activations. It is bytes, a
    size like "6GiB", a share of the plain peak like 0.4, "min", or None for what can be had without
    recomputing anything heavy. `activations` instead bounds what the step allocates besides its
    gradients. `hold_outputs` says that the caller keeps the outputs of the forward, beside the loss,
    while the backward runs.

    `solver`: "graph" searches labels and orders on the whole graph, and where those miss the budget, or
    repeat more than the forward, what "chain" finds. "chain" cuts the graph at its narrow places and
    finds the best nested schedule of the stages between them, as `graphopt.passes.nested_chain`
    describes: values may be recomputed, forgotten and recomputed again, so that a deep model fits in a
    few layers' memory at the price of several forwards. "dp", "linear", "sqrt" and "periodic" choose
    among the same places as `graphopt.passes.published_solvers` describes; they are there for
    comparison. "ilp" is "graph" with a lower bound beside it, and better labels from it where it has
    any; it takes up to `time_limit_s` seconds.
    """

    name: ClassVar[str] = "checkpoint"

    memory: Budget = None
    activations: Budget = None
    hold_outputs: bool = False
    solver: str = "graph"
    time_limit_s: float = 60.0

    def __post_init__(self) -> None:
        check_budget(self.memory)
        check_budget(self.activations, "activations")
        if self.memory is not None and self.activations is not None:
            raise PlanError("give one of memory= and activations=, not both")
        if self.solver not in (known_solvers := ("graph", "chain", "ilp", *SOLVERS)):
            known = ", ".join(known_solvers)
            raise PlanError(f"solver={self.solver!r} is not a solver; there are {known}")

    def plan(self, program: Program, costs: Costs) -> CheckpointPlan:
        """The labels of every value; PlanError with `reachable_bytes` where the budget is too small.

        A forward alone keeps nothing and recomputes nothing, whatever the budget.
        """
        flow = self.flow(program, costs)
        baseline = flow.static_bytes + step_of(flow, everything(flow)).peak_bytes
        budget = self._budget_bytes(baseline, flow.static_bytes)
        if not program.is_joint:
            return plan_of(flow, everything(flow), budget, baseline)
        wish = self.memory if self.activations is None else self.activations
        search = search_of(costs)
        room = None if budget is None else budget - costs.margin_bytes
        if self.solver in SOLVERS:
            choice = fitting(flow, subset_choice(flow, self.solver, room), room)
            return plan_of(flow, choice, budget, baseline)
        wanted = choose_nested if self.solver == "chain" else choose_best
        choice = wanted(flow, wish == "min", room, search)
        if self.solver != "ilp":
            return plan_of(flow, choice, budget, baseline)
        choice, bound = bounded(flow, choice, room, self.time_limit_s)
        return replace(plan_of(flow, choice, budget, baseline), least_recompute_seconds=bound.seconds)

    def flow(self, program: Program, costs: Costs) -> Dataflow:
        """The dataflow whose peak is bounded: gradients and outputs as the options say."""
        flow = costs.dataflow(program)
        if self.activations is not None:
            flow = without_gradient_bytes(flow)
        return holding_outputs(flow) if self.hold_outputs else flow

    def apply(self, program: Program, plan: CheckpointPlan) -> Program:
        """The joint graph with the recomputations of `plan` in it."""
        flow = dataflow(program)
        choice = choice_of(flow, plan)
        steps = steps_of(flow, choice)
        return with_recomputation(program, flow, choice.keep | states_needed(flow, choice), steps)

    def limit_bytes(self, program: Program, plan: CheckpointPlan) -> int | None:
        """The budget; for "min" the plan's peak; None where no bound was asked for."""
        if self.memory is None and self.activations is None:
            return None
        limit = plan.peak_bytes if plan.budget_bytes is None else plan.budget_bytes
        if self.activations is None and not self.hold_outputs:
            return limit
        flow = dataflow(program)
        if self.activations is not None:
            limit += bytes_made(flow, flow.gradients)
        return limit - bytes_made(flow, flow.outputs) if self.hold_outputs else limit

    def _budget_bytes(self, baseline_bytes: int, static_bytes: int) -> int | None:
        if self.activations is None:
            return resolve_budget(self.memory, baseline_bytes)
        budget = resolve_budget(self.activations, baseline_bytes - static_bytes, "activations")
        return None if budget is None else budget + static_bytes


def search_of(costs: Costs) -> Search:
    """What the search may do in a step that runs as `costs` say."""
    free = not costs.fused
    return Search(leave_room=costs.followed, freedom=Freedom(free, free))


def choice_of(flow: Dataflow, plan: CheckpointPlan) -> Choice:
    """What `plan` says of `flow`, by values; PlanError where it was made for another program."""
    keep, ephemeral = values_named(flow, plan.keep), values_named(flow, plan.ephemeral)
    order = order_named(flow, plan.order)
    check_choice(flow, keep)
    return Choice(keep, ephemeral, order, 0.0, 0, forget_named(flow, plan.forget, order))


def plan_of(flow: Dataflow, choice: Choice, budget: int | None, baseline: int) -> CheckpointPlan:
    """`choice` as a plan, by names; `budget` and `baseline` are peaks, bytes."""
    step = step_of(flow, choice)
    return CheckpointPlan(
        keep=names_of(flow, choice.keep),
        ephemeral=names_of(flow, choice.ephemeral),
        order=order_names(flow, choice.order),
        budget_bytes=budget,
        peak_bytes=flow.static_bytes + step.peak_bytes,
        baseline_bytes=baseline,
        step_seconds=sum(o.seconds for o in flow.operators),
        recompute_seconds=step.recompute_seconds,
        step_flops=sum(o.flops for o in flow.operators),
        recompute_flops=step.recompute_flops,
        forget=forget_names(flow, choice.forget),
    )
