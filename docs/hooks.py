"""What the documentation takes from elsewhere in the repository when it is built (hooks of mkdocs).

- A paragraph that is only a link to a file of `benchmarks/results/` becomes that file's tables; the
  title of a link, as in `[..](stream_loss.md "## float32")`, is how the part begins that is wanted.
- `<!-- commands -->`, `<!-- benchmarks -->`, `<!-- examples -->` and `<!-- notebooks -->` become lists
  made from the parser of the command line, docstrings and files.
- README.md, CONTRIBUTING.md, CHANGELOG.md and all results become pages.
- Links to files of the repository become links to the pages made from them.
"""

import argparse
import ast
import html
import json
import posixpath
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
FOLDERS = ("passes", "cost_models", "codegen")

_FENCE = re.compile(r"^(?:```.*?^```|~~~.*?^~~~)$\n?", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]]*)\]\(([^)\s]+)([^)]*)\)")
_TABLES = re.compile(r"^\[([^\]]*)\]\((?:\.\./)*results/(\w+)\.md(?: \"([^\"]*)\")?\)$", re.MULTILINE)


def on_startup(**command: Any) -> None:
    """Copy the package to build/docs as it is built, where mkdocstrings reads it."""
    built = ROOT / "build" / "docs" / "graphopt"
    shutil.rmtree(built, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "graphopt", built, ignore=ignore)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, built / folder, ignore=ignore)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made from files elsewhere."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text("utf-8")))
    for path in sorted(RESULTS.glob("*.md")):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_text("utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **rest: Any) -> str:
    """The page with its links and generated parts."""
    site_path = page.file.src_uri
    markdown = outside_code(markdown, lambda text: site_links(text, site_path))
    markdown = outside_code(markdown, lambda text: with_tables(text, site_path))
    if site_path.startswith("results/"):
        return boxed(markdown, "results whole")
    for marker, make in GENERATED.items():
        if f"<!-- {marker} -->" in markdown:
            markdown = markdown.replace(f"<!-- {marker} -->", make())
    return markdown


def outside_code(markdown: str, change: Callable[[str], str]) -> str:
    """`markdown` with `change` made everywhere but in fenced code."""
    parts, end = [], 0
    for fence in _FENCE.finditer(markdown):
        parts += [change(markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, change(markdown[end:])])


def source_of(site_path: str) -> str:
    """The file of the repository that a page is made from.

    >>> source_of("index.md"), source_of("results/gap.md"), source_of("passes/fuse.md")
    ('README.md', 'benchmarks/results/gap.md', 'docs/passes/fuse.md')
    """
    for source, page in PAGES.items():
        if page == site_path:
            return source
    return f"benchmarks/{site_path}" if site_path.startswith("results/") else f"docs/{site_path}"


def page_of(path: str) -> str | None:
    """The page, with an anchor, that shows a file of the repository; None where there is none.

    >>> page_of("README.md"), page_of("benchmarks/results/gap.md"), page_of("examples/train_gpt2.py")
    ('index.md', 'results/gap.md', 'examples.md#train_gpt2py')
    """
    if path in PAGES:
        return PAGES[path]
    folder, name = posixpath.split(path)
    if folder == "benchmarks/results" and name.endswith(".md"):
        return f"results/{name}"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if folder in ("benchmarks", "examples") and name.endswith(".py"):
        page = {"benchmarks": "measurements.md", "examples": "examples.md"}[folder]
        return f"{page}#{name.replace('.', '')}"
    if "notebooks" in (path, folder):
        return "notebooks.md"
    return "measurements.md" if path == "benchmarks/results" else None


def site_links(text: str, site_path: str) -> str:
    """`text` with its links to files of the repository as links between pages.

    A link to a file that is on no page becomes its text.

    >>> site_links("[a](docs/memory.md#peaks) [b](benchmarks/results/gap.md) [c](LICENSE)", "index.md")
    '[a](memory.md#peaks) [b](results/gap.md) c'
    """
    folder = posixpath.dirname(source_of(site_path))

    def changed(found: re.Match[str]) -> str:
        shown, link, title = found.groups()
        link, _, anchor = link.partition("#")
        if not link or ":" in link:
            return found.group()
        path = posixpath.normpath(posixpath.join(folder, link)).rstrip("/")
        page = page_of(path)
        if page is None:
            return shown if (ROOT / path).exists() else found.group()
        target, _, own_anchor = page.partition("#")
        near = posixpath.relpath(target, posixpath.dirname(site_path) or ".")
        anchor = anchor or own_anchor
        return f"[{shown}]({near}{'#' if anchor else ''}{anchor}{title})"

    return _LINK.sub(changed, text)


def with_tables(text: str, site_path: str) -> str:
    """`text` with the tables in place of paragraphs that only name them."""
    to_root = "../" * site_path.count("/")

    def tables(found: re.Match[str]) -> str:
        caption, name, start = found.groups()
        content = (RESULTS / f"{name}.md").read_text("utf-8")
        script = script_of(name)
        machine = content.splitlines()[2]
        source = (
            f"{machine}; [all of it]({to_root}results/{name}.md), "
            f"made by [`benchmarks/{script}`]({to_root}{page_of(f'benchmarks/{script}')})"
        )
        line = f'<p class="results-source" markdown="span">{source}</p>'
        head = f"**{caption}**\n\n" if start and start.startswith("#") else ""
        return f"{head}{boxed(excerpt(content, start))}\n\n{line}"

    return _TABLES.sub(tables, text)


def excerpt(content: str, start: str | None) -> str:
    """A part of a file of results: all below the line on the machine, or what begins with `start`.

    A section goes to the next heading, any other text to the end of the table behind it. Headings become
    bold, so that they are none of the page.

    >>> excerpt("# T\\n\\ncpu\\n\\n## A\\n\\nx\\n\\n## B\\n\\ny", "## A")
    'x'
    >>> excerpt("# T\\n\\ncpu\\n\\nCaption.\\n\\n| a |\\n|---|\\n| 1 |\\n\\nMore.", "Caption")
    'Caption.\\n\\n| a |\\n|---|\\n| 1 |'
    """
    lines = content.splitlines()
    if not start:
        return "\n".join(re.sub(r"^#+ (.*)", r"**\1**", line) for line in lines[3:]).strip()
    first = next((i for i, line in enumerate(lines) if line.startswith(start)), None)
    if first is None:
        raise ValueError(f"no line begins with {start!r}")
    rest = lines[first:]
    if start.startswith("#"):
        end = next((i for i, line in enumerate(rest[1:], 1) if line.startswith("#")), len(rest))
        return "\n".join(rest[1:end]).strip()
    table = next(i for i, line in enumerate(rest) if line.startswith("|"))
    end = next((i for i, line in enumerate(rest[table:], table) if not line.strip()), len(rest))
    return "\n".join(rest[:end]).strip()


def boxed(markdown: str, style: str = "results") -> str:
    """`markdown` with each table in a box that scrolls."""
    table = re.compile(r"(?:^\|.*\n?)+", re.MULTILINE)
    box = f'<div class="{style}" markdown>\n\n{{}}\n\n</div>\n'
    return table.sub(lambda found: box.format(found.group().strip()), markdown)


def script_of(name: str) -> str:
    """The benchmark that makes the results `name`: the script of that name, or of its first words."""
    while not (ROOT / "benchmarks" / f"{name}.py").exists():
        name, separator, _ = name.rpartition("_")
        if not separator:
            raise ValueError("these results have no script")
    return f"{name}.py"


def benchmarks() -> str:
    """Each benchmark that is a script, with its docstring and its results."""
    parts = []
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        if f"python benchmarks/{path.name}" not in docstring:
            continue
        made = [p for p in sorted(RESULTS.glob("*.md")) if script_of(p.stem) == path.name]
        links = ", ".join(f"[{p.stem}](results/{p.name})" for p in made)
        results = f"\n\nResults: {links}." if links else ""
        parts.append(f"### {path.name} {{: #{path.name.replace('.', '')} }}\n\n{docstring}{results}")
    return "\n\n".join(parts)


def examples() -> str:
    """Each example script, whole."""
    paths = sorted((ROOT / "examples").glob("*.py"))
    heads = (f"## {path.name} {{: #{path.name.replace('.', '')} }}" for path in paths)
    codes = (f"```python\n{path.read_text('utf-8').rstrip()}\n```" for path in paths)
    return "\n\n".join(f"{head}\n\n{code}" for head, code in zip(heads, codes, strict=True))


def notebooks() -> str:
    """The notebooks, each with the title and the first paragraph that it begins with."""
    lines = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text("utf-8"))["cells"]
        texts = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        title, _, rest = next(texts, path.stem).strip().partition("\n")
        summary = " ".join(rest.strip().split("\n\n")[0].split())
        lines.append(f"- `notebooks/{path.name}`: {title.lstrip('# ')}. {summary}".rstrip())
    return "\n".join(lines) or "There are none yet."


def commands() -> str:
    """The command line, from its parser: usage and options of each command."""
    from graphopt.cli import parser as command_line

    return "\n\n".join(_command(parser, help_) for parser, help_ in _leaves(command_line(), ""))


def _leaves(parser: argparse.ArgumentParser, help_: str) -> Iterator[tuple[argparse.ArgumentParser, str]]:
    """The parsers of all commands without subcommands, each with what is said of it."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        yield parser, parser.description or help_
    for action in nested:
        said = {choice.dest: choice.help or "" for choice in action._choices_actions}
        for name, inner in action.choices.items():
            yield from _leaves(inner, said.get(name, ""))


def _command(parser: argparse.ArgumentParser, help_: str) -> str:
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=98)
    usage = re.sub(r"^(usage: | {7})", "", parser.format_usage().rstrip(), flags=re.MULTILINE)
    rows = [_option(action) for action in parser._actions if action.help != argparse.SUPPRESS]
    table = "\n".join(["| option | meaning |", "|---|---|", *rows])
    return f"### {parser.prog}\n\n{_sentence(help_)}\n\n```text\n{usage}\n```\n\n{table}"


def _option(action: argparse.Action) -> str:
    value = action.metavar or (f"{{{','.join(map(str, action.choices))}}}" if action.choices else "")
    own_name = action.dest.upper() if action.option_strings else action.dest
    value = " ".join(value) if isinstance(value, tuple) else value or own_name
    name = ", ".join(action.option_strings) or value
    shown = f"{name} {value}" if action.option_strings and action.nargs != 0 else name
    meaning = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    if action.default not in (None, False, argparse.SUPPRESS, []) and "default" not in meaning:
        meaning += f" (default {action.default})"
    return f"| <code>{_cell(shown)}</code> | {_cell(meaning)} |"


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;").strip()


def _sentence(text: str) -> str:
    text = _cell(text)
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


GENERATED: dict[str, Callable[[], str]] = {
    "benchmarks": benchmarks,
    "commands": commands,
    "examples": examples,
    "notebooks": notebooks,
}
