"""Two processes that average their gradients do so with an optimized model, too."""

from pathlib import Path

import pytest
import torch
from ranks import found_by


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("mode", ["inside", "buckets", "outside"])
def test_data_parallel_training_is_eagers(mode: str, tmp_path: Path) -> None:
    found = found_by("data_parallel_worker", tmp_path, mode)
    assert found["same"] == [True] * 12 and found["shared"]
    assert found["products again"] > 0
    assert found["graphs"] > 1 or mode != "buckets"
