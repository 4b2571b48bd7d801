"""The thorough check: a rewritten program computes what the program did, on made-up inputs.

Both graphs are interpreted operator by operator on the same numbers, with the same seed, and every
output is compared. A program of views, products and reductions that was only reordered or repeated
gives equal bits; `tolerance` is relative to the largest element of an output.
"""

import torch
from torch import fx
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.cost_models.calls import TensorSpec, make
from graphopt.cost_models.values import hint
from graphopt.errors import VerifyError
from graphopt.program import Program, tensors_of


def compare_numerics(after: Program, before: Program, tolerance: float = 1e-5) -> None:
    """Raise VerifyError naming the output of `after` that differs most from that of `before`."""
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng():
        inputs = [made_up(n) for n in before.graph.nodes if n.op == "placeholder"]
        expected, found = _run(before, inputs), _run(after, inputs)
        for node, old, new in zip(after.outputs, expected, found, strict=True):
            if isinstance(node, fx.Node) and isinstance(old, torch.Tensor):
                _compare(node, new, old, tolerance)


def _compare(node: fx.Node, new: object, old: torch.Tensor, tolerance: float) -> None:
    assert isinstance(new, torch.Tensor)
    difference = _relative_difference(new, old)
    if not difference <= tolerance:
        raise VerifyError(
            f"output {node.name} differs by {difference:.1e} of its largest element from what the "
            f"program computed before ({tuple(old.shape)}, {old.dtype})"
        )


def _run(program: Program, inputs: list[object]) -> tuple[object, ...]:
    torch.manual_seed(0)
    copies = [i.clone() if isinstance(i, torch.Tensor) else i for i in inputs]
    return tuple(fx.Interpreter(program.module).run(*copies, enable_io_processing=False))


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
