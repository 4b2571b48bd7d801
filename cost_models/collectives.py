"""What collectives cost: bytes on the links, and seconds in the alpha-beta model.

In a step each rank sends to one other, which takes the latency of a link and the bytes at its rate. With
p ranks, and n bytes that each rank puts in:

| collective     | ring: steps | bytes that one rank sends |
|----------------|-------------|---------------------------|
| all_gather     | p - 1       | (p - 1) n                 |
| reduce_scatter | p - 1       | (p - 1) n / p             |
| all_reduce     | 2 (p - 1)   | 2 (p - 1) n / p           |
| all_to_all     | p - 1       | (p - 1) n / p             |
| broadcast      | p - 1       | n, the root's             |

(Thakur, Rabenseifner and Gropp, "Optimization of collective communication operations in MPICH", 2005,
sections 4.1 to 4.5; a ring broadcasts in a pipeline.) What a rank puts in is its shard for an
all_gather, and the whole tensor for the others. A tree reduces and broadcasts along log2 p links, and
each byte goes up and comes down once (Sanders, Speck and Träff, "Two-tree algorithms for full bandwidth
broadcast, reduction and scan", Parallel Computing 35, 2009). A switch that reduces takes each byte
once, whatever p (Graham et al., "Scalable hierarchical aggregation protocol (SHArP)", COMHPC 2016).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from graphopt.cost_models.devices import Cluster
from graphopt.errors import GraphoptError

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "broadcast"]
Algorithm = Literal["ring", "tree", "switch"]
KINDS: tuple[str, ...] = get_args(Kind)


def _levels(ranks: int) -> int:
    return math.ceil(math.log2(ranks))


# By ranks p, and p and n: the steps, and the bytes that one rank sends.
_Shape = tuple[Callable[[int], int], Callable[[int, int], int]]
_SHAPES: dict[str, dict[str, _Shape]] = {
    "ring": {
        "all_gather": (lambda p: p - 1, lambda p, n: (p - 1) * n),
        "reduce_scatter": (lambda p: p - 1, lambda p, n: (p - 1) * n // p),
        "all_reduce": (lambda p: 2 * (p - 1), lambda p, n: 2 * (p - 1) * n // p),
        "all_to_all": (lambda p: p - 1, lambda p, n: (p - 1) * n // p),
        "broadcast": (lambda p: p - 1, lambda p, n: min(1, p - 1) * n),
    },
    "tree": {
        "all_reduce": (lambda p: 2 * _levels(p), lambda p, n: 2 * min(1, p - 1) * n),
        "broadcast": (_levels, lambda p, n: min(1, p - 1) * n),
    },
    "switch": {"all_reduce": (lambda p: min(1, p - 1), lambda p, n: min(1, p - 1) * n)},
}


@dataclass(frozen=True, slots=True)
class Collective:
    """One collective; `nbytes` is what each rank puts in, in bytes."""

    kind: Kind
    nbytes: int

    def steps(self, ranks: int, algorithm: Algorithm = "ring") -> int:
        """How often the latency of a link is paid."""
        return self._shape(algorithm)[0](ranks)

    def sent_bytes(self, ranks: int, algorithm: Algorithm = "ring") -> int:
        """Bytes that one rank sends.

        >>> Collective("all_gather", 1000).sent_bytes(4), Collective("all_reduce", 1000).sent_bytes(4)
        (3000, 1500)
        """
        return self._shape(algorithm)[1](ranks, self.nbytes)

    def seconds(self, cluster: Cluster, algorithm: Algorithm = "ring") -> float:
        """Seconds over all of `cluster`; GraphoptError where `algorithm` has no such collective."""
        latency_s = self.steps(cluster.count, algorithm) * cluster.link_latency_s
        return latency_s + self.sent_bytes(cluster.count, algorithm) / cluster.link_bytes_per_s

    def _shape(self, algorithm: str) -> _Shape:
        found = _SHAPES[algorithm].get(self.kind)
        if found is None:
            raise GraphoptError(f"there is no {algorithm} algorithm of {self.kind}")
        return found
