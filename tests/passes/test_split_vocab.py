"""Language models whose vocabulary is split over two gloo processes train as plain ones do."""

from typing import Any

import pytest
import torch
from ranks import found_by

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")

HALVES = {
    "gpt2, tied": ["transformer.wte.weight"],
    "llama, untied": ["lm_head.weight", "model.embed_tokens.weight"],
    "gemma2, tied, soft cap": ["model.embed_tokens.weight"],
    "phi, bias": ["lm_head.weight", "lm_head.bias", "model.embed_tokens.weight"],
    "renamed": ["d.weight", "d.bias", "b.weight"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found."""
    return found_by("split_models_worker", tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("model", HALVES)
def test_parameters_are_found_by_structure(found: Any, model: str) -> None:
    assert found[model]["names"] == HALVES[model]
    assert found[model]["rows"] == [50] * len(HALVES[model])  # of 101, on rank 0
    assert found[model]["plan"].startswith(", ".join(HALVES[model]) + ": 101 words over 2 ranks")
    assert found[model]["same plan"]


@pytest.mark.parametrize("model", HALVES)
def test_training_is_that_of_the_plain_model(found: Any, model: str) -> None:
    # transformers casts float64 logits to float32, so that its plain models are the coarser ones
    bar = 1e-12 if model == "renamed" else 2e-6
    assert found[model]["loss"] < bar
    assert found[model]["trained"] < bar


@pytest.mark.parametrize("model", HALVES)
def test_logits_are_gathered_where_they_are_used(found: Any, model: str) -> None:
    assert found[model]["logits type"] == "SplitLogits"
    assert found[model]["logits"] < (1e-12 if model == "renamed" else 2e-6)
    three = model == "llama, untied"  # the embedding, and one exchange, or two
    assert found[model]["collectives without gradients"] == (3 if three else 2)


@pytest.mark.parametrize("model", HALVES)
def test_state_dicts_are_of_the_whole_model(found: Any, model: str) -> None:
    assert found[model]["loaded"] == 0.0
    assert found[model]["copied"] == 0.0


def test_checkpoints_between_the_ends_of_a_split_vocabulary(found: Any) -> None:
    ours = found["with checkpoint"]
    assert ours["loss"] < 1e-12 and ours["gradients"] < 1e-12
    assert ours["rows"] == [50, 50] and ours["state"] == 0.0
    assert ours["planned"] >= 1


def test_no_model_is_split_twice(found: Any) -> None:
    assert "split already" in found["renamed"]["again"]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("mesh", "GraphoptError: SplitVocab splits over the ranks of a mesh: give mesh="),
        ("passes", "GraphoptError: over a mesh, passes= takes one SplitVocab()"),
        ("memory", "GraphoptError: over a mesh, passes= takes one SplitVocab()"),
        ("dimension", "GraphoptError: the mesh has 2 dimensions ('dp', 'tp'): name the one that splits"),
        ("function", "GraphoptError: SplitVocab takes a module"),
        ("batch", "PlanError: the model does not run on input_ids, labels"),
        ("algorithm", "PlanError: algorithm='no-barrier' is none of"),
    ],
)
def test_refusals(found: Any, case: str, said: str) -> None:
    assert found["refusals"][case].startswith(said)
