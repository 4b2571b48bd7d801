"""A vocabulary split over gloo processes gives the losses and gradients of one process."""

from typing import Any

import pytest
import torch
from ranks import found_by

from graphopt.cost_models.split_vocab import exchanges
from graphopt.vocab_exchange import SplitSizes, Way
from graphopt.vocab_loss import LossOptions

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the ranks found, and how many they were."""
    results = found_by("split_vocab_worker", tmp_path_factory.mktemp("ranks"), str(request.param))
    return {"ranks": request.param, **results}


def test_every_option_is_exact(found: Any) -> None:
    options = found["options"]
    assert len(options["worst"]) == 9 and options["count"] == (360 if found["ranks"] == 2 else 72)
    assert max(options["worst"].values()) < 1e-12, options["worst"]


def test_probabilities_as_targets_are_exact(found: Any) -> None:
    assert found["probable"]["count"] == 120 and found["probable"]["worst"] < 1e-12


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_low_precision_is_as_close_to_float64_as_one_process(found: Any, dtype: str) -> None:
    eager = found["precision"][dtype]["eager"]
    assert len(found["precision"][dtype]["ours"]) == 6
    for way, errors in found["precision"][dtype]["ours"].items():
        pairs = zip(errors, eager, strict=True)
        assert all(error <= 1.1 * plain for error, plain in pairs), (way, errors, eager)


def test_repeats_and_ranks_agree_bit_for_bit(found: Any) -> None:
    assert found["repeats"]


def test_collectives_are_as_planned(found: Any) -> None:
    assert len(found["counted"]) == 36
    for way, smoothing, training, seen in found["counted"]:
        numbers = 3 if smoothing else 2
        sizes = SplitSizes(13, 6, 11, found["ranks"], numbers=numbers, training=training)
        planned = exchanges(sizes, Way(*way))
        kinds = [{"all_gather": "all_gather_into_tensor"}.get(c.kind, c.kind) for c in planned]
        assert [[k, c.nbytes] for k, c in zip(kinds, planned, strict=True)] == seen, way


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("target", "IndexError: Target 11 is out of bounds."),
        ("eager target", "IndexError: Target 11 is out of bounds."),
        ("probabilities", "(13, 10) must be (N, D) and (N,), or probabilities (N, 11)"),
        ("their gradient", "GraphoptError: targets of a split vocabulary get no gradient"),
        ("their index", "GraphoptError: ignore_index is not supported for probabilities"),
        ("weight", "GraphoptError: rank 0 needs a weight"),
        ("dtype", "GraphoptError: x is torch.float64, the weight torch.float32"),
        ("cap", "GraphoptError: the one-barrier algorithm has no soft cap"),
        ("way", "is none of ('three-barrier'"),
        ("small", "GraphoptError: a vocabulary of 1 words cannot be split over 2 ranks"),
        ("mesh", "GraphoptError: the mesh has 2 dimensions ('dp', 'tp'): name the one that splits"),
        ("dim", "GraphoptError: the mesh has no dimension 'pp', only ('dp', 'tp')"),
    ],
)
def test_refusals(found: Any, case: str, said: str) -> None:
    assert said in found["edges"][case]


@pytest.mark.parametrize("case", ["right dim", "ignored", "twice"])
def test_edges(found: Any, case: str) -> None:
    assert found["edges"][case] is True


def test_embedding_logits_and_a_tied_weight(found: Any) -> None:
    assert found["ends"]["worst"] < 1e-12
    assert found["ends"]["index"] == "IndexError: index out of range in self"


def test_options_are_those_of_cross_entropy() -> None:
    with pytest.raises(ValueError, match="average is not a valid value for reduction"):
        LossOptions(reduction="average")
