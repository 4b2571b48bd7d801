"""How much a transfer slows down computing, from repeated timings on a machine that others use, too.

A repetition times computing alone, a transfer alone and both side by side, one after the other, so that
what changes slowly changes all three. Of each the share k of `graphopt.cost_models.link_costs` follows;
the median over the repetitions is not moved by some that were disturbed, and half of the distance between
the quartiles says how far apart they are. Where other processes took the processor from this one while it
computed, computing waits for them and not for the transfer: such repetitions do not count.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_HELD = 0.9  # of the processor, for a repetition to count
ENOUGH = 7  # repetitions that count


@dataclass(frozen=True, slots=True)
class Repetition:
    """Seconds of computing alone, of a transfer alone, and of both.

    `held` is the share of the processor that the process had while it computed, from 0 to 1.
    """

    compute_s: float
    transfer_s: float
    both_s: float
    held: float = 1.0

    @property
    def share(self) -> float:
        """k as this repetition alone says; noise may bring it out of 0 to 1.

        >>> Repetition(3.0, 2.0, 4.0).share
        0.5
        """
        least, most = sorted((self.compute_s, self.transfer_s))
        return (self.both_s - most) / least if least > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Contention:
    """k from 0 to 1, half of the distance between its quartiles, and how many repetitions that is of."""

    share: float
    spread: float
    repetitions: int


def undisturbed(repetitions: Sequence[Repetition]) -> list[Repetition]:
    """The repetitions in which the process held its processor."""
    return [r for r in repetitions if r.held >= LEAST_HELD]


def contention(repetitions: Sequence[Repetition]) -> Contention:
    """k with its spread, from at least one repetition.

    From those that were not disturbed; where these are fewer than `ENOUGH`, from that many which held
    the processor most.

    >>> contention([Repetition(3.0, 2.0, 3.5), Repetition(3.0, 2.0, 9.0, held=0.4)] * 7)
    Contention(share=0.25, spread=0.0, repetitions=7)
    """
    kept = undisturbed(repetitions)
    if len(kept) < ENOUGH:
        kept = sorted(repetitions, key=lambda r: -r.held)[:ENOUGH]
    shares = [r.share for r in kept]
    if len(shares) == 1:
        shares *= 2
    low, middle, high = statistics.quantiles(shares, n=4, method="inclusive")
    return Contention(min(1.0, max(0.0, middle)), (high - low) / 2, len(kept))
