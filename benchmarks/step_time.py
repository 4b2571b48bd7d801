"""Step time at equal memory: graphopt at each checkpointing peer's own measured peak.

    python benchmarks/step_time.py [--models gpt2,llama,bert,t5,vit] [--rounds 21] [--inductor]

Each model has a fresh process. The peer's peak is measured; ours is planned for that peak; then both
run in turn on the same batch, peer ours peer ours, after three rounds that warm up. Below 1 ours is
faster. Run it on a quiet machine.
"""

import argparse
import time
from typing import Any

from harness import (
    answer,
    build,
    fresh,
    interleaved,
    megabytes,
    note,
    peak_of,
    prediction,
    run_step,
    setup,
    spawned,
    stored,
    table,
    write,
)
from peers import Peer, eager_flops, running

import graphopt

MODELS = ("gpt2", "llama", "bert", "t5", "vit")
BAR = 1.02
WARM = 3


def pairs(inductor: bool) -> list[tuple[Peer, str]]:
    """Each peer, and the compiler that ours runs with beside it."""
    if inductor:
        return [(Peer("inductor", every=1), "inductor")]
    return [(Peer(every=1), "eager"), (Peer(every=2), "eager")]


def static_bytes(model: Any, batch: Any) -> int:
    """Parameters, buffers and inputs, as plans count them."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [v for v in batch.values() if hasattr(v, "untyped_storage")]
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


def compare(name: str, peer: Peer, compiler: str, rounds: int) -> dict[str, Any]:
    """One pair: the peer's peak, ours planned for it, and their times in turn."""
    model, batch = build(name)
    row: dict[str, Any] = {"model": name, "peer": str(peer), "compiler": compiler}
    fresh()
    with running(peer, model) as ready:
        theirs = peak_of(ready.module, batch)
        row["peer_peak"] = theirs.peak
        if not peer.compiler:
            base = eager_flops(lambda: run_step(model, batch))
            total = eager_flops(lambda: run_step(ready.module, batch))
            row["peer_flops"] = total - base
        budget = static_bytes(model, batch) + theirs.peak
        ours = graphopt.optimize(model, memory=budget, compiler=compiler)
        mine = peak_of(ours, batch)
        row["our_peak"], row["our_flops"] = mine.peak, prediction(ours)["recompute_flops"]
        ratio = interleaved(
            lambda: run_step(ready.module, batch), lambda: run_step(ours, batch), rounds, warm=WARM
        )
    return row | vars(ratio)


def worker(name: str, inductor: bool, rounds: int) -> list[dict[str, Any]]:
    """All pairs of one model; a pair that fails says why."""
    setup()
    rows = []
    for peer, compiler in pairs(inductor):
        begin = time.perf_counter()
        try:
            rows.append(compare(name, peer, compiler, rounds))
        except Exception as error:
            why = f"{type(error).__name__}: {str(error)[:160]}"
            rows.append({"model": name, "peer": str(peer), "compiler": compiler, "error": why})
        note(f"{name} {peer}: {rows[-1]} ({time.perf_counter() - begin:.0f} s)")
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """The ratios, with their spread, against the bar."""
    head = ["model", "peer", "peer MB", "ours MB", "peer s", "ours s", "ours/peer", "quartiles"]
    lines, met = [], 0
    for row in rows:
        if "error" in row:
            lines.append([row["model"], row["peer"], row["error"].replace("|", "/"), *[None] * 7])
            continue
        met += (ok := row["median"] <= BAR)
        peaks = [megabytes(row["peer_peak"]), megabytes(row["our_peak"])]
        spread = [f"{row['median']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}"]
        seconds = [row["a_seconds"], row["b_seconds"]]
        lines.append([row["model"], row["peer"], *peaks, *seconds, *spread, row["rounds"], ok])
    text = table([*head, "rounds", f"<= {BAR}"], lines)
    return f"{text}\n\nBar {BAR} met by {met} of {len(rows)} pairs."


def main() -> None:
    """Each model in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--rounds", type=int, default=21, help="at least 15 for a figure to quote")
    parser.add_argument("--inductor", action="store_true", help="compiled pairs instead of eager")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        found = worker(options.worker, options.inductor, options.rounds)
        answer(found)
        return
    setup()
    flags = ["--inductor"] if options.inductor else []
    rows = stored("step_time", [])
    for name in options.models.split(","):
        found = spawned(__file__, ["--worker", name, "--rounds", str(options.rounds), *flags])
        if isinstance(found, dict):
            found = [{"model": name, "peer": "all", **found}]
        kinds = {(r["model"], r["peer"]) for r in found}
        rows = [r for r in rows if (r["model"], r["peer"]) not in kinds] + found
        rows.sort(key=lambda r: (r["peer"], r["model"]))
        write("step_time", "Step time at equal memory", rows, report(rows))


if __name__ == "__main__":
    main()
