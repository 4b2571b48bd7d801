"""The layout holds: floors, budgets of size, one import package, a fast import."""

import ast
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest

import graphopt

ROOT = Path(__file__).resolve().parent.parent
FOLDER_FLOORS = {"codegen": 1, "cost_models": 1, "passes": 2}
# Every module of graphopt/ has its floor here, except __init__, which only names what is public.
MODULE_FLOORS = {
    **dict.fromkeys(
        ["accumulation", "capture", "compiled", "errors", "ops", "plan", "program", "ranks", "split"], 0
    ),
    "tangents": 0,
    "measurement": 0,
    "sharded_parameters": 0,
    "__version__": 0,  # a text of graphopt/__init__
    **dict.fromkeys(
        ["absent_logits", "custom_ops", "packed_ops", "stream_ops", "stream_plans", "streamed"], 0
    ),
    **dict.fromkeys(["split_tensors", "vocab_exchange"], 0),
    **dict.fromkeys(["vocab_dtensor", "vocab_loss", "vocab_parallel", "vocab_shard"], 0),
    "html_table": 0,
    **dict.fromkeys(["cleanup", "compact_slices", "constant_masks", "origin", "tracing", "verify"], 0),
    **dict.fromkeys(["__main__", "api", "cli", "eager_modules", "inductor", "models"], 4),
    "inductor_memory": 4,
    "short_calls": 1,
    "separate_gradients": 0,
    "fused_ops": 1,
    **dict.fromkeys(["kernel_ops", "kernels"], 1),
    "arena_facts": 0,
    **dict.fromkeys(["allocations", "arena_blocks", "lower", "lower_arena", "out_forms"], 1),
    **dict.fromkeys(["report", "runtime", "terminal", "zoo"], 4),
    **dict.fromkeys(["analysis", "chart", "comparison", "graph_report", "listings"], 4),
    **dict.fromkeys(["module_report", "numerics", "report_tables", "report_text", "timeline"], 4),
    **dict.fromkeys(["cache_rows", "draft_length", "speculative", "speculative_rounds"], 4),
    **dict.fromkeys(["calibrate_command", "kernels_command", "model_options", "report_command"], 4),
    **dict.fromkeys(["skip_command", "skip_report"], 4),
    **dict.fromkeys(["completion_command", "diff_command", "optimize_command", "plan_command"], 4),
    **dict.fromkeys(["show_command", "verify_command"], 4),
    **dict.fromkeys(["bisection", "deviation", "differences", "fingerprint", "pass_syntax"], 4),
    **dict.fromkeys(["plan_file", "program_text", "verification"], 4),
    **dict.fromkeys(["deepened", "mesh", "mesh_command", "mesh_facts", "mesh_report", "traces"], 4),
    **dict.fromkeys(["html_figures", "html_modules", "html_page", "html_roofline", "html_tables"], 4),
    **dict.fromkeys(["html_memory", "html_words"], 4),
    **dict.fromkeys(["batch_plan", "fit_answer", "fit_command", "fitting", "sized_model", "width"], 4),
    **dict.fromkeys(["distributed", "pipeline_transfers", "pipelining"], 4),
    **dict.fromkeys(
        ["lane", "pipeline_vocabulary", "stage_modules", "vocab_sweeps", "vocabulary_passes"], 4
    ),
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

FILES = sorted(p for folder in ["graphopt", *FOLDER_FLOORS] for p in (ROOT / folder).rglob("*.py"))
PATHS = [str(path.relative_to(ROOT)) for path in FILES]


def floor_of_file(path: str) -> int | None:
    folder, name = path.split("/", 1)
    return FOLDER_FLOORS.get(folder, MODULE_FLOORS.get(name.removesuffix(".py")))


def floor_of_name(name: str) -> int | None:
    """The floor of a dotted name below `graphopt`; through `graphopt` itself one can reach all."""
    name = name.removeprefix("graphopt").removeprefix(".")
    if not name:
        return 4
    first = name.split(".")[0]
    if first in graphopt._LAZY:
        return floor_of_name(graphopt._LAZY[first])
    return FOLDER_FLOORS.get(first, MODULE_FLOORS.get(first))


def imported_names(tree: ast.Module) -> Iterator[str]:
    """What a file imports, inside functions too, as dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            if module == "graphopt":
                yield from (f"graphopt.{alias.name}" for alias in node.names)
            else:
                yield module


def floor_faults(path: str, source: str) -> list[str]:
    """What is wrong with the imports of the file at `path`, one line each."""
    own = floor_of_file(path)
    if own is None:
        return [f"{path} has no floor: give it one in MODULE_FLOORS"]
    faults = []
    for name in imported_names(ast.parse(source)):
        if name.startswith("."):
            faults.append(f"{path} imports {name}: imports are absolute")
        elif name.split(".")[0] in FOLDER_FLOORS:
            faults.append(f"{path} imports {name}: write graphopt.{name}")
        elif name.split(".")[0] == "graphopt":
            floor = floor_of_name(name)
            if floor is None or floor > own:
                faults.append(f"{path} (floor {own}) imports {name} (floor {floor})")
    return faults


@pytest.mark.parametrize("path", [p for p in PATHS if p != "graphopt/__init__.py"])
def test_imports_point_down(path: str) -> None:
    assert not floor_faults(path, (ROOT / path).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("passes/x.py", "from graphopt.cost_models.devices import GB", None),
        ("passes/x.py", "from graphopt import GB", None),
        ("passes/x.py", "def f():\n    from graphopt.api import optimize", "graphopt.api"),
        ("passes/x.py", "from graphopt import optimize", "graphopt.optimize"),
        ("passes/x.py", "import graphopt", "floor 4"),
        ("passes/x.py", "from graphopt.unknown import f", "floor None"),
        ("passes/x.py", "from . import solver", "absolute"),
        ("passes/x.py", "from cost_models import devices", "write graphopt.cost_models"),
        ("graphopt/unknown.py", "", "no floor"),
    ],
)
def test_floor_faults_are_found(path: str, source: str, fault: str | None) -> None:
    faults = floor_faults(path, source)
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


@pytest.mark.parametrize("path", PATHS)
def test_budgets_of_size(path: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    assert len(source.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize("folder", FOLDER_FLOORS)
def test_folder_is_no_package_of_its_own(folder: str) -> None:
    spec = importlib.util.spec_from_file_location(folder, ROOT / folder / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.raises(ImportError, match=rf"graphopt\.{folder}"):
        spec.loader.exec_module(module)


def test_public_names() -> None:
    assert {*graphopt.__all__} == {*graphopt._LAZY, "__version__"}
    assert {*graphopt.__all__} <= {*dir(graphopt)}
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = graphopt.missing


@pytest.mark.parametrize("name", graphopt.__all__)
def test_public_name_resolves(name: str) -> None:
    value = getattr(graphopt, name)
    assert getattr(value, "__module__", graphopt._LAZY.get(name)) == graphopt._LAZY.get(name)


def run_python(code: str, cwd: Path) -> str:
    """What `code` prints in a fresh interpreter, whose sys.path begins with `cwd`."""
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


IMPORT_ALL = """
import graphopt.codegen, graphopt.cost_models, graphopt.errors, graphopt.passes
print(graphopt.__file__, graphopt.passes.__file__, sep="\\n")
"""


@pytest.mark.parametrize("inside", [True, False], ids=["in the checkout", "elsewhere"])
def test_checkout_imports(inside: bool, tmp_path: Path) -> None:
    found = run_python(IMPORT_ALL, ROOT if inside else tmp_path).splitlines()
    assert [Path(file).parent for file in found] == [ROOT / "graphopt", ROOT / "passes"]


def test_wheel_has_one_top_level_name(tmp_path: Path) -> None:
    source, wheels, site = tmp_path / "source", tmp_path / "wheels", tmp_path / "site"
    for folder in ["graphopt", *FOLDER_FLOORS]:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignore)
    for file in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / file, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", wheels, source], check=True)

    (wheel,) = wheels.glob("*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(site)
    assert sorted(path.name for path in site.iterdir()) == [
        "graphopt",
        f"graphopt-{graphopt.__version__}.dist-info",
    ]
    files = {str(path.relative_to(site / "graphopt")) for path in site.glob("graphopt/**/*.py")}
    assert files == {path.removeprefix("graphopt/") for path in PATHS}
    for name in ("kernel.cuh", "emulation.h"):  # what CUDA kernels are made with
        packaged = site / "graphopt" / "codegen" / name
        assert packaged.read_bytes() == (ROOT / "codegen" / name).read_bytes()
    for name in ("report.css", "report.js"):
        packaged = site / "graphopt" / name
        assert packaged.read_bytes() == (ROOT / "graphopt" / name).read_bytes()
    found = run_python(IMPORT_ALL, site).splitlines()
    assert [Path(file).parent for file in found] == [site / "graphopt", site / "graphopt/passes"]


def test_import_is_fast(tmp_path: Path) -> None:
    code = (
        "import sys, time; begin = time.perf_counter(); import graphopt; "
        "print(time.perf_counter() - begin, 'torch' in sys.modules)"
    )
    seconds, loads_torch = run_python(code, tmp_path).split()
    assert float(seconds) < 1.0
    assert loads_torch == "False"
