"""What a call of a generated CUDA kernel costs on the host, measured without a GPU: nothing is launched.

    python benchmarks/kernel_launches.py

Calls on small tensors of the CPU, with and without `out=`, and of fused kernels as a lowered graph has
them, whose layouts are fixed. A launch is prepared and its arguments are written as for a GPU; the call
of the driver, some 1.3 us, is left out. Two tensors of a norm and a gate are made anew where there is no
`out=`. The least of nine rounds of 20,000 calls each, beside what torch takes for a result alone.
"""

import timeit
from collections.abc import Callable, Sequence
from typing import Any

import torch
from harness import table, write

from graphopt.codegen import backends, regions
from graphopt.codegen.cuda_form import Size
from graphopt.codegen.cuda_launch import CudaKernel
from graphopt.codegen.cuda_runner import Arguments, Start
from graphopt.codegen.cuda_source import Source
from graphopt.codegen.region import Region
from graphopt.fused_ops import Fused, FusedCall, Layout, Place

NAME, TITLE = "kernel_launches", "Host cost of kernel launches"
EPS = 1e-6
SIZES, STRIDES = (8, 256), (256, 1)


def launches(device: str, kernel_of: Callable[[Region], Any]) -> dict[str, Callable[[], Any]]:
    """Calls of kernels on small tensors, by name; what they give is dropped."""
    x, y, weight = (torch.randn(s, device=device) for s in (SIZES, SIZES, SIZES[1:]))
    eps = torch.tensor(EPS, dtype=torch.float64, device=device)
    norm, gated = (kernel_of(r) for r in (regions.rms_norm("float32", True), regions.swiglu("float32")))
    out = torch.empty_like(x), torch.empty_like(x)
    full, row, scalar = (
        Layout(*known)
        for known in (("float32", SIZES, STRIDES), ("float32", (256,), (1,)), ("float64", (), ()))
    )
    both = tuple(Place(n, SIZES, STRIDES) for n in range(2))
    reads = (*both, Place(2, (), ()), Place(3, (256,), (1,)))
    gate_call = FusedCall(Fused(gated.region, SIZES, (full, full), both, (full,), both[:1]))
    given = (full, full, scalar, row)
    norm_call = FusedCall(Fused(norm.region, SIZES, given, reads, (full, full), both))
    return {
        "SwiGLU, out=": lambda: gated(x, y, out=out[:1]),
        "SwiGLU": lambda: gated(x, y),
        "SwiGLU, fused call": lambda: gate_call(x, y),
        "RMSNorm + residual, out=": lambda: norm(x, y, EPS, weight, out=out),
        "RMSNorm + residual": lambda: norm(x, y, EPS, weight),
        "RMSNorm + residual, fused call": lambda: norm_call(x, y, eps, weight),
    }


class Nowhere:
    """Prepares launches as a GPU would, and launches nothing."""

    processors = 132

    def prepare(self, source: Source, size: Size, fixed: Sequence[int | None]) -> Start:
        """Writes the arguments down."""
        return Arguments(source.parameters, fixed).set


def host_cost(calls: int = 20000, rounds: int = 9) -> dict[str, float]:
    """Microseconds of calls that launch nothing."""
    kernels: dict[Region, CudaKernel] = {}

    def kernel_of(region: Region) -> CudaKernel:
        return kernels.setdefault(region, CudaKernel(region, Nowhere()))

    backends.MAKERS["cpu"] = kernel_of
    x = torch.randn(SIZES)
    runs = {**launches("cpu", kernel_of), "torch.empty_like": lambda: torch.empty_like(x)}
    found = {}
    for name, run in {**runs, "one addition": lambda: x + x}.items():
        timeit.timeit(run, number=100)
        found[name] = 1e6 * min(timeit.repeat(run, number=calls, repeat=rounds)) / calls
    return found


def shown(found: dict[str, float]) -> str:
    """The table of a run."""
    return table(["call", "us on the host"], [[k, f"{v:.2f}"] for k, v in found.items()])


if __name__ == "__main__":
    found = host_cost()
    write(NAME, TITLE, found, shown(found))
