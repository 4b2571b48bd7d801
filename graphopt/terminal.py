"""Output in a terminal: styles and progress where someone is looking, plain text in a pipe."""

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from graphopt.errors import GraphoptError

_STYLES = {
    "static": "grey50",
    "kept": "blue",
    "recomputed": "magenta",
    "gradients": "green",
    "transients": "yellow",
}
_PIPED_WIDTH = 200  # columns of a table that nobody is looking at


def print_lines(lines: Iterable[Sequence[tuple[str, str]]]) -> None:
    """Lines of styled pieces, as `graphopt.report_text` makes them; without styles in a pipe."""
    console = _console()
    for pieces in lines:
        text = Text("", no_wrap=True, overflow="ignore", end="")
        for piece, style in pieces:
            text.append(piece, style or None)
        text.rstrip()
        console.print(text, soft_wrap=True, highlight=False)


def print_table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table with a row of column names."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = _console()
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    print("\n".join(line.rstrip() for line in capture.get().rstrip().splitlines()) + "\n")


def note(text: str) -> None:
    """Says `text` on the error stream, on one line."""
    print(f"graphopt: note: {' '.join(text.split())}", file=sys.stderr)


def write_text(path: str, text: str) -> None:
    """Writes a file, or prints where `path` is `-`; GraphoptError where that fails."""
    if path == "-":
        print(text)
        return
    try:
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise GraphoptError(f"cannot write {path}: {error.strerror}") from error


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file; GraphoptError where that fails."""
    try:
        Path(path).write_bytes(data)
    except OSError as error:
        raise GraphoptError(f"cannot write {path}: {error.strerror}") from error


def progress(text: str) -> AbstractContextManager[object]:
    """Says `text` on the error stream while the block runs, if that is a terminal."""
    console = Console(stderr=True)
    return console.status(text) if console.is_terminal else contextlib.nullcontext()


@contextlib.contextmanager
def bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on the error stream, if that is a terminal, to be called with done and total."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as shown:
        task = shown.add_task(text, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def _console() -> Console:
    width = None if sys.stdout.isatty() else _PIPED_WIDTH
    return Console(width=width, theme=Theme(_STYLES))
