"""`graphopt skip`: what it prints and writes, and its messages."""

import json
from pathlib import Path

import pytest
import torch
from block_models import block_model, token_batches

from graphopt.cli import main
from graphopt.passes.blocks import find_stack
from graphopt.passes.made_up_inputs import as_batch
from graphopt.passes.skip_layers import SkipLayers
from graphopt.passes.skip_strategies import Evidence
from graphopt.skip_report import compare, free_running

transformers = pytest.importorskip("transformers")

SMALL = ["--seq", "16", "--batch", "2", "--new-tokens", "3", "--set", "num_hidden_layers=4"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.passes.layer_times.SECONDS", 0.0)


@pytest.fixture
def text(tmp_path: Path) -> str:
    file = tmp_path / "text.txt"
    file.write_bytes(
        bytes(torch.randint(256, (600,), generator=torch.Generator().manual_seed(0)).tolist())
    )
    return str(file)


def test_a_table_and_json(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "report.json", tmp_path / "short"
    options = ["--remove", "1", "--text", text, "--json", str(file), "--save", str(folder)]
    assert main(["skip", "llama", *SMALL, *options]) == 0
    out, err = capsys.readouterr()
    assert "the bytes of" in err and "llama: 3 of 4 blocks of model.layers stay (greedy)" in out
    data = json.loads(file.read_text())
    assert [unit["removed"] for unit in data["units"]].count(True) == 1
    assert [row["phase"] for row in data["phases"]] == ["prefill", "decode"]
    assert [row["tokens"] for row in data["phases"]] == [32, 2]
    assert all(0 < row["predicted_seconds"] < row["whole_seconds"] for row in data["phases"])
    quality = data["quality"]
    for figure in (
        f"KL {quality['kl']:.4g} nats",
        f"top-1 {100 * quality['top1']:.1f} %",
        "free-running",
    ):
        assert figure in out
    assert f"perplexity {quality['perplexity']:.4g} (whole {quality['whole_perplexity']:.4g})" in out
    short = transformers.LlamaForCausalLM.from_pretrained(folder)
    assert sum(p.numel() for p in short.parameters()) == data["parameters"] < data["whole_parameters"]


def test_layers_that_share_weights(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, folder = tmp_path / "report.json", tmp_path / "folded"
    options = ["--remove", "1", "--strategy", "fold", "--shared", "1", "--save", str(folder)]
    assert main(["skip", "llama", *SMALL, *options, "--text", text, "--json", str(file)]) == 0
    out, _ = capsys.readouterr()
    data = json.loads(file.read_text())
    ((source, block),) = data["plan"]["groups"]
    assert [unit["weights_of"] for unit in data["units"] if unit["weights_of"]] == [str(source)]
    (line,) = (line for line in out.splitlines() if "weights of" in line)
    assert line.split()[0] == str(block) and f"weights of {source}" in line
    assert f"{data['plan']['saved']} less by sharing" in out and "3 of 4 blocks" in out
    loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
    stored = sum(p.numel() for p in loaded.parameters())
    assert stored == data["parameters"] + data["plan"]["saved"]


def test_sublayers_of_a_model_from_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "net.py"
    file.write_text(
        "import torch\nfrom block_models import block_model\n"
        "def make():\n    return block_model('vit', 3), torch.randn(2, 3, 8, 8)\n"
    )
    options = ["--keep", "0,1,3,4,5", "--granularity", "sublayers"]
    assert main(["skip", f"{file}:make", *options]) == 0
    out, err = capsys.readouterr()
    assert "the inputs that net.py:make gives choose the layers and are measured too" in err
    removed = [line.split()[0] for line in out.splitlines() if "removed" in line]
    assert removed == ["1.attention"] and "prefill" in out and "decode" not in out


def test_figures_are_those_of_held_out_batches() -> None:
    model, batches = block_model("gpt2", 4), token_batches(4, tokens=12)
    short = SkipLayers(keep=[0, 2, 3]).apply(model, SkipLayers(keep=[0, 2, 3]).plan(model))
    inputs = tuple(as_batch(ids, model) for ids in batches)
    evidence = Evidence(model, find_stack(model, inputs[0]), inputs)
    report = compare("it", evidence, SkipLayers(keep=[0, 2, 3]).plan(model), short, 5)
    same = total = 0
    for ids in batches:
        text, other = ids[:, :6], ids[:, :6]
        for _ in range(5):
            text, other = (
                torch.cat([t, m(t).logits[:, -1:].argmax(-1)], 1)
                for m, t in ((model, text), (short, other))
            )
        same, total = same + int((text == other)[:, 6:].sum()), total + 10
    assert report.free_running == same / total < 1
    assert free_running(model, model, inputs, 5) == 1
    assert report.units[1].removed and report.units[1].kl == pytest.approx(report.quality.kl, rel=1e-4)  # type: ignore[union-attr]


REFUSED = [
    (["--keep", "0,x"], "--keep 0,x: positions are numbers"),
    (["--keep", "0,7"], "keep=[0, 7]: the blocks of model.layers are 0 to 3"),
    (["--remove", "1", "--strategy", "best"], "strategy='best' is none of greedy"),
    (["--remove", "1", "--shared", "1"], "shared=1 is for strategy='fold'"),
    (["--remove", "1", "--text", "/nowhere"], "cannot read /nowhere"),
    (["--max-kl", "1e-9"], "max_kl=1e-09: the divergence is"),
    (["--remove", "1", "--granularity", "sublayers", "--save", "short"], "cannot say that a layer"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["skip", "llama", *SMALL, *options]) == 1
    assert message in capsys.readouterr().err


def test_texts_that_do_not_fit(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["skip", "llama", "--remove", "1", "--text", text]) == 1
    assert "has 600 tokens; 8 batches of --batch 4 samples with --seq 128 tokens take 4096" in (
        capsys.readouterr().err
    )
    few = ["--set", "vocab_size=50", "--text", text]
    assert main(["skip", "llama", "--remove", "1", *few]) == 1
    assert "--text without --tokenizer needs 256 tokens, one a byte; the model has 50" in (
        capsys.readouterr().err
    )
    assert main(["skip", "llama", "--remove", "1", *few, "--tokenizer", "/nowhere"]) == 1
    assert "cannot load the tokenizer /nowhere" in capsys.readouterr().err
    assert main(["skip", "model.pt2", "--remove", "1"]) == 1
    assert "layers are removed from a module" in capsys.readouterr().err
    assert main(["skip", "t5", "--remove", "1", "--seq", "8"]) == 1
    assert "several stacks of blocks: encoder.block" in capsys.readouterr().err
