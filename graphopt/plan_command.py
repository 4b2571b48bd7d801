"""`graphopt plan`: what passes decide for a model's step, written to a file."""

import argparse
from typing import TYPE_CHECKING

from graphopt.model_options import (
    add_model_arguments,
    add_passes_argument,
    add_step_arguments,
    loaded_model,
    model_choice,
    passes_of,
    traced_program,
)

if TYPE_CHECKING:
    from graphopt.plan_file import PlanFile


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt plan`."""
    add_model_arguments(command)
    add_step_arguments(command)
    add_passes_argument(command)
    help_ = "where the plan goes; - prints only it"
    command.add_argument("-o", "--output", required=True, metavar="FILE", help=help_)
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry the command out."""
    from graphopt.report_text import pass_text
    from graphopt.terminal import print_table, write_text

    plan = planned(options)
    write_text(options.output, plan.to_json())
    if options.output != "-":
        rows = [(pass_text(pass_), str(made)) for graph in plan.graphs for pass_, made in graph.steps]
        print_table(plan.model, ("pass", "plan"), rows)
        print(f"written to {options.output}")


def planned(options: argparse.Namespace) -> "PlanFile":
    """The plans of the passes that the options ask for; the model never runs."""
    import time
    import warnings

    from graphopt.analysis import analyse
    from graphopt.cost_models.devices import get_device
    from graphopt.plan_file import PlanFile
    from graphopt.terminal import progress

    passes, device = passes_of(options), get_device(options.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with progress(f"building {options.model}"):
            loaded = loaded_model(options)
        begin = time.perf_counter()
        with progress(f"tracing {loaded.name}"):
            program = traced_program(loaded, options)
        traced = time.perf_counter() - begin
        with progress(f"planning {loaded.name}"):
            streams = options.passes is None and program.is_joint
            report = analyse(program, loaded.name, passes, device, traced, streams_blocks=streams)
    return PlanFile.of(report, options.model, model_choice(options))
