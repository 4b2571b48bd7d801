"""Devices and clusters: what one can do, in plain numbers, with the source of each.

Vendors' capacities and rates are decimal (80 GB = 80 * 10**9 bytes), and rates are those of dense
matrices: a datasheet's figure "with sparsity" is halved here.
"""

import difflib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    import torch

GB = 10**9
GiB = 2**30

_UNIT_BYTES: dict[str, int] = {
    "b": 1,
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", start=1)},
    **{f"{letter}ib": 1024**power for power, letter in enumerate("kmgt", start=1)},
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True, slots=True)
class Device:
    """One processor and its memory.

    `memory_bytes` is the capacity, `bytes_per_s` the rate of its main memory, `flops_per_s` the
    rate of matrix products as (dtype name, operations per second) pairs, `overhead_s` the least
    time from one op to the next, `cores` the CPU cores or streaming multiprocessors.

    `link` names what connects a device with up to `node_devices - 1` others beside it ("" where that is
    not known): `link_bytes_per_s` in each direction, after `link_latency_s`.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    bytes_per_s: float
    flops_per_s: tuple[tuple[str, float], ...]
    overhead_s: float
    cores: int
    source: str
    link: str = ""
    link_bytes_per_s: float = 0.0
    link_latency_s: float = 0.0
    node_devices: int = 1

    def flops(self, dtype: "torch.dtype | str") -> float:
        """Matrix-product operations per second in `dtype`.

        A dtype that is not listed gets the rate of float32, as elementwise work does.

        >>> get_device("a100").flops("bfloat16") / get_device("a100").flops("float32")
        16.0
        """
        rates = dict(self.flops_per_s)
        return rates.get(str(dtype).removeprefix("torch."), rates["float32"])


@dataclass(frozen=True, slots=True)
class Cluster:
    """`count` equal devices, each with one link of `link_bytes_per_s` in each direction."""

    device: Device
    count: int
    link_bytes_per_s: float
    link_latency_s: float
    source: str


def _gpu(
    name: str,
    source: str,
    *,
    memory_gb: float,
    bandwidth_gb_per_s: float,
    tflops: dict[str, float],
    cores: int,
    link: tuple[str, float],
) -> Device:
    """A GPU from its datasheet; float16 runs at the rate of bfloat16.

    `overhead_s`: back-to-back launches of an empty kernel take some 2 to 4 us on these GPUs. `link` is
    its name and GB/s in both directions together, as datasheets count them.
    """
    tflops = {"float16": tflops["bfloat16"], **tflops}
    rates = tuple(sorted((dtype, value * 1e12) for dtype, value in tflops.items()))
    memory_bytes, bytes_per_s = round(memory_gb * GB), bandwidth_gb_per_s * GB
    name_of_link, both_ways = link
    connected = name_of_link, both_ways * GB / 2, _HOP_S[name_of_link.split()[0]], 8
    return Device(name, "cuda", memory_bytes, bytes_per_s, rates, 3e-6, cores, source, *connected)


# A hop of NCCL's ring in its Simple protocol (src/graph/tuning.cc of NCCL, hardware latencies).
_HOP_S = {"NVLink": 3.4e-6, "PCIe": 5.7e-6}


_HOPPER_TFLOPS = {
    "float64": 33.5,
    "float32": 66.9,
    "tfloat32": 494.7,
    "bfloat16": 989.4,
    "float8_e4m3fn": 1978.9,
    "float8_e5m2": 1978.9,
}

# What a CPU is taken for where nothing is measured: a laptop of four AVX2 cores at 3 GHz (4 cores *
# 3e9 * 2 fused multiply-adds of 8 lanes * 2 operations = 384e9, of which matrix products reach some
# half) with two channels of DDR4-3200 (51.2e9 bytes/s, of which copies reach some three quarters).
GENERIC_CPU = Device(
    name="cpu-generic",
    kind="cpu",
    memory_bytes=16 * GiB,
    bytes_per_s=38e9,
    flops_per_s=(("bfloat16", 100e9), ("float32", 200e9), ("float64", 100e9)),
    overhead_s=2e-6,
    cores=4,
    source="https://en.wikipedia.org/wiki/FLOPS",
)

KNOWN_DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu(
            "a100",
            "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/"
            "nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf",
            memory_gb=80,
            bandwidth_gb_per_s=2039,
            tflops={"float64": 9.7, "float32": 19.5, "tfloat32": 156, "bfloat16": 312},
            cores=108,
            link=("NVLink 3", 600),
        ),
        _gpu(
            "h100",
            "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
            memory_gb=80,
            bandwidth_gb_per_s=3350,
            tflops=_HOPPER_TFLOPS,
            cores=132,
            link=("NVLink 4", 900),
        ),
        _gpu(
            "h200",
            "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446",
            memory_gb=141,
            bandwidth_gb_per_s=4800,
            tflops=_HOPPER_TFLOPS,
            cores=132,
            link=("NVLink 4", 900),
        ),
        _gpu(
            "b200",
            "https://www.nvidia.com/en-us/data-center/hgx/",
            memory_gb=180,
            bandwidth_gb_per_s=8000,
            tflops={
                "float64": 37,
                "float32": 75,
                "tfloat32": 1100,
                "bfloat16": 2250,
                "float8_e4m3fn": 4500,
                "float8_e5m2": 4500,
            },
            cores=148,
            link=("NVLink 5", 1800),
        ),
        _gpu(
            "l4",
            "https://www.nvidia.com/en-us/data-center/l4/",
            memory_gb=24,
            bandwidth_gb_per_s=300,
            tflops={
                "float64": 0.47,
                "float32": 30.3,
                "tfloat32": 60,
                "bfloat16": 121,
                "float8_e4m3fn": 242.5,
                "float8_e5m2": 242.5,
            },
            cores=58,
            link=("PCIe 4.0 x16", 64),
        ),
        _gpu(  # tensor-core products accumulate in float32, as torch does by default
            "rtx4090",
            "https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf",
            memory_gb=24,
            bandwidth_gb_per_s=1008,
            tflops={
                "float64": 1.29,
                "float32": 82.6,
                "tfloat32": 82.6,
                "bfloat16": 165.2,
                "float8_e4m3fn": 330.3,
                "float8_e5m2": 330.3,
            },
            cores=128,
            link=("PCIe 4.0 x16", 64),
        ),
        GENERIC_CPU,
    )
}


# Between nodes: 100 Gbit/s of InfiniBand, 4 us a hop (torch/_inductor/comm_analysis.py).
NETWORK_BYTES_PER_S, NETWORK_LATENCY_S = 12.5e9, 4e-6
NETWORK_SOURCE = "torch/_inductor/comm_analysis.py"


def group_of(device: Device, ranks: int, apart: int = 1) -> Cluster:
    """`ranks` devices, `apart` places from one to the next, on the link of the device or a network.

    Within a node of `device.node_devices` it is the device's link; a group that reaches further takes a
    network of 100 Gbit/s. GraphoptError for a device whose link is not known.

    >>> group_of(get_device("h100"), 8).link_bytes_per_s, group_of(get_device("h100"), 4, 4).source
    (450000000000.0, 'torch/_inductor/comm_analysis.py')
    """
    if not device.link:
        raise GraphoptError(
            f"what connects devices such as {device.name} is not known: give --links FILE, as "
            "`graphopt calibrate` writes it"
        )
    if ranks * apart > device.node_devices:
        return Cluster(device, ranks, NETWORK_BYTES_PER_S, NETWORK_LATENCY_S, NETWORK_SOURCE)
    source = f"{device.link}, {device.source}"
    return Cluster(device, ranks, device.link_bytes_per_s, device.link_latency_s, source)


def get_device(name: str) -> Device:
    """The known device called `name`; "cpu" is this machine's, measured once and then cached.

    >>> get_device("h100").memory_bytes
    80000000000
    >>> get_device("h10")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    graphopt.errors.GraphoptError: unknown device 'h10', did you mean 'h100'? Known: a100, b200, ...
    """
    if name == "cpu":
        from graphopt.cost_models.calibrate import calibrated_cpu

        return calibrated_cpu()
    if name in KNOWN_DEVICES:
        return KNOWN_DEVICES[name]
    names = sorted([*KNOWN_DEVICES, "cpu"])
    close = difflib.get_close_matches(name.lower(), names, n=1)
    hint = f", did you mean {close[0]!r}?" if close else "."
    raise GraphoptError(f"unknown device {name!r}{hint} Known: {', '.join(names)}")


def parse_bytes(size: str | int) -> int:
    """The number of bytes that `size` says: an integer, or text with a unit.

    Units with an "i" are binary, those without are decimal; case does not matter.

    >>> parse_bytes("6GiB"), parse_bytes("500MB"), parse_bytes("1.5 kB"), parse_bytes(4096)
    (6442450944, 500000000, 1500, 4096)
    """
    if isinstance(size, int) and not isinstance(size, bool):
        if size < 0:
            raise GraphoptError(f"a size in bytes cannot be negative: {size}")
        return size
    match = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if match is None:
        raise GraphoptError(f"cannot read {size!r} as a size in bytes: write 6GiB, 500MB or 4096")
    number, unit = match.groups()
    if unit and unit.lower() not in _UNIT_BYTES:
        raise GraphoptError(
            f"unknown unit {unit!r} in the size {size!r}: "
            "use B, kB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
        )
    scale = _UNIT_BYTES[unit.lower() or "b"]
    return int(number) * scale if number.isdigit() else round(float(number) * scale)


def format_bytes(size_bytes: int) -> str:
    """`size_bytes` in decimal units, with three digits or more.

    >>> format_bytes(512), format_bytes(39_200_000), format_bytes(-1_500)
    ('512 B', '39.2 MB', '-1.50 kB')
    """
    size: float = abs(size_bytes)
    sign = "-" if size_bytes < 0 else ""
    if size < 1000:
        return f"{sign}{size} B"
    for unit in ("kB", "MB", "GB", "TB"):
        size /= 1000
        if size < 999.5 or unit == "TB":
            break
    digits = 2 if size < 9.995 else 1 if size < 99.95 else 0
    return f"{sign}{size:.{digits}f} {unit}"
