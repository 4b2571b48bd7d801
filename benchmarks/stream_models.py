"""What streaming the loss does to the peak of a training step: every language model of the zoo.

    python benchmarks/stream_models.py [--models gpt2,bert] [--compilers eager,inductor]

Small zoo models (two layers, 64 wide) on 4 samples of 64 tokens, with a vocabulary that dominates them,
as in many models that are trained. Peaks are of the step, above parameters, buffers and batch; with
`Checkpoint` it is the least reachable one. "off" is how far a prediction of the whole step's peak lies
from the measurement. Under "inductor" plain is `torch.compile`. Each model has a process of its own.
Results of models and compilers that are not named are kept.
"""

import argparse
from typing import Any

import torch
from harness import (
    Size,
    answer,
    build,
    fresh,
    megabytes,
    note,
    peak_of,
    records,
    replaced,
    run_step,
    setup,
    spawned,
    stored,
    table,
    write,
)

import graphopt
from graphopt import Checkpoint, StreamLoss, zoo

FAMILIES = ("causal-lm", "masked-lm", "seq2seq", "speech")
MODELS = tuple(name for name, entry in zoo.ENTRIES.items() if entry.family in FAMILIES)
WAYS = {
    "stream": (StreamLoss(returns="lazy", memory="min"),),
    "checkpoint": (Checkpoint(memory="min"),),
    "both": (StreamLoss(returns="lazy", memory="min"), Checkpoint(memory="min")),
}
BAR = 0.02


def compare(name: str, vocabulary: int, compiler: str) -> dict[str, Any]:
    """Peaks of one model: plain, and each way."""
    model, batch = build(name, Size({"vocab_size": vocabulary}, 4, 64))
    row: dict[str, Any] = {"model": name, "compiler": compiler, "vocabulary": vocabulary}
    loss = run_step(model, batch)
    plain = model if compiler == "eager" else torch.compile(model, dynamic=False)
    row["plain"] = {"peak": peak_of(plain, batch).peak}
    for way, passes in WAYS.items():
        fresh()
        ours = graphopt.optimize(model, passes=passes, compiler=compiler)
        error = abs(run_step(ours, batch) - loss) / loss
        peak = peak_of(ours, batch).peak
        planned = [r for r in records(ours) if r.before.is_joint][-1]
        static = planned.static_bytes
        predicted = planned.compiled_peak_bytes or planned.steps[-1].plan.peak_bytes
        off = predicted / (static + peak) - 1
        plan = [list(head) for head in getattr(planned.steps[0].plan, "heads", ())]
        row[way] = {"peak": peak, "off": off, "loss": error, "plan": plan}
        note(f"{name} {compiler} {way}: {row[way]}")
    return row


def report(rows: list[dict[str, Any]]) -> str:
    """One line for each model and compiler, and for each compiler what holds."""
    head = ["model", "compiler", "plain MB", "StreamLoss", "off", "Checkpoint min", "off", "both", "off"]
    lines = []
    for row in rows:
        cells = [row["compiler"], megabytes(row["plain"]["peak"])]
        for way in WAYS:
            cells += [megabytes(row[way]["peak"]), f"{row[way]['off']:+.2%}"]
        plan = ", ".join(f"{variant} {block}" for _, variant, block in row["both"]["plan"]) or "plain"
        lines.append([row["model"], *cells, plan])
    compilers = dict.fromkeys(row["compiler"] for row in rows)
    found = [verdict(c, [r for r in rows if r["compiler"] == c]) for c in compilers]
    return "\n\n".join([table([*head, "way"], lines), *found])


def verdict(compiler: str, rows: list[dict[str, Any]]) -> str:
    """How many models are matched, gain, and are predicted."""
    streamed = [r for r in rows if r["stream"]["plan"]]
    fallen = [r for r in rows if r["both"]["peak"] < r["checkpoint"]["peak"]]
    close = [r for r in rows if max(abs(r[way]["off"]) for way in WAYS) <= BAR]
    return (
        f"{compiler}: {len(streamed)} of {len(rows)} are matched; the least reachable peak "
        f"of {len(fallen)} falls; predictions are within {BAR:.0%} for {len(close)}."
    )


def main() -> None:
    """Each model in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--compilers", default="eager,inductor")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    setup()
    if options.worker:
        answer(compare(options.worker, options.vocabulary, options.compilers))
        return
    rows = stored("stream_models", [])
    for name in options.models.split(","):
        found = []
        for compiler in options.compilers.split(","):
            given = ["--vocabulary", str(options.vocabulary), "--compilers", compiler]
            found.append(spawned(__file__, ["--worker", name, *given]))
            if "error" in found[-1]:
                raise SystemExit(f"{name}, {compiler}: {found[-1]['error']}")
        measured = {r["compiler"] for r in found}
        others = [r for r in rows if r["model"] == name and r["compiler"] not in measured]
        rows = replaced(rows, [*others, *found])
        write("stream_models", "Streamed losses of language models", rows, report(rows))


if __name__ == "__main__":
    main()
