"""The front of memory against time: what `Checkpoint` reaches at budgets from the least peak on."""

import functools
from dataclasses import replace

import numpy as np

from graphopt.cost_models.costs import Costs
from graphopt.errors import PlanError
from graphopt.passes.chain_solver import Chain
from graphopt.passes.checkpoint import Checkpoint, CheckpointPlan, plan_of, search_of
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.passes.nested_choice import choose_best
from graphopt.program import Program


def front(
    pass_: Checkpoint, program: Program, costs: Costs, budgets: int = 8
) -> tuple[CheckpointPlan, ...]:
    """Plans for `budgets` evenly spaced budgets, the least reachable peak and the plain one among them.

    They are those of the default solver, with `pass_`'s options for what counts; the plan that `pass_`
    makes with its own budget is not among them. The spans are solved once for all budgets. Plans that
    another one beats are left out; the rest are in the order of their peaks. A forward alone has no
    front.
    """
    if not program.is_joint or budgets < 1:
        return ()
    flow = pass_.flow(program, costs)
    search = replace(search_of(costs), leave_room=False)
    chain = functools.cache(lambda: Chain.of(flow, search.freedom))
    plain = everything(flow)
    baseline = flow.static_bytes + step_of(flow, plain).peak_bytes
    found = [plan_of(flow, plain, baseline, baseline)]
    if budgets > 1:
        least = plan_of(flow, choose_best(flow, True, None, search, chain), None, baseline)
        found.append(least)
        for budget in np.linspace(least.peak_bytes, baseline, budgets)[1:-1].astype(np.int64).tolist():
            try:
                choice = choose_best(flow, False, budget, search, chain)
            except PlanError:  # the least peak was that of a nested choice, which bounds nothing else
                continue
            found.append(plan_of(flow, choice, budget, baseline))
    return undominated(found)


def undominated(plans: list[CheckpointPlan]) -> tuple[CheckpointPlan, ...]:
    """Those of `plans` that no other beats in peak and in recomputation, by peak."""
    best: list[CheckpointPlan] = []
    for plan in sorted(plans, key=lambda p: (p.peak_bytes, p.recompute_seconds)):
        if not best or plan.recompute_seconds < best[-1].recompute_seconds:
            best.append(plan)
    return tuple(best)
