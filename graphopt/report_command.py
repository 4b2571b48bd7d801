"""`graphopt report`: predict memory and time of a model's step."""

import argparse
from typing import TYPE_CHECKING

from graphopt.model_options import (
    add_model_arguments,
    add_step_arguments,
    analysed_step,
    passes_of,
    positive,
)

if TYPE_CHECKING:
    from graphopt.report import Report


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt report`."""
    from graphopt import mesh_command

    add_model_arguments(command)
    add_step_arguments(command)
    add = command.add_argument
    add("--top", type=positive, default=10, metavar="N", help="entries of each list (default 10)")
    add("--json", metavar="FILE", help="write the report as JSON too; - prints only JSON")
    add("--chrome-trace", metavar="FILE", help="write the predicted timeline for chrome://tracing")
    add("--memory-snapshot", metavar="FILE", help="write predicted allocations for torch's memory viz")
    mesh_command.add_arguments(command)
    add("--html", metavar="FILE", help="write the report as one HTML page too (needs plotly)")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry the command out."""
    from graphopt import mesh_command
    from graphopt.html_page import plotly_script
    from graphopt.report_text import report_lines
    from graphopt.terminal import print_lines, progress, write_bytes, write_text

    if options.html:
        plotly_script()  # raises now what it would raise after the planning
    report = mesh_command.report(options) if mesh_command.asked(options) else _report(options)
    if options.json:
        write_text(options.json, report.to_json())
    if options.chrome_trace:
        write_text(options.chrome_trace, report.chrome_trace())
    if options.memory_snapshot:
        write_bytes(options.memory_snapshot, report.memory_snapshot())
    if options.html:
        with progress(f"drawing {report.name}"):
            page = report.to_html()
        write_text(options.html, page)
    if options.json != "-":
        print_lines(report_lines(report, options.top))


def _report(options: argparse.Namespace) -> "Report":
    """On one device."""
    return analysed_step(options, lambda program: passes_of(options, program.is_joint))
