"""Which gathered parameters stay from the forward to the backward, and which are gathered twice.

To keep one saves a transfer and takes memory meanwhile. Kept are first those whose transfer takes most
for a byte (small ones, where the latency counts), by powers of two; among such, the last of the forward
first: the backward reads them soonest.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from graphopt.errors import PlanError
from graphopt.passes.gathered_parameters import Gather


class _Planned(Protocol):
    @property
    def seconds(self) -> float: ...

    @property
    def peak_bytes(self) -> int: ...


P = TypeVar("P", bound=_Planned)


def by_worth(gathers: Sequence[Gather], seconds: Mapping[str, float]) -> list[Gather]:
    """The `gathers` (given in program order), those first that are best kept."""

    def key(place: int) -> tuple[float, int]:
        gather = gathers[place]
        rate = seconds.get(gather.start.name, 0.0) / max(1, gather.nbytes)
        return (-math.floor(math.log2(rate)) if rate else math.inf), -place

    return [gathers[i] for i in sorted(range(len(gathers)), key=key)]


def most_kept(saved_bytes: Sequence[int], over_bytes: int) -> int:
    """How many of the first values can wait when the others have to free `over_bytes`; 0 if none.

    >>> most_kept([4, 2, 2], 3)
    1
    """
    kept = len(saved_bytes)
    while kept and over_bytes > 0:
        kept -= 1
        over_bytes -= saved_bytes[kept]
    return kept


def fastest(
    names: Sequence[str],
    most: int,
    plan_with: Callable[[tuple[str, ...]], P],
    is_best: Callable[[P], bool],
) -> P:
    """The fastest plan of those that keep up to `most` first ones of `names` and gather the others again.

    `plan_with` plans with the names to gather again, or raises PlanError with `reachable_bytes` where
    that does not fit. As many are kept as fit, found by bisection; where the result is not as fast as
    its own bound (`is_best`), also fewer, which leaves room to gather earlier. PlanError with the least
    `reachable_bytes` where nothing fits.
    """
    plans: dict[int, P | PlanError] = {}

    def fits(kept: int) -> bool:
        if kept not in plans:
            try:
                plans[kept] = plan_with(tuple(names[kept:]))
            except PlanError as error:
                if error.reachable_bytes is None:
                    raise
                plans[kept] = error
        return not isinstance(plans[kept], PlanError)

    if not fits(most):
        low, most = -1, most - 1
        while low < most:  # invariant: `low` fits or is -1; more than `most` do not
            middle = (low + most + 1) // 2
            low, most = (middle, most) if fits(middle) else (low, middle - 1)
    for kept in () if most < 0 else (most, 3 * most // 4, most // 2, 0):
        plan = plans[kept] if fits(kept) else None
        if plan is not None and not isinstance(plan, PlanError) and is_best(plan):
            break
    found = [plan for plan in plans.values() if not isinstance(plan, PlanError)]
    if found:
        return min(found, key=lambda plan: (plan.seconds, plan.peak_bytes))
    errors = [error for error in plans.values() if isinstance(error, PlanError)]
    raise min(errors, key=lambda error: error.reachable_bytes or 0)
