"""Memory budgets as a person writes them: bytes, a size with a unit, a share, "min" or nothing."""

from graphopt.cost_models.devices import parse_bytes
from graphopt.errors import GraphoptError, PlanError

Budget = int | float | str | None


def check_budget(budget: Budget, option: str = "memory") -> None:
    """Raise PlanError where `budget` is not one of the forms that `resolve_budget` takes.

    >>> check_budget("6GiB"), check_budget(0.4), check_budget("min"), check_budget(None)
    (None, None, None, None)
    """
    resolve_budget(budget, 1, option)


def resolve_budget(budget: Budget, baseline_bytes: int, option: str = "memory") -> int | None:
    """Bytes that `budget` allows; None for "min" and None, which name no number.

    A float of at most 1 is a share of `baseline_bytes`, the peak of the step as it is.

    >>> resolve_budget("1.5KiB", 0), resolve_budget(0.5, 4096), resolve_budget(7, 0)
    (1536, 2048, 7)
    """
    if budget is None or budget == "min":
        return None
    if isinstance(budget, bool):
        raise PlanError(f"{option}={budget!r} is not a budget; {_FORMS}")
    if isinstance(budget, float):
        if not 0 < budget <= 1:
            raise PlanError(f"{option}={budget!r}: a share lies above 0 and is at most 1.0; {_FORMS}")
        return int(budget * baseline_bytes)
    if not isinstance(budget, (int, str)):
        raise PlanError(f"{option}={budget!r} is not a budget; {_FORMS}")
    try:
        found = parse_bytes(budget)
    except GraphoptError as error:
        raise PlanError(f"{option}={budget!r}: {error}; {_FORMS}") from None
    if found <= 0:
        raise PlanError(f"{option}={budget!r} must be positive; {_FORMS}")
    return found


_FORMS = 'write bytes (6 * 2**30), a size ("6GiB"), a share of the plain peak (0.4), "min" or None'
