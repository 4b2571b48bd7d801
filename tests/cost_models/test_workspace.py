"""The predicted workspace against the allocator's."""

import itertools

import pytest
import torch

from graphopt.cost_models.measured import probe, probe_key
from graphopt.cost_models.workspace import workspace_bytes

aten = torch.ops.aten


def pairs(graph) -> list[tuple[int, int]]:
    """(predicted, measured) workspace of each node that can be probed."""
    probes = probe(graph.nodes, repeats=0, cache=None)
    return [
        (workspace_bytes(node), probes[key].workspace_bytes)
        for node in graph.nodes
        if (key := probe_key(node)) is not None
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_is_exact(traced, dtype: torch.dtype) -> None:
    def function(x):
        y, mask = aten.native_dropout(x, 0.1, True)
        return aten.native_dropout_backward(y, mask, 1 / 0.9)

    (forward, backward) = pairs(traced(function, torch.randn(64, 48, dtype=dtype)))
    assert forward[0] == forward[1] == 64 * 48 * dtype.itemsize
    assert backward[0] == pytest.approx(backward[1], abs=16)  # the scale as a tensor


def test_dropout_of_all_or_nothing_is_exact(traced) -> None:
    x = torch.ones(64)
    functions = {
        lambda x: aten.native_dropout(x, 0.0, True): 256,
        lambda x: aten.native_dropout(x, 1.0, True): 256,
        lambda x: aten.native_dropout(x, 0.5, False): 0,
        lambda x: aten.native_dropout(x, 0.5, None): 256,
    }
    for function, workspace in functions.items():
        assert pairs(traced(function, x)) == [(workspace, workspace)]


def test_batch_norm_backward_is_exact(traced) -> None:
    plain = torch.randn(4, 8, 6, 6)
    last = plain.to(memory_format=torch.channels_last)
    scale = torch.randn(8)
    for grad, x in itertools.product((plain, last), repeat=2):
        graph = traced(
            lambda grad, x, scale: aten.native_batch_norm_backward(
                grad, x, scale, scale, scale, scale, scale, True, 1e-5, [True] * 3
            ),
            grad,
            x,
            scale,
        )
        ((predicted, found),) = pairs(graph)
        assert predicted == pytest.approx(found, abs=64)  # less a number per channel
        assert bool(predicted) == (grad is x)


@pytest.fixture
def two_threads():
    """With one thread oneDNN computes some convolutions in the plain layout, without scratch."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="a layout of oneDNN's own")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution_is_bounded_from_below(traced, kernel: int, stride: int) -> None:
    settings = ([stride] * 2, [kernel // 2] * 2, [1, 1], False, [0, 0], 1)

    def function(x, weight):
        y = aten.convolution(x, weight, None, *settings)
        return aten.convolution_backward(y, x, weight, None, *settings, [True, True, False])

    for channels in (3, 16, 24, 64):
        inputs = torch.randn(4, channels, 28, 28), torch.randn(32, channels, kernel, kernel)
        (forward, backward) = pairs(traced(function, *inputs))
        assert 0 < forward[0] <= forward[1]
        assert 0 < backward[0] <= backward[1]
        if stride == 1:
            assert forward[0] >= 0.8 * forward[1]


def test_symbolic_sizes_guard_nothing(traced) -> None:
    def function(x, weight):
        return torch.conv2d(x, weight, padding=1)

    graph = traced(function, torch.randn(4, 16, 28, 28), torch.randn(32, 16, 3, 3), mode="symbolic")
    size = next(iter(graph.nodes)).meta["val"].shape[0]
    guards = len(size.node.shape_env.guards)
    assert max(workspace_bytes(node) for node in graph.nodes) >= 4 * 4 * 32 * 28 * 28
    assert len(size.node.shape_env.guards) == guards


def test_other_ops_and_devices_count_nothing(traced) -> None:
    graph = traced(lambda x: aten.native_dropout(x, 0.1, True), torch.empty(64, device="meta"))
    assert [workspace_bytes(node) for node in graph.nodes] == [0] * len(graph.nodes)
