"""Every check finds the fault that it is for, and names the node and the lines around it."""

from collections.abc import Callable

import pytest
import torch
from programs import traced
from torch import fx

from graphopt import Program, VerifyError
from graphopt.program import LEAVES, Leaf
from graphopt.split import late_nodes
from graphopt.verify import EXCERPT_LINES, check_interface, check_order, excerpt, verify


@pytest.fixture
def program() -> Program:
    """A copy, to be broken."""
    return traced("perceptron")[0].copy()


def node(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


def test_a_traced_program_is_right(program: Program) -> None:
    verify(program)
    verify(program, before=traced("perceptron")[0])


def reads_before(program: Program) -> None:
    node(program, "addmm_1").append(node(program, "gelu"))


def reads_another_graph(program: Program) -> None:
    other = node(traced("perceptron")[0], "gelu")
    node(program, "gelu").replace_all_uses_with(other)


def no_storages(program: Program) -> None:
    del node(program, "gelu").meta[LEAVES]


def too_many_storages(program: Program) -> None:
    node(program, "gelu").meta[LEAVES] = (Leaf(1, None), Leaf(1, None))


def no_such_input(program: Program) -> None:
    node(program, "gelu").meta[LEAVES] = (Leaf(1, (1, 0)),)


def late_output(program: Program) -> None:
    late = next(n for n in program.operators() if n in late_nodes(program))
    output = program.graph.output_node()
    output.args = ((late, *program.outputs[1:]),)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (reads_before, "addmm_1 reads gelu before it is made"),
        (reads_another_graph, "addmm_1 reads gelu before it is made"),
        (no_storages, "gelu holds 1 tensors and records 0 storages"),
        (too_many_storages, "gelu holds 1 tensors and records 2 storages"),
        (no_such_input, "gelu aliases an input that it does not have"),
        (late_output, "forward output .* is made in the backward"),
    ],
)
def test_a_broken_program_is_refused(
    break_it: Callable[[Program], None], message: str, program: Program
) -> None:
    break_it(program)
    with pytest.raises(VerifyError, match=message) as caught:
        verify(program)
    lines = str(caught.value).splitlines()
    (marked,) = (line for line in lines[1:] if line.startswith("> "))
    assert marked.split()[1].lstrip("%") in lines[0] or "forward output" in lines[0]
    assert len(lines) <= 1 + EXCERPT_LINES


def test_the_interface_stays(program: Program) -> None:
    fewer = Program(program.module, program.num_forward_outputs, program.inputs[:-1])
    more = Program(program.module, program.num_forward_outputs + 1, program.inputs)
    for changed in (fewer, more):
        with pytest.raises(VerifyError, match="inputs or the number of forward outputs changed"):
            check_interface(changed, program)


def with_output(program: Program, index: int, value: object) -> Program:
    copy = program.copy()
    values = list(copy.outputs)
    values[index] = node(copy, value) if isinstance(value, str) else value
    copy.graph.output_node().args = (tuple(values),)
    return copy


def test_an_output_of_another_shape_or_dtype_is_refused(program: Program) -> None:
    index, gradient = next((i, o) for i, o in enumerate(program.outputs) if i and isinstance(o, fx.Node))
    other = next(
        n
        for n in program.operators()
        if n in late_nodes(program) and n.meta["val"].shape != gradient.meta["val"].shape
    )
    with pytest.raises(VerifyError, match=f"output {gradient.name} .*became .*48, 32"):
        verify(with_output(program, index, other.name), before=program)
    changed = with_output(program, index, gradient.name)
    verify(changed, before=program)
    fake = gradient.meta["val"]
    with fake.fake_mode:
        node(changed, gradient.name).meta["val"] = fake.double()
    with pytest.raises(VerifyError, match="float64"):
        verify(changed, before=program)


def test_a_gradient_that_is_lost_is_refused(program: Program) -> None:
    index = next(i for i, o in enumerate(program.outputs) if i and isinstance(o, fx.Node))
    with pytest.raises(VerifyError, match="became None"):
        verify(with_output(program, index, None), before=program)


def test_the_excerpt_shows_the_lines_around(program: Program) -> None:
    nodes = list(program.graph.nodes)
    for index in (0, len(nodes) // 2, len(nodes) - 1):
        lines = excerpt(nodes[index]).splitlines()
        assert 1 <= len(lines) <= EXCERPT_LINES
        (marked,) = (line for line in lines if line.startswith(">"))
        assert nodes[index].name in marked or nodes[index].op == "output"


def test_order_is_checked_alone() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.neg, (x,))
    second = graph.call_function(torch.neg, (first,))
    graph.output((second,))
    program = Program(fx.GraphModule({}, graph), 1, ())
    check_order(program)
    second.append(first)
    with pytest.raises(VerifyError, match=f"{second.name} reads {first.name}"):
        check_order(program)
