"""`graphopt show`: a model's graph before and after a pass, the plan between them, and the difference."""

import argparse
import difflib
import json
from typing import TYPE_CHECKING

from graphopt.errors import GraphoptError
from graphopt.model_options import (
    add_model_arguments,
    add_step_arguments,
    budget,
    loaded_model,
    traced_program,
)

if TYPE_CHECKING:
    from graphopt.chart import Line
    from graphopt.cost_models.devices import Device
    from graphopt.passes.base import Pass
    from graphopt.program import Program

SECTIONS = ("before", "plan", "after", "diff")
_STYLES = {"@": "cyan", "+": "green", "-": "red"}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt show`."""
    add_model_arguments(command)
    add_step_arguments(command)
    add = command.add_argument
    help_ = "a pass as graphopt passes lists it, or with options: 'Fuse(min_bytes=4096)'"
    add("--pass", dest="pass_", required=True, metavar="NAME", help=help_)
    add("--only", choices=SECTIONS, help="one of the four parts (default: all)")
    add("--json", metavar="FILE", help="write the parts as JSON too; - prints only JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry the command out."""
    import warnings

    from graphopt.cost_models.devices import get_device
    from graphopt.terminal import print_lines, progress, write_text

    pass_, device = _pass(options), get_device(options.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with progress(f"planning {options.model}"):
            program = traced_program(loaded_model(options), options)
            found = sections(program, pass_, device)
    chosen = {name: found[name] for name in SECTIONS if options.only in (None, name)}
    if options.json:
        write_text(options.json, json.dumps({"pass": repr(pass_), **chosen}, indent=1))
    if options.json != "-":
        print_lines(_lines(chosen, titles=options.only is None))


def sections(program: "Program", pass_: "Pass", device: "Device") -> dict[str, list[str]]:
    """The lines of each of `SECTIONS` for `pass_` on `program`, with costs on `device`.

    Raises what planning raises, and VerifyError where the pass makes a wrong program.
    """
    import dataclasses

    from graphopt.analysis import as_planned
    from graphopt.cost_models.costs import Costs
    from graphopt.passes.pipeline import run_passes
    from graphopt.program_text import program_lines

    program = as_planned(program)
    changed, (step,) = run_passes(program, [pass_], lambda p: Costs.of(p, device), lambda: 0.0)
    before, after = (program_lines(p, origins=False) for p in (program, changed))
    fields = [f"{f.name} = {getattr(step.plan, f.name)!r}" for f in dataclasses.fields(step.plan)]
    return {
        "before": program_lines(program),
        "plan": [repr(pass_), str(step.plan), *step.plan.table().splitlines(), *fields],
        "after": program_lines(changed),
        "diff": list(difflib.unified_diff(before, after, "before", "after", lineterm="")),
    }


def _pass(options: argparse.Namespace) -> "Pass":
    import dataclasses

    from graphopt.pass_syntax import parse_passes

    passes = parse_passes(options.pass_)
    if len(passes) != 1:
        raise GraphoptError(f"--pass {options.pass_} names {len(passes)} passes; show one at a time")
    given = {n: budget(getattr(options, n)) for n in ("memory", "activations") if getattr(options, n)}
    names = {field.name for field in dataclasses.fields(passes[0])}
    if unknown := sorted(set(given) - names):
        raise GraphoptError(f"{type(passes[0]).__name__} has no option {unknown[0]!r}")
    return dataclasses.replace(passes[0], **given)


def _lines(sections: dict[str, list[str]], *, titles: bool) -> "list[Line]":
    lines: list[Line] = []
    for name, rows in sections.items():
        if titles:
            lines += [[], [(f"# {name}", "bold")]]
        for number, row in enumerate(rows or ["nothing changes"] if name == "diff" else rows):
            is_head = name == "diff" and number < 2
            style = "bold" if is_head else _STYLES.get(row[:1], "") if name == "diff" else ""
            lines.append([(row, style)])
    return lines[1:] if titles else lines
