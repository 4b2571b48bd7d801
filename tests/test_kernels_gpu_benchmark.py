"""The benchmark of GPU kernels, as far as it goes without one: cases are right, and it says so."""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from graphopt.codegen import backends, cuda_emulation
from graphopt.codegen.cuda_emulation import Emulator
from graphopt.codegen.cuda_launch import CudaKernel

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def loaded(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(FOLDER))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return loaded("kernels_gpu")


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


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is off")
def test_the_kernels_in_triton_compute_the_same(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, where Triton is installed: TRITON_INTERPRET=1 before it is first imported."""
    triton_kernels = loaded("kernels_triton")
    monkeypatch.setattr(triton_kernels, "LOSS_BLOCK", 32)
    for make in benchmark.cases(torch.float32, 6, 72, "cpu").values():
        case = make()
        found = getattr(triton_kernels, case.twin)(*case.inputs, *case.more)
        expected = case.formula(*case.inputs)
        pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (found, expected)), strict=False)
        for f, e in pairs:
            torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)


def test_tables(benchmark: Any) -> None:
    peer = {"us": 10.0, "least_us": 9.0, "bytes_per_s": 2e12}
    peers = ("eager", "compiled", "graphopt")  # without Triton
    row: dict[str, Any] = {"kernel": "softmax", "dtype": "float32", "columns": 8, "bytes": 1}
    row |= {"errors": dict.fromkeys(peers, 0.0)} | dict.fromkeys(peers, peer)
    row |= {"eager": {**peer, "us": 25.0}}
    cost = {"SwiGLU, out=": 3.0, "SwiGLU, fused call": 6.5, "one addition": 9.0}
    found = {"device": "a GPU", "copy_bytes_per_s": 4e12, "launch_us": cost, "graph": True}
    text = benchmark.shown({**found, "rows": [row]})
    assert "2000" in text and "50%" in text and "2.50" in text
    assert [line[1:] for line in benchmark.bars({**found, "rows": [row, row]})] == [
        ["50.0%", ">= 85%", "NO"],
        ["2.50", "> 1", "yes"],
        ["1.00", "> 1", "NO"],
        ["not measured", "> 1", "unknown"],
        ["6.5", "< 6", "NO"],
    ]


def test_host_cost() -> None:
    """Nothing is launched, and every call has its cost."""
    module = loaded("kernel_launches")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends.MAKERS, "cpu", None)
        found = module.host_cost(calls=20, rounds=1)
    assert len(found) == 8 and all(0 < cost < 5000 for cost in found.values())
    assert "SwiGLU, fused call" in module.shown(found)


def test_without_a_gpu(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["kernels_gpu.py"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        benchmark.main()
