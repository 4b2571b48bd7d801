"""Quality against the share of layers removed, for every strategy, with and without compensation.

    python benchmarks/skip_layers.py [--steps 700] [--cache FOLDER] [--strategies NAME ...] [--sublayers]

Results of strategies that are not named are kept.

A small Llama (8 layers of width 256) is trained once, with autocast to bfloat16, on the bytes of
Python's own library sources; its weights are kept in the cache folder. Blocks are chosen and
projections refitted on files of the training text; figures are of files that were never seen.
Perplexity is per byte, KL divergence in nats per byte. The strategy "fold" has a table of its own, with
the parameters that are stored; beside it are the same layers removed without sharing, sharing without
norms fitted anew, and the layers that share removed as well.
"""

import argparse
import copy
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from byte_models import batch, config, texts, trained
from harness import note, setup, stored, table, write
from torch import Tensor
from transformers import LlamaForCausalLM

from graphopt.passes.blocks import find_stack
from graphopt.passes.compensation import KINDS
from graphopt.passes.folding import folded
from graphopt.passes.layer_sharing import norm_parameters
from graphopt.passes.made_up_inputs import as_batch
from graphopt.passes.skip_strategies import STRATEGIES, Evidence, naive_runs
from graphopt.passes.sublayer_removal import without_units

Row = dict[str, Any]

LAYERS, WIDTH, TOKENS, SAMPLES, STEPS = 8, 256, 128, 32, 700
REMOVED = (1, 2, 3, 4)
BATCHES = {"calibration": 4, "held out": 8}


def rows(
    model: LlamaForCausalLM, batches: dict[str, list[Tensor]], names: list[str], granularity: str
) -> list[Row]:
    """A row for every number of layers, or of two sublayers, strategy and kind of compensation."""
    calibration, unseen = (tuple(as_batch(ids, model) for ids in batches[key]) for key in BATCHES)
    stack = find_stack(model, unseen[0])
    held_out = Evidence(model, stack, unseen)
    found: list[Row] = []
    for kind in KINDS:
        evidence = Evidence(model, stack, calibration, granularity, kind)
        for strategy in names:
            choose = STRATEGIES[strategy](evidence)
            for count in REMOVED:
                begin = time.perf_counter()
                removed = choose(count * evidence.count // LAYERS)
                seconds = time.perf_counter() - begin
                short = without_units(model, stack, evidence.units, removed)
                if kind != "none":
                    evidence.refit(short, removed)
                row = {"removed": count, "strategy": strategy, "compensation": kind}
                row |= {"layers": [evidence.units[i].name for i in sorted(removed)]}
                row |= {"plan_seconds": seconds, "parameters": sum(p.numel() for p in short.parameters())}
                found.append(row | asdict(held_out.trials.quality(frozenset(), short)))
                note(str(found[-1]))
    return found


def fold_rows(model: LlamaForCausalLM, batches: dict[str, list[Tensor]], shared: int = 1) -> list[Row]:
    """Rows of folded models, and of what they are compared with: of least Block Influence go none to
    most layers, and `shared` of the others run with the weights of a neighbour.
    """
    calibration, unseen = (tuple(as_batch(ids, model) for ids in batches[key]) for key in BATCHES)
    stack = find_stack(model, unseen[0])
    held_out, evidence = Evidence(model, stack, unseen), Evidence(model, stack, calibration)
    choose, found = STRATEGIES["fold"](evidence), list[Row]()
    for count in (0, *REMOVED[:-1]):
        removed, begin = choose(count), time.perf_counter()
        short, groups, _ = folded(evidence, removed, shared)
        seconds = time.perf_counter() - begin
        also = removed | {i for group in groups for i in group[1:]}
        plain = copy.deepcopy(short)
        kept = [i for i in range(evidence.count) if i not in removed]
        for i in (i for group in groups for i in group[1:]):
            block = plain.get_submodule(stack.path)[kept.index(i)]
            for name, value in norm_parameters(stack.blocks[i]).items():
                block.get_parameter(name).data.copy_(value)
        models = {
            "without sharing": without_units(model, stack, evidence.units, removed),
            "fold": short,
            "fold, norms not fitted": plain,
            "removed as well": without_units(model, stack, evidence.units, also),
        }
        for name, made in models.items():
            row = {"removed": sorted(removed), "groups": groups, "what": name, "plan_seconds": seconds}
            row |= {"parameters": sum(p.numel() for p in made.parameters())}
            found.append(row | asdict(held_out.trials.quality(frozenset(), made)))
            note(str(found[-1]))
    return found


def evaluations(layers: int = 24, count: int = 6, models: int = 5) -> tuple[int, int]:
    """How often greedy runs a layer on a batch, and how often trying every layer at every step does.

    The most over some small untrained models, whose layers are worth nearly the same.
    """
    ran = []
    for seed in range(models):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config(layers, 32, TOKENS)).eval()
        ids = as_batch(torch.randint(256, (1, 32)), model)
        evidence = Evidence(model, find_stack(model, ids), (ids,))
        STRATEGIES["greedy"](evidence)(count)
        ran.append(evidence.trials.layer_runs + layers)  # and the whole run that Block Influence is of
    return max(ran), naive_runs(layers, layers, count)


def report(data: list[Row], sublayers: list[Row], folds: list[Row], counts: tuple[int, int]) -> str:
    """One table for each number of layers removed, how greedy compares with the published rules, and
    what folding keeps.
    """
    whole = (data or folds)[0]["whole_perplexity"]
    parts = [f"Perplexity of the whole model: {whole:.3f} per byte, held out."]
    for count in REMOVED if data else ():
        parts.append(f"## {count} of {LAYERS} layers removed ({count / LAYERS:.1%})")
        lines = []
        for strategy in dict.fromkeys(r["strategy"] for r in data):
            same = [r for r in data if (r["removed"], r["strategy"]) == (count, strategy)]
            cells = [f"{r['perplexity']:.2f} / {r['kl']:.3f} / {r['top1']:.1%}" for r in same]
            layers = "; ".join(dict.fromkeys(" ".join(map(str, r["layers"])) for r in same))
            lines.append([strategy, layers, *cells, f"{same[-1]['plan_seconds']:.1f}"])
        head = ["strategy", "removed", *(f"{kind}: perplexity / KL / top-1" for kind in KINDS)]
        parts.append(table([*head, "plan s"], lines))
    if any(r["strategy"] == "greedy" for r in data):
        parts += ["## Greedy with compensation against the others", table(*gains(data))]
    if sublayers:
        parts += ["## As many sublayers as two for each layer", table(*beside(data, sublayers))]
    if folds:
        parts += ["## Layers removed, and others with shared weights (fold)", table(*beside_fold(folds))]
    ran, naive = counts
    parts.append(
        f"Greedy runs at most {ran} layers to remove 6 of 24 ({ran / naive:.0%}), "
        f"trying all of them {naive}."
    )
    return "\n\n".join(parts)


def gains(data: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """How many times the divergence of greedy, refitted, that of each other rule is: as published, and
    refitted alike; and whether greedy is the best of all.
    """
    others = [s for s in dict.fromkeys(r["strategy"] for r in data) if s != "greedy"]
    lines: list[list[Any]] = []
    for count in REMOVED:
        cell = {(r["strategy"], r["compensation"]): r for r in data if r["removed"] == count}
        best = cell["greedy", "linear"]
        ratios = [
            f"{cell[o, 'none']['kl'] / best['kl']:.2f} / {cell[o, 'linear']['kl'] / best['kl']:.2f}"
            for o in others
        ]
        first = all(
            best["kl"] <= r["kl"] and best["perplexity"] <= r["perplexity"] for r in cell.values()
        )
        lines.append([count, *ratios, first and all(best["top1"] >= r["top1"] for r in cell.values())])
    return ["removed", *(f"KL of {o}, plain / refitted" for o in others), "greedy is best"], lines


def beside(data: list[Row], sublayers: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Greedy on sublayers and on layers, with the same kind of compensation."""
    lines: list[list[Any]] = []
    for row in sublayers:
        key = ("greedy", row["removed"], row["compensation"])
        (other,) = (r for r in data if (r["strategy"], r["removed"], r["compensation"]) == key)
        cells = [
            f"{r['perplexity']:.2f} / {r['kl']:.3f} / {r['top1']:.1%} / {r['parameters'] / 1e6:.2f}"
            for r in (row, other)
        ]
        lines.append([2 * row["removed"], row["compensation"], " ".join(row["layers"]), *cells])
    figures = "perplexity / KL / top-1 / million parameters"
    return ["sublayers", "compensation", "removed", figures, f"layers: {figures}"], lines


def beside_fold(folds: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """A line for each number of layers removed and each way."""
    lines = [
        [
            " ".join(map(str, row["removed"])) or "none",
            "; ".join(f"{' '.join(map(str, g[1:]))} with those of {g[0]}" for g in row["groups"]),
            row["what"],
            f"{row['perplexity']:.2f} / {row['kl']:.3f} / {row['top1']:.1%}",
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['plan_seconds']:.1f}" if row["what"] == "fold" else "",
        ]
        for row in folds
    ]
    figures = "perplexity / KL / top-1"
    return ["removed", "shared weights", "what", figures, "million parameters", "plan s"], lines


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "graphopt")
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--sublayers", action="store_true", help="greedy on sublayers too")
    options = parser.parse_args()
    setup()
    seen, unseen = texts()
    model = trained(seen, config(LAYERS, WIDTH, TOKENS), options.steps, options.cache)
    generator = torch.Generator().manual_seed(1)
    batches = {
        name: [batch(text, generator, SAMPLES, TOKENS) for _ in range(BATCHES[name])]
        for name, text in (("calibration", seen), ("held out", unseen))
    }
    old: dict[str, list[Row]] = stored("skip_layers", {"layers": [], "sublayers": [], "fold": []})
    names = [name for name in options.strategies if name != "fold"]
    data = [row for row in old["layers"] if row["strategy"] not in names]
    data += rows(model, batches, names, "layers") if names else []
    folds = fold_rows(model, batches) if "fold" in options.strategies else old["fold"]
    sublayers = old["sublayers"]
    if options.sublayers:
        sublayers = rows(model, batches, ["greedy"], "sublayers")
    text = report(data, sublayers, folds, evaluations())
    found = {"layers": data, "sublayers": sublayers, "fold": folds}
    write("skip_layers", "Quality without layers", found, text)


if __name__ == "__main__":
    main()
