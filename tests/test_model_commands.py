"""`graphopt plan`, `optimize`, `show` and `verify`: what they print and write, and their messages."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import graphopt.passes
from graphopt import PlanFile, Program, optimize
from graphopt.cli import main
from graphopt.cost_models.costs import Costs
from graphopt.models import load_model
from graphopt.passes.base import Pass
from graphopt.plan import Plan

CPU = ["--device", "cpu-generic"]
FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.sigmoid(layer(x)).exp()
        return x.sum()

class Map(Net):
    def forward(self, x):
        return self.layers[0](x)

def make(width=16):
    return Net(width), torch.linspace(-1, 1, 32 * width).view(32, width)

def other():
    return Net(16), torch.zeros(8, 16)

def without_loss():
    return Map(16), torch.zeros(8, 16)

def without_inputs():
    return Net(4)

def wrong_inputs():
    return Net(4), torch.zeros(3, 5)
"""
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(FACTORY)
    return f"{tmp_path}/net.py"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    def command(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def plan(net: str, tmp_path: Path, run: Command) -> str:
    file = str(tmp_path / "plan.json")
    code, out, err = run("plan", f"{net}:make", "--memory", "min", *CPU, "-o", file)
    assert (code, err) == (0, "") and out.endswith(f"written to {file}\n")
    assert "checkpoint(memory='min')" in out and "keep " in out
    return file


def test_a_plan_is_written_once_and_carried_out(net: str, plan: str, run: Command) -> None:
    file = PlanFile.load(plan)
    assert (file.model, file.options, file.device) == (f"{net}:make", {}, "cpu-generic")
    ((_, planned),) = file.graphs[0].steps
    code, out, err = run("optimize", f"{net}:make", "--plan", plan, *CPU, "--json", "-")
    assert (code, err) == (0, "")
    report = json.loads(out)
    loss_and_its_gradient = 8
    assert report["predicted_peak_bytes"] == planned.peak_bytes + loss_and_its_gradient  # type: ignore[attr-defined]
    assert report["measured"]["optimized"]["peak_bytes"] < report["measured"]["plain"]["peak_bytes"]
    assert report["measured"]["optimized"]["seconds"] > 0 and report["passes"] == [repr(file.passes[0])]


def test_optimize_plans_itself_and_shows_what_was_measured(net: str, run: Command) -> None:
    options = ["--set", "width=8", "--passes", "Checkpoint(memory='min')", *CPU, "--top", "1"]
    code, out, err = run("optimize", f"{net}:make", *options)
    assert (code, err) == (0, "")
    assert "measured time   " in out and " instead of " in out and "net.py:make" in out


def test_inference_is_planned_and_measured(net: str, tmp_path: Path, run: Command) -> None:
    file = str(tmp_path / "plan.json")
    options = ["--inference", "--passes", "fuse", *CPU]
    assert run("plan", f"{net}:without_loss", *options, "-o", file)[0] == 0
    assert PlanFile.load(file).options == {"inference": True}
    code, out, err = run("optimize", f"{net}:without_loss", "--plan", file, *CPU)
    assert (code, err) == (0, "") and "forward only" in out and "measured time" in out


def test_a_plan_made_in_python(net: str, tmp_path: Path, run: Command) -> None:
    loaded = load_model(f"{net}:make")
    model = optimize(loaded.model, memory="min", device="cpu-generic")
    model(*loaded.example_args).backward()
    PlanFile.of(model.report).save(tmp_path / "plan.json")
    options = ["--plan", f"{tmp_path}/plan.json", *CPU]
    assert run("optimize", f"{net}:make", *options)[0] == 0
    code, out, err = run("optimize", f"{net}:other", *options)
    assert (code, out) == (1, "")
    assert "plan.json is for another graph: its input is x float32[32, 16]" in err
    assert "and here it is x float32[8, 16]" in err and err.count("\n") == 1


def test_a_plan_for_another_model_or_other_options(net: str, plan: str, run: Command) -> None:
    held = ["--plan", plan, *CPU]
    _, _, err = run("optimize", f"{net}:other", *held)
    assert f"{plan} is for the model {net}:make, not for {net}:other" in err
    _, _, err = run("verify", f"{net}:make", *held, "--set", "width=8")
    assert f"{plan} is for no --set, and here is --set width=8" in err
    _, _, err = run("optimize", f"{net}:make", *held, "--memory", "min")
    assert "give either --plan or what to plan: a budget or --passes" in err
    data = json.loads(Path(plan).read_text())
    for key, value, message in (
        ("schema", 7, "has schema 7, and this version reads 1"),
        ("torch_version", "1.0", "was made with torch 1.0, and this is torch 2"),
        ("options", {"set": ["width=8"]}, "is for another graph: its input is x float32[32, 16]"),
    ):
        Path(plan).write_text(json.dumps({**data, key: value}))
        code, out, err = run("optimize", f"{net}:make", *held)
        assert (code, out) == (1, "") and message in err


def test_show_has_the_graph_the_plan_and_the_difference(net: str, run: Command) -> None:
    step = [f"{net}:make", "--memory", "min", *CPU]
    code, out, err = run("show", *step, "--pass", "checkpoint")
    assert (code, err) == (0, "") and "\x1b" not in out
    titles = [line for line in out.splitlines() if line.startswith("# ")]
    assert titles == ["# before", "# plan", "# after", "# diff"]
    parts = {only: run("show", *step, "--pass", "Checkpoint", "--only", only)[1] for only in
             ("before", "plan", "after", "diff")}  # fmt: skip
    assert all(part.strip() in out for part in parts.values())
    assert "net.py:12: x = torch.sigmoid(layer(x)).exp()" in parts["before"]
    assert "Checkpoint(memory='min'" in parts["plan"] and "\nkeep = (" in parts["plan"]
    added = [line for line in parts["diff"].splitlines() if line.startswith("+    ")]
    assert added and all(line[1:] in parts["after"].splitlines() for line in added)
    data = json.loads(run("show", *step, "--pass", "checkpoint", "--json", "-")[1])
    assert "\n".join(data["diff"]) == parts["diff"].strip("\n")


def test_show_says_where_nothing_changes(net: str, run: Command) -> None:
    code, out, _ = run("show", f"{net}:make", "--pass", "pack-saved", "--only", "diff", *CPU)
    assert (code, out) == (0, "nothing changes\n")


def test_show_has_colours_in_a_terminal(net: str, run: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    options = ["--memory", "min", *CPU, "--only", "diff"]
    _, out, _ = run("show", f"{net}:make", "--pass", "checkpoint", *options)
    assert "\x1b[32m+    " in out and "\x1b[31m-    " in out and "\x1b[36m@@" in out


def test_verify_groups_by_module(net: str, run: Command) -> None:
    code, out, err = run("verify", f"{net}:make", "--memory", "min", *CPU)
    assert (code, err) == (0, "")
    assert "all 8 tensors are right; passes: checkpoint(memory='min')" in out
    lines = [line.split() for line in out.splitlines() if line.strip().startswith("gradient")]
    assert [line[1:3] for line in lines] == [[f"layers.{n}", "2"] for n in range(3)]


@dataclass(frozen=True)
class NoPlan(Plan):
    """Nothing to decide."""


@dataclass(frozen=True)
class Square(Pass):
    """Takes the square where the model takes the exponential."""

    name: ClassVar[str] = "square"

    def plan(self, program: Program, costs: Costs) -> NoPlan:
        return NoPlan()

    def apply(self, program: Program, plan: NoPlan) -> Program:
        copy = program.copy()
        next(n for n in copy.graph.nodes if n.name == "exp_1").target = torch.ops.aten.square.default
        return copy


def test_verify_names_the_wrong_pass_and_its_node(
    net: str, run: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphopt.passes, "Square", Square, raising=False)
    monkeypatch.setattr(graphopt.passes, "__all__", [*graphopt.passes.__all__, "Square"])
    options = ["--passes", "Checkpoint(),square,Checkpoint('min')", *CPU]
    code, out, err = run("verify", f"{net}:make", *options)
    assert code == 1 and " wrong" in out and err.count("\n") == 1
    assert (
        "tensors are wrong: loss, output" in err and "it goes wrong in square(), first at %exp_1 " in err
    )
    assert "in the model" in err and "net.py:12" in err
    code, out, _ = run("verify", f"{net}:make", *options, "--json", "-")
    assert code == 1 and json.loads(out)["fault"]["pass_"] == "square()"


ERRORS: dict[str, tuple[list[str], str]] = {
    "no inputs": (["optimize", "NET:without_inputs"], "comes without inputs; return (model, inputs)"),
    "no loss": (["optimize", "NET:without_loss"], "there is no scalar loss in the model's output"),
    "no loss to verify": (["verify", "NET:without_loss"], "there is no scalar loss"),
    "does not run": (
        ["optimize", "NET:wrong_inputs"],
        "net.py:wrong_inputs does not run on its example inputs: RuntimeError: mat1 and mat2",
    ),
    "verify does not run": (["verify", "NET:wrong_inputs"], "does not run on its example inputs"),
    "plan does not trace": (["plan", "NET:wrong_inputs", "-o", "-"], "could not be traced"),
    "an impossible budget": (
        ["optimize", "NET:make", "--memory", "1KiB"],
        "the smallest reachable peak is",
    ),
    "plan: an impossible budget": (
        ["plan", "NET:make", "--memory", "1KiB", "-o", "-"],
        "the smallest reachable peak is",
    ),
    "two ways": (
        ["plan", "NET:make", "--memory", "min", "--passes", "Fuse", "-o", "-"],
        "give either --passes or a budget",
    ),
    "no such pass": (
        ["verify", "NET:make", "--passes", "Chekpoint()"],
        "no pass is called 'Chekpoint' (did you mean",
    ),
    "no such plan": (
        ["optimize", "NET:make", "--plan", "/nowhere"],
        "cannot read /nowhere: No such file",
    ),
    "show two": (["show", "NET:make", "--pass", "Fuse,PackSaved"], "names 2 passes; show one at a time"),
    "show without the option": (
        ["show", "NET:make", "--pass", "fuse", "--memory", "min"],
        "Fuse has no option 'memory'",
    ),
    "show a module pass": (["show", "NET:make", "--pass", "skip-layers"], "changes the module"),
    "not written": (["plan", "NET:make", "-o", "/nowhere/plan"], "cannot write /nowhere/plan: No such"),
    "unknown device": (["show", "NET:make", "--pass", "fuse", "--device", "h10"], "did you mean 'h100'?"),
}


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(arguments: list[str], message: str, net: str, run: Command) -> None:
    given = [argument.replace("NET", net) for argument in arguments]
    code, out, err = run(*given, *([] if "--device" in given else CPU))
    assert (code, out) == (1, "")
    assert err.startswith("graphopt: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "gpt2"],
        ["plan", "gpt2", "-o", "x", "--memory", "1", "--inference"],
        ["show", "gpt2"],
        ["show", "gpt2", "--pass", "fuse", "--only", "graph"],
        ["diff", "a"],
        ["verify"],
        ["completion", "tcsh"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], run: Command) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and err.startswith("usage: graphopt")


def test_exit_codes_are_documented(run: Command) -> None:
    out = run("--help")[1]
    page = (Path(__file__).parent.parent / "docs" / "plans.md").read_text(encoding="utf-8")
    for number, words in enumerate(("asked", "could not", "wrong usage", "differ")):
        (line,) = (line for line in out.splitlines() if line.startswith(f"  {number}  "))
        assert words in line
    assert "## Exit codes" in page
