"""Forward and training step with `Fuse`, beside eager PyTorch and Inductor.

    python benchmarks/fused_models.py [--models llama,gpt2,vit] [--modes forward,step] [--rounds 15]

Each case has a process of its own, on one thread. The peers run in turn on the same batch, round by
round: eager; `torch.compile`; graphopt without `Fuse` (the same passes and order); graphopt with it;
and the fused program in Inductor's hands. Times are medians with quartiles, ratios are medians of the
ratios round by round. Peaks are bytes that the allocator held above what was there before the step. A
forward runs without gradients. Errors are those of the loss, and the largest of a gradient over its
largest element, against float64.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from harness import (
    answer,
    build,
    fresh,
    megabytes,
    note,
    peak_of,
    records,
    run_step,
    spawned,
    stored,
    table,
    write,
)
from torch import nn

import graphopt
from graphopt.measurement import measure

NAME, TITLE = "fused_models", "Fused kernels in whole models"
MODELS = ("llama", "gpt2", "vit")
MODES = ("forward", "step")
PEERS = ("eager", "inductor", "unfused", "fused", "fused + inductor")
BAR = 1.03
WARM = 3
ROUNDING = 1e-12  # a float64 gradient that is no larger is 0 but for rounding


def made(peer: str, model: nn.Module, mode: str) -> nn.Module:
    """`model` as a peer runs it; all share its parameters."""
    if peer == "eager":
        return model
    if peer == "inductor":
        return torch.compile(model, dynamic=False)  # type: ignore[return-value]
    passes: list[Any] = [graphopt.Checkpoint()] if mode == "step" else []
    passes += [graphopt.Fuse()] if peer != "unfused" else []
    compiler = "inductor" if peer.endswith("inductor") else "eager"
    found: nn.Module = graphopt.optimize(model, passes=passes, compiler=compiler)
    return found


def run(module: nn.Module, batch: Mapping[str, Any], mode: str) -> float:
    """One step, or one forward; the loss."""
    if mode == "step":
        return run_step(module, batch)
    with torch.no_grad():
        return float(module(**batch).loss)


def peak(module: nn.Module, batch: Mapping[str, Any], mode: str) -> int:
    """The peak of one run, in bytes."""
    if mode == "step":
        return peak_of(module, batch).peak
    run(module, batch, mode)
    return measure(lambda: run(module, batch, mode)).peak_bytes


def errors(modules: Mapping[str, nn.Module], model: nn.Module, batch: Any, mode: str) -> dict[str, Any]:
    """Of each peer, the error of the loss, and of the worst gradient over its largest element."""
    exact = copy.deepcopy(model).double()
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    loss = run(exact, wide, mode)
    found = {}
    for peer, module in modules.items():
        own: dict[str, Any] = {"loss": abs(run(module, batch, mode) - loss) / abs(loss)}
        if mode == "step":
            pairs = zip(model.parameters(), exact.parameters(), strict=True)
            own["gradient"] = max(
                float((p.grad - e.grad).abs().max() / e.grad.abs().max())
                for p, e in pairs
                if p.grad is not None and e.grad is not None and e.grad.abs().max() > ROUNDING
            )
        found[peer] = own
    return found


def timed(runs: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each peer in each round."""
    seconds: dict[str, list[float]] = {peer: [] for peer in runs}
    for number in range(rounds + WARM):
        for peer, call in runs.items():
            begin = time.perf_counter()
            call()
            if number >= WARM:
                seconds[peer].append(time.perf_counter() - begin)
    return seconds


def case(name: str, mode: str, rounds: int, peers: list[str]) -> dict[str, Any]:
    """One model in one mode."""
    torch.set_num_threads(1)
    fresh()
    model, batch = build(name)
    modules, compile_seconds = {}, {}
    for peer in peers:
        begin = time.perf_counter()
        modules[peer] = made(peer, model, mode)
        run(modules[peer], batch, mode)
        compile_seconds[peer] = time.perf_counter() - begin
    row: dict[str, Any] = {"compile_seconds": compile_seconds}
    row["peaks"] = {peer: peak(module, batch, mode) for peer, module in modules.items()}
    row["errors"] = errors(modules, model, batch, mode)
    row["plan"] = str(records(modules["fused"])[0].steps[-1].plan)
    calls = {peer: (lambda m=module: run(m, batch, mode)) for peer, module in modules.items()}
    seconds = timed(calls, rounds)
    row["rounds"] = rounds
    row["seconds"] = {peer: statistics.quantiles(found, n=4) for peer, found in seconds.items()}
    row["ratios"] = {
        peer: statistics.quantiles(
            [a / b for a, b in zip(seconds["fused"], seconds[peer], strict=True)], n=4
        )
        for peer in peers
        if peer != "fused"
    }
    return row


def shown(rows: list[dict[str, Any]]) -> str:
    """The table of all cases, and how many meet the bar."""
    head = ["model", "mode", *(f"{p}, ms" for p in PEERS)]
    head += ["fused/eager", "fused/inductor", "fused/unfused", "peaks, MB", "error / eager's", "met"]
    cells, met, faster = [], 0, 0
    for row in rows:
        if "error" in row:
            cells.append([row["model"], row["mode"], row["error"], *[None] * (len(head) - 3)])
            continue
        better = min(("eager", "inductor"), key=lambda p: row["seconds"][p][1])
        ratio = row["ratios"][better][1]
        peaks = row["peaks"]
        good = ratio <= BAR and peaks["fused"] <= peaks["unfused"]
        met, faster = met + good, faster + (ratio < 1)
        cells.append(
            [
                *(row["model"], row["mode"]),
                *(_spread(row["seconds"].get(p), 1e3, 1) for p in PEERS),
                *(_spread(row["ratios"][p], 1, 3) for p in ("eager", "inductor", "unfused")),
                " / ".join(megabytes(peaks.get(p)) for p in PEERS),
                _relative_error(row["errors"]),
                good,
            ]
        )
    return (
        f"Peaks are of {', '.join(PEERS)}, in this order.\n\n{table(head, cells)}\n\n"
        f"Bar: within {BAR} of the better of eager and Inductor, and no higher peak than without Fuse: "
        f"met by {met} of {len(rows)}; faster than both: {faster}."
    )


def _spread(quartiles: list[float] | None, scale: float, digits: int) -> str | None:
    if quartiles is None:
        return None
    low, middle, high = (f"{q * scale:.{digits}f}" for q in quartiles)
    return f"{middle} ({low}-{high})"


def _relative_error(errors: Mapping[str, Mapping[str, float]]) -> str:
    kind = "gradient" if "gradient" in errors["eager"] else "loss"
    return f"{errors['fused'][kind]:.1e} / {errors['eager'][kind]:.1e}"


def main() -> None:
    """Measure what the options name, beside what was stored before."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--without", default="", help="peers to leave out, by commas")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        peers = [p for p in PEERS if p not in options.without.split(",")]
        answer(case(*options.case, options.rounds, peers))
        return
    torch.set_num_threads(1)
    rows = stored(NAME, [])
    for name in options.models.split(","):
        for mode in options.modes.split(","):
            variables = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
            arguments = ["--rounds", str(options.rounds), "--without", options.without]
            arguments += ["--case", name, mode]
            found = {"model": name, "mode": mode, **spawned(__file__, arguments, variables)}
            note(f"{name} {mode}: {found}")
            rows = [r for r in rows if (r["model"], r["mode"]) != (name, mode)] + [found]
            rows.sort(key=lambda r: (MODES.index(r["mode"]), MODELS.index(r["model"])))
            write(NAME, TITLE, rows, shown(rows))


if __name__ == "__main__":
    main()
