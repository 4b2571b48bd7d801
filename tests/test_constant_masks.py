"""Attention with a constant mask: the mask goes where the kernel needs none, and nowhere else."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt import constant_masks, zoo
from graphopt.constant_masks import kind_of

aten = torch.ops.aten
FORWARD = aten._scaled_dot_product_flash_attention_for_cpu.default
BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
Mask = Callable[[int, int], Tensor]


class Attention(nn.Module):
    """Attention of one projection to itself, under a mask of its places."""

    def __init__(self, mask: Mask) -> None:
        super().__init__()
        self.mask, self.project = mask, nn.Linear(8, 24)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """x [batch, length, 8]; a number."""
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        mask = self.mask(x.shape[1], x.shape[1])
        if hidden is not None:
            mask = mask & ~hidden[:, None, None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).square().sum()


def places(queries: int, keys: int) -> tuple[Tensor, Tensor]:
    return torch.arange(queries)[:, None], torch.arange(keys)[None, :]


def causal(queries: int, keys: int) -> Tensor:
    q, k = places(queries, keys)
    return k <= q


def window(size: int) -> Mask:
    def mask(queries: int, keys: int) -> Tensor:
        q, k = places(queries, keys)
        return (k <= q) & (q - k < size)

    return mask


def everything(queries: int, keys: int) -> Tensor:
    q, k = places(queries, keys)
    return (k >= 0) & (q >= 0)


def added(queries: int, keys: int) -> Tensor:
    return torch.where(causal(queries, keys), 0.0, -torch.inf)


def weighted(queries: int, keys: int) -> Tensor:
    return torch.where(causal(queries, keys), -0.5, -torch.inf)


def reversed_causal(queries: int, keys: int) -> Tensor:
    q, k = places(queries, keys)
    return k >= q


def one_short(queries: int, keys: int) -> Tensor:
    q, k = places(queries, keys)
    return (k <= q) & ((q != queries - 1) | (k != 0))


def attentions(program: graphopt.Program) -> list[tuple[bool, bool]]:
    """Of each attention operator: has it a mask, is it causal."""
    found = []
    for node in program.operators():
        if node.target in (FORWARD, BACKWARD):
            place = 4 if node.target is FORWARD else 7
            found.append((node.kwargs.get("attn_mask") is not None, (*node.args, *[False] * 8)[place]))
    return found


def check(model: nn.Module, *inputs: Tensor) -> None:
    """Loss and gradients are eager's."""
    plain = copy.deepcopy(model)
    expected, found = plain(*inputs), graphopt.optimize(model, device="cpu-generic")(*inputs)
    expected.backward(), found.backward()
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("entries", [2**22, 64])
@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (causal, (False, True)),
        (added, (False, True)),
        (window(16), (False, True)),
        (everything, (False, False)),
        (window(15), (True, False)),
        (weighted, (True, False)),
        (reversed_causal, (True, False)),
        (one_short, (True, False)),
    ],
)
def test_masks(
    mask: Mask, expected: tuple[bool, bool], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constant_masks, "ENTRIES", entries)  # few: rows are compared in several steps
    model, x = Attention(mask), torch.randn(2, 16, 8)
    assert attentions(graphopt.trace(model, (x,))) == [expected] * 2
    check(model, x)


def test_padding_is_not_constant() -> None:
    model, x = Attention(causal), torch.randn(2, 16, 8)
    hidden = torch.zeros(2, 16, dtype=torch.bool)
    hidden[1, 12:] = True
    assert attentions(graphopt.trace(model, (x, hidden))) == [(True, False)] * 2
    check(model, x, hidden)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(-2, 9), st.integers(1, 10), st.integers(8, 200))
def test_kinds(queries: int, keys: int, ahead: int, size: int, entries: int) -> None:
    def mask(x: Tensor) -> Tensor:
        q, k = places(queries, keys)
        return ((k <= q + ahead) & (q - k < size)).expand(3, 1, queries, keys)

    module = graphopt.trace(mask, (torch.zeros(1),), training=False).module
    (node,) = module.graph.output_node().all_input_nodes
    seen = mask(torch.zeros(1))[0, 0]
    kind = None
    if seen.all():
        kind = "all"
    elif torch.equal(seen, torch.ones_like(seen).tril()):
        kind = "causal"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constant_masks, "ENTRIES", entries)
        assert kind_of(node) in (kind, None)  # None also where what it is made of is too large
    assert kind_of(node) == kind


@pytest.mark.parametrize("name", ["llama", "gpt2", "whisper"])
def test_language_models_read_no_mask(name: str) -> None:
    model = zoo.build(name)
    found = attentions(graphopt.trace(model, zoo.example_batch(name, model)))
    assert found and not any(masked for masked, _ in found)
