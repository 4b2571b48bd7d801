"""Published measurements of overlap come out of the cost model and the scheduler."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def published() -> ModuleType:
    path = ROOT / "benchmarks" / "published_overlap.py"
    spec = importlib.util.spec_from_file_location("published_overlap", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tokenweave_prefill(published: ModuleType) -> None:
    rows = published.tokenweave()
    assert len(rows) == 14 and {r["model"].split("-")[0] for r in rows} == {"Llama", "Qwen2.5"}
    assert max(abs(error) for row in rows for error in row["errors"]) <= published.BAR_TOKENWEAVE
    for row in rows:  # the gain, in which the errors of both add up
        (base, base_predicted), (overlapped, predicted) = row["base_ms"], row["overlapped_ms"]
        assert base_predicted / predicted == pytest.approx(base / overlapped, rel=0.09)


def test_ladder_70b(published: ModuleType) -> None:
    rows = published.ladder_70b()
    assert len(rows) == 20
    assert sum(abs(row["error"]) for row in rows) / 20 <= published.BAR_LADDER
    assert max(abs(row["error"]) for row in rows) <= 0.14


def test_the_contention_is_what_fits_best(published: ModuleType) -> None:
    def mean(contention: float) -> float:
        return sum(abs(row["error"]) for row in published.ladder_70b(contention)) / 20

    fitted = published.read("ladder_70b")["contention"]
    assert all(mean(fitted) <= mean(fitted + step) + 1e-3 for step in (-0.1, 0.1))
    assert mean(0.0) > 0.08  # without contention the table does not come out
