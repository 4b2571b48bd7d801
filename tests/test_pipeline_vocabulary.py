"""A pipeline whose vocabulary is split trains as one process does."""

from pathlib import Path
from typing import Any

import pytest
from pipeline_worker import ONE
from ranks import found_by
from vocabulary_worker import make_plan

from graphopt.errors import PlanError
from graphopt.passes.stage_schedule import plan_pipeline
from graphopt.pipeline_transfers import algorithm_of, with_head, with_transfers

SAME = 1e-12


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What two ranks found."""
    return found_by("vocabulary_worker", tmp_path_factory.mktemp("two"), "2")


def test_losses_and_gradients_are_those_of_one_process(two: Any) -> None:
    assert len(two["worst"]) == 16
    assert max(two["worst"].values()) < SAME, two["worst"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [3, 4])
def test_a_longer_pipeline_is_one_process(ranks: int, tmp_path: Path) -> None:
    found = found_by("vocabulary_worker", tmp_path, str(ranks))
    assert max(found["worst"].values()) < SAME, found["worst"]


def test_what_does_not_fit_is_refused_by_name(two: Any) -> None:
    texts = two["refusals"]
    assert texts["absent"] == "the plan has a split vocabulary, and none was given"
    assert texts["extra"] == "the plan has no split vocabulary, and one was given"
    assert texts["loss"] == "a split vocabulary has its own loss: loss_fn must be None"
    assert texts["cap"] == "vocab-2 has no soft cap of logits; take vocab-1"
    assert "1f1b vocab-naive" in texts["naive"]
    assert "step takes the target on every rank" in texts["target"]
    assert "step takes the ids on every rank" in texts["ids"]
    assert texts["shapes"].startswith("the embedding (36, 8) and the head (37, 8)")
    assert "reduction='none'" in texts["reduction"]


@pytest.mark.parametrize("schedule", ["1f1b", "v-half"])
@pytest.mark.parametrize("algorithm", ["vocab-1", "vocab-2"])
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_rows_hold_every_pass_where_it_can_run(schedule: str, algorithm: str, devices: int) -> None:
    plan = with_head(make_plan(devices, schedule, algorithm))
    rows = with_transfers(plan)
    assert algorithm_of(plan) == algorithm
    for device, row in enumerate(rows):
        kept = [t for t in row if not any(k in t for k in ("SEND", "RECV", "REDUCE"))]
        assert kept == list(plan.orders[device])
        for kind in "ST":
            assert (
                sum(t.startswith(f"{device}{kind}") and t[len(str(device)) + 1 :].isdigit() for t in row)
                == 5
            )
        assert not any("E" in t for t in kept)


def test_a_backward_before_its_passes_is_refused() -> None:
    from dataclasses import replace

    plan = with_head(make_plan(2, "1f1b", "vocab-2"))
    first = list(plan.orders[0])
    first.remove("0S0")
    first.append("0S0")
    late = replace(plan, orders=(tuple(first), plan.orders[1]))
    with pytest.raises(PlanError, match="run S in different orders"):
        with_head(late)
    with pytest.raises(PlanError, match="wait for each other"):
        with_transfers(late)
    assert algorithm_of(plan_pipeline([ONE] * 2, 2, schedule="1f1b")) is None
