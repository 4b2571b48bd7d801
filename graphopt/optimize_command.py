"""`graphopt optimize`: run a plain and an optimised step of a model, and report what was measured."""

import argparse
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.model_options import (
    add_run_arguments,
    budget,
    held_plan,
    model_with_weights,
    passes_of,
    positive,
)

if TYPE_CHECKING:
    from graphopt.models import LoadedModel
    from graphopt.report import Report


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt optimize`."""
    add_run_arguments(command)
    add = command.add_argument
    add("--top", type=positive, default=10, metavar="N", help="entries of each list (default 10)")
    add("--json", metavar="FILE", help="write the report as JSON too; - prints only JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry the command out."""
    import warnings

    from graphopt.report_text import report_lines
    from graphopt.terminal import print_lines, progress, write_text

    wanted = wanted_of(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with progress(f"building {options.model}"):
            loaded = model_with_weights(options)
        with progress(f"running {loaded.name}"):
            report = measured_report(loaded, training=not options.inference, **wanted)
    if options.json:
        write_text(options.json, report.to_json())
    if options.json != "-":
        print_lines(report_lines(report, options.top))


def check_runs(loaded: "LoadedModel") -> None:
    """Run the model once as it is; GraphoptError with the reason where that fails."""
    import torch

    from graphopt.comparison import left_as_it_was

    model, args, kwargs = loaded.model, loaded.example_args, loaded.example_kwargs
    with torch.no_grad(), left_as_it_was(model, (), torch.device("cpu")):
        try:
            model(*args, **kwargs)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise GraphoptError(f"{loaded.name} does not run on its example inputs: {reason}") from error


def wanted_of(options: argparse.Namespace) -> dict[str, Any]:
    """What `optimize` is asked for: a plan, passes or a budget, and the device whose costs count."""
    plan = held_plan(options)
    if plan is not None:
        return {"plan": plan, "compiler": plan.compiler, "device": options.device}
    if options.passes is not None:
        return {"passes": passes_of(options, not options.inference), "device": options.device}
    budgets = {name: budget(getattr(options, name)) for name in ("memory", "activations")}
    return {**budgets, "device": options.device}


def measured_report(loaded: "LoadedModel", *, training: bool, **wanted: Any) -> "Report":
    """The report on a step of `loaded` on its example inputs, measured plain and with `wanted`.

    `wanted` are arguments of `optimize`. Without `training` a step is the forward alone.
    """
    from dataclasses import replace

    import torch

    from graphopt.api import optimize

    check_runs(loaded)
    model = optimize(loaded.model, **wanted)
    with torch.set_grad_enabled(training):
        report = model.measure(*loaded.example_args, **loaded.example_kwargs)
    named: Report = replace(report, name=loaded.name)
    return named
