"""A fingerprint is that of the graph: equal for the same one, another for any other."""

from collections.abc import Callable

import pytest
import torch
from programs import traced
from torch import nn

from graphopt import trace
from graphopt.fingerprint import fingerprint


def net(width: int = 4, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    return nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 1)).to(device, dtype)


def of(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> str:
    return fingerprint(trace(function, inputs, training=False))


def test_the_same_graph_of_other_weights_also_on_the_meta_device() -> None:
    prints = {fingerprint(trace(net(device=d), torch.randn(3, 4))) for d in ("cpu", "cpu", "meta")}
    assert len(prints) == 1


def test_other_sizes_dtypes_and_modes_differ() -> None:
    programs = [
        trace(net(), torch.ones(3, 4)),
        trace(net(), torch.ones(5, 4)),
        trace(net(6), torch.ones(3, 6)),
        trace(net(dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64)),
        trace(net(), torch.ones(3, 4), training=False),
        trace(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)), torch.ones(3, 4)),
    ]
    assert len({fingerprint(program) for program in programs}) == len(programs)


def test_edges_constants_and_strides_differ() -> None:
    x, y = torch.ones(3, 3), torch.ones(3, 3)
    prints = [
        of(lambda a, b: torch.relu(a) - torch.tanh(b), x, y),
        of(lambda a, b: torch.tanh(a) - torch.relu(b), x, y),
        of(lambda a, b: torch.relu(a) - torch.tanh(a), x, y),
        of(lambda a, b: torch.relu(a) - torch.tanh(b), x.t(), y.t()),
        of(lambda a, b: torch.relu(a) * 2.0, x, y),
        of(lambda a, b: torch.relu(a) * 2.5, x, y),
        of(lambda a, b: torch.relu(a) * 2, x, y),
    ]
    assert len(set(prints)) == len(prints)


@pytest.mark.parametrize("name", ["perceptron", "multi-output", "dropouts"])
def test_any_change_of_one_node_changes_it(name: str) -> None:
    program = traced(name)[0]
    found = {fingerprint(program), fingerprint(program.copy())}
    assert len(found) == 1
    for number, node in enumerate(list(program.operators())[:8]):
        other = program.copy()
        changed = list(other.operators())[number]
        assert changed.name == node.name
        changed.args = (*changed.args, 0)
        found.add(fingerprint(other))
    assert len(found) == 9
