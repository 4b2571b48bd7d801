"""Times of transfers: the best source wins, lines fit, parts are chosen as trying all of them would."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphopt
from graphopt.cost_models.collectives import Collective
from graphopt.cost_models.contention import Repetition
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import (
    Line,
    LinkCosts,
    Timing,
    best_split,
    collective_of,
    fitted,
    overlapped_seconds,
)
from graphopt.errors import GraphoptError

CLUSTER = Cluster(GENERIC_CPU, 2, 1e9, 1e-4, "example")
COSTS = LinkCosts(CLUSTER, {"all_reduce": ((3000, 4.0), (1000, 2.0))})
POSITIVE = st.floats(1e-6, 1e3)


@pytest.mark.parametrize(
    ("collective", "timing"),
    [
        (Collective("all_reduce", 2000), Timing(3.0, "measured")),
        (Collective("all_reduce", 3000), Timing(4.0, "measured")),
        (Collective("all_reduce", 5000), Timing(6.0, "fitted")),
        (Collective("all_reduce", 0), Timing(1.0, "fitted")),
        (Collective("all_gather", 10**9), Timing(1.0001, "roofline")),
    ],
)
def test_the_best_source(collective: Collective, timing: Timing) -> None:
    found = COSTS.timing(collective)
    assert (found.source, found.seconds) == (timing.source, pytest.approx(timing.seconds))


@given(st.floats(0, 1), st.floats(1e-12, 1e-6), st.lists(st.integers(1, 10**9), min_size=2, unique=True))
def test_a_line_is_found_again(alpha: float, beta: float, sizes: list[int]) -> None:
    found = fitted([(n, Line(alpha, beta).seconds(n)) for n in sizes])
    for n in sizes:
        assert found.seconds(n) == pytest.approx(Line(alpha, beta).seconds(n), rel=1e-4)


def test_no_line_falls() -> None:
    line = fitted([(1000, 3.0), (2000, 2.0), (3000, 1.0)])
    assert line.beta_s == 0 and 1.0 < line.alpha_s < 3.0
    for bad in ([], [(1000, 0.0)], [(-1, 1.0)]):
        with pytest.raises(GraphoptError, match="no line fits the times"):
            fitted(bad)


@given(POSITIVE, POSITIVE, st.floats(0, 1))
def test_contention_is_found_again(compute: float, transfer: float, share: float) -> None:
    both = overlapped_seconds(compute, transfer, share)
    assert max(compute, transfer) <= both <= compute + transfer + 1e-9
    found = Repetition(compute, transfer, both).share
    assert found * min(compute, transfer) == pytest.approx(
        share * min(compute, transfer), abs=1e-9 * both
    )


@given(POSITIVE, POSITIVE, st.floats(1e-3, 1e2))
def test_parts(compute: float, transfer: float, part: float) -> None:
    def seconds(d: int) -> float:
        return max(compute, transfer) + min(compute, transfer) / d + d * part

    assert seconds(best_split(compute, transfer, part)) == pytest.approx(min(map(seconds, range(1, 33))))


def test_bytes_are_what_a_rank_puts_in() -> None:
    ops = torch.ops._c10d_functional

    def f(x: torch.Tensor) -> torch.Tensor:
        shards = ops.wait_tensor(ops.reduce_scatter_tensor(x, "sum", 2, "0"))
        whole = ops.wait_tensor(ops.all_gather_into_tensor(shards, 2, "0"))
        a, b = ops.all_reduce_coalesced([x, whole], "sum", "0")
        return ops.wait_tensor(a) + ops.wait_tensor(b)

    program = graphopt.trace(f, [torch.ones(4, 8)], training=False)
    found = [c for c in map(collective_of, program.operators()) if c is not None]
    kinds = ["reduce_scatter", "all_gather", "all_reduce"]
    assert found == [Collective(k, n) for k, n in zip(kinds, (128, 64, 256), strict=True)]  # type: ignore
