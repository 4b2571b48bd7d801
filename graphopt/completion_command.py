"""`graphopt completion`: a script that completes commands, options and their values in a shell."""

import argparse
import shlex
from collections.abc import Iterable
from dataclasses import dataclass

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Argument:
    """An option with its `flags`, or a positional argument without; what may follow, and its help.

    `words` are known values, `is_file` says that names of files are values, too.
    """

    flags: tuple[str, ...]
    takes_value: bool
    words: tuple[str, ...]
    is_file: bool
    help: str


@dataclass(frozen=True)
class Command:
    """A subcommand, with its arguments."""

    name: str
    help: str
    arguments: tuple[Argument, ...]

    @property
    def options(self) -> list[Argument]:
        """The arguments with flags."""
        return [a for a in self.arguments if a.flags]

    @property
    def flags(self) -> list[str]:
        """All flags."""
        return [flag for a in self.options for flag in a.flags]

    @property
    def positional(self) -> Argument:
        """What stands without a flag: all positional arguments as one."""
        rest = [a for a in self.arguments if not a.flags]
        words = tuple(dict.fromkeys(word for a in rest for word in a.words))
        return Argument((), True, words, any(a.is_file for a in rest), "argument")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt completion`."""
    help_ = 'for which shell; in bash: eval "$(graphopt completion bash)"'
    command.add_argument("shell", choices=SHELLS, help=help_)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry the command out."""
    from graphopt.cli import parser

    print(completion(parser(), options.shell))


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """The script for one of `SHELLS`, from the commands of `parser` as they are."""
    write = {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell]
    return write(parser.prog, commands_of(parser))


def commands_of(parser: argparse.ArgumentParser) -> list[Command]:
    """The subcommands of `parser`; a short text helps with each."""
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    helps = {choice.dest: choice.help or "" for choice in subparsers._choices_actions}
    known = _known_values()
    return [
        Command(name, helps.get(name, ""), tuple(_argument(a, name, known) for a in command._actions))
        for name, command in subparsers.choices.items()
    ]


def _known_values() -> dict[str, tuple[str, ...]]:
    """Values that the parser does not list, by the name of the argument."""
    from graphopt import zoo
    from graphopt.cost_models.devices import KNOWN_DEVICES
    from graphopt.kernels_command import kernels
    from graphopt.pass_syntax import program_passes

    return {
        "model": zoo.names(),
        "device": ("cpu", *KNOWN_DEVICES),
        "pass_": tuple(kind.name for kind in program_passes().values()),
        "kernels name": tuple(kernels()),
    }


def _argument(action: argparse.Action, command: str, known: dict[str, tuple[str, ...]]) -> Argument:
    words = known.get(f"{command} {action.dest}", known.get(action.dest, ()))
    if action.choices is not None:
        words = tuple(map(str, action.choices))
    is_file = action.metavar in ("FILE", "FOLDER", "MODEL", "A", "B")
    help_ = " ".join((action.help or "").replace("%%", "%").split())
    return Argument(tuple(action.option_strings), action.nargs != 0, words, is_file, help_)


def _bash(program: str, commands: list[Command]) -> str:
    def give(words: Iterable[str], is_file: bool) -> str:
        found = f'compgen -W {shlex.quote(" ".join(words))} -- "$cur"'
        return (
            f"COMPREPLY=($({found}{'; compgen -f -- ' + chr(34) + '$cur' + chr(34) if is_file else ''}))"
        )

    lines = [f"_{program}() {{", "    local cur=\"${COMP_WORDS[COMP_CWORD]}\" IFS=$' \\t\\n'"]
    lines += ["    COMPREPLY=()", '    if [ "$COMP_CWORD" -eq 1 ]; then']
    names = [*(c.name for c in commands), "--help", "--version"]
    lines += [f"        {give(names, False)}", "        return", "    fi"]
    lines.append('    case "${COMP_WORDS[1]} ${COMP_WORDS[COMP_CWORD-1]}" in')
    for command in commands:
        for option in command.options:
            if option.takes_value:
                pattern = "|".join(shlex.quote(f"{command.name} {flag}") for flag in option.flags)
                lines.append(f"        {pattern}) {give(option.words, option.is_file)}; return ;;")
    lines += ["    esac", '    case "${COMP_WORDS[1]} $cur" in']
    for command in commands:
        lines.append(f"        '{command.name} -'*) {give(command.flags, False)} ;;")
        rest = command.positional
        lines.append(f"        '{command.name} '*) {give(rest.words, rest.is_file)} ;;")
    return "\n".join([*lines, "    esac", "}", f"complete -F _{program} {program}"])


def _zsh(program: str, commands: list[Command]) -> str:
    def quoted(text: str) -> str:
        return text.replace("'", "'\\''")

    def plain(text: str) -> str:
        return quoted("".join(c for c in text if c not in "[]:\\`$"))

    def values(argument: Argument) -> str:
        words = (
            f"({' '.join(argument.words)})" if argument.words else "_files" if argument.is_file else " "
        )
        if argument.words and argument.is_file:
            words = f"{{compadd -- {' '.join(argument.words)}; _files}}"
        return words

    lines = [f"#compdef {program}", f"_{program}() {{", "    local -a commands", "    commands=("]
    lines += [f"        '{c.name}:{plain(c.help)}'" for c in commands]
    lines += ["    )", "    if (( CURRENT == 2 )); then", "        _describe command commands"]
    lines += ["        return", "    fi", "    local command=$words[2]", "    shift words"]
    lines += ["    (( CURRENT-- ))", "    case $command in"]
    for command in commands:
        specs = []
        for option in command.options:
            value = f":value:{values(option)}" if option.takes_value else ""
            specs += [f"'{flag}[{plain(option.help)}]{value}'" for flag in option.flags]
        if any(not a.flags for a in command.arguments):
            specs.append(f"'*:argument:{values(command.positional)}'")
        lines.append(f"        {command.name}) _arguments {' '.join(specs)} ;;")
    return "\n".join([*lines, "    esac", "}", f"compdef _{program} {program}"])


def _fish(program: str, commands: list[Command]) -> str:
    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    names = " ".join(c.name for c in commands)
    first = f"complete -c {program} -n 'not __fish_seen_subcommand_from {names}' -f"
    lines = [f"{first} -a {c.name} -d {quoted(c.help)}" for c in commands]
    for command in commands:
        here = f"complete -c {program} -n '__fish_seen_subcommand_from {command.name}'"
        for option in command.options:
            flags = (f"-l {f[2:]}" if f.startswith("--") else f"-s {f[1:]}" for f in option.flags)
            words = f" -a {quoted(' '.join(option.words))}" if option.words else ""
            value = f" {'-r' if option.is_file else '-x'}{words}" if option.takes_value else ""
            lines.append(f"{here} {' '.join(flags)}{value} -d {quoted(option.help)}")
        rest = command.positional
        if rest.words:
            kind = "" if rest.is_file else " -f"
            lines.append(f"{here}{kind} -a {quoted(' '.join(rest.words))}")
    return "\n".join(lines)
