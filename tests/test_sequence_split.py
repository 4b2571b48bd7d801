"""Tensor parallel models on parts of one text, or shares of its tokens, on two gloo ranks."""

from typing import Any

import pytest
import torch
from ranks import found_by

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def check(item: Any, transfers: int) -> None:
    assert item["equal"] and item["same plan"]
    assert (item["along"], item["parts"], item["transfers"]) == ("sequence", 2, transfers)


@pytest.mark.slow
def test_models_and_training(tmp_path_factory: pytest.TempPathFactory) -> None:
    found = found_by("sequence_split_worker", tmp_path_factory.mktemp("ranks"))
    for name, transfers in {"llama": 4, "qwen2": 4, "gpt2": 4, "mixtral": 2, "long": 4}.items():
        check(found[name], transfers)
    every = ("llama", "qwen2", "gpt2", "mixtral")
    for name, parts, models in (("training", 2, every), ("shares", 1, ("llama", "gpt2"))):
        for item in (found[f"{model} {name}"] for model in models):
            assert all(item["equal"]) and all(item["nonzero"])
            assert item["same plan"] and item["parts"] == parts
    for name, sums in {"llama": 3, "gpt2": 9}.items():  # gradients of norms, biases and positions
        item = found[f"{name} partial shares"]
        assert all(item["close"]) and item["equal"].count(False) <= sums
    first, second = found["masked"]
    assert first == second and "flash_attention_for_cpu.default) has a mask, which is not known" in first
    assert found["chosen"]["along"] == "sequence"
    assert found["chosen"]["seconds"][1] < 0.98 * found["chosen"]["seconds"][0]
    assert found["refused"]["parts"] == 1 and "in 2 parts of 32 tokens" in found["refused"]["remark"]
    for name in ("double", "double thirds"):
        assert found[name]["along"] == "sequence" and found[name]["error"] < 1e-12
