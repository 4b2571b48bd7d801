"""Whether a target speed-up is what one gets: prefill and decode, batch 1 and 8.

    python benchmarks/skip_latency.py [--steps 700] [--cache FOLDER]

The model is that of skip_layers.py. `SkipLayers` is given a target; its result and the whole model then
take turns here, apart from the pass, and the median ratio of their times is the speed-up. A target is
met where this is at least 95 % of it; layers are whole, so that it may be more.
"""

import argparse
import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from byte_models import batch, config, texts, trained
from harness import interleaved, note, setup, table, write
from skip_layers import LAYERS, STEPS, TOKENS, WIDTH
from torch import Tensor

from graphopt import PlanError, SkipLayers, optimize

TARGETS, BATCHES, PHASES = (1.2, 1.5, 2.0), (1, 8), ("prefill", "decode")
ROUNDS = 60


def step(model: Any, ids: Tensor, phase: str) -> Callable[[], Any]:
    """One forward of the text, or of one token behind it: 16 of them, each with its own cache."""
    if phase == "prefill":
        return lambda: model(input_ids=ids, use_cache=False)
    past = model(input_ids=ids, use_cache=True).past_key_values
    last = ids[:, -1:]

    def decode() -> None:
        own = copy.deepcopy(past)
        for _ in range(16):
            model(input_ids=last, past_key_values=own, use_cache=True)

    return decode


def row(model: Any, ids: Tensor, phase: str, target: float) -> dict[str, Any]:
    """What the pass removed for a target, and the speed-up as timed here."""
    found: dict[str, Any] = {"phase": phase, "batch": len(ids), "target": target}
    pass_ = SkipLayers(target_speedup=target, phase=phase, calibration=[ids], strategy="block_influence")
    try:
        short: Any = optimize(model, passes=[pass_])
    except PlanError as error:
        return found | {"refused": str(error)}
    plan = short.report.steps[0].plan
    with torch.no_grad():
        ratio = interleaved(step(short, ids, phase), step(model, ids, phase), ROUNDS)
    found |= {"removed": list(plan.removed), "predicted": plan.speedup, "speedup": ratio.median}
    found |= {"low": ratio.low, "high": ratio.high, "seconds": ratio.a_seconds}
    found["whole_seconds"] = ratio.b_seconds
    return found | {"met": ratio.median >= 0.95 * target}


def report(data: list[dict[str, Any]]) -> str:
    """One line for each phase, batch and target."""
    head = ["step", "batch", "target", "removed", "predicted", "measured (quartiles)", "ms", "met"]
    lines = []
    for r in data:
        start = [r["phase"], r["batch"], r["target"]]
        if "refused" in r:
            lines.append([*start, r["refused"], "", "", "", "refused"])
            continue
        measured = f"{r['speedup']:.2f} ({r['low']:.2f} to {r['high']:.2f})"
        times = f"{1e3 * r['whole_seconds']:.2f} to {1e3 * r['seconds']:.2f}"
        removed = " ".join(map(str, r["removed"]))
        lines.append([*start, removed, f"{r['predicted']:.2f}", measured, times, r["met"]])
    return table(head, lines)


def main() -> None:
    """All targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "graphopt")
    options = parser.parse_args()
    setup()
    seen, _ = texts()
    model = trained(seen, config(LAYERS, WIDTH, TOKENS), options.steps, options.cache)
    generator = torch.Generator().manual_seed(1)
    data = []
    for phase, samples, target in itertools.product(PHASES, BATCHES, TARGETS):
        data.append(row(model, batch(seen, generator, samples, TOKENS), phase, target))
        note(str(data[-1]))
    write("skip_latency", "Target speed-ups and what is measured", data, report(data))


if __name__ == "__main__":
    main()
