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
    plans: Sequence[Plan] | None = None,
) -> tuple[Program, tuple[PassStep, ...]]:
    """Plan and apply each pass in turn; the result of each is verified before the next sees it.

    With `plans`, one for each pass, nothing is planned.
    """
    steps = []
    for number, pass_ in enumerate(passes):
        begin = clock()
        plan = pass_.plan(program, costs_of(program)) if plans is None else plans[number]
        changed = pass_.apply(program, plan)
        try:
            verify(changed, before=program, may_drop_gradients=pass_.drops_gradients)
        except GraphoptError as error:
            raise type(error)(f"after pass {pass_.name}: {error}") from error
        steps.append(PassStep(pass_, plan, clock() - begin))
        program = changed
    return program, tuple(steps)
