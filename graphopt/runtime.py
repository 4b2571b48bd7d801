"""The backend that torch.compile calls: capture, passes, and the two modules that run."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from graphopt.capture import Frame, frame_of, program_of
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import Device
from graphopt.lower import boxed, overwrite_dead_operands
from graphopt.passes.base import Pass
from graphopt.passes.pipeline import PassStep, run_passes
from graphopt.program import Program
from graphopt.split import backward_module, forward_module, saved_nodes
from graphopt.tangents import unlikely_tangents, without_gradients

Boxed = Callable[[list[Any]], Sequence[Any]]


@dataclass(frozen=True)
class Settings:
    """How graphs are compiled: the passes, the compiler ("eager", "inductor"), and whose costs count.

    With `profile` the time of every distinct operator is measured instead of predicted.
    """

    passes: tuple[Pass, ...]
    compiler: str
    device: Device
    profile: bool = False


@dataclass(frozen=True)
class GraphRecord:
    """One captured graph: before and after the passes, and each pass's step."""

    before: Program
    after: Program
    steps: tuple[PassStep, ...]
    costs: Costs
    trace_seconds: float


@dataclass
class Log:
    """What was compiled so far, in order; the report reads it. `begin` is when the call began."""

    begin: float = 0.0

    records: list[GraphRecord] = field(default_factory=list)
    breaks: list[str] = field(default_factory=list)


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
        graph = _Graph(self.settings, self.log, frame)
        if self.settings.compiler == "inductor":
            from graphopt.inductor import compile_with_inductor

            compiled = compile_with_inductor(module, example_inputs, graph)
        else:
            compiled = aot_autograd(
                fw_compiler=graph.compile_forward,
                bw_compiler=graph.compile_backward,
                inference_compiler=graph.compile_inference,
                partition_fn=graph.partition,
            )(module, example_inputs)
        return _leaving_gradients_undefined(compiled)


class _Graph:
    """One graph on its way through AOTAutograd."""

    def __init__(self, settings: Settings, log: Log, frame: Frame) -> None:
        self.settings = settings
        self.log = log
        self.frame = frame
        self.unlikely: frozenset[str] = frozenset()
        self.full_backward: fx.GraphModule | None = None

    def partition(
        self, joint: fx.GraphModule, _inputs: Any, *, num_fwd_outputs: int, **_: Any
    ) -> tuple[fx.GraphModule, fx.GraphModule]:
        """AOTAutograd's partition function: plan, apply, split."""
        full = program_of(joint, num_fwd_outputs, self.frame)
        if self.frame.broken_at is None:
            self.unlikely = unlikely_tangents(full)
        program = without_gradients(full, self.unlikely) if self.unlikely else full
        planned = self._run_passes(program)
        if not self.unlikely:
            saved = saved_nodes(planned)
            return forward_module(planned, saved), backward_module(planned, _names(saved))
        replayed = self._replay_on(full)
        names = set(_names(saved_nodes(planned))) | set(_names(saved_nodes(replayed)))
        saved = [n for n in replayed.graph.nodes if n.name in names]
        self.full_backward = backward_module(replayed, _names(saved))
        return forward_module(replayed, saved), backward_module(planned, _names(saved))

    def _run_passes(self, program: Program) -> Program:
        traced = time.perf_counter() - self.log.begin
        planned, steps = run_passes(program, self.settings.passes, self._costs, time.perf_counter)
        self.steps = steps
        costs = self._costs(program)
        self.log.records.append(GraphRecord(program, planned, steps, costs, traced))
        return planned

    def _costs(self, program: Program) -> Costs:
        return Costs.measured(program, self.settings.device, seconds=self.settings.profile)

    def _replay_on(self, full: Program) -> Program:
        """The passes' plans applied to the program in which every gradient may arrive."""
        for step in self.steps:
            full = step.pass_.apply(full, step.plan)
        return full

    def compile_inference(self, module: fx.GraphModule, _inputs: Sequence[Any]) -> Boxed:
        """The forward alone, under no_grad."""
        outputs = module.graph.output_node().args[0]
        program = program_of(module, len(outputs), self.frame)  # type: ignore[arg-type]
        return _eager(self._run_passes(program).module)

    def compile_forward(self, module: fx.GraphModule, _inputs: Sequence[Any]) -> Boxed:
        """The forward of a training step."""
        return _eager(module)

    def compile_backward(self, module: fx.GraphModule, _inputs: Sequence[Any]) -> Boxed:
        """The backward; where an unlikely gradient does arrive, the one that expects all of them."""
        return self.backward_of(module, _eager(module))

    def backward_of(self, module: fx.GraphModule, usual: Boxed) -> Boxed:
        """`usual` where no unlikely gradient arrives, else the full backward, in eager order."""
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        unlikely = [i for i, n in enumerate(placeholders) if n.name in self.unlikely]
        fills = [n.meta["val"] for n in placeholders]
        full: list[Boxed] = []

        def run(arguments: list[Any]) -> Sequence[Any]:
            expected = all(arguments[i] is None for i in unlikely)
            for i, argument in enumerate(arguments):
                if argument is None and not (expected and i in unlikely):
                    arguments[i] = _zeros_like(fills[i])
            if expected or self.full_backward is None:
                return usual(arguments)
            if not full:
                full.append(_eager(self.full_backward))
            return full[0](arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run


def _names(nodes: Sequence[fx.Node]) -> list[str]:
    return [n.name for n in nodes]


def _eager(module: fx.GraphModule) -> Boxed:
    overwrite_dead_operands(module)
    return boxed(module)


def _zeros_like(value: torch.Tensor) -> torch.Tensor:
    return torch.zeros(value.shape, dtype=value.dtype, device=value.device)


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
