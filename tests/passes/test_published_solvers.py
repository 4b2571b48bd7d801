"""The solvers of chains find what trying every subset finds, on thousands of random chains."""

import functools
import itertools

import numpy as np
import pytest

from graphopt.errors import PlanError
from graphopt.passes.published_solvers import (
    StateChain,
    dp,
    first_objective,
    linear,
    linear_within,
    periodic,
    sqrt,
    true_peak,
)


def random_chain(draw: np.random.Generator, longest: int = 8) -> StateChain:
    """Up to `longest` states of sizes from a few to many different ones; half with gradients."""
    count = int(draw.integers(0, longest + 1))
    sizes = draw.integers(0, draw.choice([2, 5, 50, 10**9]), count)
    seconds = draw.integers(1, 9, count) / 10
    if draw.random() < 0.5:
        return StateChain(sizes, None, None, seconds)
    high = int(sizes.max(initial=1)) + 1
    return StateChain(
        sizes, draw.integers(0, high, count + 1), draw.integers(0, high, count + 1), seconds
    )


@functools.cache
def subsets(count: int) -> list[tuple[int, ...]]:
    states = range(1, count + 1)
    return [s for size in range(count + 1) for s in itertools.combinations(states, size)]


def all_subsets(chain: StateChain) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True peak, first objective and checkpoint bytes of the `subsets`, by playing the steps through.

    What is alive while the backward of an operator runs: the checkpoints before it, and the states
    made since the last of them.
    """
    count = len(chain)
    zeros = np.zeros(count + 1, dtype=np.int64)
    gradients = zeros if chain.gradients is None else chain.gradients
    workspace = zeros if chain.workspace is None else chain.workspace
    chosen = np.array([[i in s for i in range(1, count + 1)] for s in subsets(count)])
    held, made, peak, heaviest = np.zeros((4, 2**count), dtype=np.int64)
    for i in range(count + 1):  # operator i + 1
        heaviest = np.maximum(heaviest, made)
        after = gradients[i + 1] if i < count else 0
        peak = np.maximum(peak, held + made + gradients[i] + after + workspace[i])
        if i < count:
            held = held + chosen[:, i] * chain.sizes[i]
            made = np.where(chosen[:, i], 0, made + chain.sizes[i])
    return peak, held + heaviest, held


def naive_seconds(chain: StateChain, checkpoints: tuple[int, ...]) -> float:
    assert chain.seconds is not None
    last = max(checkpoints, default=0)
    return sum(s for i, s in enumerate(chain.seconds, 1) if i < last and i not in checkpoints)


def test_the_objectives_are_those_of_playing_the_steps_through() -> None:
    draw = np.random.default_rng(0)
    for _ in range(300):
        chain = random_chain(draw)
        peaks, objectives, _ = all_subsets(chain)
        ways = list(zip(subsets(len(chain)), peaks, objectives, strict=True))
        for checkpoints, peak, objective in ways[::17]:
            assert true_peak(chain, checkpoints) == peak
            assert first_objective(chain, checkpoints) == objective


def test_dp_has_the_least_first_objective_of_all_subsets() -> None:
    draw = np.random.default_rng(1)
    for _ in range(1500):
        chain = random_chain(draw)
        found = dp(chain)
        assert found.objective_bytes == first_objective(chain, found.checkpoints)
        assert found.objective_bytes == all_subsets(chain)[1].min()
        if chain.gradients is None:
            assert found.peak_bytes <= found.objective_bytes


def test_linear_has_the_least_true_peak_of_all_subsets() -> None:
    draw = np.random.default_rng(2)
    for _ in range(2500):
        chain = random_chain(draw)
        found = linear(chain)
        assert found.objective_bytes == found.peak_bytes == all_subsets(chain)[0].min()
        assert true_peak(chain, found.checkpoints) == found.peak_bytes
        assert found.recompute_seconds == pytest.approx(naive_seconds(chain, found.checkpoints))


def test_one_pass_holds_the_least_that_fits() -> None:
    draw = np.random.default_rng(3)
    for _ in range(1500):
        chain = random_chain(draw)
        peaks, _, held = all_subsets(chain)
        budget = int(draw.choice(peaks))
        found = linear_within(chain, budget)
        assert found is not None and found.peak_bytes <= budget
        assert found.objective_bytes == held[peaks <= budget].min()
        assert linear_within(chain, int(peaks.min()) - 1) is None


def test_long_chains_keep_their_promises() -> None:
    draw = np.random.default_rng(4)
    for count in (100, 1000):
        sizes = np.exp(draw.normal(10, 1.5, count)).astype(np.int64)
        for chain in (StateChain(sizes), StateChain(sizes, np.append(sizes, 7))):
            best = linear(chain)
            assert true_peak(chain, best.checkpoints) == best.peak_bytes
            assert linear_within(chain, best.peak_bytes - 1) is None
            for other in (dp(chain), sqrt(chain), periodic(chain)):
                assert best.peak_bytes <= other.peak_bytes
            assert dp(chain).objective_bytes <= first_objective(chain, best.checkpoints)


@pytest.mark.parametrize(("count", "peaks"), [(16, (6, 7, 5)), (50, (12, 13, 9)), (400, (38, 39, 27))])
def test_equal_states(count: int, peaks: tuple[int, int, int]) -> None:
    chain = StateChain(np.ones(count, dtype=int))
    assert (sqrt(chain).peak_bytes, dp(chain).objective_bytes, linear(chain).peak_bytes) == peaks
    cuts = (0, *linear(chain).checkpoints)
    lengths = np.diff(cuts)
    assert list(lengths) == sorted(lengths, reverse=True)  # segments grow toward the input


def test_periodic_takes_the_best_period() -> None:
    draw = np.random.default_rng(5)
    for _ in range(500):
        chain = random_chain(draw, 20)
        count = len(chain)
        best = min(true_peak(chain, range(k, count + 1, k)) for k in range(1, count + 2))
        found = periodic(chain)
        assert found.peak_bytes == found.objective_bytes == best
        assert len({b - a for a, b in itertools.pairwise((0, *found.checkpoints))}) <= 1


def test_what_is_no_chain_is_refused() -> None:
    sizes = np.ones(3, dtype=int)
    with pytest.raises(PlanError, match="gradients of a chain of 3 states: 4 numbers"):
        StateChain(sizes, gradients=sizes)
    with pytest.raises(PlanError, match="sizes of a chain of 3 states: 3 numbers, none negative"):
        StateChain(-sizes)
