"""Plan files: written, read back, carried out without planning, and refused for another graph."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import traced
from torch import nn

import graphopt
from graphopt import Checkpoint, GraphoptError, PlanError, PlanFile, optimize
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU
from graphopt.pass_syntax import plan_class, program_passes
from graphopt.passes.base import Pass
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.plan_file import GraphPlan
from graphopt.program import Role


class Net(nn.Module):
    """A chain, with a loss; `wide` makes it another one."""

    def __init__(self, wide: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, wide), nn.Linear(wide, wide), nn.Linear(wide, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.sigmoid(layer(x)).exp()
        return x.sum()


X = torch.linspace(-1, 1, 64 * 8).view(64, 8)


def made(wide: int = 16, **options: Any) -> PlanFile:
    model = optimize(Net(wide), device="cpu-generic", **(options or {"memory": "min"}))
    model(X).backward()
    return PlanFile.of(model.report)


@pytest.fixture(scope="module")
def plan() -> PlanFile:
    return made()


def gradients(model: nn.Module, x: torch.Tensor = X) -> list[torch.Tensor]:
    model.zero_grad()
    model(x).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _sparse() -> Pass:
    program = traced("perceptron")[0]
    labels = [i.label for i in program.inputs if i.role is Role.PARAMETER]
    return graphopt.SparseUpdate(0.9, scores={label: float(n) for n, label in enumerate(labels)})


PASSES: dict[str, tuple[Pass, str]] = {
    "Arena": (graphopt.Arena(min_bytes=1024), "residual"),
    "Checkpoint": (Checkpoint(memory="min"), "residual"),
    "Fuse": (graphopt.Fuse(), "residual"),
    "OffloadSaved": (graphopt.OffloadSaved(memory=0.8, bytes_per_s=1e9), "perceptron"),
    "OverlapComm": (graphopt.OverlapComm(), "perceptron"),
    "PackSaved": (graphopt.PackSaved(), "dropouts"),
    "PatchInference": (graphopt.PatchInference(memory="min"), "convolutions"),
    "SparseUpdate": (_sparse(), "perceptron"),
    "StreamBlocks": (graphopt.StreamBlocks(parts=2), "residual"),
    "StreamLoss": (graphopt.StreamLoss(), "perceptron"),
}


OVERLAP = OverlapPlan(  # planning for ranks is tested where there are some
    order=("mm", "add"),
    transfers=(("all_reduce", "all_reduce", 4096, 1e-3, "measured", 1e-3, 0.0, "hidden"),),
    seconds_before=2e-3,
    seconds=1e-3,
    bound_seconds=1e-3,
    peak_bytes_before=8192,
    peak_bytes=8192,
    memory_bytes=None,
    contention=1.0,
    found_by=("list", "local"),
    cut=("mm",),
    spans=(("mm", "compute", 0.0, 1e-3),),
    gathers=(("all_gather", "weight", 1024, "again", 1),),
)


def test_every_pass_on_programs_is_here() -> None:
    assert PASSES.keys() == program_passes().keys()


@pytest.mark.parametrize("name", PASSES)
def test_plans_of_every_pass_survive_the_file(name: str) -> None:
    pass_, model = PASSES[name]
    program = traced(model)[0]
    planned = OVERLAP if name == "OverlapComm" else pass_.plan(program, Costs.of(program, GENERIC_CPU))
    assert type(planned) is plan_class(type(pass_))
    file = PlanFile("it", "eager", "h100", (GraphPlan.of(program, [(pass_, planned)]),))
    again = PlanFile.from_json(file.to_json())
    assert again == file and again.graphs[0].steps == ((pass_, planned),)
    assert again.steps_for(program) == ((pass_, planned),)


def test_a_plan_is_carried_out_without_planning(plan: PlanFile, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = PlanFile.load(tmp_path / "plan.json")
    assert loaded == plan
    plain = Net()
    model = optimize(plain, plan=loaded, device="cpu-generic")
    want = gradients(plain)
    assert all(map(torch.equal, gradients(model), want))
    (record,) = model.report.records
    assert [(s.pass_, s.plan) for s in record.steps] == list(plan.graphs[0].steps)
    assert model.report.predicted_peak_bytes == plan.graphs[0].steps[0][1].peak_bytes  # type: ignore[attr-defined]
    again = pickle.loads(pickle.dumps(model))
    assert all(map(torch.equal, gradients(again), want))
    compiled = torch.compile(plain, backend="graphopt", options={"plan": loaded, "device": "cpu-generic"})
    assert all(map(torch.equal, gradients(compiled), want))


def test_a_validation_runs_as_captured(plan: PlanFile) -> None:
    plain = Net()
    model = optimize(plain, plan=plan, device="cpu-generic")
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))


def test_a_plan_edited_by_hand_is_what_runs(plan: PlanFile) -> None:
    step = json.loads(plan.to_json())["graphs"][0]["steps"][0]["plan"]
    everything = made(passes=[Checkpoint()])
    assert json.loads(everything.to_json())["graphs"][0]["steps"][0]["plan"]["keep"] != step["keep"]
    mixed = replace(
        plan, graphs=(replace(plan.graphs[0], steps=everything.graphs[0].steps),), source="edited"
    )
    model = optimize(Net(), plan=mixed, device="cpu-generic")
    model(X).backward()
    assert model.report.graphs[0].recompute_seconds < made().graphs[0].steps[0][1].recompute_seconds  # type: ignore[attr-defined]


REFUSED: dict[str, tuple[Any, torch.Tensor, str]] = {
    "other sizes": (
        Net,
        X[:32].clone(),
        r"its input is x float32\[64, 8\], and here it is x float32\[32, 8\]",
    ),
    "other dtype": (lambda: Net().double(), X.double(), r"x float32\[64, 8\], and here it is x float64"),
    "other widths": (
        lambda: Net(24),
        X,
        "has the fingerprint .{12}, and this one, of other sizes, .{12}",
    ),
    "other operators": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Flatten(0), nn.Softmax(0), nn.Linear(512, 1)),
        X,
        r"its input is x float32|its graph calls aten\.",
    ),
}


@pytest.mark.parametrize(("make", "x", "message"), REFUSED.values(), ids=REFUSED)
def test_a_plan_for_another_graph_is_refused(
    make: Any, x: torch.Tensor, message: str, plan: PlanFile
) -> None:
    with pytest.raises(PlanError, match=f"the plan is for another graph: .*{message}"):
        optimize(make(), plan=plan, device="cpu-generic", compiler="eager")(x)


def test_a_training_plan_and_an_inference_plan() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3))
    model = optimize(net, passes=[graphopt.PatchInference(memory="min")], device="cpu-generic")
    image = torch.randn(1, 1, 16, 16)
    with torch.no_grad():
        want = model(image)
    plan = PlanFile.of(model.report)
    held = optimize(net, plan=plan, device="cpu-generic")
    with torch.no_grad():
        assert torch.equal(held(image), want)
        with pytest.raises(
            PlanError, match=r"float32\[1, 1, 16, 16\], and here it is .*\[1, 1, 20, 20\]"
        ):
            held(torch.randn(1, 1, 20, 20))
    with pytest.raises(PlanError, match="it is for a forward only, and this is a training step"):
        held(image)


def test_another_torch_is_refused(plan: PlanFile) -> None:
    old = replace(plan, torch_version="2.0.0")
    with pytest.raises(
        PlanError, match=f"made with torch 2.0.0, and this is torch {torch.__version__[:4]}"
    ):
        optimize(Net(), plan=old, device="cpu-generic")(X)


def test_what_the_plan_decides_is_not_given_twice(plan: PlanFile) -> None:
    for options in ({"memory": 0.5}, {"activations": "min"}, {"passes": []}):
        with pytest.raises(GraphoptError, match="give either plan= or passes=, a budget"):
            optimize(Net(), plan=plan, **options)  # type: ignore[arg-type]
    with pytest.raises(GraphoptError, match="is for compiler='eager', and here it is 'inductor'"):
        optimize(Net(), plan=plan, compiler="inductor")


def edited(plan: PlanFile, **changes: object) -> str:
    return json.dumps({**json.loads(plan.to_json()), **changes})


def test_what_is_no_plan_file_is_refused(plan: PlanFile, tmp_path: Path) -> None:
    data = json.loads(plan.to_json())
    without = {k: v for k, v in data.items() if k != "device"}
    step = {"pass": "Fuse()", "plan": data["graphs"][0]["steps"][0]["plan"]}
    texts = {
        "{": "it is no plan file: Expecting",
        "[1]": 'it is no plan file: it does not say "kind": "graphopt plan"',
        edited(plan, schema=2): "it has schema 2, and this version reads 1",
        json.dumps(without): "it is incomplete: KeyError 'device'",
        edited(plan, graphs=3): "it is incomplete: TypeError",
        edited(plan, graphs=[{**data["graphs"][0], "steps": [step]}]): "not a FusePlan",
    }
    for text, message in texts.items():
        with pytest.raises(PlanError, match=message):
            PlanFile.from_json(text, "it")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name, message in {"missing": "No such file", "binary": "it is no text"}.items():
        with pytest.raises(GraphoptError, match=f"cannot read .*{name}: {message}"):
            PlanFile.load(tmp_path / name)
    with pytest.raises(GraphoptError, match="nothing is planned for Net yet: call it once"):
        PlanFile.of(optimize(Net(), device="cpu-generic").report)


def test_plans_of_a_model_in_two_graphs() -> None:
    class Broken(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.sigmoid(self.layers[0](x)).exp()
            torch._dynamo.graph_break()
            return torch.sigmoid(self.layers[1](x)).exp().sum()

    plain = Broken()
    first = optimize(plain, memory=0.9, device="cpu-generic")
    want = gradients(first)
    plan = PlanFile.from_json(PlanFile.of(first.report).to_json())
    assert len(plan.graphs) == 2
    assert all(map(torch.equal, gradients(optimize(plain, plan=plan, device="cpu-generic")), want))
