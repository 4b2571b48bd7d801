"""Regions as CUDA kernels on tensors of a GPU, compiled and launched through CuPy.

    kernel = cuda_kernel(region)
    out, total = kernel(x, residual, eps, weight)

A kernel takes the inputs of its region in order, tensors of any strides that broadcast to one grid, and
Python numbers or tensors of one element for scalars; of the latter those on the device are read there.
Outputs come from torch's allocator, or are given as `out=`. Each launch goes to what is torch's current
stream at that moment; nothing waits for the device, and no memory comes from elsewhere, so that launches
can be captured in CUDA graphs once they have run. All tensors belong to that stream like those of any
torch operator, whose rules hold: memory that came from another stream needs `record_stream` from its
owner.

CuPy compiles for the device at hand, from compute capability 8.0 on.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.codegen.cuda_choice import CudaChoice, fits, form_with
from graphopt.codegen.cuda_form import ACCESS_BYTES, BYTES, Form, Size, Traits, form_of, size_of
from graphopt.codegen.cuda_runner import CuPyRunner, Runner, Start, Timer
from graphopt.codegen.cuda_source import Source, write
from graphopt.codegen.kernel_cache import DEFAULT_CACHE
from graphopt.codegen.launching import Launched, RegionKernel, span
from graphopt.codegen.layout import Grid, Shape, grid_of, grid_shape, output_shape
from graphopt.codegen.region import Extent, Gather, Region
from graphopt.codegen.tuned_choices import TunedChoices, layout_class
from graphopt.errors import CodegenError

_MOST_LAUNCHES = 4096  # layouts that a kernel remembers
_UNALIGNED = ACCESS_BYTES - 1  # bits of an address
_WRITTEN_BY = (
    "cuda_choice.py",
    "cuda_form.py",
    "cuda_source.py",
    "cuda_text.py",
    "kernel.cuh",
    "stages.py",
)
if TYPE_CHECKING:
    from graphopt.codegen.cuda_bench import CudaBench


@functools.lru_cache(maxsize=64)
def _device(index: int) -> CuPyRunner:
    return CuPyRunner(index)


@functools.lru_cache(maxsize=1024)
def cuda_kernel(region: Region) -> "CudaKernel":
    """The kernel of a region; CodegenError names an operator that it cannot do."""
    return CudaKernel(region)


@dataclass
class _Launch:
    """All that depends on shapes, strides and alignment, but not on addresses.

    `start` takes addresses, scalars, and where sums over the rows go, which are of the shape `partial`;
    None on a grid without rows. `stored` has sizes and strides, and the dtype, of the outputs but for
    these sums. For calls with `out=`, `reach` is how many bytes each tensor spans, `over` are pairs of
    an input and an output that may lie over it, and at the addresses `clear` nothing is spoilt.
    """

    source: Source
    start: Start | None
    stored: tuple[tuple[tuple[Shape, Shape], torch.dtype], ...]
    partial: Shape
    reach: tuple[int, ...] = ()
    over: frozenset[tuple[int, int]] = frozenset()
    clear: list[int] | None = None

    def spoilt(self, addresses: Sequence[int], given: int) -> set[int]:
        """Which of the `given` inputs an output would change before they are read."""
        found = set()
        for k, y in enumerate(addresses[given:]):
            end = y + self.reach[given + k]
            for n in range(given):
                x = addresses[n]
                if x < end and y < x + self.reach[n] and not (x == y and (n, k) in self.over):
                    found.add(n)
        if not found:
            self.clear = [*addresses]
        return found


class CudaKernel(RegionKernel):
    """A region as a callable on tensors of one device; `runner` is where, by default their GPU.

    Measured choices are kept in the folder `cache`; None keeps no files.
    """

    points, alignment = True, ACCESS_BYTES

    def __init__(
        self, region: Region, runner: Runner | None = None, cache: Path | None = DEFAULT_CACHE
    ) -> None:
        super().__init__(region)
        self.runner = runner
        self.traits = Traits(region)
        self.write(Form())  # raises what cannot be written
        self._real = getattr(torch, region.math)
        self._numbers = [(n, getattr(torch, region.inputs[n].dtype)) for n in self.scalars]
        # Positions of the sums among partial ones, and of outputs that a launch writes.
        self._parts = [self.traits.sums.index(region.outputs[k].value) for k in self.sums]
        self._stored = [k for k in range(len(region.outputs)) if k not in self.sums]
        self._launches: dict[Any, _Launch] = {}
        self.choices = TunedChoices(region, CudaChoice, _WRITTEN_BY, "", cache)

    def write(self, form: Form) -> Source:
        """The text for a form; CodegenError names an operator that there is none for."""
        return write(self.region, form)

    def form_and_size(
        self, grid: Grid, addresses: Sequence[int], pointers: tuple[str, ...], runner: Runner
    ) -> tuple[Form, Size]:
        """How a launch on tensors at these addresses is made, or where their remainders are these."""
        form = self._tuned(grid, form_of(self.traits, grid, addresses, pointers), runner)
        return form, size_of(self.traits, grid, form, runner.processors)

    def may_lie_over(self, number: int, output: int) -> bool:
        """Whether an output may be written over an input: no pass after that which stores it reads it.

        Within a pass, a thread reads all that it needs at its places before it writes there.
        """
        named, value = self.region.inputs[number], self.region.outputs[output].value
        at = self.region.values.index(named)
        if self.region.facts[value].extent is not Extent.FULL or named.extent is not Extent.FULL:
            return False
        if any(isinstance(v, Gather) and v.source == at for v in self.region.values):
            return False
        passes = self.traits.looped_stages
        stores = next(n for n, stage in enumerate(passes) if output in stage.outputs)
        return all(n <= stores for n, stage in enumerate(passes) if at in stage.places)

    def __call__(
        self, *inputs: Tensor | float, out: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """As `RegionKernel`."""
        if self.broken:
            return self.by_torch(inputs, out)
        tensors: list[Any] = [inputs[n] for n in self.given]
        if out is not None:
            tensors += out
        # All that a launch depends on; of what the tensors are is looked at when one is planned.
        addresses: list[int] = []
        key: list[Any] = []
        for x in tensors:
            address = x.data_ptr()
            addresses.append(address)
            key += (x.shape, x.stride(), x.dtype, x.get_device(), address & _UNALIGNED)
        numbers, kept = [], []
        for n, dtype in self._numbers:
            number = inputs[n]
            if isinstance(number, Tensor):
                if number.device == tensors[0].device:
                    kept.append(number.to(dtype))
                    key.append(n)
                    number = kept[-1].data_ptr()
                else:
                    number = number.item()
            numbers.append(number)
        known = tuple(key)
        launch = self._launches.get(known)
        if launch is None:
            launch = self._planned(known, inputs, tensors, out)
            if launch is None:
                return self.by_torch(inputs, out)
        if out is None:
            return self._made(launch, addresses, numbers, tensors[0].device)
        if addresses != launch.clear and (spoilt := launch.spoilt(addresses, len(self.given))):
            again = list(inputs)
            for n in spoilt:
                again[self.given[n]] = tensors[n].clone()
            return self(*again, out=out)
        if self.sums:
            addresses[len(self.given) :] = [out[k].data_ptr() for k in self._stored]
        totals = self._started(launch, addresses + numbers, out[0].device)
        for k, total in zip(self.sums, totals, strict=True):
            out[k].copy_(total)
        return tuple(out)

    def _made(
        self, launch: _Launch, addresses: list[int], numbers: list[Any], device: torch.device
    ) -> tuple[Tensor, ...]:
        """The outputs as new tensors."""
        empty = torch.empty_strided
        made = [empty(*layout, dtype=dtype, device=device) for layout, dtype in launch.stored]
        addresses += [y.data_ptr() for y in made]
        totals = self._started(launch, addresses + numbers, device)
        for k, total in zip(self.sums, totals, strict=True):
            made.insert(k, total.to(self.dtypes[k]))
        return tuple(made)

    def _started(
        self, launch: _Launch, given: Sequence[int | float], device: torch.device
    ) -> Sequence[Tensor]:
        """Start a kernel with addresses and scalars, and give its sums over the rows."""
        start = launch.start
        if not self.sums:
            if start is not None:
                start(given)
            return ()
        empty = torch.empty if launch.source.form.held and start is not None else torch.zeros
        partial = empty(launch.partial, dtype=self._real, device=device)
        if start is not None:
            start([*given, partial.data_ptr()])
        return [partial[n].sum(0) for n in self._parts]

    def fixed(
        self,
        shape: Shape,
        places: Sequence[tuple[Shape, Shape, int]],
        device: torch.device,
        pointers: tuple[str, ...],
    ) -> Launched | None:
        """As `RegionKernel`."""
        remainders = [offset % ACCESS_BYTES for _, _, offset in places]
        grid = self._grid(shape, [p[0] for p in places], [p[1] for p in places])
        launch = self._launch(grid, shape, remainders, pointers, device)
        if launch is None:
            return None
        if self.sums or launch.start is None:
            return lambda given: self._started(launch, given, device)
        start = launch.start

        def launched(given: Sequence[int | float]) -> Sequence[Tensor]:
            start(given)
            return ()

        return launched

    # --- planning a launch -------------------------------------------------------------------

    def _planned(
        self,
        key: tuple[Any, ...],
        inputs: Sequence[Tensor | float],
        tensors: list[Tensor],
        out: Sequence[Tensor] | None,
    ) -> _Launch | None:
        """The launch for these tensors, from now on known by `key`; None where it cannot be made."""
        read, device = tensors[: len(self.given)], self._device(tensors, out)
        extents = [self.region.inputs[n].extent for n in self.given]
        shape = grid_shape(extents, [tuple(x.shape) for x in read])
        results = out if out is not None else self.allocate(shape, torch.device("meta"))
        every = [*read, *(results[k] for k in self._stored)]
        grid = self._grid(shape, [tuple(x.shape) for x in every], [x.stride() for x in every])
        # What torch allocates is aligned; tensors on the meta device have no address.
        remainders = [0 if x.device.type == "meta" else x.data_ptr() % ACCESS_BYTES for x in every]
        pointers = tuple(
            self.region.inputs[n].name
            for n in self.scalars
            if isinstance(x := inputs[n], Tensor) and x.device == device
        )
        launch = self._launch(grid, shape, remainders, pointers, device)
        if launch is None:
            return None
        if out is not None:
            launch = replace(launch, reach=tuple(map(_reach, tensors)), over=self._over(read, out))
        if len(self._launches) >= _MOST_LAUNCHES:
            self._launches.clear()
        self._launches[key] = launch
        return launch

    def _grid(self, shape: Shape, sizes: Sequence[Shape], strides: Sequence[Shape]) -> Grid:
        return grid_of(self.region, shape, [t.extent for t in self.traits.tensors], sizes, strides)

    def _device(self, tensors: list[Tensor], out: Sequence[Tensor] | None) -> torch.device:
        """The device of all tensors; CodegenError where these are not what the region says."""
        if not tensors:
            raise CodegenError("a kernel without tensors has no device")
        device = tensors[0].device
        given = self.runner is not None or device.type == "cuda"
        self.check(tensors[: len(self.given)], out, device if given else torch.device("cuda"))
        return device

    def _over(self, read: list[Tensor], out: Sequence[Tensor]) -> frozenset[tuple[int, int]]:
        return frozenset(
            (n, k)
            for n, x in enumerate(read)
            for k, y in enumerate(out)
            if (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
            and self.may_lie_over(self.given[n], k)
        )

    def _launch(
        self,
        grid: Grid,
        shape: Shape,
        remainders: Sequence[int],
        pointers: tuple[str, ...],
        device: torch.device,
    ) -> _Launch | None:
        """A launch for tensors whose addresses leave these remainders; None where it cannot be made."""
        try:
            runner = self.runner_of(device)
            form, size = self.form_and_size(grid, remainders, pointers, runner)
            source = self.write(form)
            fixed = _arguments(self.traits, grid, form)
            fixed += (None,) * (len(source.parameters) - len(fixed))
            start = runner.prepare(source, size, fixed) if grid.rows else None
        except CodegenError as error:
            self.give_up(error)
            return None
        facts, outputs = self.region.facts, self.region.outputs
        shapes = [output_shape(facts[outputs[k].value].extent, shape) for k in self._stored]
        layouts = [(size, torch.empty(size, device="meta").stride()) for size in shapes]
        stored = tuple((at, self.dtypes[k]) for at, k in zip(layouts, self._stored, strict=True))
        return _Launch(source, start, stored, (len(self.traits.sums), size.parts, grid.columns))

    # --- measured choices --------------------------------------------------------------------

    def _tuned(self, grid: Grid, usual: Form, runner: Runner) -> Form:
        """The form with what was measured for such a layout on such a device, if anything was."""
        if not isinstance(runner, Timer):
            return usual
        choice = self.choices.choice(self.layout_class(grid, usual), runner.device)
        known = choice is not None and fits(self.traits, grid, usual, choice)
        return form_with(usual, grid, choice) if choice is not None and known else usual

    def usual(self, read: Sequence[Tensor], out: Sequence[Tensor]) -> tuple[Grid, Form]:
        """The grid of these tensors, and the form that the rules choose for them."""
        extents = [self.region.inputs[n].extent for n in self.given]
        shape = grid_shape(extents, [tuple(x.shape) for x in read])
        every = [*read, *(out[k] for k in self._stored)]
        grid = self._grid(shape, [tuple(x.shape) for x in every], [x.stride() for x in every])
        return grid, form_of(self.traits, grid, [x.data_ptr() % ACCESS_BYTES for x in every])

    def layout_class(self, grid: Grid, usual: Form) -> str:
        """The key of a layout among measured ones; what the rules choose has the alignment."""
        names = [t.name for t in self.traits.tensors]
        return f"{layout_class(grid, names)}, packs of {usual.pack}"

    def runner_of(self, device: torch.device) -> Runner:
        """Where launches on tensors of a device go; CodegenError where they cannot."""
        return self.runner or _device(device.index)

    def bench(self, *inputs: Tensor | float, out: Sequence[Tensor] | None = None) -> "CudaBench":
        """The kernel with these inputs, for measurements."""
        from graphopt.codegen.cuda_bench import CudaBench

        return CudaBench(self, inputs, out)

    def forget_launches(self) -> None:
        """Plan anew from now on, as there is another choice."""
        self._launches.clear()


def _reach(x: Tensor) -> int:
    """How many bytes there are from the first element of a tensor to the end of its last."""
    begin, end = span(x)
    return end - begin


def _arguments(traits: Traits, grid: Grid, form: Form) -> tuple[int | None, ...]:
    """The arguments before scalars, None for addresses."""
    flat = (1, grid.rows * grid.columns)
    found: list[int | None] = [*(flat if form.flat else (grid.rows, grid.columns)), *grid.sizes[1:]]
    for t, steps in zip(traits.tensors, grid.steps, strict=True):
        found.append(None)
        if t.extent.by_row and not form.flat:
            found += [step * BYTES[t.dtype] for step in steps[:-1]]
        if t.name in form.strided:
            found.append(steps[-1] * BYTES[t.dtype])
    return tuple(found)
