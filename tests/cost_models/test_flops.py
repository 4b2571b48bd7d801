"""Operations, against torch's own counter and by hand."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import flop_counter

from graphopt.cost_models.flops import node_flops, pointwise_ops
from graphopt.cost_models.values import UNBACKED_SIZE, hint

aten = torch.ops.aten


def counted(function, *inputs) -> int:
    """What torch's own counter sees in one eager run of forward and backward."""
    with flop_counter.FlopCounterMode(display=False) as counter:
        function(*inputs).backward()
    return counter.get_total_flops()


def total(graph) -> int:
    return sum(node_flops(node) for node in graph.nodes)


def the_node(graph, target):
    (node,) = [node for node in graph.nodes if node.target is target]
    return node


def test_mlp_equals_torch_counter(joint_graph) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU(), torch.nn.Linear(32, 5))
    x = torch.randn(3, 7, 8)

    def loss(x):
        return model(x).square().sum()

    assert total(joint_graph(loss, x)) == counted(loss, x) > 0


def test_convolutions_equal_torch_counter(joint_graph) -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
        torch.nn.BatchNorm2d(8),
        torch.nn.ConvTranspose2d(8, 4, 3, stride=2),
        torch.nn.ReLU(),
        torch.nn.Conv2d(4, 6, 5, dilation=2),
    )
    x = torch.randn(2, 3, 16, 16)

    def loss(x):
        return model(x).mean()

    assert total(joint_graph(loss, x)) == counted(loss, x) > 0


def test_attention_equals_math_backend(joint_graph) -> None:
    q = torch.randn(2, 4, 16, 8, requires_grad=True)
    k, v = (torch.randn(2, 4, 24, 8, requires_grad=True) for _ in range(2))

    def loss(q, k, v):
        return F.scaled_dot_product_attention(q, k, v).sum()

    with sdpa_kernel(SDPBackend.MATH):
        math_flops = counted(loss, q, k, v)
    graph = joint_graph(loss, q, k, v)
    forward = the_node(graph, aten._scaled_dot_product_flash_attention_for_cpu.default)
    scores = 2 * 2 * 4 * 16 * 24 * 8
    assert node_flops(forward) == 2 * scores
    assert math_flops == 6 * scores
    assert total(graph) == math_flops + scores  # the backward makes the scores again


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_convolution_backward_is_as_much_per_gradient(traced, groups: int, transposed: bool) -> None:
    x = torch.randn(2, 8, 6, 6)
    weight = torch.randn(8, 8 // groups, 3, 3)

    def backward(x, weight):
        settings = ([2, 2], [1, 1], [1, 1], transposed, [0, 0], groups)
        y = aten.convolution(x, weight, None, *settings)
        return [
            aten.convolution_backward(y, x, weight, None, *settings, mask)[0]
            for mask in ([True, True, False], [True, False, False])
        ]

    graph = traced(backward, x, weight)
    forward, both, one = (node_flops(n) for n in graph.nodes if n.target in CONVOLUTIONS)
    positions = 6 * 6 if transposed else 3 * 3
    assert forward == 2 * 2 * positions * weight.numel()
    assert (both, one) == (2 * forward, forward)


CONVOLUTIONS = (aten.convolution.default, aten.convolution_backward.default)


def test_products_by_hand(traced) -> None:
    cases = [
        (lambda a, b: aten.mm(a, b), [(3, 4), (4, 5)], 2 * 3 * 4 * 5),
        (lambda a, b: aten.bmm(a, b), [(2, 3, 4), (2, 4, 5)], 2 * 2 * 3 * 4 * 5),
        (lambda c, a, b: aten.addmm(c, a, b), [(5,), (3, 4), (4, 5)], 2 * 3 * 4 * 5),
        (lambda c, a, b: aten.baddbmm(c, a, b), [(2, 3, 5), (2, 3, 4), (2, 4, 5)], 240),
        (lambda c, a, b: aten.addbmm(c, a, b), [(3, 5), (2, 3, 4), (2, 4, 5)], 240),
        (lambda c, a, b: aten.addmv(c, a, b), [(3,), (3, 4), (4,)], 2 * 3 * 4),
        (lambda a, b: aten.mv(a, b), [(3, 4), (4,)], 2 * 3 * 4),
        (lambda a, b: aten.dot(a, b), [(4,), (4,)], 2 * 4),
    ]
    for function, shapes, flops in cases:
        graph = traced(function, *(torch.randn(shape) for shape in shapes))
        assert total(graph) == flops


def test_grouped_products_by_hand(traced) -> None:
    ends = torch.tensor([8, 16], dtype=torch.int32)
    shapes = {
        ((16, 32), (2, 32, 8)): 2 * 16 * 32 * 8,  # rows of a in two groups
        ((2, 8, 32), (32, 16)): 2 * 8 * 32 * 16,  # columns of b in two groups
        ((16, 16), (16, 8)): 2 * 16 * 16 * 8,  # the summed dimension in two groups
    }
    for (a, b), flops in shapes.items():
        operands = (torch.randn(shape, dtype=torch.bfloat16) for shape in (a, b))
        graph = traced(lambda a, b, ends: aten._grouped_mm(a, b, ends), *operands, ends)
        assert node_flops(the_node(graph, aten._grouped_mm.default)) == flops


def test_undecomposed_ops_of_an_export(traced) -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(8, 24)
            self.conv = torch.nn.Conv1d(4, 6, 3)

        def forward(self, x):
            q, k, v = self.linear(x).unflatten(-1, (3, 8)).unbind(-2)
            return self.conv(F.scaled_dot_product_attention(q, k, v)) @ torch.ones(6)

    x = torch.randn(2, 4, 8)
    graph = torch.export.export(Block(), (x,)).graph
    parts = [2 * 8 * 8 * 24, 2 * 2 * 2 * 4 * 4 * 8, 2 * 2 * 6 * 6 * 4 * 3, 2 * 2 * 6 * 6]
    assert [node_flops(node) for node in graph.nodes if node_flops(node)] == parts


def test_formula_registered_with_torch_counts(traced, monkeypatch) -> None:
    monkeypatch.setitem(flop_counter.flop_registry, aten.cdist, lambda a, b, *_, out_val: 7)
    monkeypatch.setitem(flop_counter.flop_registry, aten._cdist_forward, lambda *_, out_val: 7)
    graph = traced(lambda a, b: torch.cdist(a, b), torch.randn(3, 4), torch.randn(5, 4))
    assert total(graph) == 7


def test_symbolic_sizes_count_as_hints_and_guard_nothing(traced) -> None:
    def function(a, b):
        scores = torch.bmm(a, b).softmax(-1)
        return torch.bmm(scores, b.transpose(1, 2))

    graph = traced(function, torch.randn(2, 6, 8), torch.randn(2, 8, 10), mode="symbolic")
    products = [node for node in graph.nodes if node.target is aten.bmm.default]
    size = products[0].meta["val"].shape[1]
    guards = len(size.node.shape_env.guards)
    assert isinstance(size, torch.SymInt)
    assert [node_flops(node) for node in products] == [2 * 2 * 6 * 8 * 10] * 2
    assert pointwise_ops(the_node(graph, aten._softmax.default)) == 2 * 6 * 10
    assert len(size.node.shape_env.guards) == guards


def test_size_that_depends_on_data_has_a_fallback() -> None:
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    assert hint(ShapeEnv().create_unbacked_symint()) == UNBACKED_SIZE


def test_pointwise_ops(traced) -> None:
    table, ids = torch.randn(1000, 8), torch.zeros(4, 3, dtype=torch.int64)

    def function(table, ids):
        rows = aten.embedding(table, ids)
        return (rows * 2.0).sum([0, 1]), rows.transpose(0, 1), aten.mm(table[:8], table[:8])

    counts = {node.target: pointwise_ops(node) for node in traced(function, table, ids).nodes}
    rows = math.prod((4, 3, 8))
    assert counts[aten.embedding.default] == rows
    assert counts[aten.mul.Tensor] == rows
    assert counts[aten.sum.dim_IntList] == rows  # the elements it reads
    assert counts[aten.transpose.int] == counts[aten.mm.default] == 0
