"""How far an optimised step is from eager: loss, outputs, buffers and gradients, beside float64.

Both are compared with the same step in float64, since either may be the more accurate one. What the
optimised step is off by may be a few times what eager itself is off by, and always a few units in the
last place of the largest element.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt import ops
from graphopt.comparison import gradient_leaves, left_as_it_was
from graphopt.models import LoadedModel
from graphopt.numerics import FACTOR

UNITS = 32  # machine epsilons of the largest element, allowed where eager is (nearly) exact
ALONE_UNITS = 1024  # the same, where nothing says what eager itself is off by
Values = dict[tuple[str, str], torch.Tensor | None]  # (kind, name) -> value


@dataclass(frozen=True)
class Deviation:
    """One tensor of the step: how far it is from float64, in its largest difference.

    `kind` is "loss", "output", "buffer" or "gradient"; `name` is that of the parameter, buffer or output.
    `eager_error` is what eager is off by, and `allowed` what `error` may be; `scale` is the largest
    element. Of a missing tensor the error is infinite.
    """

    kind: str
    name: str
    error: float
    eager_error: float
    allowed: float
    scale: float

    @property
    def is_allowed(self) -> bool:
        """True where the error is within what is allowed."""
        return self.error <= self.allowed

    @property
    def module(self) -> str:
        """The path of the module that has the parameter or buffer; "" for the model itself."""
        return self.name.rpartition(".")[0] if self.kind in ("gradient", "buffer") else ""


def deviations(
    loaded: LoadedModel, optimized: Callable[..., Any], *, training: bool, may_drop: bool = False
) -> tuple[tuple[Deviation, ...], str]:
    """One step of `loaded.model`, of `optimized`, and in float64, compared tensor by tensor.

    All start from the same random numbers; the model is left as it was. With `may_drop` gradients may be
    missing that eager has. Where the model does not run in float64, eager stands for that, within
    `ALONE_UNITS`, and the text beside the rows says so; it is "" otherwise.
    """
    model, inputs = loaded.model, (tuple(loaded.example_args), dict(loaded.example_kwargs))
    dtype = next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)
    eager = _values(model, model, inputs, loaded.loss_of, training)
    try:
        reference, units, remark = _reference(loaded, dtype, training), UNITS, ""
    except Exception as error:  # whatever an operator without float64 raises
        reference, units = eager, ALONE_UNITS
        remark = f"{loaded.name} does not run in float64: {error}"
    found = _values(model, optimized, inputs, loaded.loss_of, training)
    rows = []
    for key, value in eager.items():
        if may_drop and key[0] == "gradient" and found.get(key) is None:
            continue
        rows.append(_deviation(key, value, found.get(key), reference.get(key, value), units))
    return tuple(rows), remark


def _reference(loaded: LoadedModel, dtype: torch.dtype, training: bool) -> Values:
    model = copy.deepcopy(loaded.model).double()
    inputs = pytree.tree_map_only(
        torch.Tensor, _double, (tuple(loaded.example_args), dict(loaded.example_kwargs))
    )
    with _DrawnAs(dtype):
        return _values(model, model, inputs, loaded.loss_of, training)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _values(
    model: nn.Module,
    function: Callable[..., Any],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    loss_of: Callable[[Any], torch.Tensor],
    training: bool,
) -> Values:
    """What one step of `function` around `model` gives, detached copies."""
    args, kwargs = inputs
    leaves = gradient_leaves(model, args, kwargs)
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    with left_as_it_was(model, leaves, device) as start_again:
        start_again()
        with torch.set_grad_enabled(training):
            output = function(*args, **kwargs)
            if training:
                loss_of(output).backward()
        found: Values = {("loss", "loss"): loss_of(output)} if training else {}
        found |= {("output", name): t for name, t in _named(output).items()}
        found |= {("buffer", name): b for name, b in model.named_buffers()}
        if training:
            found |= {("gradient", n): p.grad for n, p in model.named_parameters() if p.requires_grad}
            found |= {("gradient", n): t.grad for n, t in _named(inputs).items() if t.requires_grad}
        return {key: None if t is None else t.detach().clone() for key, t in found.items()}


def _named(tree: Any) -> dict[str, torch.Tensor]:
    """The tensors of nested tuples, lists and mappings, by their path."""
    if isinstance(tree, Mapping):
        tree = dict(tree)
    pairs = pytree.tree_leaves_with_path(tree)
    return {
        pytree.keystr(path) or "output": leaf for path, leaf in pairs if isinstance(leaf, torch.Tensor)
    }


def _deviation(
    key: tuple[str, str],
    eager: torch.Tensor | None,
    found: torch.Tensor | None,
    reference: torch.Tensor | None,
    units: float,
) -> Deviation:
    plain = Deviation(*key, 0.0, 0.0, 0.0, 0.0)
    if eager is None or found is None or found.shape != eager.shape or found.dtype != eager.dtype:
        return plain if eager is None and found is None else replace(plain, error=float("inf"))
    if eager.numel() == 0 or not eager.is_floating_point():
        return plain if torch.equal(eager, found) else replace(plain, error=float("inf"))
    exact = eager if reference is None else reference
    scale = float(exact.double().abs().nan_to_num(0.0, 0.0, 0.0).max())
    own = largest_difference(eager, exact)
    allowed = max(FACTOR * own, units * torch.finfo(eager.dtype).eps * scale)
    return Deviation(*key, largest_difference(found, exact), own, allowed, scale)


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """The largest difference of two elements; equal infinities, and two NaNs, do not differ.

    >>> largest_difference(torch.tensor([1.0, float("nan")]), torch.tensor([1.5, float("nan")]))
    0.5
    """
    one, other = first.detach().double(), second.detach().double()
    same = (one == other) | (one.isnan() & other.isnan())
    difference = (one - other).abs().masked_fill(same, 0.0).nan_to_num(float("inf"), float("inf"))
    return float(difference.max()) if difference.numel() else 0.0


class _DrawnAs(TorchDispatchMode):
    """Random numbers of float64 tensors are those that a model of `dtype` would draw."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not ops.draws(func, args, kwargs):
            return func(*args, **kwargs)
        lower, named = _cast((args, kwargs), torch.float64, self.dtype)
        if named.get("dtype") is torch.float64:
            named["dtype"] = self.dtype
        found = func(*lower, **named)
        if func._schema.is_mutable:  # bernoulli_ and its like fill their first argument
            return args[0].copy_(lower[0])
        return _cast(found, self.dtype, torch.float64)


def _cast(tree: Any, given: torch.dtype, wanted: torch.dtype) -> Any:
    """`tree` with the tensors of one dtype in another."""

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(wanted) if tensor.dtype is given else tensor

    return pytree.tree_map_only(torch.Tensor, cast, tree)
