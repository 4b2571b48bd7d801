"""A model that can be had at any sizes, and the symbolic step that its captures make.

The step is captured without running it, on fake tensors, once for each of a few sizes. Of a deep model of
equal layers a shallow one is captured, and its layers repeated.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt import zoo
from graphopt.analysis import trace_loaded
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import Device
from graphopt.cost_models.polynomials import NotPolynomialError, Sizes, Terms
from graphopt.cost_models.repetition import repeated
from graphopt.cost_models.symbolic import Sample, SymbolicFlow, symbolic_flow
from graphopt.errors import GraphoptError
from graphopt.models import LoadedModel, load_model
from graphopt.passes.base import Pass
from graphopt.passes.stream_blocks import StreamBlocks, StreamBlocksPlan
from graphopt.passes.stream_loss import StreamLoss, StreamLossPlan
from graphopt.plan import Plan
from graphopt.program import Program
from graphopt.runtime import Log, reserved_bytes
from graphopt.tangents import unlikely_tangents, without_gradients
from graphopt.tracing import Examples
from graphopt.width import Width, width_of

SHALLOW = 3  # layers that are captured of a deep model: the least that can be repeated
MOST = 2**16  # the largest batch, and the largest sequence of a model without a longest, of a formula
CAPTURED_SEQ = 4096  # no longer sequence is captured, unless a question names one
LEAST = {"batch": 2, "seq": 2}  # a batch or a sequence of one is another step: copies become views there
STARTS = (1, 8, 64)  # times the smallest batch: where a formula begins, if it does not hold below
_LONGEST = ("n_positions", "max_position_embeddings", "max_target_positions")


@dataclass(frozen=True)
class SizedModel:
    """`load(batch=, seq=, layers=)` gives the model with inputs of those sizes; `layers` may be absent.

    `variables` are those of "batch" and "seq" that its inputs have, and "hidden", which is loaded like
    them, where the model is had at several widths: those of `width`. `layers` is the number of layers of
    the whole model where a shallower one can be loaded, `longest` its longest sequence, if it has one.
    """

    name: str
    load: Callable[..., LoadedModel]
    variables: tuple[str, ...] = ("batch", "seq")
    layers: int | None = None
    longest: int | None = None
    width: Width | None = None


def sized_model(
    model: str | nn.Module,
    inputs: Callable[..., Examples] | None = None,
    *,
    size: zoo.Size | None = None,
    overrides: Mapping[str, zoo.Value] | None = None,
    dtype: torch.dtype | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    widths: tuple[int, int] | None = None,
) -> SizedModel:
    """A zoo name, `file.py:factory`, or a module with `inputs(batch, seq)`, at any sizes.

    A factory is called with `batch` and `seq` and returns a module and its inputs. `inputs` may take the
    batch only. With `loss`, inputs are a pair: what the module is called with, and the target. With
    `widths`, smallest and largest, the hidden size of a zoo model is a further size.
    """
    if widths is not None and (isinstance(model, nn.Module) or ".py:" in model):
        raise GraphoptError("widths= is for models of the zoo: of others, which sizes grow is not known")
    if isinstance(model, nn.Module):
        if inputs is None:
            raise GraphoptError("of a module, give inputs=: a function of batch and seq that makes them")
        return _of_module(model, inputs, loss)
    if model in zoo.ENTRIES:
        return _of_zoo(model, size, dict(overrides or {}), dtype, widths)
    if ".py:" not in model:
        zoo.entry_of(model)

    def load(**sizes: int) -> LoadedModel:
        return load_model(model, overrides={**(overrides or {}), **sizes}, device="meta")

    return SizedModel(model, load)


def _of_module(
    model: nn.Module, inputs: Callable[..., Examples], loss: Callable[..., torch.Tensor] | None
) -> SizedModel:
    code = getattr(inputs, "__code__", None)
    variables = ("batch", "seq")[: code.co_argcount if code is not None else 2]

    def load(**sizes: int) -> LoadedModel:
        made = inputs(*(sizes[v] for v in variables))
        if isinstance(made, Mapping):
            return LoadedModel(type(model).__name__, model, example_kwargs=made)
        args = (made,) if isinstance(made, torch.Tensor) else tuple(made)
        return LoadedModel(type(model).__name__, _WithLoss(model, loss) if loss else model, args)

    return SizedModel(type(model).__name__, load, variables)


class _WithLoss(nn.Module):
    """A model called with its input and the target, which returns the loss."""

    def __init__(self, model: nn.Module, loss: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Any, target: Any) -> torch.Tensor:
        return self.loss(self.model(x), target)


def _of_zoo(
    name: str,
    size: zoo.Size | None,
    overrides: dict[str, zoo.Value],
    dtype: torch.dtype | None,
    widths: tuple[int, int] | None,
) -> SizedModel:
    entry = zoo.entry_of(name)

    def load(**sizes: int) -> LoadedModel:
        changed = dict(overrides)
        if "layers" in sizes:
            changed = {k: v for k, v in changed.items() if k not in layer_names}
            changed["num_hidden_layers"] = sizes["layers"]
        if "resolution" in sizes:
            changed["image_size"] = sizes["resolution"]
        if width is not None and "hidden" in sizes:
            changed |= width.overrides(sizes["hidden"])
        own = {k: sizes[k] for k in ("batch", "seq") if k in sizes}
        return load_model(name, size=size, overrides=changed, dtype=dtype, device="meta", **own)

    layer_names = ("num_hidden_layers", "n_layer")
    width: Width | None = None
    config: Any = load().model.config
    width = None if widths is None else width_of(name, config, widths)
    limits = [getattr(config, key, None) for key in _LONGEST]
    longest = min((x for x in limits if x), default=None)
    if hasattr(config, "rope_parameters"):
        longest = None
    variables = ("batch",) if entry.family == "image" else ("batch", "seq")
    variables = variables if width is None else (*variables, "hidden")
    layers = getattr(config, "num_hidden_layers", None) if entry.family in _STACKED else None
    return SizedModel(name, load, variables, layers, longest, width)


_STACKED = ("causal-lm", "masked-lm", "image")  # families with at most one stack of layers


class Captures:
    """Captured steps of one model for one device, each made once.

    `probed` measures the scratch of kernels here (on a CPU) instead of taking it from the shapes.
    """

    def __init__(self, model: SizedModel, device: Device, probed: bool = False) -> None:
        self.model, self.device, self.probed = model, device, probed
        self._programs: dict[tuple[tuple[str, int], ...], tuple[Program, int]] = {}
        self.count = 0

    def program(self, sizes: Mapping[str, int]) -> Program:
        """The training step at `sizes`, as `optimize` plans it."""
        return self._captured(sizes)[0]

    def costs(self, program: Program, sizes: Mapping[str, int]) -> Costs:
        """Costs of the captured step at `sizes`, or of what passes made of it."""
        found = (Costs.measured if self.probed else Costs.of)(program, self.device)
        return dataclasses.replace(found, reserved_bytes=self._captured(sizes)[1])

    def _captured(self, sizes: Mapping[str, int]) -> tuple[Program, int]:
        key = tuple(sorted(sizes.items()))
        if key not in self._programs:
            self.count += 1
            loaded = self.model.load(**sizes)
            program = trace_loaded(loaded, training=True)
            if not program.is_joint:
                raise GraphoptError(f"{self.model.name} has no backward: nothing is trained")
            tangents = unlikely_tangents(program)
            program = without_gradients(program, tangents) if tangents else program
            reserved = reserved_bytes(Log(module=loaded.model), program, False)
            self._programs[key] = program, reserved
        return self._programs[key]

    def sample(self, sizes: Mapping[str, int], steps: Sequence[tuple[Pass, Plan]] = ()) -> Sample:
        """The step at `sizes` with the decisions of `steps` carried out."""
        program = self.program(sizes)
        for pass_, plan in steps:
            program = pass_.apply(program, plan)
        return Sample.of(program, self.costs(program, sizes))

    def shallow(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """`sizes` of the shallow model, where one is captured for the whole."""
        layers = self.model.layers
        is_deep = layers is not None and layers > SHALLOW + 1
        return {**sizes, "layers": SHALLOW} if is_deep else dict(sizes)

    def plans(self, passes: Sequence[Pass], sizes: Mapping[str, int]) -> list[tuple[Pass, Plan]]:
        """What `passes` decide at `sizes`, one behind the other."""
        program, steps = self.program(sizes), []
        for pass_ in passes:
            plan = pass_.plan(program, self.costs(program, sizes))
            program = pass_.apply(program, plan)
            steps.append((pass_, plan))
        return steps

    def flow(
        self,
        fixed: Mapping[str, int],
        low: Mapping[str, int] = LEAST,
        steps: Sequence[tuple[Pass, Plan]] = (),
        high: int | None = None,
    ) -> SymbolicFlow:
        """The symbolic step, of the variables that are not `fixed`, with the decisions of `steps`.

        `low` are the smallest sizes that it is for, of batch and seq; `high` is the longest sequence that
        is captured, by default at least `CAPTURED_SEQ`. A hidden size is within the model's widths.
        """
        if self.model.width is not None:
            low = {**low, "hidden": self.model.width.low}
        if "batch" in fixed or "batch" not in self.model.variables:
            return self._deep(fixed, low, steps, high)
        for factor in STARTS[:-1]:  # scratch of convolutions, for one, grows in its own way at first
            try:
                return self._deep(fixed, {**low, "batch": factor * low["batch"]}, steps, high)
            except NotPolynomialError:
                continue
        return self._deep(fixed, {**low, "batch": STARTS[-1] * low["batch"]}, steps, high)

    def _deep(
        self,
        fixed: Mapping[str, int],
        low: Mapping[str, int],
        steps: Sequence[tuple[Pass, Plan]],
        high: int | None,
    ) -> SymbolicFlow:
        layers = self.model.layers
        if layers is not None and layers > SHALLOW + 1:
            try:
                return self._repeated(fixed, low, steps, high, layers)
            except NotPolynomialError:
                raise
            except GraphoptError:  # the layers are not alike, or decided about in their own ways
                pass
        return self._flow(fixed, low, steps, high)

    def _repeated(
        self,
        fixed: Mapping[str, int],
        low: Mapping[str, int],
        steps: Sequence[tuple[Pass, Plan]],
        high: int | None,
        layers: int,
    ) -> SymbolicFlow:
        least = {**{v: low[v] for v in self.model.variables}, **fixed}
        found: list[list[tuple[Pass, Plan]]] = []
        for depth in (SHALLOW, SHALLOW + 1):  # the same decisions, by the names in each of the two
            passes = [decided(pass_, plan) for pass_, plan in steps]
            found.append(self.plans(passes, {**least, "layers": depth}) if passes else [])
        shallow = self._flow({**fixed, "layers": SHALLOW}, low, found[0], high)
        deeper = self.sample({**least, "layers": SHALLOW + 1}, found[1])
        return repeated(shallow, deeper, layers - SHALLOW)

    def _flow(
        self,
        fixed: Mapping[str, int],
        low: Mapping[str, int],
        steps: Sequence[tuple[Pass, Plan]],
        high: int | None,
    ) -> SymbolicFlow:
        variables = tuple(v for v in self.model.variables if v not in fixed)
        longest = self.model.longest or MOST
        batch, seq = low["batch"], min(low["seq"], longest)
        end = max(seq, min(longest, high or max(CAPTURED_SEQ, 2 * seq)))
        inner = (seq + end) // 2 | 1
        choices = {"batch": (batch, batch + 1, batch + 3), "seq": (seq, end, inner)}
        further = {"batch": (batch + 1, 16 * batch + 7), "seq": (inner, (2 * seq + end) // 3)}
        ranges = {"batch": (batch, MOST), "seq": (seq, max(end, longest))}
        width = self.model.width
        units: tuple[int, ...] = ()
        if width is not None and "hidden" in variables:
            choices["hidden"] = (width.low, width.high, width.between(1, 2))
            further["hidden"] = (width.between(1, 3), width.between(2, 3))
            ranges["hidden"] = (width.low, width.high)
            units = tuple(width.unit if v == "hidden" else 1 for v in variables)

        def capture(sizes: Sizes) -> Sample:
            return self.sample({**dict(zip(variables, sizes, strict=True)), **fixed}, steps)

        def found(degrees: Mapping[str, int]) -> SymbolicFlow:
            terms = Terms(variables, tuple(degrees[v] for v in variables), units)
            values = [choices[v] for v in variables]
            grid = terms.grid(values)
            points = zip(*(further[v] for v in variables), strict=True) if variables else ()
            checks = [p for p in dict.fromkeys(points) if p not in grid]
            return symbolic_flow(capture, terms, values, [ranges[v] for v in variables], checks)

        for degrees in DEGREES[:-1]:
            try:
                return self._with_units(found(degrees), fixed)
            except NotPolynomialError:
                continue
        return self._with_units(found(DEGREES[-1]), fixed)

    def _with_units(self, flow: SymbolicFlow, fixed: Mapping[str, int]) -> SymbolicFlow:
        least = {v: 2 for v in self.model.variables}
        if self.model.width is not None:
            least["hidden"] = self.model.width.low
        model = self.model.load(**{**least, **fixed}).model
        own = {n: p for n, p in model.named_parameters()}
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
        layers = [sum(p.nbytes for p in child.parameters()) for m in lists for child in m]
        itemsize = next((p.element_size() for p in own.values() if p.requires_grad), 4)
        return dataclasses.replace(flow, unit_bytes=max(layers, default=0), itemsize=itemsize)


DEGREES: tuple[dict[str, int], ...] = (
    {"batch": 1, "seq": 1, "hidden": 2},
    {"batch": 1, "seq": 2, "hidden": 2},
    {"batch": 2, "seq": 2, "hidden": 2},
)


def decided(pass_: Pass, plan: Plan) -> Pass:
    """`pass_` with what its plan decided as its options, so that it decides the same elsewhere."""
    if isinstance(pass_, StreamLoss) and isinstance(plan, StreamLossPlan) and plan.heads:
        _, variant, block = plan.heads[0]
        return dataclasses.replace(pass_, memory=None, variant=variant, block=block)
    if isinstance(pass_, StreamBlocks) and isinstance(plan, StreamBlocksPlan):
        return dataclasses.replace(pass_, memory=None, parts=plan.parts)
    return pass_
