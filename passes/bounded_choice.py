"""A choice beside the lower bound: how much less recomputation is possible at all."""

from dataclasses import replace

from graphopt.cost_models.memory import Dataflow
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint_choice import is_complete, pruned, step_of
from graphopt.passes.ilp_bound import Bound, recompute_lower_bound


def bounded(
    flow: Dataflow, choice: Choice, budget_bytes: int | None, time_limit_s: float
) -> tuple[Choice, Bound]:
    """`choice`, or what the solution of the bound leads to where that is faster; and the bound.

    The bound holds for the choice's order of the backward, and for the budget; for the peak of the
    choice where there is none. It is solved in at most `time_limit_s` seconds.
    """
    budget = budget_bytes or flow.static_bytes + step_of(flow, choice).peak_bytes
    bound = recompute_lower_bound(flow, choice.order, budget, time_limit_s)
    if not is_complete(flow, bound.keep):
        return choice, bound
    labels = replace(choice, keep=bound.keep, forget=())
    trials = [replace(labels, ephemeral=e) for e in (frozenset(), bound.repeated)]
    found = [pruned(flow, replace(t, ephemeral=t.ephemeral - t.keep)) for t in trials]
    steps = [(step_of(flow, t), t) for t in (choice, *found)]
    fitting = [(s.recompute_seconds, t) for s, t in steps if flow.static_bytes + s.peak_bytes <= budget]
    return min(fitting, key=lambda pair: pair[0])[1], bound
