"""The costs of a split loss follow the formulas, and the choice follows the costs."""

import pytest
import torch

from graphopt.cost_models.collectives import Collective
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.split_vocab import cheapest, cost, exchanges, peak_bytes
from graphopt.errors import PlanError
from graphopt.vocab_exchange import ALGORITHMS, SplitSizes, Way

SIZES = SplitSizes(2048, 512, 32000, 2)


def cluster(latency_s: float = 1e-5, ranks: int = 2) -> Cluster:
    return Cluster(GENERIC_CPU, ranks, 1e9, latency_s, "test")


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ring_costs(ranks: int) -> None:
    n, links = 10**6, cluster(ranks=ranks)
    gather, reduction = Collective("all_gather", n), Collective("all_reduce", n)
    assert gather.seconds(links) == pytest.approx((ranks - 1) * (1e-5 + n / 1e9))
    assert reduction.seconds(links) == pytest.approx(2 * (ranks - 1) * (1e-5 + n / ranks / 1e9))


@pytest.mark.parametrize("numbers", [2, 3])
@pytest.mark.parametrize("block", [128, 300, 4096])
def test_counts_and_bytes(numbers: int, block: int) -> None:
    sizes = SplitSizes(2048, 512, 32000, 2, numbers=numbers)
    blocks = -(-2048 // block)
    dx, row = 2048 * 512 * 4, 2048 * 8
    three, two, one = (exchanges(sizes, Way(a, "tokens", block)) for a in ALGORITHMS)
    assert (len(three), len(two), len(one)) == (2 * blocks + 1, blocks + 1, blocks + 1)
    assert sum(c.nbytes for c in three) == dx + (1 + numbers) * row
    assert sum(c.nbytes for c in two) == sum(c.nbytes for c in one) == dx + numbers * row


def test_fixed_latency_makes_blocks_of_words() -> None:
    assert cheapest(SIZES, cluster(1e-6)).way.stream == "tokens"
    assert cheapest(SIZES, cluster(1.0)).way.stream == "words"


def test_the_gather_hides_behind_a_product() -> None:
    ways = [Way(a, "tokens", 128) for a in ("two-barrier", "one-barrier")]
    two, one = (cost(SIZES, w, cluster(1e-2)).seconds for w in ways)
    assert one < two
    two, one = (cost(SIZES, w, cluster(0.0)).seconds for w in ways)
    assert two < one


def test_memory_bounds_the_block() -> None:
    for memory in (40 * 2**20, 60 * 2**20, 200 * 2**20):
        assert cheapest(SIZES, cluster(), memory).peak_bytes <= memory
    assert cheapest(SIZES, cluster()).peak_bytes <= 1.5 * SIZES.gradient_bytes
    least = cheapest(SIZES, cluster(), 0).peak_bytes
    tried = [peak_bytes(SIZES, Way(a, s, 64)) for a in ALGORITHMS for s in ("tokens", "words")]
    assert least == min(tried)


def test_a_soft_cap_has_no_one_barrier() -> None:
    capped = SplitSizes(2048, 512, 32000, 2, torch.bfloat16, capped=True)
    assert cheapest(capped, cluster(1e-2)).way.algorithm != "one-barrier"
    with pytest.raises(PlanError, match="soft cap"):
        cheapest(capped, cluster(), algorithms=["one-barrier"])
