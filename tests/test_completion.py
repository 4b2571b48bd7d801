"""Completion: the script for bash completes what the parser knows; those for zsh and fish parse."""

import argparse
import shutil
import subprocess
from pathlib import Path

import pytest

from graphopt import zoo
from graphopt.cli import main, parser
from graphopt.completion_command import SHELLS, commands_of, completion
from graphopt.cost_models.devices import KNOWN_DEVICES


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("completion") / "graphopt.bash"
    file.write_text(completion(parser(), "bash"))
    return str(file)


def completed(script: str, *words: str, folder: Path | None = None) -> list[str]:
    """What bash offers for the last of `words`, which come after the name of the program."""
    code = (
        f'source "{script}"; complete -p graphopt >/dev/null || exit 3; '
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _graphopt; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code, "bash", "graphopt", *words],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=20,
    )
    assert done.returncode == 0 and done.stderr == ""
    return done.stdout.split()


def test_commands_options_and_values(script: str, tmp_path: Path) -> None:
    (tmp_path / "net.py").touch()
    names = {command.name for command in commands_of(parser())}
    assert set(completed(script, "")) == names | {"--help", "--version"}
    assert completed(script, "opt") == ["optimize"]
    assert completed(script, "report", "--mem") == ["--memory", "--memory-snapshot"]
    assert completed(script, "report", "gp", folder=tmp_path) == ["gpt2"]
    assert completed(script, "report", "ne", folder=tmp_path) == ["net.py"]
    assert set(zoo.names()) <= set(completed(script, "verify", "", folder=tmp_path))
    assert completed(script, "plan", "gpt2", "--size", "") == ["small", "default"]
    assert completed(script, "fit", "--optimizer", "a") == ["adam"]
    assert set(completed(script, "show", "gpt2", "--device", "")) == {"cpu", *KNOWN_DEVICES}
    assert completed(script, "show", "gpt2", "--pass", "stream-l") == ["stream-loss"]
    assert completed(script, "kernels", "soft") == ["softmax"]
    assert completed(script, "optimize", "gpt2", "--plan", "n", folder=tmp_path) == ["net.py"]
    assert completed(script, "report", "gpt2", "--batch", "") == []
    assert completed(script, "completion", "") == list(SHELLS)
    assert completed(script, "diff", "n", folder=tmp_path) == ["net.py"]


def test_every_option_of_every_command_is_offered(script: str) -> None:
    """All at once, in one shell."""
    (subparsers,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    assert subparsers.choices
    for name, command in subparsers.choices.items():
        flags = {flag for action in command._actions for flag in action.option_strings}
        assert set(completed(script, name, "-")) == flags


@pytest.mark.parametrize("shell", SHELLS)
def test_the_command_prints_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert out.rstrip("\n") == completion(parser(), shell)
    for command in commands_of(parser()):
        assert command.name in out
        assert all(flag.lstrip("-") in out for flag in command.flags)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_parses(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    file = tmp_path / "script"
    file.write_text(completion(parser(), shell))
    done = subprocess.run([shell, "-n", str(file)], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0 and done.stderr == ""
