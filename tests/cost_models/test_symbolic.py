"""Symbolic steps against captured ones, deep steps against captured deep ones, and what is refused."""

import functools

import pytest
import torch
from sized_nets import CPU, Net, sample
from torch import Tensor, nn

from graphopt.cost_models.polynomials import NotPolynomialError, Terms
from graphopt.cost_models.repetition import repeated
from graphopt.cost_models.symbolic import SymbolicFlow, symbolic_flow
from graphopt.errors import GraphoptError

TERMS = Terms(("batch", "seq"), (1, 2))
RANGES = [(2, 1000), (2, 1000)]


def symbolic(net: nn.Module, terms: Terms = TERMS) -> SymbolicFlow:
    values = [(2, 3), (3, 9, 6)]
    return symbolic_flow(lambda sizes: sample(net, *sizes), terms, values, RANGES, [(4, 7)])


@functools.cache
def one_layer() -> SymbolicFlow:
    return symbolic(Net(1))


@functools.cache
def layers(count: int) -> SymbolicFlow:
    """The step of the batch, for three words."""
    net, terms = Net(count), Terms(("batch",), (1,))
    return symbolic_flow(lambda sizes: sample(net, *sizes, 3), terms, [(2, 3)], [(2, 1000)], [(7,)])


@pytest.mark.parametrize("sizes", [(2, 2), (7, 31)])
def test_every_number_is_that_of_the_captured_step(sizes: tuple[int, int]) -> None:
    found, flow = sample(Net(1), *sizes).flow, one_layer().at(sizes, CPU)
    assert flow.sizes == found.sizes
    assert flow.static_bytes == found.static_bytes
    for ours, theirs in zip(flow.operators, found.operators, strict=True):
        assert (ours.flops, ours.workspace_bytes) == (theirs.flops, theirs.workspace_bytes)
        assert ours.seconds == pytest.approx(theirs.seconds)


def test_expressions_of_a_product() -> None:
    batch, seq = TERMS.symbols()
    table = one_layer().node_table()
    scores = [row for row in table.values() if row["made_bytes"] == 4 * batch * seq**2]
    assert scores
    assert any(row["flops"] == 2 * batch * seq**2 * 8 for row in scores)


def test_sizes_outside_are_refused() -> None:
    with pytest.raises(GraphoptError, match="seq=1001 is outside of 2 to 1000"):
        one_layer().at((2, 1001), CPU)


class Squared(nn.Module):
    """Every word with every other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, words: Tensor) -> Tensor:
        x = words * self.weight
        return (x[:, :, None] * x[:, None, :]).exp().sum()


def test_a_degree_too_low_is_found_out() -> None:
    with pytest.raises(NotPolynomialError, match="at batch=4, seq=7"):
        symbolic(Squared(), Terms(("batch", "seq"), (1, 1)))


class Halved(nn.Module):
    """Keeps every second word."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.linear(words[:, ::2, None].float()).exp().sum()


def test_what_grows_in_steps_is_refused() -> None:
    with pytest.raises(NotPolynomialError):
        symbolic(Halved())


class Forked(nn.Module):
    """Does something else with long texts."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 4)

    def forward(self, words: Tensor) -> Tensor:
        x = self.linear(words[..., None].float())
        return (torch.tanh(x) if words.shape[1] > 4 else x).sum()


def test_another_step_at_other_sizes_is_refused() -> None:
    with pytest.raises(GraphoptError, match="the step at batch=2, seq=9 is not the one at"):
        symbolic(Forked())


# --- repeated layers ---------------------------------------------------------------------------


def test_a_deep_step_is_the_captured_one() -> None:
    deep = repeated(layers(3), sample(Net(4), 2, 3), 3)
    found, flow = sample(Net(6), 5, 3).flow, deep.at((5,), CPU)
    assert sorted(flow.sizes) == sorted(found.sizes)
    assert flow.static_bytes == found.static_bytes
    pairs = list(zip(flow.operators, found.operators, strict=True))
    assert [(a.flops, a.backward, a.anchored) for a, _ in pairs] == [
        (b.flops, b.backward, b.anchored) for _, b in pairs
    ]
    for ours, theirs in pairs:
        assert [flow.sizes[v] for v in ours.reads] == [found.sizes[v] for v in theirs.reads]
        assert [flow.sizes[v] for v in ours.writes] == [found.sizes[v] for v in theirs.writes]
    names = [o.name for o in flow.operators]
    assert len(set(names)) == len(names)


def test_layers_that_are_not_alike_are_refused() -> None:
    unlike = Net(0, (24, 24, 24, 32))
    with pytest.raises(GraphoptError, match="not alike"):
        repeated(layers(3), sample(unlike, 2, 3), 4)


def test_two_layers_do_not_show_what_repeats() -> None:
    with pytest.raises(GraphoptError, match="3 are needed"):
        repeated(layers(1), sample(Net(2), 2, 3), 4)
