"""Speculative decoding of a model with its own layers, beside plain generation and transformers' own.

    python benchmarks/speculative.py [--layers 8] [--width 256] [--steps 700] [--prompts 200]

Two Llamas of the bytes of Python's library (see byte_models.py): one trained with layer dropout and the
losses of early exits, so that its lower layers predict well, and one trained without. Prompts are pieces
of files that were never seen, 24 to 48 bytes long, and 80 bytes are written behind each.

For each model and size of batches the draft is chosen on prompts of the training text, by time: the first
layers, as many as are fastest, or layers that `SkipLayers` keeps. Then every prompt is written by all
methods in turn, alone and in batches of 8 with padding on the left: plain `generate`; speculation with
the length of drafts by expected gain, by AdaSD, and fixed; relaxed acceptance; and transformers' own
`generate(assistant_early_exit=...)`, whose exit is chosen in the same way (it takes no batches).
The speed-up is that of all calls together; "of a call" is the median over calls, with quartiles. "Same"
counts the prompts written exactly as by plain `generate`. Where one is not, "gap" is the difference
between the two best logits at the first other token, relative to the largest logit.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from byte_models import batch, config, texts, trained
from harness import note, setup, table, write
from torch import Tensor

from graphopt import SkipLayers
from graphopt.speculative import SpeculativeDecoder

TOKENS, NEW, SHORTEST, LONGEST = 128, 80, 24, 48
TUNING = 16  # prompts on which drafts are chosen
FIXED = (4, 8)

Write = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A way to generate, and where it counts the decoder whose statistics are kept."""

    name: str
    write: Write
    decoder: SpeculativeDecoder | None = None


def prompts(text: Tensor, count: int, seed: int) -> list[Tensor]:
    """Pieces of a text of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    pieces = batch(text, generator, count, LONGEST)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    return [piece[:length] for piece, length in zip(pieces, lengths, strict=True)]


def padded(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids with zeros on the left, and the mask, each of shape (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(width - len(row)), row]) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width) >= (width - lengths)[:, None]).long()


def generating(call: Any, **options: Any) -> Write:
    """A greedy call of `generate`."""

    def run(ids: Tensor, mask: Tensor) -> Tensor:
        return call(  # type: ignore[no-any-return]
            ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
        )

    return run


def speculation(name: str, model: Any, keep: Sequence[int], **options: Any) -> Method:
    """Our method."""
    decoder = SpeculativeDecoder(model, keep, **options)
    return Method(name, generating(decoder.generate), decoder)


def seconds(write: Write, ids: Tensor, mask: Tensor) -> tuple[float, Tensor]:
    """The time of one call, and what was written."""
    begin = time.perf_counter()
    written = write(ids, mask)
    return time.perf_counter() - begin, written[:, ids.shape[1] :]


def fastest(candidates: dict[Any, Write], groups: Sequence[Sequence[Tensor]]) -> Any:
    """The key of the candidate with the least total time; the candidates take turns."""
    totals = dict.fromkeys(candidates, 0.0)
    for number, group in enumerate([groups[0], *groups]):
        for key, run in candidates.items():
            spent, _ = seconds(run, *padded(group))
            totals[key] += spent if number else 0.0  # the first is to warm up
    return min(totals, key=lambda key: totals[key])


def drafts(model: Any, seen: Tensor) -> list[tuple[int, ...]]:
    """Layers to try as drafts: the first ones, and those that `SkipLayers` keeps."""
    layers = model.config.num_hidden_layers
    calibration = [batch(seen, torch.Generator().manual_seed(2), 16, TOKENS)]
    chosen = {tuple(range(n)) for n in range(1, layers // 2 + 1)}
    for share in (2, 3, 4):
        chooser = SkipLayers(remove=layers - layers // share, calibration=calibration)
        chosen.add(tuple(chooser.plan(model).kept))
    return sorted(chosen, key=lambda keep: (len(keep), keep))


def methods(
    model: Any, tried: Sequence[tuple[int, ...]], groups: Sequence[Sequence[Tensor]]
) -> list[Method]:
    """All ways to generate for batches like `groups`, with the draft that is fastest there."""
    keep = fastest({k: generating(SpeculativeDecoder(model, k).generate) for k in tried}, groups)
    note(f"draft {keep}")
    found = [
        Method("plain", generating(model.generate)),
        speculation(f"speculation, layers {' '.join(map(str, keep))}", model, keep),
        speculation("by AdaSD's length", model, keep, length="adasd"),
        *(speculation(f"{n} tokens a draft", model, keep, length=n) for n in FIXED),
        speculation("relaxed acceptance", model, keep, relaxed=True),
    ]
    if len(groups[0]) > 1:
        return found  # the assistant of transformers takes no batches
    exits = range(1, model.config.num_hidden_layers // 2 + 1)
    best = fastest({n: generating(model.generate, assistant_early_exit=n) for n in exits}, groups)
    own = generating(model.generate, assistant_early_exit=best)
    return [*found, Method(f"assistant_early_exit={best}", own)]


def grouped(pieces: Sequence[Tensor], size: int) -> list[Sequence[Tensor]]:
    """Batches of `size` prompts."""
    return [pieces[i : i + size] for i in range(0, len(pieces), size)]


def gap(model: Any, ids: Tensor, mask: Tensor, plain: Tensor, other: Tensor) -> float:
    """How far the two best tokens are apart where two texts of a row first differ, relative."""
    at = int((plain != other).nonzero()[0, 0])
    text = torch.cat([ids[mask.bool()], plain[:at]])[None]
    with torch.no_grad():
        logits = model(text).logits[0, -1]
    best = logits.topk(2).values
    return float((best[0] - best[1]) / logits.abs().max())


def measured(
    model: Any, ways: Iterable[Method], groups: Sequence[Sequence[Tensor]]
) -> list[dict[str, Any]]:
    """A row per method: speed-up over the first, texts that are the same, what was drafted."""
    counts = ("same", "drafted", "accepted", "relaxed")
    rows: dict[str, dict[str, Any]] = {
        way.name: {"method": way.name, "seconds": [], "gaps": [], "lengths": []}
        | dict.fromkeys(counts, 0)
        for way in ways
    }
    for number, group in enumerate(groups):
        ids, mask = padded(group)
        plain: Tensor | None = None
        for way in ways:
            spent, written = seconds(way.write, ids, mask)
            plain = written if plain is None else plain
            row = rows[way.name]
            row["seconds"].append(spent)
            for i in range(len(group)):
                if torch.equal(written[i], plain[i]):
                    row["same"] += 1
                else:
                    row["gaps"].append(gap(model, ids[i], mask[i], plain[i], written[i]))
            if way.decoder is not None and (found := way.decoder.statistics) is not None:
                for name in counts[1:]:
                    row[name] += getattr(found, name)
                row["lengths"] += found.draft_lengths
        if number % 20 == 0:
            note(f"{number} of {len(groups)}")
    return [summary(row, rows["plain"]["seconds"]) for row in rows.values()]


def summary(row: dict[str, Any], plain: Sequence[float]) -> dict[str, Any]:
    """Medians and shares in place of lists."""
    ratios = [a / b for a, b in zip(plain, row["seconds"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    lengths = row.pop("lengths")
    gaps = row.pop("gaps")
    return row | {
        "total_speedup": sum(plain) / sum(row["seconds"]),
        "seconds": statistics.median(row["seconds"]),
        "speedup": statistics.median(ratios),
        "low": low,
        "high": high,
        "greatest_gap": max(gaps, default=None),
        "draft_length": statistics.mean(lengths) if lengths else None,
        "verifications": len(lengths),
    }


def line(row: dict[str, Any], prompts: int) -> list[str]:
    """One row of a table."""
    drafted = row["drafted"]
    return [
        row["method"],
        f"{1e3 * row['seconds']:.0f}",
        f"{row['total_speedup']:.2f}",
        f"{row['speedup']:.2f} ({row['low']:.2f}-{row['high']:.2f})",
        f"{row['same']} of {prompts}",
        "" if row["greatest_gap"] is None else f"{row['greatest_gap']:.1e}",
        f"{(row['accepted'] + row['relaxed']) / drafted:.0%}" if drafted else "",
        f"{row['draft_length']:.2f}" if row["draft_length"] else "",
    ]


def report(data: list[dict[str, Any]], prompts: int) -> str:
    """A table for each model and size of batches."""
    head = ["method", "median ms", "speed-up", "of a call", "same", "gap", "accepted", "draft length"]
    parts = []
    for part in data:
        parts.append(f"## {part['model']}, batches of {part['batch']}")
        parts.append(table(head, [line(row, prompts) for row in part["rows"]]))
    return "\n\n".join(parts)


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "graphopt")
    options = parser.parse_args()
    setup()
    seen, unseen = texts()
    pieces = prompts(unseen, options.prompts, seed=3)
    data = []
    for exits in (True, False):
        shape = config(options.layers, options.width, TOKENS)
        model: Any = trained(seen, shape, options.steps, options.cache, exits)
        tried, tuning = drafts(model, seen), prompts(seen, TUNING, seed=1)
        kind = "Trained with layer dropout and early exits" if exits else "Trained as usual"
        for size in (1, 8):
            ways = methods(model, tried, grouped(tuning, size)[:8])
            rows = measured(model, ways, grouped(pieces, size))
            data.append({"model": kind, "batch": size, "layers": options.layers, "rows": rows})
    write("speculative", "Speculative decoding", data, report(data, options.prompts))


if __name__ == "__main__":
    main()
