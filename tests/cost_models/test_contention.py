"""Contention from timings on a machine that others use, too: made-up ones, whose k is known."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.cost_models.contention import ENOUGH, Contention, Repetition, contention, undisturbed


def noisy(
    share: float, count: int, seed: int, *, slowed: int = 0, preempted: int = 0
) -> list[Repetition]:
    """Timings of 10 ms each with noise of 2 %, and the `share` of both side by side.

    In `slowed` of them one of the three took up to five times as long; in `preempted` others had a half
    of the processor, of which the process knows.
    """
    chance, found = random.Random(seed), []
    for number in range(count):
        compute, transfer = (0.01 * chance.gauss(1, 0.02) for _ in range(2))
        both = (max(compute, transfer) + share * min(compute, transfer)) * chance.gauss(1, 0.02)
        times = [compute, transfer, both]
        if number < slowed:
            times[number % 3] *= chance.uniform(2, 5)
        elif number < slowed + preempted:
            times[2] = 2 * both
        held = 0.5 if slowed <= number < slowed + preempted else chance.uniform(0.95, 1)
        found.append(Repetition(times[0], times[1], times[2], held))
    chance.shuffle(found)
    return found


@given(st.floats(0, 0.9), st.integers(0, 10**6))
def test_noise_and_outliers_do_not_move_it(share: float, seed: int) -> None:
    """A third of the repetitions slowed down at random; the worst of them alone would say k = 1 or 0."""
    found = contention(noisy(share, 21, seed, slowed=7))
    assert found.share == pytest.approx(share, abs=0.12)
    assert found.repetitions == 21


@given(st.floats(0, 0.5), st.integers(0, 10**6))
def test_what_others_took_does_not_count(share: float, seed: int) -> None:
    """Most repetitions beside another process: their median says 1, those that remain do not."""
    every = noisy(share, 21, seed, preempted=14)
    found = contention(every)
    assert found.share == pytest.approx(share, abs=0.1) and found.repetitions == 7
    assert len(undisturbed(every)) == 7
    unaware = [Repetition(r.compute_s, r.transfer_s, r.both_s) for r in every]
    assert contention(unaware).share > 0.9


@given(st.integers(0, 10**6))
def test_the_spread_says_how_sure_it_is(seed: int) -> None:
    calm, wild = noisy(0.3, 21, seed), noisy(0.3, 21, seed, slowed=14)
    assert contention(calm).spread < 0.06 < contention(wild).spread


def test_where_too_few_held_the_processor() -> None:
    """The least disturbed ones are taken."""
    every = [Repetition(1.0, 1.0, 1.0 + i / 20, held=0.8 - i / 100) for i in range(20)]
    found = contention(every)
    assert found.share == pytest.approx(0.15) and found.spread == pytest.approx(0.075)
    assert found.repetitions == ENOUGH


@pytest.mark.parametrize(
    ("both_s", "share"), [(0.5, 0.0), (1.2, 0.0), (1.7, 0.5), (2.2, 1.0), (9.0, 1.0)]
)
def test_it_is_from_0_to_1(both_s: float, share: float) -> None:
    found = contention([Repetition(1.0, 1.2, both_s)] * 3)
    assert found.share == pytest.approx(share) and found.spread == 0 and found.repetitions == 3


def test_one_repetition_and_none_to_compute() -> None:
    assert contention([Repetition(1.0, 1.5, 2.0)]) == Contention(0.5, 0.0, 1)
    assert contention([Repetition(0.0, 1.0, 1.0)]).share == 0.0
