"""Polynomials of sizes with whole coefficients: found from exact values, and compared on whole ranges.

Bytes and operations of a step are sums of products of dimensions, and a dimension is a whole multiple of
the batch, of the sequence length, of both, or a constant. So each is a polynomial of low degree. Its
coefficients follow from as many values as it has terms; values at further sizes check it.

A polynomial is compared with another on a box of sizes by the Bernstein coefficients of the difference:
where none is negative, neither is the difference (Farouki, "The Bernstein polynomial basis: a centennial
retrospective", Computer Aided Geometric Design 29, 2012, section 4).
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import GraphoptError

Whole = NDArray[np.object_]  # arrays of Python integers, which do not overflow
Sizes = tuple[int, ...]  # one value for each variable
SPLITS = 5  # how often a box is halved in each of two directions to find the largest polynomials on it


class NotPolynomialError(GraphoptError):
    """A number of a step is no polynomial of the degrees that were assumed."""


@dataclass(frozen=True)
class Terms:
    """The monomials of the polynomials of some variables: all products of powers up to `degrees`.

    Where there are `units`, a size is a multiple of its variable's unit, and polynomials are those of how
    many units it has, so that their coefficients are whole.

    >>> Terms(("batch", "seq"), (1, 2)).exponents
    ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
    """

    variables: tuple[str, ...]
    degrees: tuple[int, ...]
    units: tuple[int, ...] = ()

    def unit(self, place: int) -> int:
        """The unit of a variable; 1 where any size will do."""
        return self.units[place] if self.units else 1

    def counts(self, sizes: Sizes) -> Sizes:
        """How many units each of some sizes has; GraphoptError where one is no multiple.

        >>> Terms(("batch", "hidden"), (1, 2), (1, 16)).counts((5, 64))
        (5, 4)
        """
        for place, (name, size) in enumerate(zip(self.variables, sizes, strict=True)):
            if size % self.unit(place):
                raise GraphoptError(f"{name}={size} is not a multiple of {self.unit(place)}")
        return tuple(size // self.unit(place) for place, size in enumerate(sizes))

    @property
    def exponents(self) -> tuple[tuple[int, ...], ...]:
        """The powers of the variables in each monomial."""
        return tuple(itertools.product(*(range(d + 1) for d in self.degrees)))

    def at(self, sizes: Sizes) -> Whole:
        """The values of the monomials at some sizes, int[term]."""
        counts = self.counts(sizes)
        return np.array([math.prod(map(pow, counts, e)) for e in self.exponents], dtype=object)

    def grid(self, values: Sequence[Sequence[int]]) -> tuple[Sizes, ...]:
        """The sizes that decide the coefficients, of at least as many `values` of each variable."""
        return tuple(itertools.product(*(v[: d + 1] for v, d in zip(values, self.degrees, strict=True))))

    def solve(self, points: Sequence[Sizes], values: Whole, *, whole: bool = True) -> Whole:
        """The coefficients, int[term, n], of the polynomials with `values`, int[point, n].

        GraphoptError where one has none that are whole; rounded down there, if they need not be `whole`.

        >>> Terms(("n",), (2,)).solve([(1,), (2,), (3,)], np.array([[2], [6], [12]], dtype=object)).T
        array([[0, 1, 1]], dtype=object)
        """
        inverse, denominator = _inverse([list(self.at(p)) for p in points])
        scaled: Whole = inverse.dot(values)
        if whole and (scaled % denominator).any():
            raise NotPolynomialError("some sizes are no polynomials with whole coefficients")
        found: Whole = scaled // denominator
        return found

    def symbols(self) -> tuple[Any, ...]:
        """The sympy symbols of the variables."""
        import sympy

        return tuple(sympy.Symbol(name, integer=True, positive=True) for name in self.variables)

    def expression(self, coefficients: Sequence[int] | Whole) -> Any:
        """The polynomial as a sympy expression.

        >>> Terms(("batch", "seq"), (1, 2)).expression([8, 0, 0, 0, 12, 4])
        4*batch*seq**2 + 12*batch*seq + 8
        """
        import sympy

        counts = [symbol / self.unit(place) for place, symbol in enumerate(self.symbols())]
        powers = [math.prod(map(pow, counts, e)) for e in self.exponents]
        return sympy.Add(*(int(c) * p for c, p in zip(coefficients, powers, strict=True)))

    def bernstein(self, box: Sequence[tuple[Fraction, Fraction]]) -> Whole:
        """From coefficients to (positive multiples of) Bernstein coefficients on `box`: [term, term]."""
        whole = np.array([[1]], dtype=object)
        for place, (degree, (low, high)) in enumerate(zip(self.degrees, box, strict=True)):
            unit = self.unit(place)
            whole = np.kron(whole, _bernstein(degree, low / unit, high / unit))
        return whole


def _inverse(rows: list[list[int]]) -> tuple[Whole, int]:
    """The inverse of a square matrix of integers, as integers over one denominator."""
    size = len(rows)
    unit = [[Fraction(i == j) for j in range(size)] for i in range(size)]
    work = [[*map(Fraction, row), *own] for row, own in zip(rows, unit, strict=True)]
    for column in range(size):
        pivot = next((r for r in range(column, size) if work[r][column]), None)
        if pivot is None:
            raise GraphoptError("these sizes do not decide the coefficients")
        work[column], work[pivot] = work[pivot], work[column]
        work[column] = [x / work[column][column] for x in work[column]]
        for row in range(size):
            if row != column and work[row][column]:
                factor = work[row][column]
                work[row] = [x - factor * y for x, y in zip(work[row], work[column], strict=True)]
    inverse = [row[size:] for row in work]
    denominator = math.lcm(*(x.denominator for row in inverse for x in row))
    return np.array([[int(x * denominator) for x in row] for row in inverse], dtype=object), denominator


def _bernstein(degree: int, low: Fraction, high: Fraction) -> Whole:
    """For one variable: int[degree + 1, degree + 1], scaled by a positive number to be whole."""
    width = high - low
    rows = []
    for k in range(degree + 1):
        row = []
        for power in range(degree + 1):  # x**power = (low + width u)**power
            expanded = (math.comb(power, i) * low ** (power - i) * width**i for i in range(power + 1))
            parts = (Fraction(math.comb(k, i), math.comb(degree, i)) * c for i, c in enumerate(expanded))
            row.append(sum(parts, Fraction()))
        rows.append(row)
    scale = math.lcm(*(x.denominator for row in rows for x in row))
    return np.array([[int(x * scale) for x in row] for row in rows], dtype=object)


def largest(terms: Terms, coefficients: Whole, box: Sequence[tuple[int, int]]) -> list[int]:
    """Which columns of `coefficients`, int[term, n], are the largest polynomial somewhere in `box`.

    Every other column is nowhere above the maximum of these: it was shown to be below one of them on each
    part of the box. Of equal columns the first is meant.
    """
    first: dict[tuple[int, ...], int] = {}
    for column in range(coefficients.shape[1]):
        first.setdefault(tuple(coefficients[:, column]), column)
    whole = [(Fraction(low), Fraction(high)) for low, high in box]
    splits = min(SPLITS, 2 * SPLITS // max(1, len(box)))  # as many boxes of three variables as of two
    return sorted(_largest(terms, coefficients, list(first.values()), whole, splits))


def _largest(
    terms: Terms,
    coefficients: Whole,
    columns: list[int],
    box: list[tuple[Fraction, Fraction]],
    splits: int,
) -> set[int]:
    bounds = _machine(terms.bernstein(box).dot(coefficients[:, columns]).T)
    kept: list[int] = []
    upper = bounds[:0]
    for index in np.argsort(-bounds.sum(axis=1), kind="stable"):
        if not (upper >= bounds[index]).all(axis=1).any():
            kept.append(int(index))
            upper = bounds[kept]
    left = [columns[k] for k in kept]
    if len(left) == 1 or splits == 0:
        return set(left)
    halves = [((low, (low + high) / 2), ((low + high) / 2, high)) for low, high in box]
    parts = (h if low < high else h[:1] for h, (low, high) in zip(halves, box, strict=True))
    boxes = itertools.product(*parts)
    return set().union(*(_largest(terms, coefficients, left, list(b), splits - 1) for b in boxes))


def _machine(values: Whole) -> NDArray[Any]:
    """`values` as machine integers where sums of them are, too: far faster, and as exact."""
    most = max((abs(int(v)) for v in values.flat), default=0) * max(1, values.shape[1])
    return values.astype(np.int64) if most < 2**62 else values
