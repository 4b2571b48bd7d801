"""What the roofline of a report page is made of: operators by intensity and rate, and the roofs."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from graphopt.cost_models.devices import Device, format_bytes
from graphopt.cost_models.nodes import node_load, runs_kernel
from graphopt.cost_models.roofline import bound_by
from graphopt.cost_models.streamed import is_streamed
from graphopt.graph_report import Side
from graphopt.origin import Origin, operator_name, origin_of

POINTS = 200


@dataclass(frozen=True)
class Point:
    """Operators that are alike: one runs `operations` on `moved_bytes` in `seconds`, `count` run.

    Operations are those of the cost model, which counts many for an element of a costly function.
    """

    operator: str
    origin: Origin
    dtype: str
    operations: int
    moved_bytes: int
    seconds: float
    bound: str
    count: int = 1

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return self.operations / self.moved_bytes


def roofline_points(side: Side) -> tuple[Point, ...]:
    """The operators of one side that do something to something, those of most time in all first."""
    found: dict[Point, int] = {}
    for operator in side.flow.operators:
        point = _point(side, operator.name)
        if point is not None:
            found[point] = found.get(point, 0) + 1
    points = [replace(point, count=count) for point, count in found.items()]
    return tuple(sorted(points, key=lambda p: -p.seconds * p.count))


def _point(side: Side, name: str) -> Point | None:
    node, device, cost = side.nodes[name], side.costs.device, side.costs.nodes.get(name)
    moved = 0 if cost is None else cost.read_bytes + cost.write_bytes
    if cost is None or not moved or not cost.seconds or not runs_kernel(node):
        return None
    load = node_load(node, device)
    elementwise = 0 if is_streamed(node) else load.elementwise_ops
    if not cost.flops + elementwise:
        return None
    bound = bound_by(cost.flops, moved, load.dtype, device, elementwise, efficiency=load.efficiency)
    kind = str(load.dtype).removeprefix("torch.") if cost.flops else "float32"
    operations = cost.flops + elementwise
    return Point(operator_name(node), origin_of(node), kind, operations, moved, cost.seconds, bound)


def roofs_of(points: tuple[Point, ...], device: Device) -> dict[str, float]:
    """The rate of each dtype that occurs, operations per second."""
    return {
        f"{dtype} {device.flops(dtype) / 1e12:.3g} TFLOP/s": device.flops(dtype)
        for dtype in sorted({p.dtype for p in points})
    }


def ceilings(
    roofs: Mapping[str, float], bytes_per_s: float, low: float, high: float
) -> dict[str, tuple[tuple[float, float], ...]]:
    """Lines of (operations per byte, operations per second) from `low` to `high` operations per byte.

    One rises with the rate of the memory to the highest roof; the others are flat from there on.

    >>> ceilings({"float32": 100.0}, 10.0, 1.0, 20.0)["memory 10 B/s"]
    ((1.0, 10.0), (10.0, 100.0))
    """
    lines: dict[str, tuple[tuple[float, float], ...]] = {}
    if roofs:
        ridge = max(roofs.values()) / bytes_per_s
        start = min(low, ridge)
        rising = (start, start * bytes_per_s), (ridge, max(roofs.values()))
        lines[f"memory {format_bytes(round(bytes_per_s))}/s"] = rising
    for name, rate in roofs.items():
        ridge = rate / bytes_per_s
        lines[name] = (ridge, rate), (max(high, 2 * ridge), rate)
    return lines
