"""Fresh memory in large pages: fewer faults, and nothing done where there is nothing to do."""

import resource
import sys
from pathlib import Path

import pytest
import torch

from graphopt.codegen import huge_pages
from graphopt.codegen.huge_pages import LEAST_BYTES, PAGE_BYTES, advise, advised, resident
from graphopt.codegen.numba_cpu import compile_region
from graphopt.codegen.regions import swiglu

NBYTES = 1 << 26  # above 32 MB, glibc maps every block anew
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
linux = pytest.mark.skipif(sys.platform != "linux", reason="says what Linux does")
large = pytest.mark.skipif(
    not _SETTING.exists() or "[never]" in _SETTING.read_text(), reason="large pages are switched off"
)


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


@linux
def test_memory_is_resident_once_written() -> None:
    fresh = torch.empty(NBYTES, dtype=torch.uint8)
    assert not resident(fresh.data_ptr(), NBYTES)
    fresh.zero_()
    assert resident(fresh.data_ptr(), NBYTES)


@linux
@large
def test_advised_memory_costs_few_faults() -> None:
    before = _faults()
    advised(torch.empty(NBYTES, dtype=torch.uint8)).zero_()
    assert _faults() - before < 2048  # 16384 pages of 4 KiB


@linux
@large
def test_outputs_of_kernels_are_advised() -> None:
    x = torch.ones(2048, NBYTES // 2048 // 4)
    kernel = compile_region(swiglu("float32"), None)
    kernel(x, x)
    before = _faults()
    (out,) = kernel(x, x)
    assert _faults() - before < 2048
    torch.testing.assert_close(out, torch.nn.functional.silu(x) * x)


@linux
def test_memory_that_is_there_is_left_alone() -> None:
    there = torch.zeros(NBYTES, dtype=torch.uint8)
    assert not advise(there.data_ptr(), NBYTES)


@pytest.mark.parametrize("nbytes", [0, 1, LEAST_BYTES - 1])
def test_small_blocks_are_left_alone(nbytes: int) -> None:
    assert not advise(PAGE_BYTES, nbytes)


def test_without_the_system_calls_nothing_is_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_library", lambda: None)
    x = torch.empty(NBYTES, dtype=torch.uint8)
    assert not advise(x.data_ptr(), NBYTES)
    assert not resident(x.data_ptr(), NBYTES)
    assert advised(x) is x
