"""Tracing needs no real tensors, changes nothing, and says what cannot be traced."""

import copy
import resource

import pytest
import torch
from programs import arguments, run_joint
from tiny_models import MODELS
from torch import nn

from graphopt import TraceError, trace
from graphopt.program import Role, tensors_of
from graphopt.tracing import capture

GLOBAL_NET = nn.Linear(4, 2)


def over_a_global(x: torch.Tensor) -> torch.Tensor:
    return GLOBAL_NET(x).sum()


class Own(nn.Module):
    """A class of the user's: its names are shown as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh())


def targets(program: object) -> list[str]:
    return [str(n.target) for n in program.operators()]  # type: ignore[attr-defined]


def test_a_model_and_its_copy_on_meta_give_the_same_program() -> None:
    model, inputs = MODELS["residual"]()
    real = trace(model, inputs)
    meta = trace(copy.deepcopy(model).to("meta"), {k: v.to("meta") for k, v in inputs.items()})
    assert targets(real) == targets(meta)
    assert real.inputs == meta.inputs
    for a, b in zip(real.graph.nodes, meta.graph.nodes, strict=True):
        for t, u in zip(tensors_of(a), tensors_of(b), strict=True):
            assert t is u is None or (t.shape, t.dtype) == (u.shape, u.dtype)  # type: ignore[union-attr]


def test_nothing_is_run_and_no_weights_are_allocated() -> None:
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(20_000, 20_000) for _ in range(5)))  # 8 GB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    program = trace(lambda x: model(x).sum(), torch.empty(10_000, 20_000, device="meta"))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert program.is_joint and grown_kib < 300 * 1024


def test_the_model_and_the_inputs_are_left_alone() -> None:
    model, inputs = MODELS["convolutions"]()
    state = copy.deepcopy(model.state_dict())
    before = {k: v.clone() for k, v in inputs.items()}
    random = torch.get_rng_state()
    trace(model, inputs)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, before[k]) for k, v in inputs.items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(random, torch.get_rng_state())
    assert model(**inputs).requires_grad


@pytest.mark.parametrize("kind", ["tensor", "list", "tuple", "keyword"])
def test_forms_of_example_inputs(kind: str) -> None:
    x = torch.ones(3, 4)
    model = Own()
    if kind == "keyword":
        program = trace(model, {"x": x})
    else:
        program = trace(model, {"tensor": x, "list": [x], "tuple": (x,)}[kind])
    (only,) = (i for i in program.inputs if i.role is Role.INPUT)
    assert only.label == "x"
    assert {i.label for i in program.inputs if i.role is Role.PARAMETER} == {
        f"{part}.{name}" for part in ("first", "last") for name in ("weight", "bias")
    }


def test_functions_closures_and_globals() -> None:
    model = nn.Linear(4, 2)
    of_model = targets(trace(model, torch.ones(3, 4)))
    closure = trace(lambda x: model(x).sum(), torch.ones(3, 4))
    assert [i.label for i in closure.inputs if i.role is Role.PARAMETER] == [
        "model.weight",
        "model.bias",
    ]
    assert set(of_model) < set(targets(closure))
    assert targets(trace(over_a_global, torch.ones(3, 4))) == targets(closure)


def test_a_bound_method_is_a_function() -> None:
    class Net(nn.Linear):
        def score(self, x: torch.Tensor) -> torch.Tensor:
            return self.forward(x).sum()

    program = trace(Net(4, 2).score, torch.ones(3, 4))
    assert program.is_joint


def test_a_program_computes_what_the_model_computes() -> None:
    model, inputs = MODELS["multi-output"]()
    program = trace(model, inputs)
    (output, *_) = run_joint(program, arguments(program, model, inputs))
    assert torch.equal(output, model(**inputs))


def test_frozen_parameters_have_no_gradient() -> None:
    model = Own()
    model.first.requires_grad_(False)
    program = trace(model, torch.ones(3, 4))
    labels = [i.label for i in program.inputs if i.role is not Role.TANGENT]
    with_gradient = {label for label, g in zip(labels, program.gradients, strict=True) if g is not None}
    assert with_gradient == {"last.weight", "last.bias"}
    assert not trace(model.requires_grad_(False), torch.ones(3, 4)).is_joint


def test_an_input_that_requires_grad_gets_a_gradient() -> None:
    program = trace(lambda x: x.exp().sum(), torch.ones(3).requires_grad_())
    assert program.is_joint


def test_training_false_is_the_forward_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    program = trace(model, torch.ones(3, 4), training=False)
    assert not program.is_joint
    assert any("dropout" in t for t in targets(program))  # the mode of the model is its own
    assert not any("dropout" in t for t in targets(trace(model.eval(), torch.ones(3, 4))))
    assert torch.is_grad_enabled()


def test_training_is_joint_also_under_no_grad() -> None:
    with torch.no_grad():
        assert trace(nn.Linear(4, 2), torch.ones(3, 4)).is_joint
        assert not torch.is_grad_enabled()


# --- errors ------------------------------------------------------------------------------------


class Breaks(nn.Module):
    """Asks for a value in the middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum().item() > 0 else x * 3


@pytest.mark.parametrize(
    ("model", "examples", "message"),
    [
        (nn.Linear(4, 2), torch.ones(3, 5), "Linear could not be traced"),
        (nn.Linear(4, 2), (torch.ones(3, 4), 3), "Linear could not be traced.*bind arguments"),
        (nn.Linear(4, 2), {"y": torch.ones(3, 4)}, "Linear could not be traced.*bind arguments"),
        (nn.Linear(4, 2), 3, "example_inputs must be a tensor.*not int"),
        (nn.Linear(4, 2), "abc", "example_inputs must be a tensor.*not str"),
        (nn.Linear(4, 2), None, "example_inputs must be a tensor.*not NoneType"),
        (Breaks(), torch.ones(3), r"Breaks could not be traced.*item"),
        (lambda x: 3, torch.ones(2), "runs no tensor operation"),
    ],
)
def test_what_cannot_be_traced(model: object, examples: object, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(model, examples)  # type: ignore[arg-type]
    assert trace(nn.Linear(4, 2), torch.ones(3, 4)).is_joint  # and the next is not disturbed


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TraceError, match="int"):
        trace(5, torch.ones(1))  # type: ignore[arg-type]


def test_capture_gives_every_graph() -> None:
    class Twice(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x * 2
            torch._dynamo.graph_break()
            return x + 1

    programs = capture(Twice(), torch.ones(3), training=False)
    assert [targets(p) for p in programs] == [["aten.mul.Tensor"], ["aten.add.Tensor"]]
