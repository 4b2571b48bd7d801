"""What every test starts from; the helpers that tests import are in tests/helpers."""

import logging
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "graphopt",
    deadline=None,  # the cores are shared
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "graphopt"))
sys.path.append(str(Path(__file__).with_name("helpers")))
torch.set_num_threads(2)
logging.getLogger("torch.__trace").propagate = False  # thousands of lines below each failure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture(autouse=True)
def _fresh_start() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
