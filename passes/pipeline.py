"""The one loop that runs passes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
) -> tuple[Program, tuple[PassStep, ...]]:
    """Plan and apply each pass in turn; the result of each is verified before the next sees it."""
    steps = []
    for pass_ in passes:
        begin = clock()
        plan = pass_.plan(program, costs_of(program))
        changed = pass_.apply(program, plan)
        try:
            verify(changed, before=program, may_drop_gradients=pass_.drops_gradients)
        except GraphoptError as error:
            raise type(error)(f"after pass {pass_.name}: {error}") from error
        steps.append(PassStep(pass_, plan, clock() - begin))
        program = changed
    return program, tuple(steps)
