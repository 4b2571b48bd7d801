"""The `graphopt` command: what it prints and writes, its exit codes, its messages."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt import __version__, zoo
from graphopt.cli import main
from graphopt.cost_models.devices import KNOWN_DEVICES
from graphopt.terminal import print_lines

H100 = ["--device", "h100"]

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

def make(width=32):
    return Net(width), torch.zeros(64, width)

def reads_a_number(width=32):
    assert torch.linspace(0, 1, 3).sum().item() > 1
    return make(width)

def without_inputs():
    return Net(4)
"""


@pytest.fixture
def factory(tmp_path: Path) -> str:
    (tmp_path / "net.py").write_text(FACTORY)
    return f"{tmp_path}/net.py"


@pytest.fixture
def output(capsys: pytest.CaptureFixture[str]) -> "Output":
    return Output(capsys)


class Output:
    """Runs the command and returns (exit code, standard output, error output)."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        captured = self.capsys.readouterr()
        return code, captured.out, captured.err


def test_report_on_a_zoo_model(output: Output, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    file = tmp_path / "report.json"
    options = ["--size", "small", "--batch", "4", "--seq", "64", "--memory", "0.7", "--top", "2"]
    code, out, err = output("report", "gpt2", *options, *H100, "--json", str(file))
    assert (code, err) == (0, "")
    assert out.startswith("graphopt report: gpt2\n  times are predicted for h100\n")
    assert "input_ids int64[4, 64]" in out and " transformers/" in out
    assert "transformer.h.*." in out and "┤" in out
    assert "\x1b" not in out and not any(line.endswith(" ") for line in out.splitlines())
    data = json.loads(file.read_text())
    assert data["schema"] == 1 and data["model"] == "gpt2"
    assert data["predicted_peak_bytes"] <= 0.7 * data["baseline_peak_bytes"]
    assert data["graphs"][0]["budget_bytes"] == int(0.7 * data["baseline_peak_bytes"])


def test_report_without_backward(output: Output) -> None:
    pytest.importorskip("transformers")
    code, out, _ = output("report", "gpt2", "--size", "small", "--inference", *H100)
    assert code == 0
    assert "forward only" in out and "Kept for the backward" not in out


def test_report_on_a_function_of_a_file(factory: str, output: Output) -> None:
    code, out, _ = output("report", f"{factory}:make", "--set", "width=16", *H100)
    assert code == 0
    assert "x float32[64, 16]" in out and "net.py:12: x = torch.sigmoid(layer(x)).exp()" in out


def test_only_json_on_standard_output(factory: str, output: Output) -> None:
    code, out, _ = output("report", f"{factory}:make", "--memory", "min", *H100, "--json", "-")
    assert code == 0 and json.loads(out)["graphs"][0]["is_training"]


def test_a_model_that_the_meta_device_cannot_hold_is_built_in_memory(
    factory: str, output: Output
) -> None:
    code, out, err = output("report", f"{factory}:reads_a_number", *H100)
    assert code == 0 and "forward and backward" in out
    assert err.startswith("graphopt: note: the weights are in memory") and "item()" in err


def test_an_exported_program_trains_where_it_can(tmp_path: Path, output: Output) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
    exported = torch.export.export(net, (torch.zeros(4, 8),))
    torch.export.save(exported, tmp_path / "net.pt2")
    code, out, _ = output("report", f"{tmp_path}/net.pt2", *H100)
    assert code == 0 and "forward and backward" in out
    code, out, _ = output("report", f"{tmp_path}/net.pt2", "--inference", *H100)
    assert code == 0 and "forward only" in out


FAILURES = {
    "unknown model": (["gpt3"], "no zoo model is called 'gpt3' (did you mean"),
    "no such file": (["missing.py:make"], "there is no file missing.py"),
    "malformed budget": (["gpt2", "--memory", "6GX"], "memory='6GX': unknown unit 'GX'"),
    "budget above one": (["gpt2", "--memory", "1.5"], "a share lies above 0 and is at most 1.0"),
    "unknown device": (["gpt2", "--device", "h10"], "unknown device 'h10', did you mean 'h100'?"),
    "malformed override": (["gpt2", "--set", "n_layer"], "cannot read 'n_layer' in the overrides"),
}


@pytest.mark.parametrize("arguments, message", FAILURES.values(), ids=FAILURES)
def test_failures_are_one_line(arguments: list[str], message: str, output: Output) -> None:
    if "--device" not in arguments:
        arguments = [*arguments, *H100]
    code, out, err = output("report", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("graphopt: ") and message in err
    assert err.count("\n") == 1, "one line, no traceback"


def test_an_unknown_override_is_named(output: Output) -> None:
    pytest.importorskip("transformers")
    code, _, err = output("report", "gpt2", "--set", "n_layers=3", *H100)
    assert code == 1 and "gpt2 has no configuration attribute 'n_layers' (did you mean" in err


def test_an_impossible_budget_names_what_can_be_reached(factory: str, output: Output) -> None:
    code, out, err = output("report", f"{factory}:make", "--memory", "1KiB", *H100)
    assert (code, out) == (1, "")
    assert "the smallest reachable peak is" in err and "bytes), of which" in err


def test_a_budget_needs_a_backward(factory: str, output: Output, tmp_path: Path) -> None:
    exported = torch.export.export(nn.Tanh(), (torch.zeros(4),))
    torch.export.save(exported, tmp_path / "tanh.pt2")
    code, _, err = output("report", f"{tmp_path}/tanh.pt2", "--memory", "min", *H100)
    assert code == 1 and "has no backward" in err


def test_a_model_without_inputs(factory: str, output: Output) -> None:
    code, _, err = output("report", f"{factory}:without_inputs", *H100)
    assert code == 1 and "comes without inputs; return (model, inputs)" in err


def test_a_file_that_cannot_be_written(factory: str, output: Output, tmp_path: Path) -> None:
    target = str(tmp_path / "missing" / "out.json")
    code, _, err = output("report", f"{factory}:make", *H100, "--json", target)
    assert code == 1 and err == f"graphopt: cannot write {target}: No such file or directory\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["report"],
        ["explain"],
        ["report", "gpt2", "--memory", "1", "--inference"],
        ["report", "gpt2", "--dtype", "int8"],
        ["report", "gpt2", "--top", "0"],
        ["report", "gpt2", "--batch", "none"],
    ],
    ids=" ".join,
)
def test_wrong_usage(arguments: list[str], output: Output) -> None:
    code, out, err = output(*arguments)
    assert (code, out) == (2, "") and err.startswith("usage: graphopt")


def test_a_missing_extra_is_one_line(output: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    code, out, err = output("report", "gpt2", *H100)
    assert (code, out) == (1, "")
    assert "pip install graphopt[zoo]" in err and err.count("\n") == 1


def test_version(output: Output) -> None:
    assert output("--version") == (0, f"graphopt {__version__}\n", "")


def test_passes_are_listed_with_their_options(output: Output) -> None:
    code, out, _ = output("passes")
    assert code == 0 and "checkpoint: Keep as much as fits, recompute the rest." in out
    rows = {row["name"]: row for row in json.loads(output("passes", "--json")[1])}
    options = rows["checkpoint"]["options"]
    assert {"name": "hold_outputs", "type": "bool", "default": "False"} in options


def test_devices_are_listed_with_their_sources(output: Output) -> None:
    code, out, _ = output("devices")
    assert code == 0
    assert all(name in out and device.source in out for name, device in KNOWN_DEVICES.items())
    found = {d["name"]: d for d in json.loads(output("devices", "--json")[1])}
    assert found["h100"]["memory_bytes"] == 80 * 10**9
    assert found["a100"]["flops_per_s"]["bfloat16"] == 312e12


def test_models_are_listed(output: Output) -> None:
    code, out, _ = output("zoo")
    assert code == 0 and all(name in out for name in zoo.names())
    assert [m["name"] for m in json.loads(output("zoo", "--json")[1])] == list(zoo.names())


def test_a_terminal_gets_styles(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    print_lines([[("title", "bold")], [("██", "kept"), ("·", "static"), ("[plain]", "")]])
    out = capsys.readouterr().out
    assert "\x1b[" in out and "[plain]" in out


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m graphopt devices | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert "Devices" in done.stdout and "Traceback" not in done.stderr


LLAMA_70B = (
    "hidden_size=8192,intermediate_size=28672,num_hidden_layers=80,"
    "num_attention_heads=64,num_key_value_heads=8"
)
MEASURED = """
import resource, sys
from graphopt.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, file=sys.stderr)
raise SystemExit(code)
"""


@pytest.mark.slow
def test_a_model_of_70_billion_parameters_fits_a_laptop() -> None:
    pytest.importorskip("transformers")
    options = ["--set", LLAMA_70B, "--batch", "1", "--seq", "4096", "--dtype", "bfloat16"]
    options += ["--memory", "min", *H100, "--json", "-"]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "report", "llama", *options],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["graphs"][0]["parameter_bytes"] > 130e9
    assert int(done.stderr.splitlines()[-1]) < 4 * 2**30
