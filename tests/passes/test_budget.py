"""Every form of a budget, and every form that is none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import Checkpoint, GiB, PlanError
from graphopt.passes.budget import check_budget, resolve_budget


@pytest.mark.parametrize(
    ("budget", "nbytes"),
    [
        (7, 7),
        ("7", 7),
        ("6GiB", 6 * GiB),
        ("6 GiB", 6 * GiB),
        ("1.5KiB", 1536),
        ("2GB", 2 * 10**9),
        (0.5, 500),
        (1.0, 1000),
        (0.0015, 1),
        ("min", None),
        (None, None),
    ],
)
def test_forms(budget: object, nbytes: int | None) -> None:
    assert resolve_budget(budget, 1000) == nbytes  # type: ignore[arg-type]
    check_budget(budget)  # type: ignore[arg-type]


WRONG = [
    True,
    False,
    -1,
    0,
    0.0,
    -0.5,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "0",
    "-3",
    "-3GiB",
    "0GiB",
    "6 zorkmids",
    "GiB",
    "half",
    "nan",
    "infGiB",
    "50%",
    "MIN",
    b"6GiB",
    [6],
    (1, 2),
    {},
    3j,
]


@pytest.mark.parametrize("budget", WRONG, ids=repr)
def test_what_is_no_budget_is_refused_with_the_forms(budget: object) -> None:
    for option in ("memory", "activations"):
        with pytest.raises(PlanError) as caught:
            check_budget(budget, option)  # type: ignore[arg-type]
        message = str(caught.value)
        assert message.startswith(f"{option}=") and repr(budget) in message
        assert '"6GiB"' in message and '"min"' in message
        assert caught.value.reachable_bytes is None


@pytest.mark.parametrize("budget", WRONG, ids=repr)
def test_a_pass_refuses_them_when_it_is_made(budget: object) -> None:
    with pytest.raises(PlanError, match="memory="):
        Checkpoint(memory=budget)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="activations="):
        Checkpoint(activations=budget)  # type: ignore[arg-type]


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 2**60))
def test_a_share_is_never_more_than_the_whole(share: float, whole: int) -> None:
    found = resolve_budget(share, whole)
    assert found is not None and 0 <= found <= whole


@given(st.integers(1, 2**70))
def test_bytes_are_themselves(nbytes: int) -> None:
    assert resolve_budget(nbytes, 1) == resolve_budget(str(nbytes), 1) == nbytes
