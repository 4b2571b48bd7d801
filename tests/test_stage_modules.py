"""Stages of traced models are the model, in one process and as a pipeline."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import found_by
from torch import nn

from graphopt import trace, zoo
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.errors import PlanError
from graphopt.passes.stage_partition import StagePlan, cut_stages
from graphopt.program import Program
from graphopt.stage_modules import own_loss, stage_modules

ONE_DEVICE = [(0,)] * 4


def cut(model: nn.Module, batch: Any, stages: int) -> tuple[Program, StagePlan]:
    program = trace(model, batch)
    return program, cut_stages(program, Costs.of(program, get_device("a100")), stages)


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_stages_one_after_the_other_are_the_model(name: str) -> None:
    torch.manual_seed(0)
    model = without_dropout(zoo.build(name, "small"))
    whole, batch = copy.deepcopy(model), zoo.example_batch(name, model, 2, 16)
    program, plan = cut(model, batch, 4)
    stages = stage_modules(program, plan, model, stage_devices=ONE_DEVICE)
    received: Any = ()
    for stage in stages:
        received = stage(*received, **batch)
        received = received if isinstance(received, tuple) else (received,)
    own_loss(received, None).backward()
    loss = whole(**batch).loss
    loss.backward()
    assert torch.equal(received[0], loss)
    for ours, exact in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, exact.grad, rtol=1e-5, atol=1e-6)
    held = [sum(1 for _ in stage.parameters()) for stage in stages]
    assert all(held) and sum(held) >= sum(1 for _ in model.parameters())


def test_they_are_a_pipeline(tmp_path: Path) -> None:
    found = found_by("stages_worker", tmp_path, "2")
    assert set(found) == {"llama 1f1b", "gpt2 zbv"}
    assert max(found.values()) < 1e-11, found


def test_what_cannot_be_cut_is_refused_by_name() -> None:
    model = without_dropout(zoo.build("gpt2", "small"))
    program, plan = cut(model, zoo.example_batch("gpt2", model, 1, 8), 2)
    with pytest.raises(PlanError, match=r"stages \[0, 1\] read transformer.wte.weight: put them on one"):
        stage_modules(program, plan, model)
    with pytest.raises(PlanError, match="another program: it cuts after 'nowhere'"):
        stage_modules(program, StagePlan(("nowhere",), *[()] * 6), model)
    normed = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    traced = trace(lambda x: normed(x).sum(), torch.ones(8, 4))
    with pytest.raises(PlanError, match=r"writes to .*, which a stage of a pipeline cannot"):
        stage_modules(traced, plan, normed)
