"""Norm weights by least squares, so that a block with other matrices returns what is wanted.

A norm in front of a projection scales its inputs; what the block returns is not linear in that scale, so
that the fit is Gauss and Newton's: each step solves the linear least squares of the output around the
weights so far, by conjugate gradients (CGLS; Björck, Numerical Methods for Least Squares Problems,
section 7.4), which take products with the Jacobian and never the matrix itself. A step is taken as far as
the true error falls. Where a norm ends the block, its output is linear, and one step is the optimum.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import jvp, vjp
from torch.nn.attention import SDPBackend, sdpa_kernel

from graphopt.errors import PlanError

Values = dict[str, Tensor]
Function = Callable[[Values], Tensor]  # of norm weights: the rows that a block then returns

STEPS = 3  # of Gauss and Newton
ITERATIONS = 8  # of conjugate gradients in each
HALVINGS = 6  # of a step that does not lower the error
ROWS = 4096  # tokens that a step is found on, unless the first batch has more


def fitted(
    functions: Sequence[Function],
    targets: Sequence[Tensor],
    starts: Sequence[Values],
    steps: int = STEPS,
    iterations: int = ITERATIONS,
) -> tuple[Values, float]:
    """The weights for which the rows of `functions` are near `targets`, and their squared error.

    `functions` and `targets` are of each batch. Begins at the one of `starts` of least error, above
    which the result never is. Steps are found on the first batches, up to `ROWS` rows of them, which
    are far more numbers than there are weights; whether one is taken, the error of all batches says.
    """
    errors = [squared_error(functions, targets, values) for values in starts]
    best = min(errors)
    values = starts[errors.index(best)]
    ends = itertools.accumulate(len(target) for target in targets)
    some = max(1, sum(end <= ROWS for end in ends))
    for _ in range(steps):
        change = least_squares_change(functions[:some], targets[:some], values, iterations)
        for halving in range(HALVINGS):
            moved = {name: value + change[name] / 2**halving for name, value in values.items()}
            if (error := squared_error(functions, targets, moved)) < best:
                values, best = moved, error
                break
        else:
            break
    return values, best


def squared_error(functions: Sequence[Function], targets: Sequence[Tensor], values: Values) -> float:
    """The sum of squared distances of all rows, in float64."""
    rows = ((f(values), target) for f, target in zip(functions, targets, strict=True))
    return sum(float((got - target).double().square().sum()) for got, target in rows)


def least_squares_change(
    functions: Sequence[Function], targets: Sequence[Tensor], values: Values, iterations: int
) -> Values:
    """The change of `values` for which the functions, linearised there, are nearest to `targets`.

    As many iterations as there are numbers in `values` find the least squares, up to rounding; fewer
    leave out the directions that matter least, as a ridge does. Every gradient is made orthogonal to
    all before it, which it is but for rounding, so that no more iterations are needed than that.
    """
    change = {name: torch.zeros_like(value) for name, value in values.items()}
    with sdpa_kernel(SDPBackend.MATH):
        runs = [vjp(f, values) for f in functions]
    missing = [target - run[0] for run, target in zip(runs, targets, strict=True)]
    ahead = gradient = _pulled([run[1] for run in runs], missing)
    seen, tolerance = [gradient], torch.finfo(missing[0].dtype).eps ** 2
    first = _dot(gradient, gradient)
    for _ in range(iterations):
        size = _dot(gradient, gradient)
        pushed = _pushed(functions, values, ahead) if size > first * tolerance else []
        steepness = sum(float(rows.double().square().sum()) for rows in pushed)
        if not steepness:
            break
        length = size / steepness
        change = _sum(change, ahead, length)
        missing = [rows - length * moved for rows, moved in zip(missing, pushed, strict=True)]
        gradient = _pulled([run[1] for run in runs], missing)
        for other in seen:
            gradient = _sum(gradient, other, -_dot(gradient, other) / _dot(other, other))
        seen.append(gradient)
        ahead = _sum(gradient, ahead, _dot(gradient, gradient) / size)
    return change


def _pushed(functions: Sequence[Function], values: Values, ahead: Values) -> list[Tensor]:
    """The Jacobian of each batch times `ahead`."""
    try:
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivatives
            return [jvp(f, (values,), (ahead,))[1] for f in functions]
    except NotImplementedError as error:
        raise PlanError(
            f"the norms cannot be fitted: no forward derivatives of the blocks: {error}"
        ) from error


def _pulled(pulls: Sequence[Callable[[Tensor], tuple[Values]]], rows: Sequence[Tensor]) -> Values:
    """The transposed Jacobians times `rows`, summed over the batches."""
    found = [pull(row)[0] for pull, row in zip(pulls, rows, strict=True)]
    return {name: sum((one[name] for one in found[1:]), found[0][name]) for name in found[0]}


def _sum(one: Values, other: Values, factor: float) -> Values:
    return {name: value + factor * other[name] for name, value in one.items()}


def _dot(one: Values, other: Values) -> float:
    return sum(float((one[name].double() * other[name].double()).sum()) for name in one)
