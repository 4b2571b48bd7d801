"""Bytes and seconds of nodes, by hand."""

import pytest
import torch

from graphopt.cost_models.devices import Device, get_device
from graphopt.cost_models.nodes import FREE, NodeCost, cost_table, node_cost
from graphopt.cost_models.roofline import bound_by, ridge_flops_per_byte, seconds

aten = torch.ops.aten

# 1000 operations and 100 bytes per second, one second per op.
SLOW = Device("slow", "cuda", 10**6, 100.0, (("bfloat16", 4000.0), ("float32", 1000.0)), 1.0, 1, "")


def costs(graph) -> list[NodeCost]:
    """The costs of the nodes that are not free, in order."""
    return [cost for cost in cost_table(graph, SLOW).values() if cost != FREE]


def test_seconds_by_hand() -> None:
    assert seconds(5000, 200, torch.float32, SLOW) == 1 + 5  # arithmetic
    assert seconds(5000, 200, torch.bfloat16, SLOW) == 1 + 2  # memory
    assert seconds(5000, 200, torch.float32, SLOW, efficiency=0.5) == 1 + 10
    assert seconds(0, 200, torch.bfloat16, SLOW, elementwise_ops=3000) == 1 + 3
    assert bound_by(5000, 200, torch.float32, SLOW) == "arithmetic"
    assert bound_by(5000, 200, torch.bfloat16, SLOW) == "memory"
    assert bound_by(500, 20, torch.float32, SLOW) == "overhead"
    assert ridge_flops_per_byte(torch.bfloat16, SLOW) == 40


def test_bytes_by_hand(traced) -> None:
    x, column = torch.randn(4, 6), torch.randn(4, 1)
    assert costs(traced(lambda x: x + x, x)) == [NodeCost(0, 96, 96, 1 + 1.92)]  # x is read once
    assert costs(traced(lambda x: x + 1, x.to(torch.bfloat16))) == [NodeCost(0, 48, 48, 1 + 0.96)]
    (_, add) = costs(traced(lambda x, c: x + aten.neg(c).expand(4, 6), x, column))
    assert (add.read_bytes, add.write_bytes) == (96 + 16, 96)  # the expanded operand once
    (mm,) = costs(traced(lambda x: aten.mm(x, x.t()), x))
    assert mm == NodeCost(2 * 4 * 6 * 4, 96 + 96, 64, 1 + 2.56)
    (norm,) = costs(traced(lambda x: aten.native_layer_norm(x, [6], None, None, 1e-5)[0], x))
    assert norm.write_bytes == 96 + 2 * 16  # also the mean and the deviation of each row


def test_views_are_free_and_a_copying_reshape_is_not(traced) -> None:
    x = torch.randn(4, 6)
    assert costs(traced(lambda x: aten._unsafe_view(x.t()[1:].unsqueeze(0), [5, 4]), x)) == []
    assert costs(traced(lambda x: aten.split(x, 2)[1].detach(), x)) == []
    (copy,) = costs(traced(lambda x: x.t().reshape(24), x))
    assert copy.write_bytes == 96


def test_reads_of_a_part(traced) -> None:
    table, ids = torch.randn(1000, 8), torch.zeros(4, dtype=torch.int64)
    (embedding,) = costs(traced(lambda t, i: aten.embedding(t, i), table, ids))
    assert (embedding.read_bytes, embedding.write_bytes) == (4 * 8 * 4 + 4 * 8, 4 * 8 * 4)
    (zeros,) = costs(traced(lambda t: aten.zeros_like(t), table))
    assert (zeros.read_bytes, zeros.write_bytes) == (0, 32_000)
    (empty,) = costs(traced(lambda t: aten.empty_like(t), table))
    assert (empty.read_bytes, empty.write_bytes) == (0, 0)


def test_in_place_op_reads_and_writes(traced) -> None:
    (add,) = costs(traced(lambda x: x.detach().add_(1), torch.randn(4, 6)))
    assert (add.read_bytes, add.write_bytes) == (96, 96)


def test_empty_tensor_costs_its_overhead(traced) -> None:
    assert costs(traced(lambda x: x * 2, torch.randn(0, 6))) == [NodeCost(0, 0, 0, 1.0)]


def test_table_of_a_joint_graph(joint_graph) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Dropout(0.1))
    graph = joint_graph(lambda x: model(x).sum(), torch.randn(8, 64, requires_grad=True))
    table = cost_table(graph, get_device("h100"))
    assert list(table) == [node.name for node in graph.nodes]
    assert sum(cost.flops for cost in table.values()) == 3 * 2 * 8 * 64 * 64
    kernels = [cost for cost in table.values() if cost.seconds]
    assert 0 < len(kernels) < len(table)
    assert all(cost.seconds >= get_device("h100").overhead_s for cost in kernels)


def test_random_numbers_are_dear_on_a_cpu(traced) -> None:
    graph = traced(lambda x: aten.native_dropout(x * 2, 0.5, True), torch.randn(512, 512))
    mul, dropout = (n for n in graph.nodes if n.target in (aten.mul.Tensor, aten.native_dropout.default))
    cpu, gpu = get_device("cpu-generic"), get_device("a100")
    assert node_cost(dropout, cpu).seconds > 5 * node_cost(mul, cpu).seconds
    assert node_cost(dropout, gpu).seconds < 2 * node_cost(mul, gpu).seconds


def test_depthwise_convolution_is_less_efficient(traced) -> None:
    def seconds_per_flop(groups: int) -> float:
        inputs = (torch.randn(4, 64, 56, 56), torch.randn(64, 64 // groups, 7, 7))
        graph = traced(lambda x, w: torch.conv2d(x, w, groups=groups), *inputs)
        (cost,) = [c for c in cost_table(graph, get_device("cpu-generic")).values() if c.flops]
        return cost.seconds / cost.flops

    assert seconds_per_flop(64) > 2 * seconds_per_flop(1)
    assert seconds_per_flop(2) == pytest.approx(seconds_per_flop(1), rel=0.2)


def test_symbolic_sizes_count_as_hints(traced) -> None:
    graph = traced(lambda x: x.exp() + 1, torch.randn(6, 10), mode="symbolic")
    assert [cost.write_bytes for cost in costs(graph)] == [240, 240]
    size = next(iter(graph.nodes)).meta["val"].shape[0]
    assert isinstance(size, torch.SymInt)
    assert not size.node.shape_env.guards
