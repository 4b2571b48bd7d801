"""Lowered modules write over what is dead, change no bit, and leave alone what others still own."""

import copy
import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arguments, run_joint, run_split, traced
from tiny_models import MODELS
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt import measure, trace
from graphopt.cost_models.memory import dataflow
from graphopt.cost_models.schedule import forward_steps, simulate
from graphopt.lower import boxed, last_uses, overwrite_dead_operands, storages_of
from graphopt.program import Program, record_leaves
from graphopt.split import backward_module, forward_module, saved_nodes

aten = torch.ops.aten


def graph_of(function: Callable[..., object], *inputs: torch.Tensor) -> fx.GraphModule:
    module = make_fx(function, tracing_mode="fake")(*inputs)
    module.graph.eliminate_dead_code()
    record_leaves(module.graph)
    module.recompile()
    return module


def overwritten(module: fx.GraphModule) -> int:
    """How many operators write into one of their arguments."""
    return sum(
        getattr(n.target, "_schema", None) is not None and n.target._schema.is_mutable
        for n in module.graph.nodes
    )


def check(function: Callable[..., object], *inputs: torch.Tensor) -> int:
    """Lower `function`; same bits, inputs unchanged; the number of operators that overwrite."""
    module = graph_of(function, *inputs)
    want = function(*[x.clone() for x in inputs])
    count = overwrite_dead_operands(module)
    assert overwritten(module) == count
    given = [x.clone() for x in inputs]
    got = boxed(module)(list(given))
    for a, b in zip(
        torch.utils._pytree.tree_leaves(got), torch.utils._pytree.tree_leaves(want), strict=False
    ):
        assert torch.equal(a, b) and a.stride() == b.stride() and a.dtype == b.dtype
    for x, before in zip(given, inputs, strict=True):
        assert torch.equal(x, before)
    return count


X = torch.linspace(-2, 2, 12).reshape(3, 4)
PAIRS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": lambda x: x.exp() + x,
    "radd": lambda x: x + x.exp(),
    "alpha": lambda x: torch.add(x, x.exp(), alpha=3),
    "number": lambda x: x.exp() + 2,
    "sub": lambda x: x - x.exp(),
    "mul": lambda x: x.exp() * 3.5,
    "div": lambda x: x / x.exp(),
    "neg": lambda x: -x.exp(),
    "tanh": lambda x: x.exp().tanh(),
    "sigmoid": lambda x: x.exp().sigmoid(),
    "rsqrt": lambda x: x.exp().rsqrt(),
    "sqrt": lambda x: x.exp().sqrt(),
    "relu": lambda x: x.sin().relu(),
    "gelu": lambda x: torch.nn.functional.gelu(x.sin()),
    "gelu tanh": lambda x: torch.nn.functional.gelu(x.sin(), approximate="tanh"),
    "silu": lambda x: torch.nn.functional.silu(x.sin()),
    "pow": lambda x: x.sin() ** 3,
    "square root of": lambda x: x.sin().exp() ** 0.5,
    "tanh backward": lambda x: aten.tanh_backward(x.sin(), x),
    "tanh backward, output": lambda x: aten.tanh_backward(x, x.tanh()),
    "sigmoid backward": lambda x: aten.sigmoid_backward(x.sin(), x.sigmoid()),
    "gelu backward": lambda x: aten.gelu_backward(x.sin(), x),
    "gelu backward, input": lambda x: aten.gelu_backward(x, x.sin(), approximate="tanh"),
    "silu backward": lambda x: aten.silu_backward(x.sin(), x.cos()),
    "threshold backward": lambda x: aten.threshold_backward(x.sin(), x, 0.1),
    "threshold backward, input": lambda x: aten.threshold_backward(x, x.sin(), 0.1),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_operator_of_the_table_writes_over_its_operand(name: str, dtype: torch.dtype) -> None:
    """The first operator of each reads an input; the second may have the result in its place."""
    inputs = X.to(dtype)
    assert check(PAIRS[name], inputs) >= 1
    module = graph_of(PAIRS[name], inputs)
    overwrite_dead_operands(module)
    last = list(module.graph.nodes)[-2]
    assert last.target._schema.is_mutable


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda x: x.add(1), 0),  # an input
        (lambda x: x.view(12).add(1), 0),  # a view of an input
        (lambda x: (lambda y: (y.mul(2), y))(x.exp()), 0),  # an output
        (lambda x: (lambda y: (y.mul(2), y.view(12)))(x.exp()), 0),  # a view of an output
        (lambda x: (lambda y: y.mul(2) + y.sum())(x.exp()), 1),  # read later: only the last
        (lambda x: (lambda y, v: y.mul(2) + v[0])(*(lambda y: (y, y.t().t()))(x.exp())), 1),
        (lambda x: x.exp().t().mul(x.t().contiguous()), 1),  # into either; this takes the first
        (lambda x: x.exp()[:2].mul(2), 0),  # a part
        (lambda x: x.exp().view(4, 3).mul(2), 1),  # all of it, seen otherwise
        (lambda x: x[:1].exp().expand(3, 4).mul(2), 0),
        (lambda x: x.exp().mul(x[0]), 1),  # broadcasts into it
        (lambda x: x[0].exp().mul(x), 0),  # would have to grow
        (lambda x: x.exp().gt(1).mul(2.5), 0),  # another dtype
        (lambda x: (lambda y: y * y)(x.exp()), 1),
        (lambda x: (lambda y: y * y.flip(0))(x.exp()), 1),
        (lambda x: (lambda y: y[:, :3] * y[:, :3].t())(x.exp()), 0),  # reads what it would write
        (lambda x: (lambda y: y + y.view(12).view(3, 4))(x.exp()), 0),
        (lambda x: x.exp().tanh().sigmoid().neg(), 3),
        (lambda x: x.split(2, 1)[0].exp().neg(), 1),
        (lambda x: torch.sort(x)[0].neg(), 1),  # one of two results
        (lambda x: (lambda r: r[0].neg() + r[1])(torch.sort(x)), 2),
        (lambda x: torch.ones(3, 4) + x, 1),
        (lambda x: x[:0].exp().neg(), 1),  # empty
    ],
)
def test_only_what_is_dead_and_fits_is_written_over(
    function: Callable[[torch.Tensor], object], count: int
) -> None:
    assert check(function, X) == count


def random_function(seed: int, length: int) -> Callable[..., list[torch.Tensor]]:
    """A program of `length` pointwise operators, views and reductions over what came before."""

    def function(*inputs: torch.Tensor) -> list[torch.Tensor]:
        draw = random.Random(seed)
        seen = list(inputs)
        for _ in range(length):
            x, y = draw.choice(seen[-4:]), draw.choice(seen[-4:])
            made = draw.choice(
                [
                    lambda x, y: x + y,
                    lambda x, y: x * y,
                    lambda x, y: x - 2 * y,
                    lambda x, y: aten.tanh_backward(x, y),
                    lambda x, y: x.sigmoid(),
                    lambda x, y: x.tanh(),
                    lambda x, y: -x,
                    lambda x, y: x.relu(),
                    lambda x, y: x.t(),
                    lambda x, y: x.view(-1).view(4, 4) if x.is_contiguous() else x,
                    lambda x, y: x.flip(0),
                    lambda x, y: torch.stack([x, y]).unbind(0)[1],
                    lambda x, y: x[:1].expand(4, 4),
                    lambda x, y: torch.cat([x[2:], y[:2]]),
                    lambda x, y: torch.sort(x.contiguous())[0],
                    lambda x, y: x.contiguous(),
                ]
            )(x, y)
            seen.append(made)
        return [s for i, s in enumerate(seen) if i == len(seen) - 1 or draw.random() < 0.15]

    return function


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(3, 14))
def test_random_programs_keep_every_bit(seed: int, length: int) -> None:
    inputs = [torch.linspace(-1, 1, 16).reshape(4, 4) ** k for k in (1, 2)]
    check(random_function(seed, length), *inputs)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_lowered_halves_of_a_step_keep_every_bit(name: str) -> None:
    program, model, inputs = traced(name)
    given_values = arguments(program, model, inputs)
    want = run_joint(program, given_values)
    before = {k: v.clone() for k, v in given_values.items()}
    for got, expected in zip(run_split(program, given_values), want, strict=True):
        assert got is expected is None or torch.equal(got, expected)
    assert all(torch.equal(before[k], v) for k, v in given_values.items())


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_simulation_knows_what_is_written_over(name: str) -> None:
    program = traced(name)[0]
    flow = dataflow(program)
    saved = saved_nodes(program)
    kept = {v for n in saved for v in flow.value_of[n.name] if flow.values[v].producer >= 0}
    forward = forward_module(program, saved)
    predicted = simulate(flow, forward_steps(flow, kept), (), kept | set(flow.outputs))
    count = overwrite_dead_operands(forward)
    assert count == sum(v is not None for v in predicted.reused)


def test_the_memory_is_gone() -> None:
    x = torch.rand(250, 1000)
    module = graph_of(lambda x: x.exp().tanh().sigmoid().neg(), x)
    plain = measure(lambda: boxed(copy.deepcopy(module))([x])).peak_bytes
    overwrite_dead_operands(module)
    lowered = boxed(module)
    assert plain == 2 * 10**6
    assert measure(lambda: lowered([x])).peak_bytes == 10**6


def test_arguments_die_as_soon_as_they_are_read() -> None:
    def function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum() + y.new_zeros(1000, 1000).sum()

    large = torch.ones(1000, 1000)
    run = boxed(graph_of(function, large, large[0]))
    assert run._boxed_call  # type: ignore[attr-defined]
    assert measure(lambda: run([large.clone(), large[0]])).peak_bytes < 5 * 10**6  # one at a time
    arguments = [large, large[0]]
    run(arguments)
    assert arguments == []


def test_a_scalar_read_counts_as_a_read() -> None:
    """`item` returns no tensor; what it reads must still be there."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    total = graph.call_function(aten.sum.default, (x,))
    double = graph.call_function(aten.mul.Tensor, (total, 2))
    item = graph.call_function(aten._local_scalar_dense.default, (total,))
    graph.output((double, item))
    fake = torch._subclasses.FakeTensorMode()
    with fake:
        x.meta["val"] = torch.empty(3)
        total.meta["val"], double.meta["val"] = torch.empty(()), torch.empty(())
    item.meta["val"] = 1.0
    record_leaves(graph)
    module = fx.GraphModule({}, graph)
    overwrite_dead_operands(module)
    doubled, read = boxed(module)([torch.ones(3)])
    assert (float(doubled), read) == (6.0, 3.0)


def test_last_uses_see_through_views() -> None:
    module = graph_of(lambda x: (lambda y: y.t()[1:].neg() + y.sum())(x.exp()), X)
    by_name = {n.name: n for n in module.graph.nodes}
    storages = storages_of(module.graph)
    exp = by_name["exp"]
    (view,) = (n for n in module.graph.nodes if n.target is aten.slice.Tensor)
    assert storages[view] == ((exp, 0),)
    last = last_uses(module.graph, storages)
    assert last[(exp, 0)].name == "sum_1"
    assert last[(by_name["add"], 0)].op == "output"


def test_programs_are_not_changed_by_lowering_their_halves() -> None:
    program: Program = traced("u-net")[0]
    before = str(program.graph)
    saved = saved_nodes(program)
    forward = forward_module(program, saved)
    backward = backward_module(program, [n.name for n in saved])
    assert overwrite_dead_operands(forward) + overwrite_dead_operands(backward) > 0
    assert str(program.graph) == before


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("waits_first", [True, False])
def test_what_a_transfer_still_reads_is_not_overwritten(waits_first: bool) -> None:
    collectives = torch.ops._c10d_functional

    def f(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sent = x * 2
        begun = collectives.all_gather_into_tensor(sent, 2, "0")
        if waits_first:
            gathered = collectives.wait_tensor(begun)
            return gathered + 0.5, sent + 1
        other = sent + 1
        return collectives.wait_tensor(begun) + 0.5, other

    module = trace(f, [torch.ones(3)], training=False).copy().module
    count = overwrite_dead_operands(module)
    assert count == (2 if waits_first else 1)  # what was gathered, and what was sent
    assert any(n.target is aten.add_.Scalar or n.target is aten.add.out for n in module.graph.nodes)
