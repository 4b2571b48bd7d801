"""What a user can get wrong on any command line, each with its message on one line and its exit code.

Messages that other files hold through the same command (`test_cli.py`, `test_skip_command.py`,
`test_kernels_command.py`, `test_calibrate_command.py`, `test_model_commands.py`) are not repeated.
"""

import json
from pathlib import Path

import pytest
import torch

from graphopt import PlanFile, __version__
from graphopt.cli import main
from graphopt.codegen import nvrtc

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + torch.tanh(self.linear(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x

class Loss(Net):
    def forward(self, x):
        return super().forward(x).square().mean()

def make():
    return Net(), torch.ones(2, 4, 8)

def trains():
    return Loss(), torch.ones(2, 4, 8)

def sized(batch, seq):
    return Loss(), torch.ones(batch, seq, 8)

def frozen(batch, seq):
    return Loss().requires_grad_(False), torch.ones(batch, seq, 8)

def fails():
    return 1 / 0

def a_text():
    return "net"

def text_as_inputs():
    return Net(), "inputs"
"""
FIT = "--memory 1MiB"

# What is typed, words apart, and what is said; in capitals are files, and what `fit` needs.
ERRORS = {
    "report: no function": ("report NET", "names a file but no function in it: write NET:factory"),
    "report: another function": ("report NET:mak", "has no function 'mak'; it has make"),
    "report: it fails": ("report NET:fails", "net.py:fails failed: ZeroDivisionError: division by zero"),
    "report: no module": (
        "report NET:a_text",
        "returned a str, not a torch.nn.Module or (module, inputs)",
    ),
    "report: no inputs": ("report NET:text_as_inputs", "returned a str as the example inputs"),
    "report: broken file": ("report BROKEN:make", "broken.py failed: SyntaxError"),
    "report: unknown argument": ("report NET:make --set width=3", "unexpected keyword argument 'width'"),
    "report: an option of zoo models": ("report NET:make --batch 3", "batch=3 has no effect on"),
    "report: twice": ("report gpt2 --set n_layer=1,n_layer=2", "set 'n_layer' twice"),
    "report: positions": (
        "report gpt2 --size small --seq 300",
        "seq=300 is longer than the 128 positions",
    ),
    "report: short": ("report gpt2 --size small --seq 1", "seq >= 2, not batch=2, seq=1"),
    "report: not built": (
        "report gpt2 --size small --set n_head=5",
        "cannot build gpt2 in size 'small' with n_head=5 on meta",
    ),
    "report: no loss": ("report NET:make --memory 0", "memory=0 must be positive"),
    "report: no program": ("report BROKEN.pt2", "cannot load BROKEN.pt2 as a program saved with"),
    "fit: unknown model": ("fit gpt3 --seq 8 FIT", "no zoo model is called 'gpt3' (did you mean"),
    "fit: no size": ("fit gpt2 --size small FIT", "give seq= for the largest batch, batch= for"),
    "fit: no sequence": ("fit vit --size small --seq 8 FIT", "vit has no sequence: leave seq"),
    "fit: memory": ("fit gpt2 --memory 6GX --seq 8", "unknown unit 'GX'"),
    "fit: device": ("fit gpt2 --memory 1GiB --seq 8 --device h10", "did you mean 'h100'?"),
    "fit: degree": ("fit gpt2 --seq 8 --data 0 FIT", "data=0: a degree is at least 1"),
    "fit: samples": ("fit gpt2 --stages 8,16 FIT", "--stages needs --samples, those of an epoch"),
    "fit: stages": (
        "fit gpt2 --stages 8,x --samples 9 FIT",
        "--stages 8,x: write sizes such as 512,1024,2048",
    ),
    "fit: no samples": ("fit gpt2 --stages 8 --samples 0 FIT", "a batch plan needs stages and samples"),
    "fit: workers": (
        "fit gpt2 --stages 8 --samples 9 --workers 2 --small-workers 3 FIT",
        "of 2 workers, 3 cannot be small ones",
    ),
    "fit: extra time": (
        "fit gpt2 --stages 8 --samples 9 --extra-time 0.5 FIT",
        "extra_time=0.5 does not lie between 1 and",
    ),
    "fit: arguments": ("fit NET:make --seq 8 FIT", "unexpected keyword argument 'batch'"),
    "fit: frozen": ("fit NET:frozen --seq 8 FIT", "has no backward: nothing is trained"),
    "fit: not written": (
        "fit NET:sized --seq 4 --plain FIT --json /nowhere/fit.json",
        "cannot write /nowhere/fit.json: No such file or directory",
    ),
    "skip: cannot be saved": ("skip NET:make --keep 0,2 --save FOLDER", "Net has no save_pretrained"),
    "skip: one has to stay": ("skip NET:make --remove 3", "remove=3: the model has 3 "),
    "skip: shared": (
        "skip NET:make --remove 1 --strategy fold --shared 0",
        "shared=0: one block or more runs with a neighbour's weights",
    ),
    "skip: speed-up": ("skip NET:make --target-speedup 0.5", "how many times as fast is above 1"),
    "skip: perplexity": (
        "skip NET:make --max-ppl-increase 0.1",
        "needs a model that predicts the next token",
    ),
    "kernels: rows": (
        "kernels rms_norm --shape 2147483648x8",
        "a kernel for 2147483648 rows: fewer than 2**31 are supported",
    ),
    "passes: a score": (
        "plan NET:trains --passes SparseUpdate('1MiB',scores=[('a',-1.0)]) -o -",
        "the score of a is -1.0; a contribution is at least 0",
    ),
    "passes: no scores": (
        "plan NET:trains --passes SparseUpdate('1MiB') -o -",
        "a budget needs scores= or calibration=",
    ),
    "passes: parts": ("show NET:trains --pass StreamBlocks(parts=0)", "is neither a positive number"),
    "passes: solver": ("show NET:trains --pass Checkpoint(solver='best')", "'best' is not a solver"),
    "passes: minimum": ("verify NET:trains --passes Fuse(min_bytes=-1)", "is not a number of bytes"),
}


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "net.py").write_text(FACTORY)
    (tmp_path / "broken.py").write_text("def make(:\n")
    (tmp_path / "broken.pt2").write_text("no archive")
    return {
        "NET": f"{tmp_path}/net.py",
        "BROKEN.pt2": f"{tmp_path}/broken.pt2",
        "BROKEN": f"{tmp_path}/broken.py",
        "FOLDER": f"{tmp_path}/short",
    }


def filled(text: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        text = text.replace(name, place)
    return text


@pytest.mark.parametrize(("arguments", "message"), ERRORS.values(), ids=ERRORS)
def test_one_line_says_what_is_wrong(
    arguments: str, message: str, places: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    given = filled(arguments, {**places, "FIT": FIT}).split()
    if given[0] not in ("skip", "kernels", "passes") and "--device" not in given:
        given += ["--device", "cpu-generic"]
    assert main(given) == 1
    captured = capsys.readouterr()
    said = [line for line in captured.err.splitlines() if "graphopt: note:" not in line]
    assert len(said) == 1 and said[0].startswith("graphopt: ")
    assert filled(message, places) in said[0] and "Traceback" not in captured.err


@pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC: pip install nvidia-cuda-nvrtc")
def test_an_architecture_that_nvrtc_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", "softmax", "--lint", "--arch", "sm_12"]) == 1
    assert "NVRTC could not compile a kernel for sm_12" in capsys.readouterr().err


@pytest.fixture
def plan(places: dict[str, str], tmp_path: Path) -> Path:
    """A plan of one pass on the training step of the file."""
    path = tmp_path / "plan.json"
    options = ["--memory", "min", "--device", "cpu-generic", "-o", str(path)]
    assert main(["plan", f"{places['NET']}:trains", *options]) == 0
    return path


def test_plans_edited_by_hand_wrongly(
    places: dict[str, str], plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = json.loads(plan.read_text())
    (known,) = data["graphs"][0]["steps"]
    region: dict[str, object] = {"plan": "FusePlan", "regions": [{"nodes": ["a"]}], "missed": []}
    region |= {"peak_bytes": 0, "baseline_bytes": 0}
    cases: list[tuple[dict[str, object], str]] = [
        (
            {"plan": {**known["plan"], "keep": ["x"]}},
            "the plan was made for another program: it keeps 'x'",
        ),
        ({"plan": {**known["plan"], "order": ["x"]}}, "the plan's order cannot be that of this backward"),
        ({"plan": {**known["plan"], "kept": []}}, "CheckpointPlan has no field kept"),
        ({"pass": "Fuse()"}, "not a FusePlan"),
        ({"pass": "Fuse()", "plan": region}, "not a FusedRegion: "),
        ({"pass": "Fuze()"}, "no pass is called 'Fuze' (did you mean"),
    ]
    for changes, message in cases:
        data["graphs"][0]["steps"] = [{**known, **changes}]
        plan.write_text(json.dumps(data))
        capsys.readouterr()
        arguments = ["--plan", str(plan), "--device", "cpu-generic"]
        assert main(["optimize", f"{places['NET']}:trains", *arguments]) == 1
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        *("devices h100", "zoo --all", "passes -x", "calibrate", "kernels", "skip gpt2", "fit gpt2"),
        "skip gpt2 --remove 1 --keep 0",
    ],
)
def test_wrong_usage(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("usage: graphopt")


def test_versions_are_those_of_this_package(plan: Path) -> None:
    file = PlanFile.load(plan)
    assert (file.graphopt_version, file.torch_version) == (__version__, torch.__version__)
