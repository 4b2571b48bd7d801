"""Tracing: a model and example inputs to a Program, without running anything or allocating weights."""

import copy
import re
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphopt.capture import CaptureSettings, Frame, frame_of, program_of
from graphopt.cleanup import cleaned
from graphopt.errors import TraceError
from graphopt.program import Program

Examples = Sequence[Any] | Mapping[str, Any] | torch.Tensor


def trace(
    model: nn.Module | Callable[..., Any],
    example_inputs: Examples,
    *,
    training: bool = True,
) -> Program:
    """The Program of one step of `model` on inputs like `example_inputs`.

    The example inputs are a tensor, a sequence of positional arguments or a mapping of keyword
    arguments; only their shapes and types count, and the model may be on the meta device. With
    `training` the graph is joint: forward and backward of everything that requires grad. Raises
    TraceError where the model breaks into several graphs or cannot be captured.

    >>> import torch
    >>> model = torch.nn.Linear(4, 1, device="meta")
    >>> print(trace(lambda x: model(x).sum(), torch.ones(3, 4)))
    Program(joint forward and backward: 10 operators; 2 parameters, 1 inputs, 1 tangents)
    """
    programs = capture(model, example_inputs, training=training, fullgraph=True)
    if not programs:
        raise TraceError(f"{_name(model)} runs no tensor operation that could be traced")
    return programs[0]


def capture(
    model: nn.Module | Callable[..., Any],
    example_inputs: Examples,
    *,
    training: bool = True,
    fullgraph: bool = False,
) -> list[Program]:
    """The Programs of every graph that one call of `model` runs, in order; see `trace`."""
    if not callable(model):
        raise TraceError(f"trace takes a module or a function, not {type(model).__name__}")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    faked = _Faker(mode)
    args, kwargs = _arguments(example_inputs)
    programs: list[Program] = []
    compiled = torch.compile(
        faked.callable(model), backend=_collector(programs, fullgraph), dynamic=False, fullgraph=fullgraph
    )
    args, kwargs = pytree.tree_map_only(torch.Tensor, faked.tensor, (args, kwargs))
    try:
        with CaptureSettings(), mode, torch.set_grad_enabled(training):
            compiled(*args, **kwargs)
    except TraceError:
        raise
    except Exception as error:
        if fullgraph and programs:  # stopped on purpose: there is nothing left to learn
            return programs
        raise TraceError(f"{_name(model)} could not be traced: {reason_of(error)}") from error
    return programs


class _Captured(Exception):
    """Ends a capture as soon as the only graph is known."""


def _collector(programs: list[Program], only_one: bool) -> Callable[..., Any]:
    def backend(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        frame = frame_of(module, example_inputs)
        return aot_autograd(
            fw_compiler=_boxed_interpreter,
            inference_compiler=lambda graph, _: _keep_forward(graph, frame, programs, only_one),
            partition_fn=lambda joint, inputs, **kw: _keep(
                joint, inputs, frame, programs, only_one, **kw
            ),
        )(module, example_inputs)

    return backend


def _keep(
    joint: fx.GraphModule,
    inputs: Any,
    frame: Frame,
    programs: list[Program],
    only_one: bool,
    *,
    num_fwd_outputs: int,
    **options: Any,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    from torch._functorch.partitioners import default_partition

    programs.append(cleaned(program_of(joint, num_fwd_outputs, frame).copy()))
    if only_one:
        raise _Captured
    return default_partition(joint, inputs, num_fwd_outputs=num_fwd_outputs, **options)


def _keep_forward(
    module: fx.GraphModule, frame: Frame, programs: list[Program], only_one: bool
) -> Callable[..., Any]:
    outputs = module.graph.output_node().args[0]
    program = program_of(module, len(outputs), frame)  # type: ignore[arg-type]
    programs.append(cleaned(program.copy()))
    if only_one:
        raise _Captured
    return _boxed_interpreter(module, ())


def _boxed_interpreter(module: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
    def run(arguments: list[Any]) -> Any:
        return module(*arguments)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


class _Faker:
    """Fake copies of real and meta tensors; a copy of one tensor is always the same."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.mode = mode
        self.memo: dict[int, Any] = {}
        self.originals: list[torch.Tensor] = []

    def tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake copy; tensors on the meta device are taken to be on the CPU."""
        if id(tensor) not in self.memo:
            fake = self._like(tensor)
            if tensor.requires_grad and not isinstance(tensor, nn.Parameter):
                fake.requires_grad_()
            if isinstance(tensor, nn.Parameter):
                fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
            self.memo[id(tensor)] = fake
            self.originals.append(tensor)
        return self.memo[id(tensor)]  # type: ignore[no-any-return]

    def _like(self, tensor: torch.Tensor) -> torch.Tensor:
        if is_traceable_wrapper_subclass(tensor):  # a DTensor, for one: around fake parts
            names, context = tensor.__tensor_flatten__()
            parts = {name: getattr(tensor, name) for name in names}
            inner = {k: self.tensor(p) if isinstance(p, torch.Tensor) else p for k, p in parts.items()}
            sizes = tensor.shape, tensor.stride()
            return type(tensor).__tensor_unflatten__(inner, context, *sizes)
        device = "cpu" if tensor.device.type == "meta" else tensor.device
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)

    def callable(self, model: nn.Module | Callable[..., Any]) -> Callable[..., Any]:
        """`model` on fake tensors: a module's copy, or a function whose modules are copied."""
        if isinstance(model, nn.Module):
            return self.module(model).forward
        return self._function(model) if isinstance(model, types.FunctionType) else model

    def module(self, model: nn.Module) -> nn.Module:
        """A copy of `model` whose parameters and buffers are fake."""
        for tensor in (*model.parameters(), *model.buffers()):
            self.tensor(tensor)
        return copy.deepcopy(model, dict(self.memo))

    def _function(self, function: types.FunctionType) -> Callable[..., Any]:
        """A copy of `function` that sees fake copies of the modules it names."""
        cells = tuple(
            types.CellType(self.module(c.cell_contents)) if _holds_module(c) else c
            for c in function.__closure__ or ()
        )
        names = function.__code__.co_names
        modules = {n: function.__globals__.get(n) for n in names}
        fakes = {n: self.module(m) for n, m in modules.items() if isinstance(m, nn.Module)}
        scope = {**function.__globals__, **fakes} if fakes else function.__globals__
        copied = types.FunctionType(
            function.__code__, scope, function.__name__, function.__defaults__, cells or None
        )
        copied.__kwdefaults__ = function.__kwdefaults__
        return copied


def _holds_module(cell: types.CellType) -> bool:
    try:
        return isinstance(cell.cell_contents, nn.Module)
    except ValueError:  # an empty cell
        return False


def _arguments(example_inputs: Examples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, torch.Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise TraceError(
        "example_inputs must be a tensor, a sequence of positional arguments or a mapping of "
        f"keyword arguments, not {type(example_inputs).__name__}"
    )


def _name(model: Any) -> str:
    return type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "it")


def reason_of(error: BaseException) -> str:
    """The first lines of what went wrong, without Dynamo's advice, and the user's line that did it."""
    text = str(error)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    places = re.findall(r'File "([^"]+)", line (\d+)', text)
    where = f" (at {places[-1][0]}:{places[-1][1]})" if places else ""
    return ("; ".join(lines[:3]) or type(error).__name__) + where
