"""`graphopt skip`: remove layers of a model, and show what that costs and gains."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from graphopt.models import LoadedModel
    from graphopt.passes.blocks import Batch
    from graphopt.passes.skip_layers import SkipLayers
    from graphopt.skip_report import SkipReport, UnitRow

GOALS = {  # option of the pass: type and help
    "keep": (str, "N,N,...", "the positions that stay"),
    "remove": (int, "N", "how many go"),
    "max_kl": (float, "NATS", "bound on the mean KL divergence per token"),
    "max_ppl_increase": (float, "SHARE", "bound on the growth of the perplexity: 0.05 is 5 %%"),
    "min_top1": (float, "SHARE", "bound on the share of tokens with the same prediction"),
    "target_speedup": (float, "TIMES", "how many times as fast, measured"),
}
CHOICES = {"strategy": "greedy", "compensation": "none", "granularity": "layers", "phase": "prefill"}
BATCHES = 4  # of a text; as many again are held out, for the figures


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt skip`."""
    add = command.add_argument
    add("model", metavar="MODEL", help="a zoo name or file.py:factory")
    goals = command.add_argument_group("the goal").add_mutually_exclusive_group(required=True)
    for name, (kind, metavar, help_) in GOALS.items():
        goals.add_argument(_flag(name), type=kind, metavar=metavar, help=help_)
    for name, default in CHOICES.items():
        add(_flag(name), default=default, help=f"as of SkipLayers (default {default})")
    add("--shared", type=int, metavar="N", help="of strategy fold: how many take a neighbour's weights")
    add("--text", metavar="FILE", help="what to judge layers on: half of it chooses, half is measured")
    add("--tokenizer", metavar="FOLDER", help="of the text; without one its bytes are the tokens")
    add("--batch", type=int, default=4, metavar="N", help="samples of a batch (default 4)")
    add("--seq", type=int, default=128, metavar="N", help="tokens of a sample (default 128)")
    add("--new-tokens", type=int, default=32, metavar="N", help="generated per prompt (default 32)")
    add("--size", choices=("small", "default"), help="size of a zoo model (default: small)")
    add("--set", action="append", default=[], metavar="NAME=VALUE,...", help="configuration")
    add("--save", metavar="FOLDER", help="write the short model with save_pretrained")
    add("--json", metavar="FILE", help="write the report as JSON too; - prints only JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry the command out."""
    import warnings

    from graphopt.terminal import progress, write_text

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with progress(f"building {options.model}"):
            loaded, chosen, held_out = _inputs(options)
        with progress(f"removing layers of {loaded.name}"):
            short, report = skip(loaded, _pass(options, chosen), held_out, options.new_tokens)
    if options.save:
        _saved(short, options.save)
    if options.json:
        write_text(options.json, report.to_json())
    if options.json != "-":
        _print(report)


def skip(
    loaded: "LoadedModel", pass_: "SkipLayers", held_out: "list[Batch]", new_tokens: int
) -> "tuple[nn.Module, SkipReport]":
    """The model without layers, and its report on batches that chose nothing."""
    from graphopt.api import optimize
    from graphopt.passes.blocks import find_stack
    from graphopt.passes.skip_strategies import Evidence
    from graphopt.skip_report import compare

    stack = find_stack(loaded.model, held_out[0])
    evidence = Evidence(loaded.model, stack, tuple(held_out), pass_.granularity)
    short: Any = optimize(loaded.model, passes=[pass_])
    plan = short.report.steps[0].plan
    return short, compare(loaded.name, evidence, plan, short, new_tokens)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _pass(options: argparse.Namespace, calibration: "list[Batch]") -> "SkipLayers":
    from graphopt.passes.skip_layers import SkipLayers

    given = {name: getattr(options, name) for name in (*GOALS, *CHOICES, "shared")}
    if options.keep is not None:
        try:
            given["keep"] = [int(part) for part in options.keep.split(",")]
        except ValueError:
            raise GraphoptError(f"--keep {options.keep}: positions are numbers, as in 0,1,4") from None
    return SkipLayers(**given, calibration=calibration)


def _inputs(options: argparse.Namespace) -> "tuple[LoadedModel, list[Batch], list[Batch]]":
    """The model, the batches that choose and those that are measured."""
    from graphopt import zoo
    from graphopt.models import load_model
    from graphopt.passes.made_up_inputs import as_batch
    from graphopt.terminal import note

    if options.model.endswith(".pt2"):
        raise GraphoptError(f"{options.model}: layers are removed from a module, not from its graph")
    sizes = {"batch": options.batch, "seq": options.seq} if options.model in zoo.ENTRIES else {}
    overrides = zoo.parse_overrides(",".join(options.set))
    loaded = load_model(options.model, size=options.size, overrides=overrides, **sizes)
    if options.text:
        batches = _text_batches(options, loaded.model)
        return loaded, batches[::2], batches[1::2]
    inputs: Any = loaded.example_args or dict(loaded.example_kwargs)
    if isinstance(inputs, dict) and not _needs_labels(loaded.model):
        inputs.pop("labels", None)
    if not inputs:
        raise GraphoptError(f"{loaded.name} comes without inputs; give --text, or return (model, inputs)")
    note(
        "the tokens are made up: layers and quality say nothing about real text; give --text"
        if options.model in zoo.ENTRIES
        else f"the inputs that {loaded.name} gives choose the layers and are measured too"
    )
    batch = as_batch(inputs, loaded.model)
    return loaded, [batch], [batch]


def _needs_labels(model: Any) -> bool:
    """Models with a decoder of their own make its inputs from the labels."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _text_batches(options: argparse.Namespace, model: Any) -> "list[Batch]":
    """Batches from evenly spaced parts of the text: twice `BATCHES`."""
    ids = _tokens(options, model)
    rows, needed = 2 * BATCHES * options.batch, options.seq
    if options.batch < 1 or options.seq < 2 or len(ids) < rows * needed:
        raise GraphoptError(
            f"{options.text} has {len(ids)} tokens; {2 * BATCHES} batches of --batch {options.batch} "
            f"samples with --seq {options.seq} tokens take {rows * needed}"
        )
    step = (len(ids) - needed) // max(1, rows - 1)
    samples = [ids[i * step : i * step + needed] for i in range(rows)]
    device = next(model.parameters()).device
    import torch

    made = [torch.stack(samples[i :: 2 * BATCHES]).to(device) for i in range(2 * BATCHES)]
    return [{"input_ids": batch} for batch in made]


def _tokens(options: argparse.Namespace, model: Any) -> "Tensor":
    import torch

    from graphopt.terminal import note

    try:
        raw = Path(options.text).read_bytes()
    except OSError as error:
        raise GraphoptError(f"cannot read {options.text}: {error.strerror}") from error
    if options.tokenizer:
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True)
        except (OSError, ValueError) as error:
            raise GraphoptError(f"cannot load the tokenizer {options.tokenizer}: {error}") from error
        return torch.tensor(tokenizer(raw.decode(errors="replace"))["input_ids"])
    size = getattr(getattr(model, "config", None), "vocab_size", 0)
    if size < 256:
        raise GraphoptError(
            f"--text without --tokenizer needs 256 tokens, one a byte; the model has {size}"
        )
    if size != 256:
        note(f"the bytes of {options.text} stand for tokens, of which the model has {size}")
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()


def _saved(short: Any, folder: str) -> None:
    if not hasattr(short, "save_pretrained"):
        raise GraphoptError(f"--save {folder}: {type(short).__name__} has no save_pretrained")
    short.save_pretrained(folder)


def _print(report: "SkipReport") -> None:
    from graphopt.terminal import print_table

    phases = [row.phase for row in report.phases]
    rows = [
        (
            unit.name,
            _state(unit),
            _number(unit.influence, "{:.4f}"),
            _number(unit.kl, "{:.4g}"),
            *(f"{1e3 * unit.seconds[phase]:.3g}" for phase in phases),
        )
        for unit in report.units
    ]
    head = ("layer", "", "block influence", "KL without it", *(f"{phase} ms" for phase in phases))
    print_table(f"{report.model}: {_first_line(report)}", head, rows)
    rows = [
        (
            row.phase,
            *(f"{1e3 * s:.4g}" for s in (row.whole_seconds, row.predicted_seconds, row.seconds)),
            *(f"{row.tokens / s:.4g}" for s in (row.whole_seconds, row.seconds)),
            f"{row.speedup:.2f}",
        )
        for row in report.phases
    ]
    head = ("step", "whole ms", "predicted ms", "measured ms", "whole tokens/s", "tokens/s", "speed-up")
    print_table("Time", head, rows)
    print(", ".join(report.figures()))


def _state(unit: "UnitRow") -> str:
    if unit.weights_of is not None:
        return f"weights of {unit.weights_of}"
    return "removed" if unit.removed else ""


def _first_line(report: "SkipReport") -> str:
    return str(report.plan).splitlines()[0]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
