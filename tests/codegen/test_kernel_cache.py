"""The folder of compiled kernels: shared by processes, checked, and bounded in size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphopt.codegen import kernel_cache, native, numba_cpu, regions
from graphopt.codegen.kernel_cache import load, trim
from graphopt.codegen.numba_cpu import NumbaKernel

X = torch.arange(12.0).view(3, 4)
SILU = X * torch.sigmoid(X) * X
CODE = """
import sys, time
from pathlib import Path
import torch
begin = time.process_time()
from graphopt.codegen import regions
from graphopt.codegen.numba_cpu import NumbaKernel
x = torch.arange(12.0).view(3, 4)
out, = NumbaKernel(regions.swiglu("float32"), Path(sys.argv[1]))(x, x)
print(time.process_time() - begin, "numba" in sys.modules)
torch.testing.assert_close(out, x * torch.sigmoid(x) * x)
"""


def started(folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", CODE, str(folder)], stdout=subprocess.PIPE, text=True)


def run(folder: Path) -> torch.Tensor:
    return NumbaKernel(regions.swiglu("float32"), folder)(X, X)[0]


def binaries(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.bin"))


def test_two_processes_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = [started(tmp_path), started(tmp_path)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(binaries(tmp_path)) == 1 and not list(tmp_path.glob("*.tmp"))
    monkeypatch.delattr(native, "optimized")
    torch.testing.assert_close(run(tmp_path), SILU)  # what they left is whole


def test_numba_is_for_the_first_process_only(tmp_path: Path) -> None:
    words = [started(tmp_path).communicate()[0].split() for _ in range(2)]
    assert [compiled for _, compiled in words] == ["True", "False"]


@pytest.mark.slow
def test_seconds_of_the_first_kernel(tmp_path: Path) -> None:
    cold, warm = (float(started(tmp_path).communicate()[0].split()[0]) for _ in range(2))
    assert cold < 3.0 and warm < 0.2


@pytest.mark.parametrize("damage", ["cut", "altered", "empty"])
def test_a_damaged_entry_is_made_anew(damage: str, tmp_path: Path) -> None:
    run(tmp_path)
    (path,) = binaries(tmp_path)
    whole = path.read_bytes()
    broken = {
        "cut": whole[:-100],
        "altered": whole[:500] + bytes([whole[500] ^ 1]) + whole[501:],
        "empty": b"",
    }
    path.write_bytes(broken[damage])
    torch.testing.assert_close(run(tmp_path), SILU)
    repaired = path.read_bytes()
    assert kernel_cache.hashlib.sha256(repaired[32:]).digest() == repaired[:32] and len(repaired) > 2000


def test_a_kernel_that_is_there_is_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path)
    monkeypatch.delattr(native, "optimized")
    torch.testing.assert_close(run(tmp_path), SILU)


def test_the_text_of_a_kernel_is_kept_and_repaired(tmp_path: Path) -> None:
    text = "answer = 41 + 1\n"
    load(text, tmp_path)
    (path,) = tmp_path.glob("*.py")
    assert path.read_text() == text
    path.write_text("answer = 0\n")
    del sys.modules[f"graphopt.codegen.kernel_{path.stem}"]
    assert load(text, tmp_path).answer == 42 and path.read_text() == text


def test_the_folder_is_bounded(tmp_path: Path) -> None:
    for number in range(10):
        path = tmp_path / f"{number}.bin"
        path.write_bytes(bytes(100))
        os.utime(path, (number, number))
    trim(tmp_path, 1000)
    assert len(binaries(tmp_path)) == 10
    trim(tmp_path, 999)
    assert [path.stem for path in binaries(tmp_path)] == ["3", "4", "5", "6", "7", "8", "9"]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    torch.testing.assert_close(run(blocked / "kernels"), SILU)
    assert blocked.read_text() == ""


def test_other_primitives_make_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernel_cache.key_of("text")
    assert before != kernel_cache.key_of("other text")
    monkeypatch.setattr(kernel_cache, "toolchain", lambda: "another compiler")
    assert before != kernel_cache.key_of("text")


def test_without_a_folder() -> None:
    torch.testing.assert_close(numba_cpu.NumbaKernel(regions.swiglu("float32"), None)(X, X)[0], SILU)


ON_TWO_THREADS = """
import sys
from pathlib import Path
import torch
from graphopt.codegen import regions
from graphopt.codegen.numba_cpu import NumbaKernel
torch.set_num_threads(2)
x = torch.randn(1024, 512)
(found,) = NumbaKernel(regions.softmax("float32"), Path(sys.argv[1]))(x)
assert torch.allclose(found, x.softmax(-1), atol=1e-6)
"""


def test_a_second_process_runs_what_the_first_compiled_for_two_threads(tmp_path: Path) -> None:
    for _ in range(2):
        subprocess.run([sys.executable, "-c", ON_TWO_THREADS, str(tmp_path)], check=True, timeout=120)
