"""`graphopt plan`: what passes decide for a model's step, written to a file."""

import argparse
from typing import TYPE_CHECKING

from graphopt.model_options import (
    add_model_arguments,
    add_passes_argument,
    add_step_arguments,
    analysed_step,
    model_choice,
    passes_of,
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
    from graphopt.plan_file import PlanFile

    streams = options.passes is None
    report = analysed_step(options, lambda p: passes_of(options, p.is_joint), streams_blocks=streams)
    return PlanFile.of(report, options.model, model_choice(options))
