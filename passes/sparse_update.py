"""Updating some of the parameters: the most contribution to learning within a memory budget.

Lin et al., "On-Device Training Under 256KB Memory" (2022), section 2.2, choose layers and tensors by
measured contribution under a memory constraint; Ardakani et al., "SlimFit: Memory-Efficient Fine-Tuning
of Transformer-based Models Using Training Dynamics" (2023), freeze the layers that learn least. Here a
contribution is any number per parameter; from calibration gradients it is how much one step of the
optimizer lowers the loss to first order: by the squared norm of the mean gradient for SGD, and by its
sum of magnitudes for Adam, whose first step follows the signs (Balles and Hennig, "Dissecting Adam: The
Sign, Magnitude and Variance of Stochastic Gradients", 2018, section 1.1).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import ClassVar

import torch

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.memory import Dataflow
from graphopt.errors import PlanError
from graphopt.passes.base import Pass
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.passes.frozen_gradients import gradient_of, without_gradients_of
from graphopt.passes.update_memory import UpdateMemory
from graphopt.passes.update_selection import Chosen, Group, Selection
from graphopt.plan import Plan
from graphopt.program import Program, Role

# What the optimizer keeps for a parameter, in times its bytes.
OPTIMIZERS = {"sgd": 0, "momentum": 1, "adam": 2}
ROUNDS = 4  # corrections of the limit by the true peak of the pruned program
Gradients = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class SparseUpdatePlan(Plan):
    """The parameters that are updated and those that are frozen, by what the user calls them.

    Peaks are bytes of the whole step, parameters, inputs and `state_bytes` of the optimizer included;
    `baseline_bytes` is the peak with all parameters updated. `contribution` is that of the updated
    parameters, out of `total`.
    """

    update: tuple[str, ...]
    frozen: tuple[str, ...]
    contribution: float
    total: float
    budget_bytes: int | None
    state_bytes: int
    peak_bytes: int
    baseline_bytes: int

    def __str__(self) -> str:
        share = self.contribution / self.total if self.total else 0.0
        return (
            f"update {len(self.update)} of {len(self.update) + len(self.frozen)} parameters, with "
            f"{share:.1%} of the contribution: peak {format_bytes(self.peak_bytes)} instead of "
            f"{format_bytes(self.baseline_bytes)}"
        )


@dataclass(frozen=True)
class SparseUpdate(Pass):
    """Update the parameters of most contribution that fit the memory; the others get no gradient.

    `memory` bounds the peak of the step, the optimizer's state included: bytes, a size like "6GiB",
    or a share of the peak with all parameters updated; None updates all. `optimizer` is "sgd",
    "momentum" or "adam" (AdamW, too): what it keeps counts, and how it moves says what a gradient is
    worth. `scores` is the contribution of each parameter by name; or give `calibration`, the gradients
    of some batches by name, as `calibration_gradients` yields them. `by` is "tensor", or "layer" to
    decide on the parameters of a module together.

    >>> batches = [{"weight": torch.tensor([1.0, 3.0])}, {"weight": torch.tensor([3.0, 3.0])}]
    >>> SparseUpdate("1MiB", calibration=batches).scores
    (('weight', 13.0),)
    >>> SparseUpdate("1MiB", optimizer="adam", calibration=batches).scores
    (('weight', 5.0),)
    """

    name: ClassVar[str] = "sparse-update"
    drops_gradients: ClassVar[bool] = True

    memory: Budget = None
    scores: Mapping[str, float] | tuple[tuple[str, float], ...] = field(default=(), repr=False)
    by: str = "tensor"
    optimizer: str = "sgd"
    calibration: InitVar[Iterable[Gradients] | None] = None

    def __post_init__(self, calibration: Iterable[Gradients] | None) -> None:
        check_budget(self.memory)
        if self.memory == "min":
            raise PlanError('memory="min" would update nothing; write bytes, a size or a share')
        if self.by not in ("tensor", "layer"):
            raise PlanError(f'by={self.by!r} is none of "tensor", "layer"')
        if self.optimizer not in OPTIMIZERS:
            known = ", ".join(f'"{name}"' for name in OPTIMIZERS)
            raise PlanError(f"optimizer={self.optimizer!r} is none of {known}")
        if calibration is not None and self.scores:
            raise PlanError("give one of scores= and calibration=, not both")
        scores = dict(self.scores)
        if calibration is not None:
            scores = contributions(calibration, self.optimizer)
        for label, score in scores.items():
            if not (math.isfinite(score) and score >= 0):
                raise PlanError(f"the score of {label} is {score}; a contribution is at least 0")
        if self.memory is not None and not scores:
            raise PlanError("a budget needs scores= or calibration=, to know what to update")
        object.__setattr__(self, "scores", tuple(sorted(scores.items())))

    def plan(self, program: Program, costs: Costs) -> SparseUpdatePlan:
        """What to update; PlanError with `reachable_bytes` where not one parameter fits."""
        problem = _Problem(program, costs, self)
        every: Chosen = frozenset(range(len(problem.groups)))
        baseline = problem.true_peak(every)
        budget = resolve_budget(self.memory, baseline)
        if budget is None or baseline <= budget or not program.is_joint:
            return problem.plan(every, budget, baseline)
        plan = problem.plan(problem.within(budget) or problem.smallest(), budget, baseline)
        if plan.peak_bytes > budget:
            raise PlanError(
                f"not one parameter can be updated within {format_bytes(budget)}; the smallest peak "
                f"found with one is {format_bytes(plan.peak_bytes)} ({plan.peak_bytes} bytes)",
                reachable_bytes=plan.peak_bytes,
            )
        return plan

    def apply(self, program: Program, plan: SparseUpdatePlan) -> Program:
        """The step without the gradients of the frozen parameters."""
        known = {i.label: i.name for i in program.inputs if i.role is Role.PARAMETER}
        unknown = [label for label in (*plan.frozen, *plan.update) if label not in known]
        if unknown:
            raise PlanError(f"the plan was made for another program: it names {unknown[0]!r}")
        if both := sorted(set(plan.frozen) & set(plan.update)):
            raise PlanError(f"the plan both updates and freezes {both[0]!r}")
        if not plan.frozen:
            return program.copy()
        if not program.is_joint:
            raise PlanError("the program has no backward, and the plan freezes parameters")
        return without_gradients_of(program, {known[label] for label in plan.frozen})[0]


def contributions(calibration: Iterable[Gradients], optimizer: str) -> dict[str, float]:
    """For each parameter, the first-order decrease of the loss by a step of `optimizer` at rate 1.

    `calibration` holds the gradients of some batches, whose mean is taken.
    """
    sums: dict[str, torch.Tensor] = {}
    count = 0
    for gradients in calibration:
        count += 1
        for label, gradient in gradients.items():
            found = gradient.detach().double()
            sums[label] = sums[label] + found if label in sums else found
    order = 1 if optimizer == "adam" else 2
    return {label: float((total / count).abs().pow(order).sum()) for label, total in sums.items()}


class _Problem:
    """The groups to choose from, and the peak of a choice."""

    def __init__(self, program: Program, costs: Costs, options: SparseUpdate) -> None:
        self.program, self.costs = program, costs
        self.flow: Dataflow = costs.dataflow(program)
        self.memory = UpdateMemory(program, self.flow)
        gradients = gradient_of(program)
        self.values = {name: self.flow.value_of[node.name] for name, node in gradients.items()}
        self.names = {
            i.label: i.name for i in program.inputs if i.role is Role.PARAMETER and i.name in gradients
        }
        self.state_factor = OPTIMIZERS[options.optimizer]
        scores = _scores_of(self.names, dict(options.scores))
        self.groups = [
            Group(
                labels,
                sum(scores[label] for label in labels),
                sum(map(self._nbytes, labels)) + self._state_bytes(labels),
            )
            for labels in _grouped(list(self.names), options.by)
        ]

    def peak(self, chosen: Chosen) -> int:
        """The peak of a choice, from the pruned dataflow."""
        frozen = {self.names[label] for label in self._labels(chosen, frozen=True)}
        wanted = (v for name, values in self.values.items() if name not in frozen for v in values)
        return self.memory.peak_bytes(wanted) + self._state_bytes(self._labels(chosen))

    def true_peak(self, chosen: Chosen) -> int:
        """The peak of a choice, from the program written out."""
        frozen = {self.names[label] for label in self._labels(chosen, frozen=True)}
        flow = self.flow
        if frozen:
            pruned, new = without_gradients_of(self.program, frozen)
            flow = self.costs.with_nodes(new).dataflow(pruned)
        peak = step_of(flow, everything(flow)).peak_bytes
        return flow.static_bytes + peak + self._state_bytes(self._labels(chosen))

    def within(self, budget: int) -> Chosen:
        """The best choice found whose true peak is within the budget; empty where there is none.

        Scratch can differ once an operator makes fewer gradients, so the limit follows the truth.
        """
        best: Chosen = frozenset()
        limit = budget
        search = Selection(self.groups, self.peak)
        for _ in range(ROUNDS):
            chosen = search.best(limit)
            if not chosen:
                break
            excess = self.true_peak(chosen) - budget
            if excess <= 0 and search.score(chosen) > search.score(best):
                best = chosen
            if excess == 0 or (excess < 0 and search.peak(chosen) + excess >= limit):
                break
            limit -= excess
        return best

    def smallest(self) -> Chosen:
        """The one group of the lowest peak; all where none has a contribution."""
        single = [frozenset({i}) for i, g in enumerate(self.groups) if g.score]
        return min(single, key=self.peak, default=frozenset(range(len(self.groups))))

    def plan(self, chosen: Chosen, budget: int | None, baseline: int) -> SparseUpdatePlan:
        """The plan of a choice."""
        return SparseUpdatePlan(
            update=self._labels(chosen),
            frozen=self._labels(chosen, frozen=True),
            contribution=sum(self.groups[i].score for i in sorted(chosen)),
            total=sum(g.score for g in self.groups),
            budget_bytes=budget,
            state_bytes=self._state_bytes(self._labels(chosen)),
            peak_bytes=self.true_peak(chosen),
            baseline_bytes=baseline,
        )

    def _labels(self, chosen: Chosen, frozen: bool = False) -> tuple[str, ...]:
        """The parameters of a choice, or the others (`frozen`)."""
        groups = (g for i, g in enumerate(self.groups) if (i in chosen) is not frozen)
        return tuple(label for group in groups for label in group.names)

    def _nbytes(self, label: str) -> int:
        return sum(self.flow.sizes[v] for v in self.flow.value_of[self.names[label]])

    def _state_bytes(self, labels: Iterable[str]) -> int:
        """What the optimizer keeps for these parameters."""
        return self.state_factor * sum(map(self._nbytes, labels))


def _scores_of(labels: Iterable[str], scores: Mapping[str, float]) -> Mapping[str, float]:
    """The score of each parameter; all alike where none are given."""
    if not scores:
        return dict.fromkeys(labels, 1.0)
    if missing := [label for label in labels if label not in scores]:
        given = ", ".join([*scores][:3])
        raise PlanError(f"{missing[0]} has no score; scores are given for {given}, ...")
    return scores


def _grouped(labels: Sequence[str], by: str) -> list[tuple[str, ...]]:
    """Each label alone, or all of one module together, in order."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(label if by == "tensor" else label.rpartition(".")[0], []).append(label)
    return [tuple(group) for group in groups.values()]
