"""Capture through torch.compile: names, breaks, and settings that are given back."""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from eager_steps import records, step, twin
from torch import nn

import graphopt
from graphopt.capture import CaptureSettings
from graphopt.program import Role
from graphopt.tracing import capture

config = torch._dynamo.config


@pytest.fixture(autouse=True)
def _settings_are_given_back() -> Iterator[None]:
    before = config.recompile_limit, config.accumulated_recompile_limit
    ignored = set(config.ignore_logging_functions)
    yield
    assert (config.recompile_limit, config.accumulated_recompile_limit) == before
    assert set(config.ignore_logging_functions) == ignored


class Talking(nn.Module):
    """Logs and warns while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.log = logging.getLogger("talking")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x).tanh()
        self.log.info("half way")
        warnings.warn("half way", stacklevel=1)
        self.log.warning("nearly there")
        return self.inner(x).sum()


def test_logging_and_warning_break_no_graph() -> None:
    small = twin(Talking(), torch.randn(3, 4))
    assert len(records(small)) == 1 and not small._graphopt.log.breaks


class Broken(nn.Module):
    """Breaks into two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh().exp()
        torch._dynamo.graph_break()  # the break
        return self.second(x).tanh().sum()


def line_of(mark: str) -> int:
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    return 1 + next(i for i, line in enumerate(lines) if line.endswith(mark))


def test_a_break_is_named_with_its_place() -> None:
    programs = capture(Broken(), torch.randn(3, 4))
    assert [len(p.breaks) for p in programs] == [1, 0]
    assert f"test_capture.py:{line_of('# the break')}: " in programs[0].breaks[0]
    assert "graph_break" in programs[0].breaks[0]
    labels = [[i.label for i in p.inputs if i.role is Role.PARAMETER] for p in programs]
    assert [sorted(part) for part in labels] == [
        ["first.bias", "first.weight"],
        ["second.bias", "second.weight"],
    ]


def test_a_broken_model_trains_right_and_the_break_is_logged() -> None:
    small = twin(Broken(), torch.randn(3, 4))
    assert len(records(small)) == 2
    (broken_at,) = set(small._graphopt.log.breaks)
    assert f"test_capture.py:{line_of('# the break')}: " in broken_at


def test_labels_are_dotted_names_through_lists_and_dicts() -> None:
    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(2, 2)})])
            self.register_buffer("scale", torch.ones(2))
            self.extra = nn.ParameterList([nn.Parameter(torch.ones(2))])

        def forward(self, batch: dict[str, torch.Tensor], *, more: torch.Tensor) -> torch.Tensor:
            x = self.blocks[0]["a"](batch["x"]) * self.scale + self.extra[0]
            return (x + more).sum()

    batch = {"batch": {"x": torch.ones(3, 2)}, "more": torch.ones(2)}
    (program,) = capture(Deep(), batch)
    labels = {i.label: i.role for i in program.inputs}
    assert labels["blocks.0.a.weight"] is Role.PARAMETER
    assert labels["extra.0"] is Role.PARAMETER
    assert labels["scale"] is Role.BUFFER
    assert labels["batch.x"] is Role.INPUT
    assert labels["more"] is Role.INPUT


def test_labels_of_a_container_of_torch_are_the_users_too() -> None:
    (program,) = capture(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), torch.ones(3, 4))
    labels = [i.label for i in program.inputs if i.role is not Role.TANGENT]
    assert labels == ["0.weight", "0.bias", "args[0]"]


def test_labels_are_the_models_with_a_loss_behind_it() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self = nn.Linear(4, 4)  # as transformers' BERT has it

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.self(x)

    model = Attention()
    x = torch.ones(3, 4)
    small = graphopt.optimize(model, loss=nn.functional.mse_loss, device="cpu-generic")
    small(x, target=x).backward()
    labels = {i.label for i in records(small)[0].before.inputs if i.role is Role.PARAMETER}
    assert labels == {name for name, _ in model.named_parameters()}


def test_a_tied_parameter_is_one_input() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    (program,) = capture(net, torch.ones(3, 4))
    assert sum(i.role is Role.PARAMETER for i in program.inputs) == 1
    assert sum(g is not None for g in program.gradients) == 1


def test_more_shapes_than_dynamos_limit_are_captured() -> None:
    net = nn.Linear(4, 4)
    small = graphopt.optimize(net, device="cpu-generic")
    many = config.recompile_limit + 3
    for rows in range(1, many + 1):
        x = torch.randn(rows, 4)
        assert torch.equal(small(x), net(x))
    assert len(records(small)) == many


# --- the settings ------------------------------------------------------------------------------


def test_the_settings_hold_inside_and_nest() -> None:
    settings = CaptureSettings()
    before = config.recompile_limit
    with settings:
        inner = config.recompile_limit
        assert inner > before
        assert warnings.warn in config.ignore_logging_functions
        with settings:
            assert config.recompile_limit == inner
        assert config.recompile_limit == inner
    assert config.recompile_limit == before


def test_the_settings_are_given_back_after_an_error() -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("on purpose")

    with pytest.raises(Exception, match="on purpose"):
        graphopt.optimize(fails, device="cpu-generic")(torch.ones(1))


def test_the_users_own_ignored_functions_stay() -> None:
    def mine() -> None: ...

    config.ignore_logging_functions = {mine}
    try:
        with CaptureSettings():
            assert mine in config.ignore_logging_functions
        assert config.ignore_logging_functions == {mine}
    finally:
        config.ignore_logging_functions = set()


def test_torch_compile_beside_it_keeps_its_own_limit() -> None:
    net, other = nn.Linear(4, 4), nn.Tanh()
    small = graphopt.optimize(net, device="cpu-generic")
    small(torch.ones(2, 4))
    graphs = []

    def count(module: torch.fx.GraphModule, _: object) -> object:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(other, backend=count, dynamic=False)
    for rows in range(1, 12):
        compiled(torch.ones(rows, 4))
    assert len(graphs) <= config.recompile_limit
    assert step(small, torch.ones(2, 4)).loss is not None
