"""`graphopt kernels`: texts, predicted bytes and times, and the lint."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.cli import main
from graphopt.codegen import numba_cpu, numba_cuda, nvrtc
from graphopt.codegen.numba_bench import NumbaBench
from graphopt.codegen.numba_cpu import NumbaKernel
from graphopt.kernels_command import kernels


def shown(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert main(["kernels", *arguments]) == 0
    return capsys.readouterr().out


def test_bytes_and_time_of_a_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers of 2 bytes: x and residual are read, result and sum written; and a weight is read."""
    text = shown(capsys, "rms_norm", "--shape", "4096x1024", "--device", "h200")
    nbytes = 4 * 4096 * 1024 * 2 + 1024 * 2
    assert 'extern "C" __global__' in text and "enum { TEAM = 32, TEAMS = 8 };" in text
    assert f"{nbytes / 4.8e12 * 1e6:.1f} us at 4800 GB/s of h200" in text
    assert "32 threads for a row, 8 columns in a pack, 4 packs of a thread in registers" in text


@pytest.mark.parametrize("name", kernels())
def test_all_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = shown(capsys, name, "--dtype", "float32", "--quiet")
    assert "__global__" not in quiet and "GB/s of h100" in quiet


def test_json_has_the_text_and_the_facts(capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(shown(capsys, "softmax", "--shape", "8x16", "--json", "-"))
    assert (data["kernel"], data["dtype"], data["shape"]) == ("softmax", "bfloat16", [8, 16])
    assert "__global__" in data["text"] and data["facts"]["bytes"].startswith("512 B")


def test_the_text_for_numba(capsys: pytest.CaptureFixture[str]) -> None:
    assert "def rows(begin, end, columns" in shown(capsys, "softmax", "--backend", "numba")


def test_the_text_for_numba_cuda(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "softmax", "--backend", "numba-cuda", "--shape", "4096x1024")
    assert "cuda.syncthreads()" in text and "PACK, TEAM, TEAMS = 8, 128, 2" in text
    assert "128 threads for a row, 8 columns in a pack, in a loop" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rms"], "no kernel is named rms: there are rms_norm"),
        (["softmax", "--shape", "4096"], "as in 4096x1024"),
        (["softmax", "--shape", "0x4"], "as in 4096x1024"),
        (["softmax", "--backend", "numba", "--lint"], "--lint is for the CUDA backends"),
        (["softmax", "--device", "h10"], "did you mean 'h100'"),
        (["softmax", "--lint", "--arch", "90"], "is no architecture"),
    ],
)
def test_messages(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["kernels", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC: pip install nvidia-cuda-nvrtc")
def test_lint(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "softmax", "--arch", "sm_100", "--lint", "--quiet")
    assert "sm_100" in text and "no spills" in text
    assert "4 of 16 bytes, 0 below" in text


@pytest.mark.skipif(not numba_cuda.can_compile(), reason="no numba-cuda with NVVM")
def test_lint_of_ptx(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "softmax", "--backend", "numba-cuda", "--lint", "--quiet")
    assert "the driver gives out registers" in text and "of 16 bytes, 0 below" in text


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where measured launches are kept, instead of the user's; and made-up times."""
    monkeypatch.setattr(numba_cpu, "compile_region", lambda region: NumbaKernel(region, tmp_path))
    seconds = {512: 0.5e-3, 1024: 0.8e-3, 2048: 1e-3}
    monkeypatch.setattr(NumbaBench, "seconds", lambda bench, choice, count: seconds[choice.block])
    return tmp_path


def test_tune(own_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    words = ["layer_norm", "--tune", "--backend", "numba", "--shape", "4x1500", "--threads", "1"]
    text = shown(capsys, *words)
    assert "rows 4..7, columns 1500: block=512 takes 0.50 of the default's time" in text
    assert re.search(r"block=1024 +800\.0 +0\.800 +0\.800-0\.800\n", text) and ", 1 threads" in text
    assert re.search(r"block=512 +500\.0 +0\.500 +0\.500-0\.500 +again, chosen\n", text)
    data = json.loads(shown(capsys, *words, "--json", "-"))
    assert data["chosen"]["block"] == 512 and data["kernel"] == "layer_norm"
    assert len(list(own_folder.glob("*.tuned"))) == 1 and torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "numba", "--threads", "0"], "--threads 0: at least 1"),
        (["--threads", "2"], "--backend numba measures this CPU"),
        (["--backend", "numba-cuda"], "numba-cuda has one way to launch"),
    ],
)
def test_messages_of_tune(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and "numba" not in arguments:
        pytest.skip("a GPU is here")
    assert main(["kernels", "softmax", "--tune", *arguments]) == 1
    assert message in capsys.readouterr().err
