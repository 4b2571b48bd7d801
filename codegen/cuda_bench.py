"""Calls of a CUDA kernel on given tensors, timed on their device, for `graphopt.codegen.tuning`."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from graphopt.codegen.cuda_choice import CudaChoice, candidates, choice_of, fits
from graphopt.errors import CodegenError

if TYPE_CHECKING:
    from graphopt.codegen.cuda_launch import CudaKernel


class CudaBench:
    """A kernel with inputs and outputs, anew for each choice; CodegenError where nothing can time it."""

    def __init__(
        self, kernel: "CudaKernel", inputs: Sequence[Tensor | float], out: Sequence[Tensor] | None
    ) -> None:
        from graphopt.codegen.cuda_runner import Timer

        self.kernel, self._inputs = kernel, inputs
        self._results = kernel(*inputs, out=out)
        runner = kernel.runner_of(self._results[0].device)
        if not isinstance(runner, Timer):
            raise CodegenError(f"launches of a {type(runner).__name__} cannot be timed")
        read = kernel.readable(inputs, self._results)
        self._grid, self._usual = kernel.usual(read, self._results)
        self._runner = runner
        self._kernels: dict[CudaChoice, CudaKernel] = {}
        self.default = choice_of(self._usual)
        self.candidates = candidates(kernel.traits, self._grid, self._usual)
        self.layout, self.device = kernel.layout_class(self._grid, self._usual), runner.device
        self.choices = kernel.choices

    def fits(self, choice: CudaChoice) -> bool:
        """Whether a choice is right for these inputs."""
        return fits(self.kernel.traits, self._grid, self._usual, choice)

    def seconds(self, choice: CudaChoice, count: int) -> float:
        """The mean time of `count` calls; CodegenError where a kernel cannot be compiled."""
        kernel = self._kernels.get(choice) or self._with(choice)

        def run() -> None:
            kernel(*self._inputs, out=self._results)

        return self._runner.seconds(run, count)

    def use(self, choice: CudaChoice) -> None:
        """Plan launches anew from now on."""
        self.kernel.forget_launches()

    def _with(self, choice: CudaChoice) -> "CudaKernel":
        """A kernel of its own that knows no other choice for this layout."""
        kernel = type(self.kernel)(self.kernel.region, self._runner, None)
        kernel.choices.keep(self.layout, self.device, {"chosen": vars(choice)})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch operators in its place
            kernel(*self._inputs, out=self._results)
        if kernel.broken:
            raise CodegenError(f"a kernel with {choice} could not be made")
        self._kernels[choice] = kernel
        return kernel
