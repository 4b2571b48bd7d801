"""The examples in the docstrings of every module run and give what they show."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"graphopt": "graphopt", **{f: f"graphopt.{f}" for f in ("cost_models", "passes", "codegen")}}
NAMES = sorted(
    f"{package}.{path.stem}"
    for folder, package in FOLDERS.items()
    for path in (ROOT / folder).glob("*.py")
    if not path.stem.startswith("__")
)


@pytest.mark.parametrize("name", NAMES)
def test_examples(name: str) -> None:
    if name == "graphopt.zoo":
        pytest.importorskip("transformers")
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


def test_the_main_calls_have_examples() -> None:
    finder = doctest.DocTestFinder(recurse=True)
    for name, functions in {
        "graphopt.api": ["optimize"],
        "graphopt.tracing": ["trace"],
        "graphopt.measurement": ["measure"],
        "graphopt.passes.budget": ["resolve_budget"],
    }.items():
        tests = finder.find(importlib.import_module(name), name)
        with_examples = {t.name.rpartition(".")[2] for t in tests if t.examples}
        assert set(functions) <= with_examples
