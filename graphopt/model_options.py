"""What commands that look at a model's step share: the options, the model they name and its capture."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError, PlanError, TraceError

if TYPE_CHECKING:
    from graphopt.models import LoadedModel
    from graphopt.passes.base import Pass
    from graphopt.passes.budget import Budget
    from graphopt.plan_file import PlanFile
    from graphopt.program import Program
    from graphopt.report import Report

DTYPES = ("float32", "bfloat16", "float16", "float64")
_BUDGET = "bytes, a size (6GiB), a share of the plain peak (0.5), or min"


def add_model_arguments(command: argparse.ArgumentParser) -> None:
    """The model, and what a zoo model is built with."""
    add = command.add_argument
    add("model", metavar="MODEL", help="a zoo name, file.py:factory or file.pt2")
    add("--batch", type=positive, metavar="N", help="samples (zoo models; default 2)")
    add("--seq", type=positive, metavar="N", help="tokens of each sample (zoo models; default 32)")
    add("--size", choices=("small", "default"), help="size of a zoo model (default: default)")
    add("--dtype", choices=DTYPES, help="of the weights of a zoo model (default float32)")
    add("--set", action="append", default=[], metavar="NAME=VALUE,...", help="configuration")


def add_step_arguments(command: argparse.ArgumentParser) -> None:
    """The budget of a step, and whose costs count."""
    budgets = command.add_mutually_exclusive_group()
    budgets.add_argument("--memory", metavar="BUDGET", help=f"for the step's peak: {_BUDGET}")
    budgets.add_argument("--activations", metavar="BUDGET", help="without gradients and weights")
    budgets.add_argument("--inference", action="store_true", help="forward only, nothing is kept")
    add = command.add_argument
    add("--device", default="cpu", help="whose costs count: a name, or cpu for this machine")


def add_run_arguments(command: argparse.ArgumentParser) -> None:
    """The model's step, and its passes or a file of their plans."""
    add_model_arguments(command)
    add_step_arguments(command)
    add_passes_argument(command)
    help_ = "of graphopt plan, carried out instead of planning"
    command.add_argument("--plan", metavar="FILE", help=help_)


def add_passes_argument(command: argparse.ArgumentParser) -> None:
    """Passes as text, instead of a budget."""
    command.add_argument(
        "--passes", metavar="PASSES", help="instead of a budget: 'Checkpoint(memory=0.6),Fuse()'"
    )


def positive(text: str) -> int:
    """The number of at least 1 that an option gives."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def passes_of(options: argparse.Namespace, training: bool) -> "tuple[Pass, ...]":
    """The passes that the options ask for: `--passes`, or those of `optimize` within the budget."""
    if text := getattr(options, "passes", None):
        from graphopt.pass_syntax import parse_passes

        if options.memory or options.activations:
            raise GraphoptError("give either --passes or a budget: a budget is short for one Checkpoint")
        return tuple(parse_passes(text))
    from graphopt.passes.defaults import default_passes

    return default_passes(budget(options.memory), budget(options.activations), training, "eager")


def budget(text: str | None) -> "Budget":
    """A budget as it is written on the command line: `0.5` and `4096` are numbers."""
    if text is None:
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def loaded_model(options: argparse.Namespace) -> "LoadedModel":
    """The model, its weights on the meta device where it can be built there."""
    from graphopt.models import load_model
    from graphopt.terminal import note

    given = _given(options)
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


def model_with_weights(options: argparse.Namespace) -> "LoadedModel":
    """The model on the CPU, with its weights, to be run on the inputs that it comes with."""
    from graphopt.models import load_model

    loaded = load_model(options.model, **_given(options))
    check_inputs(loaded)
    return loaded


def check_inputs(loaded: "LoadedModel") -> None:
    """GraphoptError where the model comes without inputs."""
    if not loaded.example_args and not loaded.example_kwargs:
        raise GraphoptError(f"{loaded.name} comes without inputs; return (model, inputs)")


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the model, as `load_model` takes it."""
    import torch

    from graphopt import zoo

    return {
        "size": options.size or ("default" if options.model in zoo.ENTRIES else None),
        "batch": options.batch,
        "seq": options.seq,
        "dtype": getattr(torch, options.dtype) if options.dtype else None,
        "overrides": zoo.parse_overrides(",".join(options.set)),
    }


def model_choice(options: argparse.Namespace) -> dict[str, Any]:
    """What a plan file says of the model: the options that are given, by name."""
    return {name: getattr(options, name) for name in _CHOICE if getattr(options, name)}


def held_plan(options: argparse.Namespace) -> "PlanFile | None":
    """The file of `--plan`; the options of its model become those of `options`.

    PlanError where they are for another model, or say something else.
    """
    from graphopt.plan_file import PlanFile

    if options.plan is None:
        return None
    if options.memory or options.activations or getattr(options, "passes", None):
        raise GraphoptError("give either --plan or what to plan: a budget or --passes")
    plan = PlanFile.load(options.plan)
    if plan.options is None:  # made in Python: the graph alone says which model it is for
        return plan
    if plan.model != options.model:
        raise PlanError(f"{options.plan} is for the model {plan.model}, not for {options.model}")
    for name in _CHOICE:
        given, held = getattr(options, name), plan.options.get(name)
        if given and given != held:
            raise PlanError(
                f"{options.plan} is for {_option(name, held)}, and here is {_option(name, given)}"
            )
        if held is not None:
            setattr(options, name, held)
    return plan


_CHOICE = ("size", "batch", "seq", "dtype", "set", "inference")


def _option(name: str, value: Any) -> str:
    if value is None or value is True:
        return f"--{name}" if value else f"no --{name}"
    return f"--{name} {','.join(value) if isinstance(value, list) else value}"


def traced_program(loaded: "LoadedModel", options: argparse.Namespace) -> "Program":
    """A training step; forward only where that is asked for, or an exported program cannot train."""
    from graphopt.analysis import trace_loaded
    from graphopt.terminal import note

    check_inputs(loaded)
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


def analysed_step(
    options: argparse.Namespace,
    passes_for: "Callable[[Program], Sequence[Pass]]",
    streams_blocks: bool = False,
) -> "Report":
    """The report on the model's step after the passes for it; the model never runs.

    With `streams_blocks` blocks of a training step may be streamed, as `analyse` has it.
    """
    import time
    import warnings

    from graphopt.analysis import analyse
    from graphopt.cost_models.devices import get_device
    from graphopt.terminal import progress

    device = get_device(options.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with progress(f"building {options.model}"):
            loaded = loaded_model(options)
        begin = time.perf_counter()
        with progress(f"tracing {loaded.name}"):
            program = traced_program(loaded, options)
        traced = time.perf_counter() - begin
        with progress(f"planning {loaded.name}"):
            streams = streams_blocks and program.is_joint
            passes = passes_for(program)
            return analyse(program, loaded.name, passes, device, traced, streams_blocks=streams)
