"""Tensor parallel models on parts of the batch give the same bits on two gloo ranks."""

from typing import Any

import pytest
import torch
from ranks import found_by

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found."""
    return found_by("batch_split_worker", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(
    ("case", "parts", "transfers"),
    [("llama", 2, 14), ("gpt2", 2, 12), ("thirds", 3, 6), ("refused", 1, 2)],
)
def test_results_and_gradients_are_the_same_bits(
    found: Any, case: str, parts: int, transfers: int
) -> None:
    item = found[case]
    assert all(item["equal"]) and all(item["nonzero"]) and item["same plan"] and item["reported"]
    assert (item["parts"], item["transfers"]) == (parts, transfers)


def test_inference(found: Any) -> None:
    assert found["inference"] == {"equal": [True], "transfers": 4}


def test_a_predicted_loss_is_refused(found: Any) -> None:
    assert found["refused"]["remark"].startswith("the batch stays whole: predicted are ")


def test_what_rounds_otherwise_stays_whole(found: Any) -> None:
    """Products of two rows may take another kernel than those of eight."""
    exact, loose = found["rounding"], found["rounded"]
    assert all(exact["equal"]) and all(loose["close"])
    if not all(loose["equal"]):
        assert "operators stay whole, as they round otherwise on a part" in exact["remark"]


def test_every_rank_refuses(found: Any) -> None:
    first, second = found["too many"]
    assert first == second and "split=9: its batch of 8 has less than 9 samples" in first
    first, second = found["uneven"]
    assert "Totals: split=2: other ranks cannot split it in the same way" in first
    assert "Totals: split=2: no transfer depends on the batch" in second
