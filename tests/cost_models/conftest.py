"""Graphs to measure: joint graphs as AOTAutograd makes them, and small traced functions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import default_partition
from torch.fx.experimental.proxy_tensor import make_fx


def _joint_graph(model: Callable[..., torch.Tensor], *inputs: torch.Tensor, **options: Any) -> fx.Graph:
    """The forward and backward of ``model(*inputs)``, a number, as one graph, not decomposed."""
    found = []

    def partition(joint: fx.GraphModule, joint_inputs: Any, **keywords: Any) -> Any:
        found.append(joint)
        return default_partition(joint, joint_inputs, **keywords)

    def compile_nothing(module: fx.GraphModule, _inputs: Any) -> Any:
        return make_boxed_func(module.forward)

    backend = aot_autograd(fw_compiler=compile_nothing, partition_fn=partition, decompositions={})
    torch._dynamo.reset()
    torch.compile(model, backend=backend, **options)(*inputs)
    (joint,) = found
    return joint.graph


def _traced(function: Callable[..., Any], *inputs: Any, mode: str = "fake") -> fx.Graph:
    """`function` as a graph of the ops it calls."""
    return make_fx(function, tracing_mode=mode)(*inputs).graph


@pytest.fixture
def joint_graph() -> Callable[..., fx.Graph]:
    return _joint_graph


@pytest.fixture
def traced() -> Callable[..., fx.Graph]:
    return _traced
