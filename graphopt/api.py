"""The `optimize` call: the same model, within a memory budget, with a report."""

import copy
import functools
import shutil
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from graphopt.capture import CaptureSettings
from graphopt.cost_models.calibrate import calibrated_cpu
from graphopt.cost_models.devices import KNOWN_DEVICES, Device, get_device
from graphopt.errors import GraphoptError, TraceError
from graphopt.module_report import run_module_passes
from graphopt.passes.base import Pass
from graphopt.passes.budget import Budget
from graphopt.passes.defaults import default_passes
from graphopt.passes.module_pass import ModulePass
from graphopt.passes.split_vocab import SplitVocab
from graphopt.plan_file import PlanFile, held_or_given
from graphopt.report import Report
from graphopt.runtime import Backend, Log, Settings
from graphopt.sharded_parameters import refuse_fully_sharded
from graphopt.tracing import reason_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

COMPILERS = ("eager", "inductor", "auto")
VERIFY = ("structure", "full")


def optimize(
    model: nn.Module | Callable[..., Any],
    *,
    memory: Budget = None,
    activations: Budget = None,
    passes: Sequence[Pass | ModulePass | SplitVocab] | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    compiler: str = "eager",
    device: str | Device | None = None,
    fullgraph: bool = False,
    profile: bool = False,
    verify: str = "structure",
    mesh: "DeviceMesh | None" = None,
    plan: PlanFile | None = None,
) -> Any:
    """`model` (a module or a function), made to train within a memory budget.

    The result of a module is a module of the same class that shares everything with it: parameters,
    buffers, hooks, mode, attributes. The first call with new shapes captures, plans and compiles.

    Args:
        model: an `nn.Module`, or a function such as a whole loss computation.
        memory: bound on the peak of the step, parameters and gradients included: bytes, "6GiB", a
            share of the plain peak (0.4), "min", or None: nothing heavy again. May use `StreamBlocks`.
        activations: bound on what the step allocates besides gradients, in the same forms.
        passes: instead of `Checkpoint(memory=memory, activations=activations)`, in inference with `Fuse`.
            After `SkipLayers` alone the result is a changed copy, a plain module with a `report`.
        loss: for a model that computes no loss itself, `loss(output, target)`. The result is then
            called as `model(..., target=y)` and returns the loss.
        compiler: "eager" runs the planned graphs operator by operator, exactly; "inductor" hands
            them to Inductor; "auto" chooses Inductor where a toolchain for it is there.
        device: whose costs decide between recomputations: a name, a `Device`, or None for this one.
        verify: "structure" checks every rewritten graph; "full" compares its numerics on made-up inputs.
        profile: measure the time of every distinct operator instead of predicting it.
        mesh: ranks that `SplitVocab()`, first of `passes`, splits the vocabulary of `model` itself over.
        fullgraph: raise TraceError at a graph break instead of planning the parts.
        plan: plans made before, as `PlanFile.load` reads them, for exactly the graphs of these inputs.

    Raises:
        PlanError: a budget that cannot be met (with `reachable_bytes`), or one that is malformed.
        TraceError: a model that cannot be captured; both at the first call.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    >>> small = optimize(net, memory="1MiB", loss=torch.nn.functional.mse_loss, device="cpu-generic")
    >>> small(torch.zeros(4, 8), target=torch.zeros(4, 1)).backward()
    >>> net[0].weight.grad.shape
    torch.Size([32, 8])
    """
    _check(model, verify)
    passes = held_or_given(plan, compiler, passes, (memory, activations, mesh))
    if mesh is not None or any(isinstance(p, SplitVocab) for p in passes or ()):
        model, passes = _split(model, passes, mesh, device, (memory, activations, loss) == (None,) * 3)
    first, rest = _module_passes_first(passes)
    way, model = _compiler(compiler), run_module_passes(model, first)
    chosen, forward = _passes(rest, memory, activations, way)
    if (first or mesh is not None) and not chosen and loss is None and compiler == "eager":
        return model
    settings = Settings(chosen, forward, way, _device(device, model), profile, verify, not passes, plan)
    return _wrapped(model, _State(settings, fullgraph, loss, _name(model)))


def _wrapped(model: Any, state: "_State") -> Any:
    if isinstance(model, nn.Module):
        return _optimized_module(model, state)
    return OptimizedFunction(model, state)


def _check(model: Any, verify: str) -> None:
    if not isinstance(model, nn.Module) and not callable(model):
        raise TraceError(f"optimize takes a module or a function, not {type(model).__name__}")
    if isinstance(model, nn.Module):
        refuse_fully_sharded(model)
    if verify not in VERIFY:
        raise GraphoptError(f"verify={verify!r} is none of {', '.join(VERIFY)}")


def _split(
    model: Any,
    passes: Sequence[Pass | ModulePass | SplitVocab] | None,
    mesh: "DeviceMesh | None",
    device: str | Device | None,
    plain: bool,
) -> tuple[nn.Module, Sequence[Any]]:
    """`model`, its vocabulary split over `mesh` as its `split_vocab` says, and the other passes."""
    if mesh is None:
        raise GraphoptError("SplitVocab splits over the ranks of a mesh: give mesh=")
    if not isinstance(model, nn.Module):
        raise GraphoptError("SplitVocab takes a module: it replaces parameters")
    first, *rest = passes or (None,)
    if not isinstance(first, SplitVocab) or any(isinstance(p, SplitVocab) for p in rest) or not plain:
        raise GraphoptError(
            "over a mesh, passes= takes one SplitVocab(), first; there is no budget or loss"
        )
    known = _device(device, model)
    plan = first.plan(model, mesh, known)
    model.split_vocab = plan  # type: ignore[assignment]
    return first.apply(model, mesh, known, plan), rest


def _module_passes_first(
    passes: Sequence[Pass | ModulePass | SplitVocab] | None,
) -> tuple[list[ModulePass], list[Pass] | None]:
    """The passes that change the module, and those that change its program."""
    if passes is None:
        return [], None
    first = [p for p in passes if isinstance(p, ModulePass)]
    if list(passes[: len(first)]) != first:
        raise GraphoptError(f"{first[-1].name} changes the module; put it before the other passes")
    return first, list(passes[len(first) :])  # type: ignore[arg-type] # checked next


def _passes(
    passes: Sequence[Pass] | None, memory: Budget, activations: Budget, compiler: str
) -> tuple[tuple[Pass, ...], tuple[Pass, ...]]:
    """The passes of training steps, and those of graphs without a backward."""
    if passes is None:
        step, forward = (default_passes(memory, activations, mode, compiler) for mode in (True, False))
        return step, forward
    if memory is not None or activations is not None:
        raise GraphoptError("give either passes= or a budget; a budget is short for one Checkpoint")
    wrong = [p for p in passes if not isinstance(p, Pass)]
    if wrong:
        raise GraphoptError(f"passes= takes pass objects like graphopt.Checkpoint(), not {wrong[0]!r}")
    return tuple(passes), tuple(passes)


def _compiler(name: str) -> str:
    if name not in COMPILERS:
        raise GraphoptError(f"compiler={name!r} is none of {', '.join(COMPILERS)}")
    if name != "auto":
        return name
    has_triton = torch.cuda.is_available() and torch.utils._triton.has_triton()
    has_cpp = any(shutil.which(compiler) for compiler in ("g++", "clang++"))
    return "inductor" if has_triton or has_cpp else "eager"


def _device(device: str | Device | None, model: Any) -> Device:
    if isinstance(device, Device):
        return device
    if device is not None:
        return get_device(device)
    tensors = iter([*model.parameters(), *model.buffers()]) if isinstance(model, nn.Module) else iter(())
    first = next(tensors, None)
    if first is not None and first.device.type == "cuda":
        return _cuda_device(first.device)
    return calibrated_cpu()


def _cuda_device(device: torch.device) -> Device:
    name = torch.cuda.get_device_name(device).lower()
    matching = [key for key in KNOWN_DEVICES if key in name.replace(" ", "")]
    return get_device(max(matching, key=len) if matching else "a100")


def _name(model: Any) -> str:
    return (
        type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "function")
    )


class _State:
    """What an optimised callable has beside what it shares with the original."""

    def __init__(
        self,
        settings: Settings,
        fullgraph: bool,
        loss: Callable[..., torch.Tensor] | None,
        name: str,
    ) -> None:
        self.settings = settings
        self.fullgraph = fullgraph
        self.loss = loss
        self.name = name
        self.log = Log()
        self.capture_settings = CaptureSettings()
        self.compiled: Callable[..., Any] | None = None
        self.original: Any = None

    def bind(self, function: Callable[..., Any]) -> None:
        """Compile `function` (lazily, as torch.compile does), with the loss behind it."""

        @functools.wraps(function)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self.call(args, kwargs)

        self.forward: Callable[..., Any] = forward
        if self.loss is not None:
            function = _with_loss(function, self.loss)
        self.compiled = torch.compile(
            function,
            backend=Backend(self.settings, self.log),
            dynamic=False,
            fullgraph=self.fullgraph,
        )

    def call(self, args: Any, kwargs: Any) -> Any:
        """Run; what goes wrong in capture or planning is raised once, as one of graphopt's errors."""
        self.log.begin, self.log.first = time.perf_counter(), len(self.log.records)
        self.log.last_run.clear()
        try:
            with self.capture_settings:
                return self.compiled(*args, **kwargs)  # type: ignore[misc]
        except torch._dynamo.exc.BackendCompilerFailed as error:
            inner = error.inner_exception
            if isinstance(inner, GraphoptError):
                inner.args = (f"{self.name}: {inner.args[0]}", *inner.args[1:])
                raise inner from None
            raise TraceError(f"{self.name} could not be captured: {inner}") from error
        except torch._dynamo.exc.Unsupported as error:
            reason = reason_of(error)
            raise TraceError(f"{self.name} breaks into several graphs: {reason}") from error
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = reason_of(error)
            raise TraceError(f"{self.name} could not be captured on these inputs: {reason}") from error

    def report(self) -> Report:
        """What happened so far."""
        return Report.of(self.name, self.settings, self.log)

    def measure(self, optimized: Any, args: Any, kwargs: Any) -> Report:
        """Measure a plain and an optimised step of the model, and report."""
        from graphopt.comparison import compare_steps

        plain = self.original if self.loss is None else _with_loss(self.original, self.loss)
        self.log.measured = compare_steps(plain, optimized, self.original, args, kwargs)
        return self.report()


def _with_loss(function: Callable[..., Any], loss: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def with_loss(*args: Any, target: Any = None, **kwargs: Any) -> Any:
        output = function(*args, **kwargs)
        return output if target is None else loss(output, target)

    return with_loss


class OptimizedModule:
    """What an optimised module has beside its own class: the report, and the planned forward.

    Never made by itself: `optimize` returns an object of a class that derives from this one and from
    the model's class, and shares the model's `__dict__`.
    """

    __slots__ = ()
    _graphopt: _State

    @property
    def report(self) -> Report:
        """What changed, what was predicted, what was measured."""
        return self._graphopt.report()

    def measure(self, *args: Any, **kwargs: Any) -> Report:
        """The report, with the measured memory and time of a plain and of an optimised step.

        The arguments are those of a call. Of each kind, five steps run: forward and backward of the
        loss, under `no_grad` the forward, as the model is now (mode, autocast). Gradients, buffers and
        random generators are put back afterwards; parameters do not change, unless a hook of the model
        changes them.
        """
        return self._graphopt.measure(self, args, kwargs)

    @property
    def original(self) -> nn.Module:
        """The module that was optimised; it runs as it did."""
        return self._graphopt.original  # type: ignore[no-any-return]

    @property
    def forward(self) -> Callable[..., Any]:
        """The model's forward, captured and planned.

        A property, so that it comes before a forward that libraries set on the instance they share.
        """
        return self._graphopt.forward

    @forward.setter
    def forward(self, function: Callable[..., Any]) -> None:
        self.__dict__["forward"] = function
        self._graphopt.bind(function)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        state = self._graphopt
        return _rebuilt(copy.deepcopy(state.original, memo), state.settings, state.fullgraph, state.loss)

    def __reduce__(self) -> Any:
        state = self._graphopt
        return _rebuilt, (state.original, state.settings, state.fullgraph, state.loss)


def _rebuilt(
    model: nn.Module,
    settings: Settings,
    fullgraph: bool,
    loss: Callable[..., torch.Tensor] | None,
) -> nn.Module:
    return _optimized_module(model, _State(settings, fullgraph, loss, _name(model)))


def _optimized_module(model: nn.Module, state: _State) -> nn.Module:
    if isinstance(model, OptimizedModule):
        model = model.original
    kind = _optimized_class(type(model))  # type: ignore[arg-type] # classes are hashable
    result = kind.__new__(kind)
    object.__setattr__(result, "__dict__", model.__dict__)
    kind._graphopt.__set__(result, state)
    state.original = state.log.module = model
    state.bind(model.forward)
    return result  # type: ignore[no-any-return]


@functools.cache
def _optimized_class(kind: type) -> Any:
    """A subclass of `kind` whose instances have one more slot."""
    members = {"__slots__": ("_graphopt",), "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (OptimizedModule, kind), members)


class OptimizedFunction:
    """An optimised function: called as the original, with a report."""

    def __init__(self, function: Callable[..., Any], state: _State) -> None:
        functools.update_wrapper(self, function)
        self._graphopt = state
        state.original = function
        state.bind(function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._graphopt.call(args, kwargs)

    @property
    def report(self) -> Report:
        """What changed, what was predicted, what was measured."""
        return self._graphopt.report()


def dynamo_backend(
    module: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend behind `torch.compile(model, backend="graphopt", options={...})`.

    Options are those of `optimize`: memory, activations, passes, plan, compiler, device, profile.
    """
    given = dict(options or {})
    known = {"memory", "activations", "passes", "plan", "compiler", "device", "profile"}
    if unknown := sorted(set(given) - known):
        raise GraphoptError(f"unknown option {unknown[0]!r}; known are {', '.join(sorted(known))}")
    plan, compiler = given.get("plan"), given.get("compiler", "eager")
    budgets = given.get("memory"), given.get("activations")
    passes = held_or_given(plan, compiler, given.get("passes"), budgets)
    way = _compiler(compiler)
    settings = Settings(
        *_passes(passes, *budgets, way),
        way,
        _device(given.get("device"), module),
        bool(given.get("profile", False)),
        held=plan,
    )
    return Backend(settings, Log())(module, example_inputs)
