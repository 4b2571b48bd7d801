"""The `graphopt` command: analyse a model, remove layers, measure links, list what there is."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence

from graphopt import (
    __version__,
    calibrate_command,
    fit_command,
    kernels_command,
    report_command,
    skip_command,
)
from graphopt.errors import GraphoptError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; 0 where it did what was asked, 1 where it could not, 2 on wrong usage."""
    try:
        options = _parser().parse_args(argv)
    except SystemExit as stop:  # after --help, --version, or a message about the usage
        return int(stop.code or 0)
    try:
        options.run(options)
        sys.stdout.flush()
    except GraphoptError as error:
        print(f"graphopt: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="graphopt", description=__doc__)
    parser.add_argument("--version", action="version", version=f"graphopt {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report_command.add_arguments(
        commands.add_parser("report", help="predict memory and time of a model's step")
    )
    fit_command.add_arguments(commands.add_parser("fit", help="the largest batch or sequence that fits"))
    skip_command.add_arguments(commands.add_parser("skip", help="remove layers of a model"))
    kernels_command.add_arguments(commands.add_parser("kernels", help="show a generated kernel"))
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
    return parser


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
