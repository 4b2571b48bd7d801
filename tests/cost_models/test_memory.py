"""Dataflows say what lives where; the peak that follows is the one that the allocator measures."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from drawn_plans import Drawn, stuck
from eager_steps import records, total
from tiny_models import MODELS
from torch import nn

import graphopt
from graphopt import Checkpoint, measure
from graphopt.cost_models.memory import NO_PRODUCER, Dataflow, dataflow
from graphopt.cost_models.schedule import backward_steps, forward_steps, simulate
from graphopt.passes.base import Pass
from graphopt.passes.checkpoint_choice import everything, step_of

FLOAT = 4  # bytes


def predicted_and_measured(model: nn.Module, inputs: dict[str, Any], pass_: Pass) -> tuple:
    """Peak bytes above what exists before the step, of the loss and gradients of `model`."""
    small = graphopt.optimize(
        model, passes=[pass_], loss=lambda output, _: total(output), device="cpu-generic"
    )

    def step() -> None:
        small(**inputs, target=0).backward()

    for _ in range(2):  # the first compiles, the second allocates what libraries keep
        step()
        small.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    measured = measure(step).peak_bytes
    (record,) = records(small)
    small.zero_grad(set_to_none=True)
    return record.steps[0].plan.peak_bytes - dataflow(record.before).static_bytes, measured


def close(predicted: int, measured: int) -> bool:
    """Within a percent, and the 4 bytes each of the loss and its gradient."""
    return abs(measured - predicted) <= 0.01 * predicted + 4 * FLOAT


PASSES = {
    "keep everything": Checkpoint(memory=1.0),
    "min": Checkpoint(memory="min"),
    "keep half": Drawn(seed=1, keep=0.5, ephemeral=0.0),
    "keep half, rest for each use": Drawn(seed=2, keep=0.5, ephemeral=1.0),
    "keep little": Drawn(seed=3, keep=0.2, ephemeral=0.5),
}


@pytest.mark.parametrize("plan", PASSES)
@pytest.mark.parametrize("name", ["perceptron", "residual", "views"])
def test_the_predicted_peak_is_the_measured_one(name: str, plan: str) -> None:
    model, inputs = MODELS[name]()
    predicted, measured = predicted_and_measured(model, inputs, PASSES[plan])
    assert close(predicted, measured), f"{predicted} predicted, {measured} measured"


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"perceptron", "residual", "views", "dropouts"}))
def test_the_least_predicted_peak_is_the_measured_one(name: str) -> None:
    model, inputs = MODELS[name]()
    predicted, measured = predicted_and_measured(model, inputs, PASSES["min"])
    assert close(predicted, measured), f"{predicted} predicted, {measured} measured"


def test_random_operators_that_are_replayed_save_the_states_of_the_generator() -> None:
    model, _ = MODELS["dropouts"]()
    inputs = {"x": torch.randn(4096, 32)}  # beside which a state of 5 kB is small
    for pass_ in (Drawn(seed=3, keep=0.2, ephemeral=0.5), Drawn(keep=0.0, ephemeral=0.0)):
        predicted, measured = predicted_and_measured(model, inputs, pass_)
        assert close(predicted, measured), f"{predicted} predicted, {measured} measured"


# --- by hand -----------------------------------------------------------------------------------


def sigmoids(rows: int = 1000) -> tuple[nn.Module, dict[str, Any]]:
    class Sigmoids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * self.scale
            for _ in range(6):
                x = torch.sigmoid(x)
            return x.sum()

    return Sigmoids(), {"x": torch.randn(rows)}


def test_six_sigmoids_in_a_row() -> None:
    model, inputs = sigmoids()
    program = graphopt.trace(model, inputs)
    flow = dataflow(program)
    # The scaled input, six sigmoids, their sum; the six gradients back, the scale's before and after.
    made = [v.nbytes for v in flow.values if v.producer != NO_PRODUCER]
    assert made == [4000] * 7 + [4] + [4000] * 7 + [4]
    assert flow.static_bytes == 4000 + 4
    choice = everything(flow)
    assert sorted(flow.values[v].label for v in choice.keep) == [
        f"sigmoid{end}" for end in ("", "_1", "_2", "_3", "_4", "_5")
    ]
    # All six outputs; then the first gradient of full size beside them, written over ever after.
    assert step_of(flow, choice).peak_bytes == 7 * 4000


class Of(nn.Module):
    """A function of one parameter."""

    def __init__(self, function: Any, *sizes: int) -> None:
        super().__init__()
        self.function = function
        self.x = nn.Parameter(torch.randn(*sizes))

    def forward(self) -> torch.Tensor:
        return self.function(self.x)


def flow_of(function: Any, *sizes: int, training: bool = True) -> Dataflow:
    return dataflow(graphopt.trace(Of(function, *sizes), (), training=training))


def test_views_take_no_memory_and_share_what_they_look_at() -> None:
    flow = flow_of(lambda x: x.exp().view(2, 6).t()[1:].expand(3, 5, 2).neg().sum(), 3, 4)
    names = [o.name for o in flow.operators if not o.backward]
    assert names == ["exp", "neg", "sum_1"]
    assert flow.value_of["expand"] == flow.value_of["exp"]
    (neg,) = flow.value_of["neg"]
    assert flow.values[neg].nbytes == 3 * 5 * 2 * FLOAT
    assert flow.operators[1].reads == flow.value_of["exp"]
    assert flow.operators[1].reusable == ()  # it has another layout


def test_results_of_one_operator_are_values_of_their_own() -> None:
    flow = flow_of(lambda x: torch.topk(x, 2)[0].sum(), 3, 4)
    values, indices = flow.value_of["topk"]
    assert flow.value_of["getitem"] == (values,)
    assert [flow.values[v].nbytes for v in (values, indices)] == [3 * 2 * 4, 3 * 2 * 8]
    assert [flow.values[v].label for v in (values, indices)] == ["topk[0]", "topk[1]"]


@pytest.mark.parametrize(
    ("function", "reusable"),
    [
        (lambda x: x.exp().mul(2), ["exp"]),
        (lambda x: x.exp().t().mul(2), ["exp"]),
        (lambda x: x.exp().t().mul(x.t().sin()), ["exp", "sin"]),
        (lambda x: x.exp().t().mul(x.t().contiguous().sin()), ["exp"]),  # dense in another order
        (lambda x: x.exp()[:2].mul(2), []),  # part of the storage
        (lambda x: x.exp()[:, :1].mul(2), []),
        (lambda x: x[:, :1].exp().mul(x.sin()), ["sin"]),  # broadcast
        (lambda x: x.exp().gt(0).mul(2.0), []),  # another dtype
        (lambda x: x[:1].exp().expand(3, 4).mul(2), []),
        (lambda x: x.exp().mul(x), ["exp"]),  # not the parameter
        (lambda x: (lambda y: y.mul(y))(x.exp()), ["exp"]),
        (lambda x: (lambda y: y.mul(y.flip(0)))(x.exp()), ["exp", "flip"]),
        (lambda x: (lambda y: y[:, :3].mul(y[:, :3].t()))(x.exp()), []),
        (lambda x: (lambda y: y.mul(y.view(4, 3).view(3, 4)))(x.exp()), []),  # a view of it
    ],
)
def test_an_operand_of_the_same_layout_that_fills_its_storage_may_be_written_over(
    function: Any, reusable: list[str]
) -> None:
    flow = flow_of(function, 3, 4, training=False)
    assert flow.operators[-1].name == "mul"
    found = sorted({flow.values[v].label for v in flow.operators[-1].reusable})
    assert [label for label in found if flow.values[flow.value_of[label][0]].producer >= 0] == reusable


def test_what_reads_an_input_that_the_forward_changes_cannot_be_repeated() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return ((x * self.weight).exp() * self.seen).sum()

    flow = dataflow(graphopt.trace(Counter(), torch.randn(3, 4)))
    by_name = {o.name: o.recomputable for o in flow.operators if not o.backward}
    assert by_name == {"add": False, "mul": True, "exp": True, "mul_1": True, "sum_1": True}
    assert stuck(flow) == set(flow.value_of["add"])


def test_anchored_operators_are_those_that_depend_on_a_tangent() -> None:
    class Half(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            context.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            (x,) = context.saved_tensors
            return gradient * x.sin()  # made in the backward, from the forward alone

    flow = flow_of(lambda x: Half.apply(x.cos()).sum(), 3, 4)
    anchored = {o.name for o in flow.operators if o.backward and o.anchored}
    on_demand = {o.name for o in flow.operators if o.backward and not o.anchored}
    assert on_demand == {"sin_1", "neg"}  # the derivative of cos
    assert anchored == {"mul", "mul_1"}


def test_static_bytes_are_inputs_and_tied_parameters_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).tanh()).sum()

    flow = dataflow(graphopt.trace(Tied(), torch.randn(3, 4)))
    assert flow.static_bytes == FLOAT * (4 * 4 + 3 * 4)


def test_a_forward_only_program_has_no_backward() -> None:
    flow = flow_of(lambda x: x.exp().sum(), 3, 4, training=False)
    assert len(flow.forward) == len(flow.operators) == 2
    assert not flow.gradients and not flow.late
    timeline = simulate(flow, forward_steps(flow, ()), (), flow.outputs)
    assert timeline.during == (48, 52)
    assert backward_steps(flow, (), (), []) == []


def test_the_layout_of_a_convolution_is_followed() -> None:
    def channels_last(x: torch.Tensor) -> torch.Tensor:
        return F.relu(x.to(memory_format=torch.channels_last).exp()).mul(2)

    flow = flow_of(channels_last, 2, 3, 4, 4, training=False)
    assert [o.name for o in flow.operators if not o.reusable] == [flow.operators[0].name]
