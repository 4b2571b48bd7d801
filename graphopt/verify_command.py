"""`graphopt verify`: whether an optimised step computes what the model does, and where it goes wrong."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from graphopt.errors import VerifyError
from graphopt.model_options import (
    add_run_arguments,
    model_with_weights,
)
from graphopt.optimize_command import check_runs, wanted_of

if TYPE_CHECKING:
    from graphopt.verification import Verification


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt verify`."""
    add_run_arguments(command)
    add = command.add_argument
    add("--json", metavar="FILE", help="write the figures as JSON too; - prints only JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry the command out; VerifyError where results differ."""
    import warnings

    from graphopt.terminal import note, progress, write_text
    from graphopt.verification import verify_model

    wanted = wanted_of(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with progress(f"building {options.model}"):
            loaded = model_with_weights(options)
        check_runs(loaded)
        with progress(f"comparing {loaded.name} with eager and float64"):
            found = verify_model(loaded, training=not options.inference, **wanted)
    if found.remark:
        note(f"eager is the reference, since {found.remark}")
    if options.json:
        write_text(options.json, json.dumps(found.as_data(), indent=1))
    if options.json != "-":
        _print(found)
    if not found.is_right:
        raise VerifyError(found.message)


def _print(found: "Verification") -> None:
    from graphopt.terminal import print_table

    rows: list[tuple[Any, ...]] = []
    for kind, module, group in found.groups():
        worst = max(group, key=lambda d: d.error / (d.allowed or 1e-300) if d.error else 0.0)
        figures = (worst.error, worst.eager_error, worst.allowed)
        texts = (f"{figure / (worst.scale or 1.0):.1e}" for figure in figures)
        rows.append(
            (kind, module, str(len(group)), worst.name, *texts, "" if worst.is_allowed else "wrong")
        )
    head = ("", "module", "tensors", "worst", "error", "of eager", "allowed", "")
    print_table(f"{found.model}: largest errors, relative to the largest element in float64", head, rows)
    if found.is_right:
        print(
            f"all {len(found.deviations)} tensors are right; passes: {', '.join(found.passes) or 'none'}"
        )
