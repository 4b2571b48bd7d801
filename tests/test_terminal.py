"""Progress is shown where somebody is looking, and nothing where output is piped."""

import os
import pty
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = """
from graphopt.terminal import bar, progress
with bar("counting") as advance:
    for done in range(3):
        advance(done + 1, 3)
with progress("thinking"):
    pass
print("answer")
"""


def environment() -> dict[str, str]:
    plain = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    return {**plain, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"}


def test_a_bar_in_a_terminal() -> None:
    """The error stream is a pseudo-terminal, the standard output is not."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", CODE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=environment()) as process:
        os.close(theirs)
        seen = bytearray()
        try:
            while data := os.read(ours, 4096):
                seen += data
        except OSError:  # the other side has been closed
            pass
        assert process.stdout is not None
        output = process.stdout.read()
    os.close(ours)
    assert process.returncode == 0 and output == b"answer\n"
    text = seen.decode()
    assert "counting" in text and "3/3" in text and "thinking" in text and "\x1b[" in text


def test_nothing_in_a_pipe() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, env=environment())
    assert (run.returncode, run.stdout, run.stderr) == (0, b"answer\n", b"")
