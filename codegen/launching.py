"""What the kernels of every backend do around a launch: inputs, results, and torch in case of need."""

import functools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from graphopt.codegen import reference
from graphopt.codegen.huge_pages import advised
from graphopt.codegen.layout import output_shape
from graphopt.codegen.region import Extent, Reduce, Region
from graphopt.errors import CodegenError

if TYPE_CHECKING:
    from graphopt.codegen.tuning import Bench, Tuned

# Of a launch for known layouts: takes the addresses of the tensors and then the scalars, gives the sums
# over rows.
Launched: TypeAlias = Callable[[Sequence[int | float]], Sequence[Tensor]]


class RegionKernel(ABC):
    """A region as a callable on tensors.

    Positions among `Region.inputs`: `given` of tensors, `scalars` of numbers. Among `Region.outputs`:
    `sums`, those over the rows, which a launch leaves in parts. `dtypes` are those of the outputs.
    `broken` says that the kernel could not be made, and that torch operators run instead. `points` says
    that scalars may be given as addresses of their numbers on the device, `alignment` of how many bytes
    addresses are multiples in a launch for known layouts, but for their offsets.
    """

    points = False
    alignment = 1

    def __init__(self, region: Region) -> None:
        self.region = region
        self.scalars = [n for n, v in enumerate(region.inputs) if v.extent is Extent.SCALAR]
        self.given = [n for n, v in enumerate(region.inputs) if v.extent is not Extent.SCALAR]
        self.sums = [
            k
            for k, out in enumerate(region.outputs)
            if isinstance(value := region.values[out.value], Reduce) and value.over == "rows"
        ]
        self.dtypes: list[torch.dtype] = [getattr(torch, out.dtype) for out in region.outputs]
        self.broken = False

    @abstractmethod
    def __call__(
        self, *inputs: Tensor | float, out: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """The outputs, in the order of `Region.outputs`.

        `out` may be inputs written over where the region allows that; otherwise these are copied first.
        """

    def bench(self, *inputs: Tensor | float, out: Sequence[Tensor] | None = None) -> "Bench":
        """The kernel with inputs of a call, for measurements; CodegenError where none can be made."""
        raise CodegenError(f"a {type(self).__name__} has no launches to measure")

    def tune(
        self,
        *inputs: Tensor | float,
        out: Sequence[Tensor] | None = None,
        rounds: int = 11,
        again: bool = True,
    ) -> "Tuned":
        """Measure launches on these inputs, and use the best: `graphopt.codegen.tuning.tune`."""
        from graphopt.codegen.tuning import tune

        return tune(self, *inputs, out=out, rounds=rounds, again=again)

    @abstractmethod
    def may_lie_over(self, number: int, output: int) -> bool:
        """Whether an output may be written over an input, place for place."""

    @abstractmethod
    def fixed(
        self,
        shape: tuple[int, ...],
        places: Sequence[tuple[tuple[int, ...], tuple[int, ...], int]],
        device: torch.device,
        pointers: tuple[str, ...],
    ) -> Launched | None:
        """A launch on a grid of `shape` for tensors at these places; None where that is not worth it.

        `places` has (sizes, strides, bytes from an aligned address) of the inputs but for scalars, then
        of the outputs but for sums over the rows; `pointers` names scalars that are given as addresses.
        """

    def readable(self, inputs: Sequence[Any], out: Sequence[Tensor] | None) -> list[Any]:
        """The tensors among `inputs`; copied, those that an output would change before they are read."""
        read = [inputs[n] for n in self.given]
        if out is None:
            return read
        return [
            x.clone() if any(self._spoils(n, k, x, y) for k, y in enumerate(out)) else x
            for n, x in zip(self.given, read, strict=True)
        ]

    def _spoils(self, number: int, output: int, x: Tensor, y: Tensor) -> bool:
        """Whether an output in the memory of y would change an input, x, before it is read."""
        if not overlap(x, y):
            return False
        same = x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()
        return not (same and x.dtype == y.dtype and self.may_lie_over(number, output))

    def check(self, read: list[Tensor], out: Sequence[Tensor] | None, device: torch.device) -> None:
        """Raise CodegenError where a tensor has another dtype than the region says, or device."""
        dtypes = [getattr(torch, self.region.inputs[n].dtype) for n in self.given]
        every = [*zip(read, dtypes, strict=True), *zip(out or (), self.dtypes, strict=out is not None)]
        for x, dtype in every:
            if x.dtype != dtype or x.device != device:
                raise CodegenError(f"a kernel for {dtype} on {device} was given {x.dtype} on {x.device}")

    def allocate(self, shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
        """New tensors for the outputs on a grid of `shape`."""
        facts = self.region.facts
        return tuple(
            advised(torch.empty(output_shape(facts[out.value].extent, shape), dtype=dtype, device=device))
            for out, dtype in zip(self.region.outputs, self.dtypes, strict=True)
        )

    def launched_or_by_torch(
        self,
        launch: Callable[[], tuple[Tensor, ...]],
        inputs: Sequence[Tensor | float],
        out: Sequence[Tensor] | None,
    ) -> tuple[Tensor, ...]:
        """What `launch` gives; from the first CodegenError on, torch operators, after one warning."""
        if not self.broken:
            try:
                return launch()
            except CodegenError as error:
                self.give_up(error)
        return self.by_torch(inputs, out)

    def give_up(self, error: CodegenError) -> None:
        """From now on, torch operators; for the same reason, that is said once."""
        self.broken = True
        say(f"a region runs by torch operators: {error}")

    def by_torch(
        self, inputs: Sequence[Tensor | float], out: Sequence[Tensor] | None
    ) -> tuple[Tensor, ...]:
        """The outputs by torch operators, copied to `out` where that is given."""
        found = reference.run(self.region, *inputs)
        for y, x in zip(out or (), found, strict=out is not None):
            y.copy_(x)
        return found if out is None else tuple(out)


@functools.cache
def say(text: str) -> None:
    """Warn, once for each text."""
    warnings.warn(text, stacklevel=4)


def overlap(x: Tensor, y: Tensor) -> bool:
    """Whether the memory between the first and last element of each has bytes in common."""
    (a, b), (c, d) = span(x), span(y)
    return a < d and c < b


def span(x: Tensor) -> tuple[int, int]:
    """The addresses of a tensor's first byte, and of the one after its last."""
    if x.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()
