"""DTensors at the ends of a split vocabulary: two gloo processes against one."""

from typing import Any

import pytest
import torch
from ranks import found_by

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found."""
    return found_by("split_dtensor_worker", tmp_path_factory.mktemp("dtensors"))


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_a_model_of_dtensors_trains_as_a_plain_one(found: Any, model: str) -> None:
    ours = found[model]
    assert set(ours["rows"]) == {6}  # of 11 words, as DTensor cuts them, on rank 0
    assert max(ours["loss"], ours["trained"], ours["logits"]) < 1e-12
    assert ours["loss type"] == "DTensor"


@pytest.mark.parametrize("model", ["untied", "tied"])
def test_its_state_dict_is_of_dtensors_and_takes_plain_ones(found: Any, model: str) -> None:
    assert set(found[model]["placements"]) == {"(Shard(dim=0),)"}
    assert found[model]["loaded"] == found[model]["loaded plain"] == 0.0


def test_functions_of_dtensors_and_their_gradients(found: Any) -> None:
    assert len(found["functions"]) == 8 and max(found["functions"].values()) < 1e-12


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("x", "GraphoptError: x is a DTensor (Shard(dim=0),): it must be replicated"),
        ("columns", "GraphoptError: a weight (Shard(dim=1),) is not sharded by rows over one"),
        ("plain", "GraphoptError: say the shard of a weight that is no DTensor sharded by rows"),
        ("other shard", "GraphoptError: a weight (Shard(dim=0),) has not the rows of Shard(words=11"),
        ("empty", "GraphoptError: a vocabulary of 1 words cannot be split over 2 ranks"),
        ("mesh", "PlanError: the weight of the projection is sharded over other ranks"),
    ],
)
def test_refusals(found: Any, case: str, said: str) -> None:
    assert found["refusals"][case].startswith(said)
