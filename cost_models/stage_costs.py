"""What the stages of a pipeline take, and the links between the devices that run them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.errors import PlanError

Matrix = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class StageCost:
    """One microbatch on one stage: seconds of its passes, and bytes.

    `input_s` is the backward to the stage's input, `weight_s` that to its weights. `saved_bytes` wait
    from the forward to the end of the backward; where that is in two parts, `weight_input_bytes` of them
    (all, if None) to the end of the second. `output_bytes` go to the next stage, and as many gradients
    come back. `weight_bytes` are held all the time: parameters, their gradients, and optimizer states.
    """

    forward_s: float
    input_s: float
    weight_s: float
    saved_bytes: int = 0
    weight_input_bytes: int | None = None
    output_bytes: int = 0
    weight_bytes: int = 0

    def __post_init__(self) -> None:
        if min(self.forward_s, self.input_s, self.weight_s) < 0:
            raise PlanError(f"a pass takes a negative time: {self}")
        if not 0 <= self.waits_bytes <= self.saved_bytes:
            raise PlanError(f"{self.waits_bytes} of {self.saved_bytes} bytes wait for the weights")

    @property
    def backward_s(self) -> float:
        """The whole backward."""
        return self.input_s + self.weight_s

    @property
    def seconds(self) -> float:
        """All passes of a microbatch."""
        return self.forward_s + self.backward_s

    @property
    def waits_bytes(self) -> int:
        """Bytes that the gradient of the weights needs."""
        return self.saved_bytes if self.weight_input_bytes is None else self.weight_input_bytes

    def part(self, count: int) -> "StageCost":
        """One of `count` equal parts of the stage, by layers.

        >>> StageCost(2.0, 2.0, 2.0, saved_bytes=6).part(2).seconds
        3.0
        """
        return StageCost(
            self.forward_s / count,
            self.input_s / count,
            self.weight_s / count,
            self.saved_bytes // count,
            self.waits_bytes // count,
            self.output_bytes,
            self.weight_bytes // count,
        )


@dataclass(frozen=True)
class StageLinks:
    """The links of a cluster: from device i to device j, `latency_s[i][j]` and `bytes_per_s[i][j]`.

    Transfers run beside computing and beside each other; one on the device itself takes no time.
    """

    latency_s: Matrix
    bytes_per_s: Matrix

    def __post_init__(self) -> None:
        count = len(self.latency_s)
        rows = [*self.latency_s, *self.bytes_per_s]
        if len(self.bytes_per_s) != count or any(len(row) != count for row in rows):
            raise PlanError(f"links of {count} devices are two matrices of {count} rows and columns")

    @staticmethod
    def even(devices: int, latency_s: float = 0.0, bytes_per_s: float = float("inf")) -> "StageLinks":
        """The same link between any two of `devices`."""
        return StageLinks(((latency_s,) * devices,) * devices, ((bytes_per_s,) * devices,) * devices)

    @staticmethod
    def between_places(
        places: Sequence[str], pairs: Mapping[frozenset[str], tuple[float, float]]
    ) -> "StageLinks":
        """Devices at named `places`, with (latency, rate) of each pair of places, and within one.

        >>> links = StageLinks.between_places(["a", "b", "a"], {frozenset("ab"): (1.0, 8.0),
        ...     frozenset("a"): (0.5, 16.0)})
        >>> links.seconds(0, 1, 16), links.seconds(0, 2, 16)
        (3.0, 1.5)
        """
        within = [[pairs.get(frozenset((a, b)), (0.0, float("inf"))) for b in places] for a in places]
        return StageLinks(
            tuple(tuple(latency for latency, _ in row) for row in within),
            tuple(tuple(rate for _, rate in row) for row in within),
        )

    @property
    def devices(self) -> int:
        """How many devices there are."""
        return len(self.latency_s)

    def seconds(self, source: int, target: int, nbytes: int) -> float:
        """Seconds until `nbytes` sent by `source` have arrived at `target`."""
        if source == target:
            return 0.0
        return self.latency_s[source][target] + nbytes / self.bytes_per_s[source][target]
