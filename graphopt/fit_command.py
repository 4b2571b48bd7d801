"""`graphopt fit`: what fits into a memory, and batches for rising sequence lengths or resolutions."""

import argparse
import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.model_options import DTYPES

if TYPE_CHECKING:
    from graphopt.cost_models.training_state import TrainingSetup
    from graphopt.fit_answer import Fit
    from graphopt.passes.base import Pass

FORMULA_WIDTH = 400  # characters of a formula that are printed; JSON has all


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt fit`."""
    add = command.add_argument
    add("model", metavar="MODEL", help="a zoo name, or file.py:factory called with batch and seq")
    add("--memory", required=True, metavar="SIZE", help="of one device, for all of the step: 80GiB")
    add("--seq", type=int, metavar="N", help="find the largest batch for this sequence length")
    add("--batch", type=int, metavar="N", help="find the longest sequence for this batch")
    add("--device", default="cpu", help="whose costs count: a name, or cpu for this machine")
    add("--size", choices=("small", "default"), default="default", help="of a zoo model")
    add("--dtype", choices=DTYPES, help="of the weights of a zoo model (default float32)")
    add("--set", action="append", default=[], metavar="NAME=VALUE,...", help="configuration")
    add("--plain", action="store_true", help="without passes only")
    add("--json", metavar="FILE", help="write the answer as JSON too; - prints only JSON")
    setup = command.add_argument_group("the training")
    add = setup.add_argument
    add("--optimizer", choices=("none", "sgd", "momentum", "adam"), default="none")
    add("--master-weights", action="store_true", help="in float32, with the optimizer's state")
    add("--zero", type=int, choices=(0, 1, 2, 3), default=0, help="what data ranks shard")
    for name in ("data", "tensor", "pipeline"):
        add(f"--{name}", type=int, default=1, metavar="N", help=f"degree of {name} parallelism")
    stages = command.add_argument_group("a batch plan, instead of the largest batch")
    add = stages.add_argument
    add("--stages", metavar="N,N,...", help="rising sequence lengths, or resolutions of images")
    add("--samples", type=int, metavar="N", help="of an epoch")
    add("--cycles", type=int, default=1, metavar="N", help="how often the stages are gone through")
    add("--workers", type=int, default=1, metavar="N", help="workers in all")
    add("--small-workers", type=int, default=1, metavar="N", help="those with the small batch")
    add("--extra-time", type=float, default=1.05, metavar="TIMES", help="of an epoch with both batches")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry the command out."""
    import warnings

    from graphopt.terminal import bar, write_text

    with warnings.catch_warnings(), bar(f"looking at {options.model}") as advance:
        warnings.simplefilter("ignore")
        answer = _plan(options) if options.stages else _fit(options, advance)
    if options.json:
        write_text(options.json, answer.to_json())
    if options.json == "-":
        return
    if options.stages:
        print(answer)
    else:
        _print(answer)


def _setup(options: argparse.Namespace) -> "TrainingSetup":
    from graphopt.cost_models.training_state import TrainingSetup

    degrees = options.data, options.tensor, options.pipeline
    return TrainingSetup(options.optimizer, options.master_weights, options.zero, *degrees)


def _model(options: argparse.Namespace) -> dict[str, Any]:
    """What says which model it is, and whose costs count."""
    import torch

    from graphopt import zoo

    is_zoo = options.model in zoo.ENTRIES
    return {
        "size": options.size if is_zoo else None,
        "overrides": zoo.parse_overrides(",".join(options.set)),
        "dtype": getattr(torch, options.dtype) if options.dtype else None,
        "device": options.device,
        "setup": _setup(options),
    }


def _fit(options: argparse.Namespace, advance: Callable[[int, int], None]) -> Any:
    from graphopt.fitting import fit

    passes: list[Pass] | None = [] if options.plain else None
    asked = {"memory": options.memory, "seq": options.seq, "batch": options.batch, "passes": passes}
    return fit(options.model, **asked, **_model(options), advance=advance)


def _plan(options: argparse.Namespace) -> Any:
    from graphopt.batch_plan import Dual, plan_batches
    from graphopt.passes.checkpoint import Checkpoint

    if options.samples is None:
        raise GraphoptError("--stages needs --samples, those of an epoch")
    try:
        stages = [int(text) for text in options.stages.split(",")]
    except ValueError:
        raise GraphoptError(f"--stages {options.stages}: write sizes such as 512,1024,2048") from None
    return plan_batches(
        options.model,
        memory=options.memory,
        stages=stages,
        samples=options.samples,
        cycles=options.cycles,
        dual=Dual(options.workers, options.small_workers, options.extra_time),
        passes=() if options.plain else (Checkpoint(memory="min"),),
        **_model(options),
    )


def _print(answer: "Fit") -> None:
    from graphopt.cost_models.devices import format_bytes
    from graphopt.fit_answer import named, shown
    from graphopt.origin import format_seconds
    from graphopt.terminal import print_table

    rows = []
    for row in answer.rows:
        sizes = [shown(row.largest_batch), shown(row.largest_seq)]
        parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in row.parts if n)
        where = row.remark or f"{row.half}, {row.operator}"
        rows.append((named(row), *sizes, format_seconds(row.seconds), parts, where))
    title = f"{answer.model} in {format_bytes(answer.memory_bytes)} on {answer.device}"
    asked = [f"{k} {v}" for k, v in (("batch", answer.batch), ("seq", answer.seq)) if v is not None]
    head = ("passes", "largest batch", "largest seq", "step", "at the peak", "where")
    print_table(", ".join([title, *asked]), head, rows)
    for row in answer.rows:
        if row.formula:
            print(textwrap.shorten(f"{named(row)}: {row.formula}", FORMULA_WIDTH, placeholder=" ..."))
    times = format_seconds(answer.capture_seconds), format_seconds(answer.solve_seconds)
    print(f"{answer.captures} captures in {times[0]}, solved in {times[1]}")
