"""Models with parameters in shards on two gloo ranks: right, and the same bits within less memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import found_by

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found."""
    return found_by("sharded_worker", tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("model", ["llama", "shared"])
def test_gradients_are_those_of_one_process(found: Any, model: str) -> None:
    assert found[model]["right"] and found[model]["names"]


@pytest.mark.parametrize(("model", "case"), [("llama", "tight"), ("shared", "tight"), ("shared", "free")])
def test_the_same_bits(found: Any, model: str, case: str) -> None:
    item = found[model][case]
    assert all(item["equal"]) and all(item["nonzero"]) and item["same plan"] and item["reported"]


@pytest.mark.parametrize("model", ["llama", "shared"])
def test_any_parameter_may_be_gathered_again(found: Any, model: str) -> None:
    assert found[model]["subsets"] == [True] * 3


def test_less_memory_gathers_again(found: Any) -> None:
    assert found["shared"]["free"]["again"] == 0 < found["shared"]["tight"]["again"]
    tight = found["llama"]["tight"]
    assert tight["again"] > 0 and tight["peaks"][1] <= 0.9 * tight["peaks"][0]


def test_inference(found: Any) -> None:
    assert found["inference"]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("fully_shard", "TraceError: the parameters of FSDPLinear 0 are gathered by torch's fully_shard"),
        ("fully_shard, sharded", "shard the plain model with graphopt.shard_parameters(model, mesh)"),
        ("twice", "GraphoptError: weight is a DTensor before its sharding"),
        ("plane", "GraphoptError: parameters are sharded over a mesh of one dimension, not 2"),
        ("recurrent", "GraphoptError: LSTM keeps its parameters in a list, so that they cannot be"),
        ("too little", "PlanError: Sequential: no order of the operators found fits 50 B; the least"),
    ],
)
def test_refusals(found: Any, case: str, said: str) -> None:
    first, second = found["refused"][case]
    assert said in first and first == second


@pytest.mark.slow
def test_two_layers_of_eight_are_enough(tmp_path: Path) -> None:
    found = found_by("sharded_worker", tmp_path, "deep")
    free, tight = found["free"], found["tight"]
    assert free["equal"] and tight["equal"] and free["again"] == 0 < tight["again"]
    assert tight["gap"] <= 1.01 and tight["seconds"] <= 1.01 * free["seconds"]
    assert free["room"] == free["gathered"] and tight["room"] <= 0.25 * free["gathered"]
