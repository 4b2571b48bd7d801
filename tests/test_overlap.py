"""Models split over two gloo ranks give the same bits in the planned order, on all ranks or on none."""

from typing import Any

import pytest
import torch
from ranks import found_by

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found."""
    return found_by("overlap_worker", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("model", ["llama", "branches", "measured", "slower", "uneven"])
def test_results_and_gradients_are_the_same_bits(found: Any, model: str) -> None:
    case = found[model]
    assert len(case["equal"]) == {"llama": 14, "uneven": 5}.get(model, 9)
    assert all(case["equal"]) and all(case["nonzero"])
    assert case["same plan"]


@pytest.mark.parametrize("model", ["llama", "branches", "slower"])
def test_transfers_are_hidden(found: Any, model: str) -> None:
    before, after, bound = found[model]["seconds"]
    assert bound <= after < 0.99 * before
    assert found[model]["exposed"][1] < found[model]["exposed"][0]
    assert found[model]["transfers"] == (7 if model == "llama" else 12)


def test_what_runs_is_the_plan(found: Any) -> None:
    assert found["as planned"]


def test_the_report(found: Any) -> None:
    case = found["llama"]
    assert case["plan"] in case["report"] and case["plan"].startswith("7 transfers, exposed ")
    assert "x the bound" in case["plan"] and "dependency" in case["report"]
    assert case["kinds"] == ["all_reduce"] and case["sources"] == ["roofline"]


def test_links_are_measured(found: Any) -> None:
    assert found["measured"]["kinds"] == ["all_gather", "all_reduce", "reduce_scatter"]
    assert found["measured"]["sources"] == ["measured"]


def test_the_slowest_rank_counts(found: Any) -> None:
    assert found["largest"] == [1.0, 3.0]
    assert found["slower"]["seconds"][0] > 1.3 * found["branches"]["seconds"][0]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("graph", "PlanError: Sequential: the graphs differ between ranks: at place"),
        (
            "options",
            "the graphs differ between ranks: at place 0, rank 0 of the group has (None, 0, 1.01, 1",
        ),
        (
            "order",
            "PlanError: the planned orders differ between ranks: at place 2, rank 0 of the group has 0",
        ),
        ("length", "at place 1, rank 0 of the group has nothing, rank 1 has a"),
    ],
)
def test_every_rank_says_what_differs(found: Any, case: str, said: str) -> None:
    first, second = found["refused"][case]
    assert said in first and first == second


def test_a_rank_that_stopped(found: Any) -> None:
    assert "could not compare the graphs; one of them has stopped" in found["alone"]
