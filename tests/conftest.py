"""What every test starts from; the helpers that tests import are in tests/helpers."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # shared cores
settings.register_profile("same", relaxed, derandomize=True, database=None)
settings.register_profile("explore", relaxed, max_examples=2000)
settings.load_profile("same")  # pytest --hypothesis-profile=explore for more
sys.path.append(str(Path(__file__).with_name("helpers")))
torch.set_num_threads(1)  # for tiny tensors, threads on shared cores wait for one another


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture(autouse=True)
def _fresh_start() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    logging.getLogger("torch.__trace").propagate = False  # thousands of lines below each failure
