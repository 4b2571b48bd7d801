"""The backend that torch.compile calls: capture, passes, and the two modules that run."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from graphopt.accumulation import Accumulation
from graphopt.arena_blocks import Blocks
from graphopt.arena_facts import block_of, spots_of
from graphopt.capture import Frame, frame_of, program_of
from graphopt.cleanup import cleaned
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import Device, format_bytes
from graphopt.eager_modules import Boxed, eager, eager_backward
from graphopt.errors import PlanError
from graphopt.numerics import compare_numerics
from graphopt.passes.base import Pass
from graphopt.passes.pipeline import PassStep, run_passes
from graphopt.passes.replay import RECOMPUTE_OF
from graphopt.passes.stream_blocks import run_or_stream
from graphopt.program import Program, Role, bytes_behind, tensors_of
from graphopt.split import as_saved, backward_module, forward_module, saved_nodes
from graphopt.tangents import unlikely_tangents, without_gradients

if TYPE_CHECKING:
    from graphopt.comparison import StepComparison
    from graphopt.plan_file import PlanFile

ATTEMPTS = 6  # plans for one graph, each with less room, where Inductor holds more than planned


@dataclass(frozen=True)
class Settings:
    """How graphs are compiled: the passes, the compiler ("eager", "inductor"), and whose costs count.

    With `profile` the time of every distinct operator is measured instead of predicted. `verify` is
    "structure", or "full" to compare the numerics of every rewritten graph, too. With `streams_blocks` a
    budget that a `Checkpoint` alone cannot meet well in eager order is tried with `StreamBlocks`, too.
    """

    passes: tuple[Pass, ...]
    inference_passes: tuple[Pass, ...]  # of graphs without a backward
    compiler: str
    device: Device
    profile: bool = False
    verify: str = "structure"
    streams_blocks: bool = False
    held: "PlanFile | None" = None  # plans that were made before, in place of planning


@dataclass(frozen=True)
class GraphRecord:
    """One captured graph: before and after the passes, and each pass's step.

    `compiled_peak_bytes` is the peak of the step by the schedule of the compiler that runs the planned
    graph, where that is not ours: bytes, parameters and inputs included.
    """

    before: Program
    after: Program
    steps: tuple[PassStep, ...]
    costs: Costs
    trace_seconds: float
    compiled_peak_bytes: int | None = None

    @cached_property
    def static_bytes(self) -> int:
        """Parameters, buffers and inputs, and what the step holds outside of this graph."""
        return self.costs.dataflow(self.before).static_bytes

    @cached_property
    def limit_bytes(self) -> int | None:
        """What a compiler of the planned graph should stay within; None where any peak will do."""
        limits = (step.pass_.limit_bytes(self.before, step.plan) for step in self.steps)
        return min((limit for limit in limits if limit is not None), default=None)

    @property
    def kept_bytes(self) -> int:
        """Bytes that the backward takes from the forward, with their block; inputs are left out."""
        saved = [n for n in saved_nodes(self.after) if n.op != "placeholder"]
        loose = sum(bytes_behind(n) for n in saved if not spots_of(n))
        block = block_of(self.after.graph)
        return loose + (block.nbytes if block and (block.keep or any(map(spots_of, saved))) else 0)


@dataclass
class Log:
    """What was compiled so far, in order; the report reads it.

    `begin` is when the current call began, `first` the number of records then; `module` is the module
    that is optimised, if it is one.
    """

    begin: float = 0.0
    first: int = 0
    module: torch.nn.Module | None = None

    records: list[GraphRecord] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)
    last_run: set[int] = field(default_factory=set)  # records that the last call ran
    measured: "StepComparison | None" = None


class Backend:
    """A torch.compile backend: one call for each graph that Dynamo captures."""

    def __init__(self, settings: Settings, log: Log) -> None:
        self.settings = settings
        self.log = log

    def __call__(self, module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph; the result keeps gradients that nobody needs undefined."""
        frame = frame_of(module, example_inputs)
        if frame.broken_at is not None:
            self.log.breaks.append(frame.broken_at)
        if self.settings.compiler == "inductor":
            graph, compiled = self._through_inductor(module, example_inputs, frame)
        else:
            graph = _Graph(self.settings, self.log, frame)
            compiled = aot_autograd(
                fw_compiler=graph.compile_forward,
                bw_compiler=graph.compile_backward,
                inference_compiler=graph.compile_inference,
                partition_fn=graph.partition,
            )(module, example_inputs)
        return _noted(self.log, graph, _leaving_gradients_undefined(compiled))

    def _through_inductor(
        self, module: fx.GraphModule, example_inputs: Sequence[Any], frame: Frame
    ) -> tuple["_Graph", Callable[..., Any]]:
        """As planned and compiled; where the result is over its budget, planned again with less room.

        Where no plan has so little room, the one with the least peak.
        """
        from graphopt.inductor import compile_with_inductor

        def attempt(margin_bytes: int) -> tuple[_Graph, Callable[..., Any]]:
            del self.log.records[logged:]
            graph = _Graph(self.settings, self.log, frame, margin_bytes)
            return graph, compile_with_inductor(module, example_inputs, graph)

        margin, logged = 0, len(self.log.records)
        try:
            for number in range(ATTEMPTS):
                graph, compiled = attempt(margin)
                if graph.excess_bytes <= 0:
                    return graph, compiled
                margin += graph.excess_bytes << number
        except PlanError as error:
            if error.reachable_bytes is None or error.budget_bytes is None:
                raise
            graph, compiled = attempt(margin + error.budget_bytes - error.reachable_bytes)
            if graph.excess_bytes <= 0:
                return graph, compiled
        missed = graph.over_budget()
        del self.log.records[logged:]
        raise missed


class _Graph:
    """One graph on its way through AOTAutograd."""

    def __init__(self, settings: Settings, log: Log, frame: Frame, margin_bytes: int = 0) -> None:
        self.settings = settings
        self.log = log
        self.frame = frame
        self.margin_bytes = margin_bytes
        self.unlikely: frozenset[str] = frozenset()
        self.full_backward: fx.GraphModule | None = None
        self.accumulation = Accumulation(())
        self.blocks = Blocks()
        self.record: int | None = None

    def partition(
        self, joint: fx.GraphModule, inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """AOTAutograd's partition function: plan, apply, split."""
        full = cleaned(program_of(joint, num_fwd_outputs, self.frame), self.settings.compiler)
        self.accumulation = Accumulation(
            [i for i, item in enumerate(full.inputs) if item.role is Role.PARAMETER]
        )
        held = self.settings.held
        if self.frame.broken_at is None and not (held and held.knows(full)):
            self.unlikely = unlikely_tangents(full)
        program = without_gradients(full, self.unlikely) if self.unlikely else full
        passes = self.settings.passes
        planned = self._run_passes(program, passes)
        if not self.unlikely:
            saved = saved_nodes(planned)
            return forward_module(planned, saved), backward_module(planned, _names(saved))
        try:
            replayed = self._replay_on(full)
        except PlanError:  # the other gradients need values that this plan neither keeps nor can make
            self.log.records.pop()
            self.unlikely = frozenset()
            planned = self._run_passes(full, passes)
            saved = saved_nodes(planned)
            return forward_module(planned, saved), backward_module(planned, _names(saved))
        names = set(_names(saved_nodes(planned))) | set(_names(saved_nodes(replayed)))
        saved = as_saved(n for n in replayed.graph.nodes if n.name in names)
        self.full_backward = backward_module(replayed, _names(saved))
        return forward_module(replayed, saved), backward_module(planned, _names(saved))

    def _run_passes(self, program: Program, passes: tuple[Pass, ...]) -> Program:
        traced = time.perf_counter() - self.log.begin
        held = self.settings.held
        may_stream = self.settings.streams_blocks and self.settings.compiler == "eager"
        run = held.run if held else run_or_stream if may_stream else run_passes
        planned, steps = run(program, passes, self._costs, time.perf_counter)
        self.steps = steps
        if self.settings.verify == "full":
            compare_numerics(planned, program)
        costs = self._costs(program)
        self.record = len(self.log.records)
        self.log.records.append(GraphRecord(program, planned, steps, costs, traced))
        return planned

    def _costs(self, program: Program) -> Costs:
        fused = self.settings.compiler == "inductor"
        costs = Costs.measured(program, self.settings.device, seconds=self.settings.profile, fused=fused)
        reserved = reserved_bytes(self.log, program, self.frame.broken_at is not None)
        return replace(
            costs,
            reserved_bytes=reserved,
            margin_bytes=self.margin_bytes,
            followed=self.frame.broken_at is not None,
        )

    @property
    def _logged(self) -> GraphRecord:
        assert self.record is not None, "nothing is planned yet"
        return self.log.records[self.record]

    @property
    def room_bytes(self) -> int | None:
        """What one half of the step may hold beside parameters and inputs; None for any amount."""
        limit = self._logged.limit_bytes
        return None if limit is None else limit - self._logged.static_bytes

    @property
    def scratch_bytes(self) -> Mapping[str, int]:
        """What library kernels hold while they run, by the name of their node."""
        costs = self._logged.costs
        makers = {n.name: n.meta.get(RECOMPUTE_OF, n.name) for n in self._logged.after.operators()}
        new = [n for n in self._logged.after.operators() if makers[n.name] not in costs.nodes]
        known = costs.with_nodes(new).workspace_bytes
        return {name: known.get(maker, 0) for name, maker in makers.items()}

    def note_peak(self, peak_bytes: int) -> None:
        """What one half of the step holds at most beside parameters and inputs, as compiled."""
        record = self._logged
        peak = max(record.compiled_peak_bytes or 0, record.static_bytes + peak_bytes)
        assert self.record is not None
        self.log.records[self.record] = replace(record, compiled_peak_bytes=peak)

    @property
    def excess_bytes(self) -> int:
        """By how much the compiled step is over its budget; 0 where there is no number to keep to."""
        record = self._logged
        peak, limit = record.compiled_peak_bytes, record.limit_bytes
        budgets = (getattr(step.plan, "budget_bytes", None) for step in record.steps)
        return 0 if peak is None or limit is None or not any(budgets) else max(0, peak - limit)

    def over_budget(self) -> PlanError:
        """What to raise where the compiled step cannot be had within its budget."""
        record = self._logged
        limit, peak = record.limit_bytes or 0, record.compiled_peak_bytes or 0
        return PlanError(
            f"no plan that Inductor compiles keeps the step within {format_bytes(limit)}; the smallest "
            f"reachable peak is {format_bytes(peak)} ({peak} bytes); compiler='eager' may reach less",
            reachable_bytes=peak,
            budget_bytes=limit,
        )

    def _replay_on(self, full: Program) -> Program:
        """The passes' plans applied to the program in which every gradient may arrive."""
        for step in self.steps:
            full = step.pass_.apply(full, step.plan)
        return full

    def compile_inference(self, module: fx.GraphModule, _inputs: Sequence[Any]) -> Boxed:
        """The forward alone, under no_grad."""
        return eager(self.planned_inference(module).copy().module, self.blocks)

    def planned_inference(self, module: fx.GraphModule) -> Program:
        """The forward alone, planned."""
        outputs: Any = module.graph.output_node().args[0]
        program = cleaned(program_of(module, len(outputs), self.frame), self.settings.compiler)
        return self._run_passes(program, self.settings.inference_passes)

    def compile_forward(self, module: fx.GraphModule, _inputs: Sequence[Any]) -> Boxed:
        """The forward of a training step."""
        forward = eager(module, self.blocks)

        def run(arguments: list[Any]) -> Sequence[Any]:
            self.accumulation.note(arguments)
            return forward(arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def compile_backward(self, module: fx.GraphModule, _inputs: Sequence[Any]) -> Boxed:
        """The backward; where an unlikely gradient does arrive, the one that expects all of them."""
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        return self.backward_of(placeholders, eager_backward(module, self.blocks, self.accumulation))

    def backward_of(self, placeholders: Sequence[fx.Node], usual: Boxed) -> Boxed:
        """`usual` where no unlikely gradient arrives, else the full backward, in eager order."""
        unlikely = [i for i, n in enumerate(placeholders) if n.name in self.unlikely]
        fills = [n.meta["val"] for n in placeholders]
        full: list[Boxed] = []

        def run(arguments: list[Any]) -> Sequence[Any]:
            expected = all(arguments[i] is None for i in unlikely)
            for i, argument in enumerate(arguments):
                if argument is None and not (expected and i in unlikely):
                    like = fills[i]
                    arguments[i] = torch.zeros(like.shape, dtype=like.dtype, device=like.device)
            if expected or self.full_backward is None:
                return usual(arguments)
            if not full:
                full.append(eager(self.full_backward, None, self.accumulation))
            return full[0](arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def reserved_bytes(log: Log, program: Program, followed: bool) -> int:
    """Bytes that the step holds outside `program`, with the loss and its gradient, the caller's."""
    return _held_elsewhere(log, program, followed) + 2 * _bytes_of_numbers(program)


def _held_elsewhere(log: Log, program: Program, followed: bool) -> int:
    """Bytes that the step holds outside `program`: other parameters, and what other graphs keep.

    Where the callable has several graphs, the gradients of the parameters of the others count too.
    """
    earlier = log.records[log.first :]
    held = sum(record.kept_bytes for record in earlier)
    if log.module is None:
        return held + sum(_bytes_of(r.before, Role.PARAMETER, Role.BUFFER) for r in earlier)
    every = {t.untyped_storage()._cdata: t for t in (*log.module.buffers(), *log.module.parameters())}
    held += sum(t.untyped_storage().nbytes() for t in every.values())
    held -= _bytes_of(program, Role.PARAMETER, Role.BUFFER)
    if earlier or followed:
        trained = sum(t.untyped_storage().nbytes() for t in every.values() if t.requires_grad)
        held += max(0, trained - _bytes_of(program, Role.PARAMETER))
    return max(0, held)


def _bytes_of(program: Program, *roles: Role) -> int:
    nodes = (n for n in program.graph.nodes if program.roles.get(n.name) in roles)
    return sum(map(bytes_behind, nodes))


def _bytes_of_numbers(program: Program) -> int:
    """Bytes of the gradients that come back to outputs of one element."""
    nodes = (n for n in program.graph.nodes if program.roles.get(n.name) is Role.TANGENT)
    tensors = [t for n in nodes for t in tensors_of(n) if t is not None and t.numel() == 1]
    return sum(t.element_size() for t in tensors)


def _names(nodes: Sequence[fx.Node]) -> list[str]:
    return [n.name for n in nodes]


def _noted(log: Log, graph: _Graph, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, which notes in the log that its graph ran."""

    def run(*arguments: Any) -> Any:
        results = compiled(*arguments)
        if graph.record is not None:
            log.last_run.add(graph.record)
        return results

    return run


def _leaving_gradients_undefined(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Tell autograd not to make zeros for the outputs of `compiled` that get no gradient."""

    def run(*arguments: Any) -> Any:
        results = compiled(*arguments)
        for result in results if isinstance(results, (tuple, list)) else (results,):
            node = result.grad_fn if isinstance(result, torch.Tensor) else None
            if node is not None and hasattr(node, "set_materialize_grads"):
                node.set_materialize_grads(False)
        return results

    return run
