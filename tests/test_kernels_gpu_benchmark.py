"""The benchmark of GPU kernels, as far as it goes without one: cases are right, and it says so."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.codegen import cuda_emulation
from graphopt.codegen.cuda_emulation import Emulator
from graphopt.codegen.cuda_launch import CudaKernel

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def benchmark() -> Any:
    spec = importlib.util.spec_from_file_location("kernels_gpu", FOLDER / "kernels_gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["kernels_gpu"] = module
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.mark.skipif(cuda_emulation.compiler() is None, reason="no C++ compiler")
def test_cases_compute_the_same(benchmark: Any) -> None:
    for make in benchmark.cases(torch.float32, 6, 64, "cpu").values():
        case = make()
        found = CudaKernel(case.region, Emulator())(*case.given)
        expected = case.formula(*case.inputs)
        for f, e in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=False):
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)
        assert benchmark.error(case, found) < 1e-5
        assert benchmark.error(case, tuple(y * 1.01 for y in found)) > 1e-3


def test_tables(benchmark: Any) -> None:
    peer = {"us": 10.0, "least_us": 9.0, "bytes_per_s": 2e12}
    row = {
        "kernel": "softmax",
        "dtype": "float32",
        "columns": 8,
        "bytes": 1,
        "errors": dict.fromkeys(benchmark.PEERS, 0.0),
    }
    row |= dict.fromkeys(benchmark.PEERS, peer) | {"eager": {**peer, "us": 25.0}}
    found = {"device": "a GPU", "copy_bytes_per_s": 4e12, "launch_us": {"eager": 3.0}, "graph": True}
    text = benchmark.shown({**found, "rows": [row]})
    assert "2000" in text and "50%" in text and "2.50" in text


def test_without_a_gpu(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels_gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        benchmark.main()
