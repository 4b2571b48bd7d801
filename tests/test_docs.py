"""The documentation holds: its examples run, its figures are measured, its links lead somewhere."""

import ast
import contextlib
import doctest
import importlib.util
import io
import itertools
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import graphopt
from graphopt import passes
from graphopt.cli import parser

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
WRITTEN = sorted(DOCS.rglob("*.md"))
PAGES = {str(p.relative_to(ROOT)): p.read_text(encoding="utf-8") for p in WRITTEN} | {
    name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md")
}
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"# needs\b")  # how a block begins that is only compiled
OUTPUT = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A fenced block: its language, text, line and place; and the output that a page shows for it."""

    language: str
    text: str
    line: int
    expected: "re.Match[str] | None"


def blocks(page: str) -> list[Block]:
    """The blocks of a page; a ```text right behind a ```python is what that prints."""
    found = list(FENCE.finditer(page))
    result = []
    for fence, after in itertools.zip_longest(found, found[1:]):
        near = bool(after and after.group(1) == "text" and not page[fence.end() : after.start()].strip())
        line = page.count("\n", 0, fence.start()) + 1
        result.append(Block(fence.group(1), fence.group(2), line, after if near else None))
    return result


def with_block(kind: str) -> list[str]:
    return [name for name, page in PAGES.items() if any(b.language == kind for b in blocks(page))]


# --- examples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", with_block("python"))
def test_examples(name: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: Any) -> None:
    """The blocks of a page run one after the other, and print what the page says."""
    if "import zoo" in PAGES[name]:
        pytest.importorskip("transformers")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(tmp_path)
    differ = []
    for block in blocks(PAGES[name]):
        if block.language != "python":
            continue
        code = compile("\n" * block.line + block.text, str(ROOT / name), "exec")
        if NOT_RUN.match(block.text):
            check_imports(block.text)
            continue
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, module.__dict__)
        if block.expected and not said(block.expected.group(2), printed.getvalue()):
            differ.append((block.expected, printed.getvalue()))
    if differ and request.config.getoption("--regenerate-golden"):
        rewrite(name, differ)
    else:
        assert not differ, f"{name}: {differ[0][0].group(2)}\n--- is now ---\n{differ[0][1]}"


def said(expected: str, printed: str) -> bool:
    return doctest.OutputChecker().check_output(expected, printed, OUTPUT)


def rewrite(name: str, differ: Sequence[tuple["re.Match[str]", str]]) -> None:
    """Write what is printed now into the page."""
    page = PAGES[name]
    for fence, printed in reversed(differ):
        text = "\n".join(line.rstrip() for line in printed.splitlines())
        page = f"{page[: fence.start(2)]}{text}\n{page[fence.end(2) :]}"
    (ROOT / name).write_text(page, encoding="utf-8")


def check_imports(code: str) -> None:
    """What a block that does not run here takes from graphopt is there."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "graphopt":
            ns: dict[str, Any] = {}
            exec(compile(ast.Module([node], []), "import", "exec"), ns)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert node.value.id != "graphopt" or hasattr(graphopt, node.attr), node.attr


@pytest.mark.parametrize("name", with_block("sh"))
def test_shell_examples(name: str) -> None:
    """Commands of graphopt are parsed as they would be; targets, scripts and modules are there."""
    for block in blocks(PAGES[name]):
        if block.language == "sh":
            for line in block.text.replace("\\\n", " ").splitlines():
                check_command(shlex.split(line, comments=True))


def check_command(words: list[str]) -> None:
    """One line of a shell example."""
    if not words:
        return
    if "graphopt" in words and (words[0] == "graphopt" or words[words.index("graphopt") - 1] == "-m"):
        options = parser().parse_args(words[words.index("graphopt") + 1 :])
        assert callable(options.run)
        return
    assert words[0] in ("make", "pip", "python", "sudo", "torchrun", ".venv/bin/python"), words
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words[1:])
    for word in words:
        assert not word.endswith(".py") or (ROOT / word).is_file(), word


# --- figures and messages ----------------------------------------------------------------------

UNIT = r"(?:%|times\b|ms\b|us\b|MB\b|MiB\b|GB\b)"
MEASURED = re.compile(rf"(?<![\w.-])(\d[\d,]*(?:\.\d+)?)(?=(?: to [\d.,]+)? ?{UNIT})")
RESULT_LINK = re.compile(r"\((?:\.\./)*benchmarks/results/(\w+)\.md\)")


def prose(page: str) -> Iterator[str]:
    """The paragraphs, bullets and rows of a page, without code."""
    for paragraph in re.split(r"\n\s*\n|\n(?=- )|\n(?=\|)", FENCE.sub("", page)):
        yield " ".join(re.sub(r"`[^`]*`", "", paragraph).split())


def numbers(text: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text)]


def unfounded(paragraph: str) -> list[str]:
    """The measured figures of a paragraph that none of the results it links to has, rounded or not."""
    files = [ROOT / f"benchmarks/results/{name}.md" for name in RESULT_LINK.findall(paragraph)]
    known = [n for file in files for n in numbers(file.read_text(encoding="utf-8"))]
    found = []
    for text in MEASURED.findall(paragraph):
        figure, digits = float(text.replace(",", "")), len(text.partition(".")[2])
        if not any(round(n, digits) == figure for n in known):
            found.append(text)
    return found


@pytest.mark.parametrize("name", PAGES)
def test_figures_are_measured(name: str) -> None:
    """A figure with a unit stands in a file of results that its paragraph links to."""
    for paragraph in prose(PAGES[name]):
        assert not unfounded(paragraph), paragraph


def test_unfounded_figures_are_found() -> None:
    link = "([table](benchmarks/results/step_time.md))"
    assert unfounded("It takes 0.79 times as long.") == ["0.79"]
    assert unfounded(f"It takes 0.79 times as long {link}.") == []
    assert unfounded(f"It takes 0.13 to 0.79 times as long {link}.") == ["0.13"]
    assert unfounded(f"It takes 0.13 times as long {link}.") == ["0.13"]


def templates() -> list[str]:
    """Every text of the sources, with `…` for what is put into it."""
    found = []
    for folder in ("graphopt", "passes", "cost_models", "codegen"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_are_those_of_the_sources() -> None:
    """The constant parts of each message occur, in order, in one text of the sources."""
    quoted = re.findall(r"^### `(.*)`$", PAGES["docs/errors.md"], re.MULTILINE)
    texts = [text for text in templates() if len(text) > 8]
    assert len(quoted) >= 20
    for message in quoted:
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip()]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert max(map(len, parts)) > 8 and any(pattern.search(text) for text in texts), message


# --- structure ---------------------------------------------------------------------------------


def page_of_pass(name: str) -> str:
    module = passes._LAZY[name].rpartition(".")[2]
    return f"docs/passes/{module}.md"


@pytest.mark.parametrize("name", passes.__all__)
def test_page_of_pass(name: str) -> None:
    """Every pass has a page of the same parts, and is in the table of passes and in the README's."""
    path = page_of_pass(name)
    heads = re.findall(r"^## (.*)$", FENCE.sub("", PAGES[path]), re.MULTILINE)
    wanted = ["Example", "How it decides", "When it helps, and when not", "Measured", "Options"]
    assert [head for head in heads if head in wanted] == wanted
    assert f"::: graphopt.{name}\n" in PAGES[path]
    assert f"({Path(path).name})" in PAGES["docs/passes/index.md"]
    assert f"({path})" in PAGES["README.md"]


def test_readme_is_a_front_page() -> None:
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 200
    assert all(len(line) <= 120 or line.startswith("|") for line in lines)


@pytest.mark.parametrize("name", PAGES)
def test_links_in_the_repository(name: str) -> None:
    """Links between files of the repository lead to files, as one reads them without the site."""
    for link in re.findall(r"\]\(([^)\s]+)[^)]*\)", FENCE.sub("", PAGES[name])):
        if not link.startswith(("http", "#")):
            assert ((ROOT / name).parent / link.partition("#")[0]).exists(), link


# --- the site ----------------------------------------------------------------------------------


@dataclass
class Page(HTMLParser):
    """What one page of the site has: ids, links, and what a browser loads for it."""

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if given.get("id"):
            self.ids.add(str(given["id"]))
        if tag == "a" and given.get("href") is not None:
            self.links.append(str(given["href"]))
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loaded.append(str(given["src"]))
        if tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.loaded.append(str(given["href"]))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """The pages of the site, built as `make docs` does, where warnings are errors."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {}
    for path in sorted(folder.rglob("*.html")):
        pages[path] = Page()
        pages[path].feed(path.read_text(encoding="utf-8"))
    return pages


def test_site_links(site: dict[Path, Page]) -> None:
    """Every link within the site leads to a file, and to an id in it."""
    for path, page in site.items():
        if path.name == "404.html":  # its links are from the root of a server
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {link}"
            if parts.fragment and target in site:
                ids = site[target].ids
                assert unquote(parts.fragment) in ids, f"{path.name}: {link}"


def test_site_loads_nothing_from_a_network(site: dict[Path, Page]) -> None:
    assert site
    for path, page in site.items():
        assert not [src for src in page.loaded if urlsplit(src).netloc], path.name


def test_public_names_are_described(site: dict[Path, Page]) -> None:
    ids = set[str]().union(*(page.ids for page in site.values()))
    names = {f"graphopt.{name}" for name in graphopt.__all__}
    assert names <= ids
    assert {f"graphopt.{name}" for name in passes.__all__} <= names


def test_commands_and_benchmarks_are_listed(site: dict[Path, Page]) -> None:
    pages = {
        path.name: "".join(page.text) for path, page in site.items() if path.parent.name != "results"
    }
    (actions,) = (a for a in parser()._actions if hasattr(a, "_choices_actions"))
    assert all(f"graphopt {name}" in pages["cli.html"] for name in actions.choices or ())
    assert "--memory BUDGET" in pages["cli.html"]
    for path in (ROOT / "benchmarks/results").glob("*.md"):
        assert path.stem in pages["measurements.html"]
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in pages["examples.html"]


def hooks_module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["hooks", "doctest_blocks"])
def test_examples_of_the_hooks(name: str) -> None:
    found = doctest.testmod(hooks_module(name))
    assert found.attempted and not found.failed


def test_notebooks_are_listed(tmp_path: Path) -> None:
    """By the title and the first paragraph of each; without any, the page says so."""
    hooks = hooks_module("hooks")
    hooks.ROOT = tmp_path
    assert hooks.notebooks() == "There are none yet."
    cells = [
        {"cell_type": "code", "source": ["1"]},
        {"cell_type": "markdown", "source": ["# Plans\n", "\n", "What they\n", "say.\n", "\n", "More."]},
    ]
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks/plans.ipynb").write_text(json.dumps({"cells": cells}), encoding="utf-8")
    assert hooks.notebooks() == "- `notebooks/plans.ipynb`: Plans. What they say."
