"""What collectives cost: bytes on the links, and seconds in the alpha-beta model.

Ring algorithms: a gather takes p - 1 steps of n bytes, a reduction to all 2 (p - 1) steps of n / p bytes,
a step takes the latency of a link and its bytes at the rate of a link (Thakur, Rabenseifner and Gropp,
"Optimization of collective communication operations in MPICH", 2005, sections 4.1 and 4.5).
"""

from dataclasses import dataclass
from typing import Literal

from graphopt.cost_models.devices import Cluster


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective; `nbytes` is what each rank puts in, in bytes."""

    kind: Literal["all_gather", "all_reduce"]
    nbytes: int

    def _steps(self, ranks: int) -> int:
        return (ranks - 1) * (2 if self.kind == "all_reduce" else 1)

    def sent_bytes(self, ranks: int) -> int:
        """Bytes that one rank sends.

        >>> Collective("all_gather", 1000).sent_bytes(4), Collective("all_reduce", 1000).sent_bytes(4)
        (3000, 1500)
        """
        share = ranks if self.kind == "all_reduce" else 1
        return self._steps(ranks) * self.nbytes // share

    def seconds(self, cluster: Cluster) -> float:
        """Seconds over all of `cluster`."""
        latency_s = self._steps(cluster.count) * cluster.link_latency_s
        return latency_s + self.sent_bytes(cluster.count) / cluster.link_bytes_per_s
