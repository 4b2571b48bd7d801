"""Polynomials found from values and compared on boxes, against evaluation at every size."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.cost_models.polynomials import NotPolynomialError, Terms, largest
from graphopt.errors import GraphoptError

TERMS = Terms(("batch", "seq"), (1, 2))
COEFFICIENTS = st.lists(st.integers(-(10**12), 10**12), min_size=6, max_size=6)
SMALL = st.lists(st.integers(-30, 30), min_size=6, max_size=6)


def value(coefficients: list[int], batch: int, seq: int) -> int:
    powers = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2))
    return sum(c * batch**i * seq**j for c, (i, j) in zip(coefficients, powers, strict=True))


@given(COEFFICIENTS, COEFFICIENTS)
def test_coefficients_are_recovered(a: list[int], b: list[int]) -> None:
    points = TERMS.grid([(2, 3, 5), (7, 64, 9)])
    values = np.array([[value(c, *p) for c in (a, b)] for p in points], dtype=object)
    assert TERMS.solve(points, values).T.tolist() == [a, b]


def test_what_is_no_polynomial_is_refused() -> None:
    halves = np.array([[n // 2] for n in (2, 4)], dtype=object)
    with pytest.raises(NotPolynomialError):
        Terms(("seq",), (1,)).solve([(2,), (4,)], halves)
    with pytest.raises(GraphoptError, match="do not decide"):
        Terms(("seq",), (1,)).solve([(2,), (2,)], halves)


@settings(max_examples=60)
@given(st.lists(SMALL, min_size=1, max_size=8), st.integers(1, 4), st.integers(1, 5))
def test_the_largest_are_enough_everywhere(columns: list[list[int]], low: int, span: int) -> None:
    box = [(low, low + span), (2, 2 + 2 * span)]
    found = largest(TERMS, np.array(columns, dtype=object).T, box)
    assert found
    for batch, seq in itertools.product(*(range(a, b + 1) for a, b in box)):
        most = max(value(c, batch, seq) for c in columns)
        assert most == max(value(columns[i], batch, seq) for i in found)


def test_what_is_below_another_is_left_out() -> None:
    above, below, crossing = [0, 0, 0, 0, 9, 0], [0, 0, 0, 0, 8, 0], [500, 0, 0, 0, 0, 0]
    columns = np.array([below, above, crossing, above], dtype=object).T
    assert largest(TERMS, columns, [(2, 100), (2, 100)]) == [1, 2]
    assert largest(TERMS, columns, [(20, 100), (20, 100)]) == [1]


def test_no_overflow() -> None:
    huge = [0, 0, 0, 0, 0, 10**17]
    columns = np.array([huge, [c + 1 for c in huge]], dtype=object).T
    assert largest(TERMS, columns, [(2, 2**16), (2, 2**17)]) == [1]


def test_expression() -> None:
    batch, seq = TERMS.symbols()
    assert TERMS.expression([1, 0, 3, 0, 5, 7]) == 1 + 3 * seq**2 + 5 * batch * seq + 7 * batch * seq**2
