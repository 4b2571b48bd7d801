"""Programs: roles, labels and storages as they were traced, and copies that share nothing."""

from typing import Any

import pytest
import torch
from tiny_models import MODELS
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt import TraceError, trace
from graphopt.program import (
    LEAVES,
    Leaf,
    Program,
    Role,
    leaves,
    record_leaves,
    storage_nbytes,
    tensors_of,
)


class Net(nn.Module):
    """A parameter, a buffer that the forward changes, a frozen parameter, two results."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.inner.bias.requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.norm(self.inner(x)) * scale
        return h.sum(), h


@pytest.fixture
def program() -> Program:
    return trace(Net(), (torch.ones(3, 4), torch.ones(1)))


def node(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


def test_inputs_have_the_users_names_and_roles(program: Program) -> None:
    found = {(i.label, i.role, i.mutated) for i in program.inputs if i.role is not Role.TANGENT}
    assert found == {
        ("inner.weight", Role.PARAMETER, False),
        ("inner.bias", Role.PARAMETER, False),
        ("norm.weight", Role.PARAMETER, False),
        ("norm.bias", Role.PARAMETER, False),
        ("norm.running_mean", Role.BUFFER, True),
        ("norm.running_var", Role.BUFFER, True),
        ("norm.num_batches_tracked", Role.BUFFER, True),
        ("x", Role.INPUT, False),
        ("scale", Role.INPUT, False),
    }
    placeholders = [n.name for n in program.graph.nodes if n.op == "placeholder"]
    assert [i.name for i in program.inputs] == placeholders
    assert {i.name: i.role for i in program.inputs} == dict(program.roles)


def test_outputs_are_results_then_one_gradient_for_each_input(program: Program) -> None:
    assert program.is_joint
    # Three new running statistics, the sum and h.
    assert len(program.forward_outputs) == program.num_forward_outputs == 5
    inputs = [i for i in program.inputs if i.role is not Role.TANGENT]
    assert len(program.gradients) == len(inputs)
    with_gradient = {i.label for i, g in zip(inputs, program.gradients, strict=True) if g is not None}
    assert with_gradient == {"inner.weight", "norm.weight", "norm.bias"}
    assert sum(i.role is Role.TANGENT for i in program.inputs) == 2


def test_a_forward_alone_is_not_joint() -> None:
    program = trace(nn.Linear(4, 2), torch.ones(3, 4), training=False)
    assert not program.is_joint and program.gradients == ()
    assert str(program) == "Program(forward: 2 operators; 2 parameters, 1 inputs)"


def test_a_copy_has_the_same_names_and_facts_and_a_graph_of_its_own(program: Program) -> None:
    before = str(program.graph)
    copy = program.copy()
    assert [n.name for n in copy.graph.nodes] == [n.name for n in program.graph.nodes]
    assert str(copy.graph) == before
    for new, old in zip(copy.graph.nodes, program.graph.nodes, strict=True):
        assert new is not old and new.meta == old.meta and new.meta is not old.meta
    assert copy.inputs == program.inputs
    assert copy.num_forward_outputs == program.num_forward_outputs
    for n in reversed(list(copy.operators())):
        if not n.users:
            copy.graph.erase_node(n)
    output = copy.graph.output_node()
    output.args = ((None,) * len(copy.outputs),)
    copy.graph.eliminate_dead_code()
    assert len(list(copy.operators())) < len(list(program.operators()))
    assert str(program.graph) == before


def test_a_copy_of_a_copy_runs_the_same(program: Program) -> None:
    again = program.copy().copy()
    values = [
        torch.rand(tensors_of(n)[0].shape)  # type: ignore[union-attr]
        for n in program.graph.nodes
        if n.op == "placeholder"
    ]
    first = fx.Interpreter(program.module).run(*values)
    second = fx.Interpreter(again.module).run(*values)
    for a, b in zip(first, second, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_operators_are_what_computes(program: Program) -> None:
    kinds = {n.op for n in program.operators()}
    assert kinds == {"call_function"}
    count = sum(n.op == "call_function" for n in program.graph.nodes)
    assert len(list(program.operators())) == count


# --- storages ----------------------------------------------------------------------------------


def traced(function: object, *shape: int) -> Program:
    return trace(function, torch.ones(*shape), training=False)  # type: ignore[arg-type]


def test_a_view_is_a_leaf_of_what_it_looks_at() -> None:
    program = traced(lambda x: x.exp().view(12).chunk(3)[1].sin(), 3, 4)
    exp, view = node(program, "exp"), node(program, "view")
    assert leaves(exp) == (Leaf(48, None),)
    assert leaves(view) == (Leaf(48, (0, 0)),)
    split = next(n for n in program.operators() if n.target is torch.ops.aten.split.Tensor)
    assert leaves(split) == (Leaf(48, (0, 0)),) * 3
    (part,) = split.users
    assert [(leaf.nbytes, leaf.alias and leaf.alias[0]) for leaf in leaves(part)] == [(48, 0)]
    assert leaves(node(program, "sin")) == (Leaf(16, None),)


def test_the_aliased_input_is_found_among_several() -> None:
    program = traced(lambda x: torch.ops.aten.view_as_real(torch.complex(x.sin(), x.cos())), 3)
    (view,) = (n for n in program.operators() if n.target is torch.ops.aten.view_as_real.default)
    assert leaves(view)[0].alias == (0, 0)
    program = traced(lambda x: x.exp().expand_as(x.sin()), 3)
    expand = next(n for n in program.operators() if leaves(n)[0].alias is not None)
    assert expand.all_input_nodes[leaves(expand)[0].alias[0]].name == "exp"


def test_several_results_have_storages_of_their_own() -> None:
    program = traced(lambda x: torch.sort(x)[1], 5)
    (sort,) = (n for n in program.operators() if n.target is torch.ops.aten.sort.default)
    assert leaves(sort) == (Leaf(20, None), Leaf(40, None))
    (taken,) = sort.users
    assert leaves(taken) == (Leaf(40, (0, 1)),)


def test_the_bytes_are_those_of_the_storage() -> None:
    assert storage_nbytes(torch.ones(3, 1).expand(3, 100)) == 12
    assert storage_nbytes(torch.ones(3, 100)[:, :1]) == 1200
    assert storage_nbytes(torch.ones(3, 4, dtype=torch.bfloat16)) == 24


def test_every_node_of_a_traced_program_has_its_leaves() -> None:
    for make in MODELS.values():
        model, inputs = make()
        torch._dynamo.reset()
        program = trace(model, inputs)
        for n in program.graph.nodes:
            if n.op == "output":
                continue
            assert len(leaves(n)) == len(tensors_of(n)) > 0, n
            for leaf, tensor in zip(leaves(n), tensors_of(n), strict=True):
                if tensor is None:  # a gradient that nobody asked the convolution for
                    assert leaf == Leaf(0, None)
                    continue
                assert leaf.nbytes == storage_nbytes(tensor)
                assert n.op != "placeholder" or leaf.alias is None


def test_meta_tensors_have_no_storages_to_tell_apart() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.neg.default, (x,))
    graph.output(y)
    for n in (x, y):
        n.meta["val"] = torch.ones(3, device="meta")
    with pytest.raises(TraceError, match="node x was traced without fake tensors"):
        record_leaves(graph)
    assert LEAVES not in y.meta


def test_a_view_of_a_copy_that_was_taken_out() -> None:
    """Its value still points at the copy's memory; by its schema it is a view of what took its place."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.ops.aten.relu.default, (x,))
    copy = graph.call_function(torch.ops.aten.clone.default, (made,))
    view = graph.call_function(torch.ops.aten.view.default, (copy, [6]))
    graph.output(view)
    with FakeTensorMode():
        x.meta["val"] = torch.ones(2, 3)
        for node in (made, copy, view):
            target: Any = node.target
            node.meta["val"] = target(*fx.map_arg(node.args, lambda n: n.meta["val"]))
    copy.replace_all_uses_with(made)
    graph.erase_node(copy)
    record_leaves(graph)
    assert leaves(view) == (Leaf(24, (0, 0)),) and leaves(made) == (Leaf(24, None),)
