"""What transfers take: as measured, by a line fitted to what was measured, or by the model of a ring.

Contention: C seconds of computing beside N seconds of transfer take max(C, N) + k min(C, N). k is 0 where
the transfer leaves the processor alone, and 1 where overlap gains nothing.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from torch import fx

from graphopt import ops
from graphopt.cost_models.collectives import KINDS, Collective
from graphopt.cost_models.devices import Cluster
from graphopt.cost_models.values import numel, tensors
from graphopt.errors import GraphoptError

Source = Literal["measured", "fitted", "given", "roofline"]
Samples = tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, and where they come from."""

    seconds: float
    source: Source


@dataclass(frozen=True, slots=True)
class Line:
    """`alpha_s` seconds and `beta_s` more for each byte."""

    alpha_s: float
    beta_s: float

    def seconds(self, nbytes: int) -> float:
        """What `nbytes` take.

        >>> Line(1e-5, 1e-9).seconds(10_000)
        2e-05
        """
        return self.alpha_s + self.beta_s * nbytes


# Pinned memory over PCIe 4.0: what remains of 32e9 bytes/s; torch's own estimate of a link is 24e9
# (torch/_inductor/comm_analysis.py). A copy is launched like a kernel.
HOST_LINK = Line(10e-6, 1 / 24e9)


def fitted(samples: Sequence[tuple[int, float]]) -> Line:
    """The line of least squared relative error through (bytes, seconds), neither number negative.

    >>> line = fitted([(1000, 3.0), (2000, 5.0), (4000, 9.0)])
    >>> round(line.alpha_s, 6), round(line.beta_s, 6)
    (1.0, 0.002)
    """
    from scipy.optimize import nnls

    if not samples or any(nbytes < 0 or seconds <= 0 for nbytes, seconds in samples):
        raise GraphoptError(f"no line fits the times {list(samples)}")
    rows = np.array([(1 / seconds, nbytes / seconds) for nbytes, seconds in samples])
    scale = rows.max(axis=0)
    scale[scale == 0] = 1.0
    alpha_s, beta_s = nnls(rows / scale, np.ones(len(samples)))[0] / scale
    return Line(float(alpha_s), float(beta_s))


@dataclass(frozen=True)
class LinkCosts:
    """What transfers of one group take.

    `samples` are (bytes that a rank puts in, seconds) by kind of collective: between them time is
    interpolated, beyond them it follows the line fitted to them. A kind that was not measured takes
    what the ring on `cluster` takes. `contention` is k as above, measured give or take
    `contention_spread`.
    """

    cluster: Cluster
    samples: Mapping[str, Samples] = field(default_factory=dict)
    contention: float = 0.0
    contention_spread: float = 0.0

    def timing(self, collective: Collective) -> Timing:
        """Seconds of `collective`, from the best source there is."""
        samples = sorted(self.samples.get(collective.kind, ()))
        if not samples:
            return Timing(collective.seconds(self.cluster), "roofline")
        sizes, times = zip(*samples, strict=True)
        if sizes[0] <= collective.nbytes <= sizes[-1]:
            return Timing(float(np.interp(collective.nbytes, sizes, times)), "measured")
        return Timing(fitted(samples).seconds(collective.nbytes), "fitted")


def collective_of(start: fx.Node) -> Collective | None:
    """The collective that `start` starts; None for a copy between host and device."""
    transfer = ops.transfer_of(start)
    if transfer is None or transfer.kind not in KINDS:
        return None
    return Collective(transfer.kind, put_in_bytes(start))  # type: ignore[arg-type]


def put_in_bytes(start: fx.Node) -> int:
    """Bytes of the tensors that `start` transfers; of a copy to or from a handle, those of the tensor."""
    values = [v for n in start.all_input_nodes for v in tensors(n.meta.get("val"))]
    read = sum(numel(v) * v.element_size() for v in values)
    transfer = ops.transfer_of(start)
    if transfer is None or transfer.group is not None:
        return read
    return max(read, sum(numel(v) * v.element_size() for v in tensors(start.meta.get("val"))))


def overlapped_seconds(compute_s: float, transfer_s: float, contention: float = 0.0) -> float:
    """Seconds of computing and a transfer side by side.

    >>> overlapped_seconds(3.0, 2.0), overlapped_seconds(3.0, 2.0, 0.5), overlapped_seconds(3.0, 2.0, 1.0)
    (3.0, 4.0, 5.0)
    """
    return max(compute_s, transfer_s) + contention * min(compute_s, transfer_s)


def best_split(compute_s: float, transfer_s: float, part_s: float, most: int = 32) -> int:
    """Into how many parts to split work whose transfers then run beside the computing of the next part.

    d parts take max(C, N) + min(C, N) / d + d o, where a part costs `part_s` = o more: d is near the
    square root of min(C, N) / o. The better of its neighbours, 1 where splitting gains nothing.

    >>> best_split(4.0, 1.0, 0.1), best_split(4.0, 1.0, 2.0), best_split(4.0, 1.0, 0.0)
    (3, 1, 32)
    """
    shorter = min(compute_s, transfer_s)
    if part_s <= 0:
        return most if shorter > 0 else 1
    near = math.isqrt(int(shorter / part_s))
    tried = {min(most, max(1, d)) for d in (near, near + 1)}
    return min(tried, key=lambda d: (shorter / d + d * part_s, d))
