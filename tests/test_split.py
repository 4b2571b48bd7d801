"""Split in two, a joint graph computes what it computed whole, and what eager PyTorch computes."""

import copy

import pytest
import torch
from drawn_plans import Drawn
from programs import arguments, ramp, run_joint, run_split, tangent_nodes, traced
from tiny_models import MODELS
from torch import nn

from graphopt import Program, VerifyError, trace
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.program import Role
from graphopt.split import backward_module, forward_module, late_nodes, saved_nodes


def eager(model: nn.Module, inputs: dict[str, torch.Tensor], program: Program) -> list:
    """Gradients by autograd, in the order of the program's inputs."""
    model = copy.deepcopy(model)
    torch.manual_seed(0)
    output = model(**inputs)
    (tangent,) = tangent_nodes(program)
    output.backward(ramp(tangent.meta["val"]))
    known = dict(model.named_parameters())
    given = [i for i in program.inputs if i.role is not Role.TANGENT]
    return [output.detach(), *(known[i.label].grad if i.label in known else None for i in given)]


def assert_equal(got: list, want: list) -> None:
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert (a is None) is (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("name", MODELS)
def test_whole_split_and_eager_agree_bit_for_bit(name: str) -> None:
    program, model, inputs = traced(name)
    given = arguments(program, model, inputs)
    whole = run_joint(program, given)
    assert_equal(run_split(program, given), whole)
    last_output = program.num_forward_outputs - 1  # before it: new running statistics
    assert_equal(whole[last_output:], eager(model, inputs, program))


def test_the_forward_returns_outputs_then_what_the_backward_takes() -> None:
    program, _, _ = traced("multi-output")
    saved = saved_nodes(program)
    forward = forward_module(program, saved)
    backward = backward_module(program, [n.name for n in saved])
    returned = forward.graph.output_node().args[0]
    assert len(returned) == program.num_forward_outputs + len(saved)
    taken = [n.name for n in backward.graph.nodes if n.op == "placeholder"]
    tangents = [n.name for n in tangent_nodes(program)]
    assert taken == [*(n.name for n in saved), *tangents]
    assert [n.name for n in returned[program.num_forward_outputs :]] == taken[: len(saved)]
    inputs = [i.name for i in program.inputs if i.role is not Role.TANGENT]
    assert [n.name for n in forward.graph.nodes if n.op == "placeholder"] == inputs


def test_nothing_is_run_twice_and_nothing_is_lost() -> None:
    program, _, _ = traced("residual")
    saved = saved_nodes(program)
    forward = forward_module(program, saved)
    backward = backward_module(program, [n.name for n in saved])
    early = {n.name for n in forward.graph.nodes if n.op == "call_function"}
    late = {n.name for n in backward.graph.nodes if n.op == "call_function"}
    assert not early & late
    assert early | late == {n.name for n in program.operators()}
    assert late == {n.name for n in late_nodes(program)}


def test_what_autograd_must_not_check_is_saved_last() -> None:
    program = traced("perceptron")[0].copy()
    nodes = saved_nodes(program)
    assert len(nodes) > 2
    nodes[0].meta["saved_tensor_with_no_vc_check"] = True
    again = saved_nodes(program)
    assert [n.name for n in again] == [n.name for n in (*nodes[1:], nodes[0])]


def test_a_gradient_that_the_forward_makes_is_saved() -> None:
    class Linear(nn.Module):
        """Its gradient is its input, whatever comes back."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.weight).sum()

    model, x = Linear(), torch.randn(4)
    program = trace(model, x)
    output = program.graph.output_node()
    values = list(program.outputs)
    index = next(i for i, v in enumerate(values[1:], 1) if v is not None)
    (x_node,) = (n for n in program.graph.nodes if program.roles.get(n.name) is Role.INPUT)
    values[index] = x_node
    output.args = (tuple(values),)
    given = arguments(program, model, {"x": x})
    assert x_node in saved_nodes(program)
    assert torch.equal(run_split(program, given)[index], x)


def test_a_tensor_that_is_not_saved_is_named() -> None:
    program, _, _ = traced("perceptron")
    names = [n.name for n in saved_nodes(program)]
    kept = [n for n in names if n != "gelu"]
    assert len(kept) < len(names)
    with pytest.raises(VerifyError, match="reads gelu, which is not saved"):
        backward_module(program, kept)


@pytest.mark.parametrize("seed", range(3))
def test_recomputation_is_part_of_the_backward(seed: int) -> None:
    program, _model, _inputs = traced("u-net")
    pass_ = Drawn(seed=seed)
    costs = Costs.of(program, get_device("cpu-generic"))
    planned = pass_.apply(program, pass_.plan(program, costs))
    saved = {n.name for n in saved_nodes(planned)}
    forward = forward_module(planned, saved_nodes(planned))
    assert not any(n.name.endswith("_again") for n in forward.graph.nodes)
    made = {n.name for n in planned.operators()} & saved
    assert made <= set(pass_.plan(program, costs).keep)
