"""A rank that stops, stays away or plans something else: every rank that is left says so, in time."""

from typing import Any

import pytest
import torch
from ranks import found_by

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
TIMEOUT_S = 3.0  # of the process groups
GRACE_S = 6.0  # for what a busy machine does besides waiting


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the ranks of each case said."""
    return found_by("failing_ranks_worker", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (
            "stops, planning",
            "PlanError: the ranks of group 0 could not compare the graphs; one of them has",
        ),
        ("stops, measuring", "PlanError: the links of group 0 could not be measured: "),
        ("stops, running", "RuntimeError: "),
    ],
)
def test_a_rank_that_stops(found: Any, case: str, text: str) -> None:
    (message, seconds), gone = found[case]
    assert gone is None and message.startswith(text) and "peer" in message
    assert seconds < TIMEOUT_S + GRACE_S


@pytest.mark.parametrize(
    ("case", "text"),
    [
        (
            "stays away, planning",
            "PlanError: the ranks of group 0 could not compare the graphs; one of them",
        ),
        ("stays away, running", "RuntimeError: "),
    ],
)
def test_a_rank_that_stays_away(found: Any, case: str, text: str) -> None:
    """One gives up at the timeout of the group, the late one where it finds the other gone."""
    (first, waited), (second, late) = found[case]
    assert first.startswith(text) and ("Timed out waiting 3000ms" in first or "timeout" in first)
    assert second.startswith(text) and "Connection closed by peer" in second
    assert TIMEOUT_S <= waited < TIMEOUT_S + GRACE_S and late < 1.5 * TIMEOUT_S + GRACE_S


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("another order", "PlanError: the planned orders differ between ranks: at place "),
        (
            "another link",
            "PlanError: the graphs differ between ranks: at place 0, rank 0 of the group has ",
        ),
    ],
)
def test_a_rank_that_plans_something_else(found: Any, case: str, text: str) -> None:
    (first, _), (second, _) = found[case]
    assert first.startswith(text) and first == second
