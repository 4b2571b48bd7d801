"""The time of one op: what the slower of arithmetic and memory takes, and the cost of starting it.

Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52(4), 2009.
"""

from typing import Literal

import torch

from graphopt.cost_models.devices import Device


def seconds(
    flops: int,
    moved_bytes: int,
    dtype: torch.dtype,
    device: Device,
    elementwise_ops: int = 0,
    *,
    efficiency: float = 1.0,
) -> float:
    """Seconds of one op on `device`.

    `flops` are of matrix products in `dtype` and reach `efficiency` of the device's rate,
    `moved_bytes` are those read and written, `elementwise_ops` run at the rate of float32.

    >>> from graphopt.cost_models.devices import get_device
    >>> h100 = get_device("h100")
    >>> f"{seconds(2 * 4096**3, 3 * 2 * 4096**2, torch.bfloat16, h100) * 1e6:.0f} us"
    '142 us'
    >>> f"{seconds(0, 2 * 2 * 4096**2, torch.bfloat16, h100, 4096**2) * 1e6:.0f} us"
    '23 us'
    """
    arithmetic_s = _arithmetic_seconds(flops, dtype, device, elementwise_ops, efficiency)
    return device.overhead_s + max(arithmetic_s, moved_bytes / device.bytes_per_s)


def bound_by(
    flops: int,
    moved_bytes: int,
    dtype: torch.dtype,
    device: Device,
    elementwise_ops: int = 0,
    *,
    efficiency: float = 1.0,
) -> Literal["arithmetic", "memory", "overhead"]:
    """Which of the three takes the largest part of `seconds`: the side of the ridge an op is on."""
    arithmetic_s = _arithmetic_seconds(flops, dtype, device, elementwise_ops, efficiency)
    memory_s = moved_bytes / device.bytes_per_s
    if device.overhead_s > max(arithmetic_s, memory_s):
        return "overhead"
    return "arithmetic" if arithmetic_s > memory_s else "memory"


def ridge_flops_per_byte(dtype: torch.dtype, device: Device) -> float:
    """Operations per byte above which a matrix product in `dtype` is bound by arithmetic."""
    return device.flops(dtype) / device.bytes_per_s


def _arithmetic_seconds(
    flops: int, dtype: torch.dtype, device: Device, elementwise_ops: int, efficiency: float
) -> float:
    products_s = flops / (device.flops(dtype) * efficiency)
    return products_s + elementwise_ops / device.flops(torch.float32)
