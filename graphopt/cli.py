"""The `graphopt` command: analyse a model, remove layers, measure links, list what there is."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from graphopt import (
    __version__,
    calibrate_command,
    completion_command,
    diff_command,
    fit_command,
    kernels_command,
    optimize_command,
    plan_command,
    report_command,
    show_command,
    skip_command,
    verify_command,
)
from graphopt.errors import GraphoptError

EXIT_CODES = """\
exit codes:
  0  it did what was asked
  1  it could not, or verify found a difference; one line on the error stream says why
  2  wrong usage
  3  graphopt diff --exit-code: the files differ
"""
_Formatter = argparse.RawDescriptionHelpFormatter


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return one of `EXIT_CODES`."""
    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:  # after --help, --version, or a message about the usage
        return int(stop.code or 0)
    try:
        code = options.run(options)
        sys.stdout.flush()
    except GraphoptError as error:
        print(f"graphopt: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return int(code or 0)


def parser() -> argparse.ArgumentParser:
    """The commands, and what each of them takes."""
    found = argparse.ArgumentParser(
        prog="graphopt", description=__doc__, epilog=EXIT_CODES, formatter_class=_Formatter
    )
    found.add_argument("--version", action="version", version=f"graphopt {__version__}")
    commands = found.add_subparsers(required=True, metavar="COMMAND")
    report_command.add_arguments(
        commands.add_parser("report", help="predict memory and time of a model's step")
    )
    plan_command.add_arguments(commands.add_parser("plan", help="write what passes decide to a file"))
    optimize_command.add_arguments(
        commands.add_parser("optimize", help="run a plain and an optimised step, side by side")
    )
    show_command.add_arguments(
        commands.add_parser("show", help="a model's graph before and after a pass")
    )
    verify_command.add_arguments(
        commands.add_parser("verify", help="compare an optimised step with eager and float64")
    )
    diff_command.add_arguments(commands.add_parser("diff", help="in what two plans or reports differ"))
    fit_command.add_arguments(commands.add_parser("fit", help="the largest batch or sequence that fits"))
    skip_command.add_arguments(commands.add_parser("skip", help="remove layers of a model"))
    kernels_command.add_arguments(commands.add_parser("kernels", help="show a generated kernel"))
    completion_command.add_arguments(commands.add_parser("completion", help="a script for a shell"))
    measure_links = commands.add_parser("calibrate", help="measure collectives, under torchrun")
    calibrate_command.add_arguments(measure_links)
    listings: dict[str, tuple[Callable[[argparse.Namespace], None], str]] = {
        "passes": (_passes, "list the passes and their options"),
        "devices": (_devices, "list the known devices"),
        "zoo": (_zoo, "list the models that need no file"),
    }
    for name, (run, help_) in listings.items():
        command = commands.add_parser(name, help=help_)
        command.add_argument("--json", action="store_true", help="print JSON")
        command.set_defaults(run=run)
    return found


def _passes(options: argparse.Namespace) -> None:
    from graphopt.listings import passes

    found = passes()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    from graphopt.terminal import print_table

    for entry in found:
        rows = [(o["name"], o["type"], o["default"]) for o in entry["options"]]
        print_table(f"{entry['name']}: {entry['summary']}", ("option", "type", "default"), rows)


def _devices(options: argparse.Namespace) -> None:
    from graphopt.listings import devices

    found = devices()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    from graphopt.terminal import print_table

    dtypes = sorted({dtype for d in found for dtype in d["flops_per_s"]})
    rows = []
    for d in found:
        rates = (d["flops_per_s"].get(dtype) for dtype in dtypes)
        tera = ("" if rate is None else f"{rate / 1e12:.4g}" for rate in rates)
        sizes = (d["memory_bytes"] / 1e9, d["bytes_per_s"] / 1e9)
        rows.append((d["name"], *(f"{size:.4g}" for size in sizes), *tera))
    head = ("name", "memory GB", "GB/s", *dtypes)
    print_table("Devices, with TFLOP/s of matrix products by dtype", head, rows)
    print_table("Sources", ("name", "source"), [(d["name"], d["source"]) for d in found])
    print("cpu is this machine, measured when it is first asked for")


def _zoo(options: argparse.Namespace) -> None:
    from graphopt.listings import models

    found = models()
    if options.json:
        print(json.dumps(found, indent=1))
        return
    from graphopt.terminal import print_table

    rows = [(m["name"], m["family"], f"{m['source']}.{m['class']}") for m in found]
    print_table("Models", ("name", "family", "class"), rows)
