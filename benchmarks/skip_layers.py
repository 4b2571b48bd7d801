"""Quality against the share of layers removed, for every strategy, with and without compensation.

    python benchmarks/skip_layers.py [--steps 300] [--cache FOLDER]

A small Llama (8 layers) is trained once on the bytes of Python's own library sources; its weights are
kept in the cache folder. Blocks are chosen and projections refitted on files of the training text;
figures are of files that were never seen. Perplexity is per byte, KL divergence in nats per byte.
"""

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from harness import note, setup, table, write
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from graphopt import SkipLayers
from graphopt.passes.blocks import find_stack
from graphopt.passes.compensation import KINDS
from graphopt.passes.layer_trials import LayerTrials
from graphopt.passes.made_up_inputs import as_batch
from graphopt.passes.skip_strategies import STRATEGIES

LAYERS, TOKENS, SAMPLES = 8, 128, 32
REMOVED = (1, 2, 3, 4)
HELD_OUT = 10  # every tenth file
BATCHES = {"calibration": 4, "held out": 8}
CONFIG = LlamaConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=352,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=TOKENS,
    bos_token_id=None,
    eos_token_id=None,
)


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out, from the modules of the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [torch.frombuffer(bytearray(file.read_bytes() or b"\n"), dtype=torch.uint8) for file in files]
    seen = [part for i, part in enumerate(parts) if i % HELD_OUT]
    return torch.cat(seen).long(), torch.cat(parts[::HELD_OUT]).long()


def batch(text: Tensor, generator: torch.Generator) -> Tensor:
    """Random pieces of a text, shape (SAMPLES, TOKENS)."""
    starts = torch.randint(len(text) - TOKENS, (SAMPLES,), generator=generator)
    return torch.stack([text[i : i + TOKENS] for i in starts.tolist()])


def trained(text: Tensor, steps: int, cache: Path) -> LlamaForCausalLM:
    """The model after `steps` steps of AdamW, from the cache where it is there."""
    folder = cache / f"llama-{LAYERS}x{CONFIG.hidden_size}-{steps}"
    if folder.exists():
        return LlamaForCausalLM.from_pretrained(folder).eval()  # type: ignore[no-any-return]
    torch.manual_seed(0)
    model, generator = LlamaForCausalLM(CONFIG), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    begin = time.perf_counter()
    for step in range(steps):
        rate = min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 3e-3 * max(rate, 0.02)
        ids = batch(text, generator)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            note(f"step {step}: loss {loss:.3f}, {time.perf_counter() - begin:.0f} s")
    model.save_pretrained(folder)
    return model.eval()  # type: ignore[no-any-return]


def rows(model: LlamaForCausalLM, batches: dict[str, list[Tensor]]) -> list[dict[str, Any]]:
    """A row for every number of layers, strategy and kind of compensation."""
    calibration = batches["calibration"]
    held_out = [as_batch(ids, model) for ids in batches["held out"]]
    trials = LayerTrials(model, find_stack(model, held_out[0]), held_out)
    found = []
    for count in REMOVED:
        for strategy in STRATEGIES:
            begin = time.perf_counter()
            plan = SkipLayers(remove=count, strategy=strategy, calibration=calibration).plan(model)
            seconds = time.perf_counter() - begin
            for kind in KINDS:
                pass_ = SkipLayers(keep=plan.kept, calibration=calibration, compensation=kind)
                quality = trials.quality(frozenset(), pass_.apply(model, plan))
                row = {"removed": count, "strategy": strategy, "compensation": kind}
                row |= {"layers": list(plan.removed), "kl": quality.kl, "top1": quality.top1}
                row |= {"perplexity": quality.perplexity, "whole_perplexity": quality.whole_perplexity}
                found.append(row | {"plan_seconds": seconds})
                note(f"{count} {strategy} {kind}: {plan.removed} KL {quality.kl:.4f}")
    return found


def report(data: list[dict[str, Any]]) -> str:
    """One table for each number of layers removed."""
    parts = [f"Perplexity of the whole model: {data[0]['whole_perplexity']:.3f} per byte, held out."]
    for count in REMOVED:
        parts.append(f"## {count} of {LAYERS} layers removed ({count / LAYERS:.0%})")
        lines = []
        for strategy in STRATEGIES:
            same = [r for r in data if (r["removed"], r["strategy"]) == (count, strategy)]
            cells = [f"{r['perplexity']:.2f} / {r['kl']:.3f} / {r['top1']:.1%}" for r in same]
            layers = " ".join(map(str, same[0]["layers"]))
            lines.append([strategy, layers, *cells, f"{same[0]['plan_seconds']:.1f}"])
        head = ["strategy", "removed", *(f"{kind}: perplexity / KL / top-1" for kind in KINDS)]
        parts.append(table([*head, "plan s"], lines))
    return "\n\n".join(parts)


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "graphopt")
    options = parser.parse_args()
    setup()
    seen, unseen = texts()
    model = trained(seen, options.steps, options.cache)
    generator = torch.Generator().manual_seed(1)
    batches = {
        name: [batch(text, generator) for _ in range(BATCHES[name])]
        for name, text in (("calibration", seen), ("held out", unseen))
    }
    data = rows(model, batches)
    write("skip_layers", "Quality without layers", data, report(data))


if __name__ == "__main__":
    main()
