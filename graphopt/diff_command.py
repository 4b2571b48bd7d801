"""`graphopt diff`: in what two plan files, or two reports, differ."""

import argparse
import json
from typing import Any

DIFFERENT = 3  # the exit code of --exit-code where something differs
_SHOWN = 6  # names of a list that is printed


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt diff`."""
    add = command.add_argument
    add("a", metavar="A", help="a plan of graphopt plan, or a report as --json writes it")
    add("b", metavar="B", help="another one, of the same kind")
    add("--exit-code", action="store_true", help=f"exit with {DIFFERENT} where they differ")
    add("--json", metavar="FILE", help="write the differences as JSON too; - prints only JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Carry the command out; the exit code."""
    from graphopt.differences import compare_files
    from graphopt.terminal import print_table, write_text

    found = compare_files(options.a, options.b)
    if options.json:
        write_text(options.json, json.dumps(found.as_data(), indent=1))
    if options.json != "-":
        if found.rows:
            rows = [(row.what, _text(row.what, row.a), _text(row.what, row.b)) for row in found.rows]
            print_table(f"{found.kind}s that differ", ("", options.a, options.b), rows)
        else:
            print("equal")
        if found.measured:
            rows = [(row.what, _text(row.what, row.a), _text(row.what, row.b)) for row in found.measured]
            print_table("Measured, which is not compared", ("", options.a, options.b), rows)
    return DIFFERENT if options.exit_code and found.rows else 0


def _text(what: str, value: Any) -> str:
    """A value as the table shows it: bytes and seconds with units, of long lists the first names."""
    from graphopt.cost_models.devices import format_bytes
    from graphopt.origin import format_seconds

    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{name}={v}" for name, v in value.items()) or "none"
    if isinstance(value, list):
        more = f" and {len(value) - _SHOWN} more" if len(value) > _SHOWN else ""
        return f"{len(value)}: {', '.join(map(str, value[:_SHOWN]))}{more}" if value else "none"
    if isinstance(value, int) and not isinstance(value, bool) and what.endswith("bytes"):
        return format_bytes(value)
    if isinstance(value, float) and what.endswith("seconds"):
        return format_seconds(value)
    return str(value)
