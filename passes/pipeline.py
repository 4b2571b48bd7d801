"""The one loop that runs passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from graphopt.cost_models.costs import Costs
from graphopt.errors import GraphoptError
from graphopt.passes.base import Pass
from graphopt.plan import Plan
from graphopt.program import Program
from graphopt.verify import verify


@dataclass(frozen=True)
class PassStep:
    """One pass as it ran: what it was, what it decided, how long it thought (seconds)."""

    pass_: Pass
    plan: Plan
    seconds: float


def run_passes(
    program: Program,
    passes: Sequence[Pass],
    costs_of: Callable[[Program], Costs],
    clock: Callable[[], float],
    plans: Sequence[Plan] | None = None,
) -> tuple[Program, tuple[PassStep, ...]]:
    """Plan and apply each pass in turn; the result of each is verified before the next sees it.

    With `plans`, one for each pass, nothing is planned.
    """
    steps: list[PassStep] = []
    first, limit = program, None
    for number, pass_ in enumerate(passes):
        begin = clock()
        if plans is None:
            plan = pass_.plan(program, replace(costs_of(program), limit_bytes=limit))
        else:
            plan = plans[number]
        changed = pass_.apply(program, plan)
        try:
            verify(changed, before=program, may_drop_gradients=pass_.drops_gradients)
        except GraphoptError as error:
            raise type(error)(f"after pass {pass_.name}: {error}") from error
        steps.append(PassStep(pass_, plan, clock() - begin))
        program = changed
        promised = (limit, pass_.limit_bytes(first, plan))
        limit = min((bound for bound in promised if bound is not None), default=None)
    return program, tuple(steps)
