"""Bytes of collectives, counted on messages that really are sent from rank to rank."""

import math

import pytest
import torch

from graphopt.cost_models.collectives import KINDS, Collective
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.errors import GraphoptError

Chunks = list[list[torch.Tensor]]  # of each rank


class Ring:
    """Ranks in a ring; counts the steps and the bytes that each rank sends."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.steps, self.sent = ranks, 0, [0] * ranks

    def shift(self, messages: list[torch.Tensor], by: int = 1) -> list[torch.Tensor]:
        """Every rank sends one message `by` places further, and gets one."""
        self.steps += 1
        for rank, message in enumerate(messages):
            self.sent[rank] += message.nbytes
        return [messages[(rank - by) % self.ranks] for rank in range(self.ranks)]


def reduce_scatter(ring: Ring, chunks: Chunks) -> list[torch.Tensor]:
    """Rank r ends with chunk r, summed over all ranks."""
    p = ring.ranks
    moving = [chunks[rank][(rank - 1) % p] for rank in range(p)]
    for step in range(p - 1):
        moving = ring.shift(moving)
        moving = [m + chunks[rank][(rank - step - 2) % p] for rank, m in enumerate(moving)]
    return moving


def all_gather(ring: Ring, shards: list[torch.Tensor]) -> Chunks:
    p, moving = ring.ranks, list(shards)
    found: Chunks = [[torch.empty(0)] * p for _ in range(p)]
    for step in range(p):
        for rank in range(p):
            found[rank][(rank - step) % p] = moving[rank]
        if step < p - 1:
            moving = ring.shift(moving)
    return found


def all_to_all(ring: Ring, chunks: Chunks) -> Chunks:
    p = ring.ranks
    found = [list(row) for row in chunks]
    for by in range(1, p):
        got = ring.shift([chunks[rank][(rank + by) % p] for rank in range(p)], by)
        for rank in range(p):
            found[rank][(rank - by) % p] = got[rank]
    return found


@pytest.mark.parametrize("p", [2, 3, 4, 8])
def test_ring_algorithms(p: int) -> None:
    chunks = [[torch.randn(3, dtype=torch.float64) for _ in range(p)] for _ in range(p)]
    whole = [torch.cat(row) for row in chunks]
    total = sum(whole[1:], whole[0]).split(3)
    rings = {kind: Ring(p) for kind in KINDS}
    scattered = reduce_scatter(rings["reduce_scatter"], chunks)
    assert all(torch.allclose(s, t) for s, t in zip(scattered, total, strict=True))
    gathered = all_gather(rings["all_gather"], whole)
    assert all(torch.equal(torch.cat(row), torch.cat(whole)) for row in gathered)
    summed = all_gather(rings["all_reduce"], reduce_scatter(rings["all_reduce"], chunks))
    assert all(torch.allclose(torch.cat(row), torch.cat(total)) for row in summed)
    exchanged = all_to_all(rings["all_to_all"], chunks)
    assert all(torch.equal(exchanged[i][j], chunks[j][i]) for i in range(p) for j in range(p))
    for kind in ("reduce_scatter", "all_gather", "all_reduce", "all_to_all"):
        collective = Collective(kind, whole[0].nbytes)  # type: ignore[arg-type]
        assert collective.steps(p) == rings[kind].steps, kind
        assert [collective.sent_bytes(p)] * p == rings[kind].sent, kind


def test_other_algorithms() -> None:
    total = Collective("all_reduce", 1000)
    assert [total.steps(p, "tree") for p in (1, 2, 8, 9)] == [0, 2, 6, 8]
    assert total.sent_bytes(8, "tree") == 2000 and total.sent_bytes(1, "tree") == 0
    assert (total.steps(8, "switch"), total.sent_bytes(8, "switch")) == (1, 1000)
    assert Collective("broadcast", 1000).steps(8, "tree") == math.log2(8)
    assert Collective("broadcast", 1000).sent_bytes(8) == 1000
    with pytest.raises(GraphoptError, match="there is no tree algorithm of all_to_all"):
        Collective("all_to_all", 1000).steps(4, "tree")


@pytest.mark.parametrize("kind", KINDS)
def test_seconds(kind: str) -> None:
    collective = Collective(kind, 4000)  # type: ignore[arg-type]
    cluster = Cluster(GENERIC_CPU, 4, 1e6, 1e-3, "example")
    expected = collective.steps(4) * 1e-3 + collective.sent_bytes(4) / 1e6
    assert collective.seconds(cluster) == pytest.approx(expected)
    assert collective.seconds(Cluster(GENERIC_CPU, 1, 1e6, 1e-3, "example")) == 0
