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


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_the_order_of_parts_is_near_the_bound(found: Any, case: str) -> None:
    _, after, bound = found[case]["seconds"]
    assert bound <= after <= 1.05 * bound


def test_inference(found: Any) -> None:
    assert found["inference"] == {"equal": True, "transfers": 4, "along": "batch"}
    assert found["text"] == {"equal": True, "transfers": 4, "along": "sequence"}


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


@pytest.mark.parametrize("model", ["llama", "gpt2"])
def test_norms_on_shares_of_the_tokens(found: Any, model: str) -> None:
    item = found[f"{model} shares"]
    assert all(item["equal"]) and item["same plan"] and item["shared"] == 2
    assert item["kinds"].count("reduce_scatter") == 2 and "all_reduce" not in item["kinds"]
    assert item["kinds"].count("all_gather") >= 2
    assert item["remark"].startswith("with norms on shares of the tokens predicted are")


def test_experts_on_chunks_of_their_capacity(found: Any) -> None:
    *chunked, small, training = found["experts"]
    assert [row[:2] for row in chunked[:2]] == [[2, 4], [3, 6]]
    assert chunked[2][0] == 1  # on a link that is so slow to start
    assert all(equal for _, _, equal, _ in chunked) and all(close for *_, close in chunked)
    assert small[0] == small[1]
    assert len(training["equal"]) == 5 and all(training["equal"]) and all(training["nonzero"])
    assert training["transfers"] == 8 and "in 2 chunks of the experts' capacity" in training["remark"]
