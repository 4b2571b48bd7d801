"""The `graphopt` command: analyse a model, remove layers, measure links, list what there is."""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt import __version__, calibrate_command, fit_command, kernels_command, skip_command
from graphopt.errors import GraphoptError, TraceError

if TYPE_CHECKING:
    from graphopt.models import LoadedModel
    from graphopt.passes.base import Pass
    from graphopt.passes.budget import Budget
    from graphopt.program import Program

DTYPES = ("float32", "bfloat16", "float16", "float64")
_BUDGET = "bytes, a size (6GiB), a share of the plain peak (0.5), or min"


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
    _add_report(commands.add_parser("report", help="predict memory and time of a model's step"))
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


def _add_report(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("model", metavar="MODEL", help="a zoo name, file.py:factory or file.pt2")
    add("--batch", type=_positive, metavar="N", help="samples (zoo models; default 2)")
    add("--seq", type=_positive, metavar="N", help="tokens of each sample (zoo models; default 32)")
    add("--size", choices=("small", "default"), help="size of a zoo model (default: default)")
    add("--dtype", choices=DTYPES, help="of the weights of a zoo model (default float32)")
    add("--set", action="append", default=[], metavar="NAME=VALUE,...", help="configuration")
    budgets = command.add_mutually_exclusive_group()
    budgets.add_argument("--memory", metavar="BUDGET", help=f"for the step's peak: {_BUDGET}")
    budgets.add_argument("--activations", metavar="BUDGET", help="without gradients and weights")
    budgets.add_argument("--inference", action="store_true", help="forward only, nothing is kept")
    add("--device", default="cpu", help="whose costs count: a name, or cpu for this machine")
    add("--top", type=_positive, default=10, metavar="N", help="entries of each list (default 10)")
    add("--json", metavar="FILE", help="write the report as JSON too; - prints only JSON")
    command.set_defaults(run=_report)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _report(options: argparse.Namespace) -> None:
    from graphopt.analysis import analyse
    from graphopt.cost_models.devices import get_device
    from graphopt.passes.checkpoint import Checkpoint
    from graphopt.report_text import report_lines
    from graphopt.terminal import print_lines, progress, write_text

    wanted = _budget(options.memory), _budget(options.activations)
    passes: list[Pass] = [Checkpoint(memory=wanted[0], activations=wanted[1])]
    device = get_device(options.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with progress(f"building {options.model}"):
            loaded = _load(options)
        begin = time.perf_counter()
        with progress(f"tracing {loaded.name}"):
            program = _trace(loaded, options)
        traced = time.perf_counter() - begin
        with progress(f"planning {loaded.name}"):
            chosen = passes if program.is_joint else []
            report = analyse(program, loaded.name, chosen, device, traced)
    if options.json:
        write_text(options.json, report.to_json())
    if options.json != "-":
        print_lines(report_lines(report, options.top))


def _budget(text: str | None) -> "Budget":
    """A budget as it is written on the command line: `0.5` and `4096` are numbers."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _load(options: argparse.Namespace) -> "LoadedModel":
    """The model, its weights on the meta device where it can be built there."""
    import torch

    from graphopt import zoo
    from graphopt.models import load_model
    from graphopt.terminal import note

    given: dict[str, Any] = {
        "size": options.size,
        "batch": options.batch,
        "seq": options.seq,
        "dtype": getattr(torch, options.dtype) if options.dtype else None,
        "overrides": zoo.parse_overrides(",".join(options.set)),
    }
    if options.model in zoo.ENTRIES:
        given["size"] = options.size or "default"
    if Path(options.model).suffix == ".pt2":
        return load_model(options.model, **given)
    try:
        return load_model(options.model, device="meta", **given)
    except GraphoptError as error:
        if ".py:" not in options.model:
            raise
        loaded = load_model(options.model, **given)
        note(f"the weights are in memory, since on the meta device {error}")
        return loaded


def _trace(loaded: "LoadedModel", options: argparse.Namespace) -> "Program":
    """A training step; forward only where that is asked for, or an exported program cannot train."""
    from graphopt.analysis import trace_loaded
    from graphopt.terminal import note

    if not loaded.example_args and not loaded.example_kwargs:
        raise GraphoptError(f"{loaded.name} comes without inputs; return (model, inputs)")
    try:
        program = trace_loaded(loaded, training=not options.inference)
    except TraceError as error:
        if options.inference or not loaded.name.endswith(".pt2"):
            raise
        note(f"forward only, since {error}")
        program = trace_loaded(loaded, training=False)
    if not program.is_joint and (options.memory or options.activations):
        raise GraphoptError(
            f"{loaded.name} has no backward, so nothing is kept that a budget could bound"
        )
    return program


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
