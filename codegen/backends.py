"""Which kernel a region becomes on a device: the one place that chooses."""

import functools
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from graphopt.codegen.cuda_launch import CudaKernel, cuda_kernel
from graphopt.codegen.launching import Launched, RegionKernel
from graphopt.codegen.numba_cpu import compile_region
from graphopt.codegen.numba_cuda import numba_cuda_kernel
from graphopt.codegen.region import Region


def gpu_kernel(region: Region) -> CudaKernel:
    """CUDA C through CuPy; where CuPy cannot be imported and numba-cuda can, a Numba CUDA kernel.

    CodegenError names an operator that the backend cannot do.
    """
    return numba_cuda_kernel(region) if _only_numba() else cuda_kernel(region)


def installed(device_type: str) -> bool:
    """Whether there is a package that compiles kernels for such devices; nothing is imported."""
    packages = {"cpu": ("numba",), "cuda": ("cupy", "numba_cuda")}
    return any(find_spec(name) is not None for name in packages.get(device_type, ()))


@functools.cache
def _only_numba() -> bool:
    return not _imports("cupy") and _imports("numba_cuda")


def _imports(name: str) -> bool:
    try:
        import_module(name)
    except ImportError:
        return False
    return True


# By the type of the device; the others are for `TorchKernel`.
MAKERS: dict[str, Callable[[Region], RegionKernel]] = {"cpu": compile_region, "cuda": gpu_kernel}


def kernel_on(region: Region, device: torch.device) -> RegionKernel:
    """The kernel of a region for tensors on `device`."""
    return MAKERS.get(device.type, torch_kernel)(region)


@functools.lru_cache(maxsize=1024)
def torch_kernel(region: Region) -> "TorchKernel":
    """The region run by torch operators."""
    return TorchKernel(region)


class TorchKernel(RegionKernel):
    """A region as a callable on tensors of any device, one torch operator after the other."""

    def __call__(
        self, *inputs: Tensor | float, out: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """As `RegionKernel`."""
        return self.by_torch(inputs, out)

    def may_lie_over(self, number: int, output: int) -> bool:
        """True: outputs are stored when everything was read."""
        return True

    def fixed(self, *_: object) -> Launched | None:
        """None: nothing is saved by knowing layouts."""
        return None
