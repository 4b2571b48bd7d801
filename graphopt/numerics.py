"""The thorough check: a rewritten program computes what the program did, on made-up inputs.

Both graphs are interpreted operator by operator on the same numbers, with the same seed, and every
output is compared; a graph with an arena runs as it is lowered. A program of views, products and
reductions that was only reordered or repeated gives equal bits; `tolerance` is relative to the largest
element of an output. Where kernels round in other places and an output cancels, or its dtype is narrow,
more than that may be right: then both are compared with the program in float64, and the rewritten one may
be off by a few times what the first is.
"""

from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from graphopt import ops
from graphopt.arena_blocks import Blocks
from graphopt.arena_facts import spots_of
from graphopt.cost_models.calls import TensorSpec, make
from graphopt.cost_models.values import hint
from graphopt.eager_modules import eager
from graphopt.errors import VerifyError
from graphopt.program import Program, Role, tensors_of
from graphopt.split import backward_module, forward_module, saved_nodes

FACTOR = 10.0  # times the error of the program before


def compare_numerics(after: Program, before: Program, tolerance: float = 1e-5) -> None:
    """Raise VerifyError naming an output of `after` that differs too much from that of `before`."""
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng():
        inputs = [made_up(n) for n in before.graph.nodes if n.op == "placeholder"]
        expected: tuple[Any, ...] = _run(before, inputs)
        found: tuple[Any, ...] = _run(after, inputs)
        rows = zip(after.outputs, expected, found, strict=True)
        wrong = {
            number: difference
            for number, (node, old, new) in enumerate(rows)
            if isinstance(node, fx.Node)
            and isinstance(old, torch.Tensor)
            and not (difference := _relative_difference(new, old)) <= tolerance
        }
        exact = _in_float64(before, inputs) if wrong else None
        for number, difference in wrong.items():
            old, new = expected[number], found[number]
            if exact is None or not _as_exact(new, old, exact[number]):
                raise VerifyError(_message(after.outputs[number], old, difference, exact is not None))


def _message(node: object, old: Any, difference: float, compared: bool) -> str:
    more = f", over {FACTOR:g} times what that is off by itself" if compared else ""
    return (
        f"output {node} differs by {difference:.1e} of its largest element from what the program "
        f"computed before ({tuple(old.shape)}, {old.dtype}){more}"
    )


def _as_exact(new: Any, old: Any, exact: Any) -> bool:
    """Whether `new` is about as near to `exact` as `old` is."""
    own = _relative_difference(old, exact)
    return _relative_difference(new, exact) <= FACTOR * own


def _in_float64(program: Program, inputs: list[object]) -> tuple[object, ...] | None:
    """What `program` computes in float64; None where an operator of it cannot, or draws numbers."""
    if any(ops.is_random(node) for node in program.operators()):
        return None
    copies = [_wide(i.clone()) if isinstance(i, torch.Tensor) else i for i in inputs]
    try:
        return tuple(_Wide(program.module).run(*copies, enable_io_processing=False))
    except Exception:  # whatever an operator without float64 raises
        return None


class _Wide(fx.Interpreter):
    """Every float and every dtype of floats becomes float64."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """A constant of the graph."""
        return _wide(super().get_attr(target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """One operator; what it makes of no tensor is made wide, too."""
        wide = pytree.tree_map(_wide, (args, kwargs))
        return pytree.tree_map(_wide, super().call_function(target, *wide))


def _wide(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    is_float = isinstance(value, torch.dtype) and value.is_floating_point
    return torch.float64 if is_float else value


def _run(program: Program, inputs: list[object]) -> tuple[object, ...]:
    torch.manual_seed(0)
    copies = [i.clone() if isinstance(i, torch.Tensor) else i for i in inputs]
    if any(map(spots_of, program.graph.nodes)):
        return _run_in_arena(program, copies)
    return tuple(fx.Interpreter(program.module).run(*copies, enable_io_processing=False))


def _run_in_arena(program: Program, inputs: list[object]) -> tuple[object, ...]:
    """As `program` runs when it is lowered: a graph that is interpreted knows of no places in memory."""
    blocks = Blocks()
    if not program.is_joint:
        return tuple(eager(program.copy().module, blocks)(inputs))
    placeholders = (n for n in program.graph.nodes if n.op == "placeholder")
    parts: dict[bool, list[object]] = {True: [], False: []}
    for node, value in zip(placeholders, inputs, strict=True):
        parts[program.roles[node.name] is Role.TANGENT].append(value)
    saved, count = saved_nodes(program), program.num_forward_outputs
    results = eager(forward_module(program, saved), blocks)(parts[False])
    backward = backward_module(program, [n.name for n in saved])
    return *results[:count], *eager(backward, blocks)([*results[count:], *parts[True]])


def made_up(node: fx.Node) -> object:
    """What stands for the input `node`: random numbers in its layout, zeros where they are integers."""
    tensor = tensors_of(node)[0]
    if tensor is None:
        return node.meta.get("val")
    sizes, strides = (tuple(map(hint, numbers)) for numbers in (tensor.shape, tensor.stride()))
    return make(TensorSpec(tensor.dtype, sizes, strides, tensor.device))


def _relative_difference(new: torch.Tensor, old: torch.Tensor) -> float:
    if torch.equal(new, old):
        return 0.0
    scale = old.double().abs().nan_to_num(0.0).max().clamp_min(1e-30)
    difference = (new.double() - old.double()).abs()
    same = (new == old) | (new.isnan() & old.isnan())
    return float((difference.masked_fill(same, 0.0).max() / scale).item())
