"""What training holds, against the table of the ZeRO paper and against torch's own optimizers."""

import pytest
import torch
from torch import nn

from graphopt.cost_models.training_state import State, TrainingSetup
from graphopt.errors import GraphoptError

ELEMENTS = 7_500_000_000
HALF = State(2 * ELEMENTS, 2 * ELEMENTS, 0, 0, 0, 2)


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_the_table_of_zero(stage: int, gigabytes: float) -> None:
    """7.5e9 parameters, Adam in mixed precision, 64 ranks (Rajbhandari et al. 2020, figure 1)."""
    setup = TrainingSetup("adam", True, stage, 64)
    whole = setup.held_bytes(HALF) + setup.gradient_bytes(HALF, HALF.gradient_bytes)
    assert whole / 1e9 == pytest.approx(gigabytes, rel=5e-3)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("sgd", lambda p: torch.optim.SGD(p, 0.1)),
        ("momentum", lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        ("adam", lambda p: torch.optim.Adam(p, 0.1)),
    ],
)
def test_the_state_of_torch_optimizers(name: str, optimizer: object) -> None:
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    made = optimizer(net.parameters())  # type: ignore[operator]
    net(torch.ones(2, 5)).sum().backward()
    made.step()
    held = sum(v.nbytes for s in made.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    nbytes = sum(p.nbytes for p in net.parameters())
    state = State(nbytes, nbytes, 0, len(list(net.parameters())))
    assert TrainingSetup(name).optimizer_bytes(state) == held


def test_units_are_gathered_and_reduced_whole() -> None:
    state = State(1000, 1000, 100, 10, 200)
    alone, sharded = TrainingSetup(data=10), TrainingSetup(data=10, zero=3)
    assert alone.held_bytes(state) == 1000
    assert sharded.held_bytes(state) == 100 + 2 * 200
    assert sharded.gradient_bytes(state, 600) == 60 + 200
    assert TrainingSetup(tensor=2, pipeline=5).held_bytes(state) == 100


def test_what_is_refused() -> None:
    with pytest.raises(GraphoptError, match="optimizer='lion' is none of"):
        TrainingSetup("lion")
    with pytest.raises(GraphoptError, match="zero=4"):
        TrainingSetup(zero=4)
    with pytest.raises(GraphoptError, match="tensor=0"):
        TrainingSetup(tensor=0)
