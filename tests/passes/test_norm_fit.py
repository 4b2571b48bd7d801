"""Norm weights: the least squares of the linearised block, and never a greater error."""

import copy
from typing import Any

import pytest
import torch
from block_models import FAMILIES, block_model, token_batches
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from graphopt.passes.blocks import find_stack
from graphopt.passes.folding import adapted_norms
from graphopt.passes.layer_sharing import norm_parameters, shared_tensors
from graphopt.passes.made_up_inputs import as_batch, made_up_batch
from graphopt.passes.norm_fit import fitted, least_squares_change, squared_error
from graphopt.passes.skip_strategies import Evidence


def evidence_of(model: nn.Module, batches: Any) -> Evidence:
    inputs = tuple(as_batch(batch, model) for batch in batches)
    return Evidence(model, find_stack(model, inputs[0]), inputs)


def pair(family: str, seed: int = 0) -> tuple[Any, Any, list[Any], list[Tensor], Any]:
    """Two blocks in float64, what the second is called with, what it returns, and its model."""
    model = block_model(family, 3, seed=seed).double()
    e = evidence_of(model, [made_up_batch(model)] if family == "vit" else token_batches(2, seed=seed))
    source, block = e.stack.blocks[1:]
    given = [e.stack.with_hidden(*c[2], h[2]) for c, h in zip(e.calls, e.states, strict=True)]
    return source, block, given, [row[3] for row in e.states], e


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in values.values()])


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "bert"])
def test_a_step_is_the_least_squares_of_the_linearised_block(family: str) -> None:
    """Beside torch.linalg.lstsq on the whole Jacobian, made by reverse derivatives."""
    source, block, given, wanted, _ = pair(family)
    fixed = {name: tensor.detach() for name, tensor in shared_tensors(source).items()}
    start = {name: value.detach() for name, value in norm_parameters(block).items()}

    def function(args: Any, kwargs: Any) -> Any:
        def rows(values: dict[str, Tensor]) -> Tensor:
            output = functional_call(block, {**fixed, **values}, args, kwargs)
            return (output if isinstance(output, Tensor) else output[0]).flatten(0, -2)

        return rows

    functions = [function(*one) for one in given]
    targets = [target.flatten(0, -2).detach() for target in wanted]
    unknowns = sum(value.numel() for value in start.values())
    found = least_squares_change(functions, targets, start, iterations=unknowns)
    jacobians = []
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for f in functions:
            parts = jacrev(f)(start)
            size = f(start).numel()
            jacobians.append(torch.cat([parts[n].reshape(size, -1) for n in start], dim=1).detach())
    missing = torch.cat([(t - f(start)).flatten() for f, t in zip(functions, targets, strict=True)])
    matrix = torch.cat(jacobians)
    best = torch.linalg.lstsq(matrix, missing.detach()[:, None], driver="gelsd").solution[:, 0]
    error = (matrix @ flat(found) - missing).norm()
    torch.testing.assert_close(error, (matrix @ best - missing).norm(), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(matrix @ flat(found), matrix @ best, rtol=1e-3, atol=1e-6)


def test_a_norm_that_ends_the_block_is_fitted_exactly() -> None:
    """Where the output is linear in the weights one step is the optimum of each channel."""
    torch.manual_seed(0)
    source, block = (nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7)).double() for _ in range(2))
    x, target = torch.randn(2, 30, 5).double(), torch.randn(2, 30, 7).double()
    values, error = adapted_norms(source, block, [((x,), {})], [target], [None], 1, 40)
    normal = nn.functional.layer_norm(source[0](x), (7,)).detach().flatten(0, 1)
    squares = 0.0
    for channel in range(7):
        design = torch.stack([normal[:, channel], torch.ones(60).double()], dim=1)
        wanted = target.flatten(0, 1)[:, channel, None]
        best = torch.linalg.lstsq(design, wanted).solution
        torch.testing.assert_close(values["1.weight"][channel], best[0, 0])
        torch.testing.assert_close(values["1.bias"][channel], best[1, 0])
        squares += float((design @ best - wanted).square().sum())
    assert error == pytest.approx(squares)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(2))
def test_adapted_norms_never_raise_the_error(family: str, seed: int) -> None:
    source, block, given, wanted, e = pair(family, seed)
    values, error = adapted_norms(source, block, given, wanted, [None] * len(given))
    errors = []
    for norms in (block, source):
        other = copy.deepcopy(block)
        other.load_state_dict(source.state_dict() | {n: p for n, p in norm_parameters(norms).items()})
        errors.append(returned_error(other, given, wanted))
    assert error < min(errors)
    fitted_block = copy.deepcopy(block)
    fitted_block.load_state_dict(source.state_dict() | values)
    assert error == pytest.approx(returned_error(fitted_block, given, wanted), rel=1e-6)
    assert e.stack.blocks[2] is block and returned_error(block, given, wanted) == pytest.approx(
        0, abs=1e-9
    )


def test_a_step_found_on_some_batches_lowers_the_error_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first batch alone wants 3, all of them the mean, 5 / 3."""
    monkeypatch.setattr("graphopt.passes.norm_fit.ROWS", 1)
    functions, targets = (
        [lambda values: values["v"]] * 3,
        [torch.full((1, 1), x) for x in (3.0, 1.0, 1.0)],
    )
    start = {"v": torch.zeros(1, 1)}
    values, error = fitted(functions, targets, [start], steps=1)
    assert values["v"].item() == 3 and error == 8 < squared_error(functions, targets, start)
    values, error = fitted(functions, targets, [{"v": torch.ones(1, 1)}], steps=1)
    assert values["v"].item() == 2 and error == 3 < 4  # half a step: the whole one would be worse


def returned_error(block: nn.Module, given: Any, wanted: Any) -> float:
    total = 0.0
    with torch.no_grad():
        for (args, kwargs), target in zip(given, wanted, strict=True):
            output = block(*args, **kwargs)
            total += float(
                ((output if isinstance(output, Tensor) else output[0]) - target).square().sum()
            )
    return total


def test_a_step_that_raises_the_error_is_not_taken() -> None:
    """On |v|³ the linearised step from a small value overshoots by far."""
    functions, targets = [lambda values: values["v"] ** 3], [torch.ones(4, dtype=torch.float64)]
    start = {"v": torch.full((4,), 0.2, dtype=torch.float64)}
    full = {"v": start["v"] + least_squares_change(functions, targets, start, 4)["v"]}
    assert squared_error(functions, targets, full) > squared_error(functions, targets, start)
    values, error = fitted(functions, targets, [start], steps=1)
    assert error < squared_error(functions, targets, start)
    values, error = fitted(functions, targets, [start], steps=30)
    torch.testing.assert_close(values["v"], targets[0])
