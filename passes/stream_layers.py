"""The pass that runs a model larger than its memory: weights of blocks are loaded while others run."""

import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from graphopt.cost_models.layer_pipeline import LayerCosts
from graphopt.cost_models.link_costs import Line
from graphopt.errors import PlanError, VerifyError
from graphopt.measurement import measure
from graphopt.passes.blocks import Batch, Stack, call, evaluation, find_stack
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.layer_channels import FileChannel, PinnedChannel, measured_copy, measured_read
from graphopt.passes.layer_file import pack, record_of, write_layers
from graphopt.passes.layer_plan import StreamLayersPlan, StreamMeasurement
from graphopt.passes.layer_ring import LayerRing
from graphopt.passes.layer_streaming import (
    OwnWeights,
    StreamedModel,
    attach,
    own_weights,
    restore,
    without_weights,
)
from graphopt.passes.layer_times import PHASES, measure_units
from graphopt.passes.made_up_inputs import as_batch, made_up_batch
from graphopt.passes.module_pass import ModulePass
from graphopt.passes.pipeline_choice import choose_pipeline
from graphopt.passes.removal_checks import leading_tensor
from graphopt.passes.skip_units import whole_blocks

_RUNS = 5  # timed steps of the changed model
# What a model raises whose weights are used outside of the blocks that they belong to.
_FAILURES = (
    AttributeError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class StreamLayers(ModulePass):
    """Runs a model whose weights do not fit in memory: blocks are loaded while others run (inference).

    `memory` bounds what the model and its step hold at the peak: bytes, "2GiB", a share of the plain peak
    (0.25), or "min". The weights of the repeated blocks go to a file in `folder` (None: a temporary one,
    removed with the model; choose a folder that is not in memory itself), or to pinned host memory where
    the model is on CUDA. A cost model of computing and loading decides which blocks stay, and how many
    slots the others share, so that steps in a row take the least time within `memory`.

    `calibration` are batches of the model's input, the largest that it will get: a step is timed on the
    first ("prefill", or `phase="decode"`: one more token), and its memory taken from all. Larger ones
    need more memory; so does a cache that grows.

    Loading is measured, on a file in `folder`, unless `bytes_per_s` says how fast it is. `throttled`
    holds a file's reader to that rate: for tests, and to try out what a slower device would do.

    The result has the class and the outputs of the model, bit for bit. It is a copy, so that for a while
    there are the model and what is resident; `in_place=True` changes the model itself. It is
    in evaluation mode and frozen, runs on one thread at a time, and is not to be used after `close()`.
    """

    memory: Budget
    folder: str | Path | None = None
    calibration: Iterable[Any] = field(default=(), repr=False, compare=False)
    phase: str = "prefill"
    bytes_per_s: float | None = None
    throttled: bool = False
    in_place: bool = False
    name: ClassVar[str] = "stream-layers"

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibration", tuple(self.calibration))
        check_budget(self.memory)
        if self.memory is None:
            raise PlanError('memory=None: give bytes, a size, a share of the plain peak, or "min"')
        if self.phase not in PHASES:
            raise PlanError(f"phase={self.phase!r} is none of {', '.join(PHASES)}")
        rate = self.bytes_per_s
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
            raise PlanError(f"bytes_per_s={rate!r} is no rate above 0")
        if self.throttled and rate is None:
            raise PlanError("throttled=True needs bytes_per_s, the rate")

    def plan(self, model: nn.Module) -> StreamLayersPlan:
        """Which blocks stay, and how many slots there are; PlanError with the least memory that works."""
        batches, stack = self._found(model)
        own = own_weights(model, stack)
        costs, channel = self._costs(model, stack, own, batches)
        whole = costs.peak_bytes(frozenset(range(len(own))), 0)
        limit = resolve_budget(self.memory, whole)
        found = choose_pipeline(costs, costs.peak_bytes(frozenset(), 1) if limit is None else limit)
        pipeline = found.pipeline
        return StreamLayersPlan(
            path=stack.path,
            blocks=len(stack.blocks),
            resident=tuple(sorted(pipeline.resident)),
            slots=pipeline.slots,
            memory_bytes=costs.peak_bytes(frozenset(), 1) if limit is None else limit,
            peak_bytes=pipeline.run.peak_bytes,
            fixed_bytes=costs.fixed_bytes,
            step_bytes=costs.step_bytes,
            block_bytes=costs.block_bytes,
            compute_seconds=costs.compute_seconds,
            rest_seconds=costs.rest_seconds,
            load_seconds=costs.load_seconds,
            channel=channel,
            seconds=pipeline.seconds,
            bound_seconds=found.bound_seconds,
            exposed=pipeline.exposed(),
        )

    def apply(self, model: nn.Module, plan: StreamLayersPlan) -> nn.Module:
        """A model that streams as `plan` says; VerifyError where its outputs are not those of `model`."""
        batches, stack = self._found(model)
        own = own_weights(model, stack)
        sizes = tuple(record_of(weights.tensors).nbytes for weights in own)
        if (stack.path, sizes) != (plan.path, plan.block_bytes):
            raise PlanError(
                f"the plan is for {plan.blocks} blocks of {sum(plan.block_bytes)} bytes at "
                f"{plan.path!r}; the model has {len(sizes)} of {sum(sizes)} bytes at {stack.path!r}"
            )
        plan.check()
        expected = _output(model, batches[0])
        names = {i: tuple(own[i].names.values()) for i in plan.streamed}
        device = next(model.parameters()).device
        channel = self._channel([own[i].tensors for i in plan.streamed], device) if names else None
        changed = without_weights(model, stack, own, plan.streamed, self.in_place)
        del own  # so that weights that are not needed any more can go before the slots come
        ring = None if channel is None else LayerRing(channel, plan.slots, device)
        changed = attach(changed, plan.path, names, ring)
        try:
            for _ in range(2):  # the second time with slots that were used
                _check_equal(changed, batches[0], expected)
        except BaseException:
            if self.in_place:
                restore(changed, plan.path)
            if ring is not None:
                ring.close()
            raise
        return changed

    def measure(self, model: nn.Module, plan: StreamLayersPlan, changed: nn.Module) -> StreamMeasurement:
        """A step's peak, from the allocator, and its time; PlanError where the peak is over the bound."""
        batches = self._batches(changed)
        ring: LayerRing | None = changed._layer_ring  # type: ignore[assignment]
        held = _held_bytes(changed) + _input_bytes(batches) + (ring.nbytes if ring else 0)
        seconds, device = [], next(changed.parameters()).device
        with evaluation(changed):
            peak = held + _step_bytes(changed, batches)
            for _ in range(_RUNS):
                begin = time.perf_counter()
                _wait(leading_tensor(call(changed, batches[0])))
                seconds.append(time.perf_counter() - begin)
        if peak > plan.memory_bytes:
            raise PlanError(
                f"memory={self.memory!r}: a step was measured to hold {peak} bytes on {device}, "
                f"{plan.peak_bytes} were predicted",
                reachable_bytes=peak,
            )
        return StreamMeasurement(peak, plan.memory_bytes, median(seconds))

    def _found(self, model: nn.Module) -> tuple[tuple[Batch, ...], Stack]:
        if not isinstance(model, nn.Module):
            raise PlanError(f"StreamLayers takes a module, not {type(model).__name__}")
        if isinstance(model, StreamedModel):
            raise PlanError("the model streams its layers already")
        if next(model.parameters(), None) is None:
            raise PlanError(f"{type(model).__name__} has no parameters")
        batches = self._batches(model)
        return batches, find_stack(model, batches[0])

    def _batches(self, model: nn.Module) -> tuple[Batch, ...]:
        return tuple(as_batch(batch, model) for batch in self.calibration) or (made_up_batch(model),)

    def _costs(
        self, model: nn.Module, stack: Stack, own: Sequence[OwnWeights], batches: Sequence[Batch]
    ) -> tuple[LayerCosts, str]:
        """What steps and loads take and hold, and how the channel is described."""
        sizes = tuple(record_of(weights.tensors).nbytes for weights in own)
        streamable = sum(p.untyped_storage().nbytes() for w in own for p in w.tensors.values())
        if not streamable:
            raise PlanError("the blocks have no weights that nothing else has")
        with evaluation(model):
            step_bytes = _step_bytes(model, batches)
        times = measure_units(model, whole_blocks(stack), batches[0], self.phase)
        line, channel = self._line(own, sizes, next(model.parameters()).device)
        costs = LayerCosts(
            compute_seconds=times.unit_seconds,
            rest_seconds=max(0.0, times.rest_seconds),
            load_seconds=tuple(line.seconds(size) for size in sizes),
            block_bytes=sizes,
            fixed_bytes=_held_bytes(model) - streamable + _input_bytes(batches),
            step_bytes=step_bytes,
        )
        return costs, channel

    def _line(
        self, own: Sequence[OwnWeights], sizes: Sequence[int], device: torch.device
    ) -> tuple[Line, str]:
        """What loads take: as given, or measured on the largest block."""
        if device.type == "cuda" and (self.folder is not None or self.throttled):
            raise PlanError("folder= and throttled= are for a model on the CPU: CUDA has pinned memory")
        where = "pinned memory" if device.type == "cuda" else "file"
        if self.bytes_per_s is not None:
            how = "throttled to" if self.throttled else "taken for"
            return Line(0.0, 1 / self.bytes_per_s), f"{where}, {how} {self.bytes_per_s / 1e6:.1f} MB/s"
        if device.type == "cuda":
            line = measured_copy(max(sizes), device)
        else:
            largest = max(range(len(sizes)), key=lambda i: sizes[i])
            with self._folder(removed=True) as folder:
                file = write_layers(folder, [own[largest].tensors], is_temporary=True)
                line = measured_read(file)
                file.close()
        return line, f"{where}, measured {max(sizes) / line.seconds(max(sizes)) / 1e6:.1f} MB/s"

    def _channel(
        self, blocks: Sequence[Mapping[str, Tensor]], device: torch.device
    ) -> FileChannel | PinnedChannel:
        """Where the weights of `blocks` are from now on."""
        if device.type == "cuda":
            records, pinned = [record_of(tensors) for tensors in blocks], []
            for tensors, record in zip(blocks, records, strict=True):
                pinned.append(torch.empty(record.nbytes, dtype=torch.uint8, pin_memory=True))
                pack(tensors, record, pinned[-1])
            return PinnedChannel(records, pinned, device)
        with self._folder(removed=False) as folder:
            file = write_layers(folder, blocks, is_temporary=self.folder is None)
        return FileChannel(file, self.bytes_per_s if self.throttled else None)

    @contextmanager
    def _folder(self, removed: bool) -> Iterator[Path]:
        """The user's folder, or a new one; `removed` wants one of its own, which goes with its file."""
        if self.folder is not None and not removed:
            yield Path(self.folder)
            return
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        yield Path(tempfile.mkdtemp(prefix="graphopt-layers-", dir=self.folder))


def _output(model: nn.Module, batch: Batch) -> Tensor:
    with evaluation(model):
        return leading_tensor(call(model, batch))


def _check_equal(changed: nn.Module, batch: Batch, expected: Tensor) -> None:
    name = type(changed).__name__
    try:
        got = _output(changed, batch)
    except _FAILURES as error:
        raise VerifyError(
            f"{name} fails with streamed layers, whose weights are there only while the layer runs: "
            f"{type(error).__name__}: {error}"
        ) from error
    if got.shape != expected.shape or not torch.equal(got, expected):
        raise VerifyError(f"{name} computes something else with streamed layers")


def _step_bytes(model: nn.Module, batches: Sequence[Batch]) -> int:
    """What the model allocates at the peak of a step, on any of the batches."""
    device = next(model.parameters()).device
    return max(measure(lambda b=batch: call(model, b), device=device).peak_bytes for batch in batches)  # type: ignore[misc]


def _held_bytes(model: nn.Module) -> int:
    """Parameters and buffers, each storage once; those without data are on the meta device."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.device.type != "meta"]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _input_bytes(batches: Sequence[Batch]) -> int:
    return max(
        sum(t.untyped_storage().nbytes() for t in tree_leaves(batch) if isinstance(t, Tensor))
        for batch in batches
    )


def _wait(tensor: Tensor) -> None:
    if tensor.device.type == "cuda":
        torch.cuda.synchronize(tensor.device)
