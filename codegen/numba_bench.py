"""Launches of a Numba kernel on given tensors, timed for `graphopt.codegen.tuning`."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.codegen.device_text import cpu_text
from graphopt.codegen.numba_choice import STREAM_ALL, NumbaChoice, candidates, default_choice, fits
from graphopt.codegen.tuning import timed

if TYPE_CHECKING:
    from graphopt.codegen.numba_cpu import Launch, NumbaKernel


class NumbaBench:
    """A kernel with inputs, and outputs that are in memory already.

    With one thread, times are those that this thread was on its processor, otherwise those of a clock.
    """

    def __init__(
        self, kernel: "NumbaKernel", inputs: Sequence[Tensor | float], out: Sequence[Tensor] | None
    ) -> None:
        self.kernel = kernel
        self._results = kernel(*inputs, out=out)
        self._read = kernel.readable(inputs, self._results)
        scalars = (inputs[n] for n in kernel.scalars)
        self._numbers = [x.item() if isinstance(x, Tensor) else x for x in scalars]
        self._launches: dict[NumbaChoice, Launch] = {}
        threads = torch.get_num_threads()
        self._clock = time.thread_time if threads == 1 else time.perf_counter
        usual = self._launch(NumbaChoice())
        self.default = default_choice(kernel.region, usual.nbytes)
        streamed = self._launch(replace(self.default, stream_cost=STREAM_ALL)).compiled.source.tiles > 0
        self.candidates = candidates(kernel.region, usual.grid, usual.nbytes, streamed, threads)
        self.layout, self.device = kernel.layout_class(usual.grid), cpu_text()
        self.choices = kernel.choices

    def fits(self, choice: NumbaChoice) -> bool:
        """Whether a choice is right for these inputs."""
        return fits(self.kernel.region, choice)

    def seconds(self, choice: NumbaChoice, count: int) -> float:
        """The mean time of `count` launches; CodegenError where Numba cannot compile one."""
        stored = [y for k, y in enumerate(self._results) if k not in self.kernel.sums]
        addresses = [x.data_ptr() for x in (*self._read, *stored)]
        launch = self._launch(choice)

        def run() -> Any:
            return self.kernel.run(launch, addresses, self._numbers)

        return timed(self._clock, run, count)

    def use(self, choice: NumbaChoice) -> None:
        """Plan launches anew from now on."""
        self.kernel.forget_launches()

    def _launch(self, choice: NumbaChoice) -> "Launch":
        launch = self._launches.get(choice)
        if launch is None:
            may_stream = self.kernel.may_stream(self._results)
            launch = self.kernel.plan(self._read, self._results, may_stream, choice)
            self._launches[choice] = launch
        return launch
