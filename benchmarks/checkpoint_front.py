"""Memory against recomputation: graphopt and every peer on the same steps.

    python benchmarks/checkpoint_front.py --models gpt2,llama,unet [--quick]

Each model has a process of its own, in which all its points are measured: the peak of one step from
the allocator's events (after two that warm up), the FLOPs that are computed again, and the time of
interleaved steps against eager. Results of models that are not named are kept.
"""

import argparse
import math
import re
import time
from typing import Any

from front_tables import CONVOLUTIONAL, front_text
from harness import (
    answer,
    build,
    environment,
    fresh,
    interleaved,
    note,
    peak_of,
    prediction,
    resident_peak_of,
    run_step,
    setup,
    spawned,
    stored,
    write,
)
from peers import Peer, eager_flops, peers, running

import graphopt
from graphopt import Checkpoint, GraphoptError, PlanError, StreamBlocks

TRANSFORMERS = ("gpt2", "llama", "bert", "t5", "vit", "swin", "mixtral", "whisper")
MODELS = (*TRANSFORMERS, *CONVOLUTIONAL)
RESIDENT = ("eager", "checkpoint", "graphopt min")


def peer_point(peer: Peer, model: Any, batch: Any, eager_total: int, rounds: int) -> dict[str, Any]:
    """One peer's peak, recomputation and time."""
    point: dict[str, Any] = {"label": str(peer), "kind": peer.kind, "compiler": peer.compiler}
    fresh()
    try:
        wanted = run_step(model, batch)
        with running(peer, model) as ready:
            if not math.isclose(found := run_step(ready.module, batch), wanted, rel_tol=1e-5):
                raise GraphoptError(f"the loss is {found}, not {wanted}")
            peak = peak_of(ready.module, batch)
            if peer.compiler:
                point |= {"graphs": len(ready.counts), "recomputed_flops": ready.recomputed_flops}
                point["joint_flops"] = sum(before for before, _ in ready.counts)
            else:
                total = eager_flops(lambda: run_step(ready.module, batch))
                point["recomputed_flops"] = total - eager_total
            point |= vars(peak) | timed(model, ready.module, batch, rounds)
    except Exception as error:
        point["error"] = f"{type(error).__name__}: {str(error)[:160]}"
    return point


def our_point(label: str, model: Any, batch: Any, rounds: int, **options: Any) -> dict[str, Any]:
    """One plan of graphopt: predicted, measured, counted, timed."""
    point: dict[str, Any] = {"label": label, "kind": "graphopt"}
    point |= {"options": {k: str(v) if k == "passes" else v for k, v in options.items()}}
    fresh()
    try:
        begin = time.perf_counter()
        ours = graphopt.optimize(model, **options)
        run_step(ours, batch)
        point["first_call_seconds"] = time.perf_counter() - begin
        found = peak_of(ours, batch)
        point |= prediction(ours)
        point |= vars(found) | timed(model, ours, batch, rounds)
    except PlanError as error:
        point["error"] = f"PlanError: {str(error)[:160]}"
        point["reachable_bytes"] = getattr(error, "reachable_bytes", None)
        return point
    except Exception as error:
        point["error"] = f"{type(error).__name__}: {str(error)[:160]}"
        return point
    point["recomputed_flops"] = point.pop("recompute_flops")
    bounded = point["budget_bytes"] is not None and "activations" not in options
    point["within"] = found.peak + point["static_bytes"] <= point["budget_bytes"] if bounded else None
    return point


def timed(model: Any, module: Any, batch: Any, rounds: int) -> dict[str, Any]:
    """Time of `module` over eager, interleaved."""
    if not rounds or model is module:
        return {}
    ratio = interleaved(lambda: run_step(model, batch), lambda: run_step(module, batch), rounds, warm=1)
    return {"time": vars(ratio)}


def worker(name: str, quick: bool, rounds: int, wanted: str) -> dict[str, Any]:
    """All points of one model."""
    setup()
    model, batch = build(name)
    run_step(model, batch)
    total = eager_flops(lambda: run_step(model, batch))
    points: list[dict[str, Any]] = []

    def keep(point: dict[str, Any]) -> dict[str, Any]:
        points.append(point)
        shown = point.get("error") or f"{point['peak'] / 1e6:.1f} MB {point['recomputed_flops']}"
        note(f"{name} {point['label']}: {shown} ({time.perf_counter() - begin:.0f} s)")
        return point

    begin = time.perf_counter()
    keep(peer_point(Peer(), model, batch, total, 0))
    for peer in (p for p in peers(quick) if re.fullmatch(wanted, str(p))):
        few = 0 if quick and peer.kind == "partitioner" else rounds
        keep(peer_point(peer, model, batch, total, few))
    theirs = [p for p in points if "peak" in p]
    first = keep(our_point("graphopt", model, batch, rounds))
    keep(our_point("graphopt min", model, batch, rounds, memory="min"))
    passes = [StreamBlocks(memory="min"), Checkpoint(memory="min")]
    keep(our_point("graphopt streamed min", model, batch, rounds, passes=passes))
    keep(our_point("graphopt activations min", model, batch, rounds, activations="min"))
    if compiles_with_inductor() and re.fullmatch(wanted, "inductor + checkpoint"):
        for label, options in (("", {}), (" min", {"memory": "min"})):
            label = f"graphopt inductor{label}"
            keep(our_point(label, model, batch, rounds, compiler="inductor", **options))
    if "static_bytes" in first:
        for peak in distinct(sorted({p["peak"] for p in theirs}), 0.005 if quick else 0.0):
            budget = first["static_bytes"] + peak
            point = keep(our_point(f"graphopt at {peak / 1e6:.1f} MB", model, batch, 0, memory=budget))
            point["peer_peak"] = peak
    found = {"eager_flops": total, "points": points, "environment": environment()}
    return found | {"quick": quick, "peers": wanted}


def compiles_with_inductor() -> bool:
    """True where this graphopt can hand its graphs to Inductor."""
    from importlib.util import find_spec

    return find_spec("graphopt.inductor") is not None


def distinct(peaks: list[int], tolerance: float) -> list[int]:
    """`peaks`, ascending, without those that lie within `tolerance` above the one before."""
    found: list[int] = []
    for peak in peaks:
        if not found or peak > found[-1] * (1 + tolerance):
            found.append(peak)
    return found


def resident(name: str, label: str) -> dict[str, Any]:
    """Peak by the allocator's events, and by the operating system, in this (fresh) process."""
    setup()
    model, batch = build(name)
    fitted = {"eager": Peer(), "checkpoint": Peer(every=1)}
    if label in fitted:
        with running(fitted[label], model) as ready:
            return _both(ready.module, batch)
    return _both(graphopt.optimize(model, memory="min"), batch)


def _both(module: Any, batch: Any) -> dict[str, Any]:
    grown = resident_peak_of(module, batch)
    return {"events": peak_of(module, batch).peak, "resident": grown}


def one_model(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Every point of one model, and the check against resident memory."""
    flags = ["--quick"] if options.quick else []
    flags += ["--rounds", str(options.rounds), "--peers", options.peers]
    found = spawned(__file__, ["--worker", name, *flags])
    low = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    found["resident"] = {
        label: spawned(__file__, ["--worker", name, "--resident", label], low) for label in RESIDENT
    }
    return found


def main() -> None:
    """Each model in its own process; then the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--quick", action="store_true", help="fewer solvers, no Inductor budgets")
    parser.add_argument("--rounds", type=int, help="timed pairs of steps per point; 0 for none")
    parser.add_argument("--peers", default=".*", help="only those whose whole label this matches")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--resident", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds is None:
        options.rounds = 3 if options.quick else 9
    if options.worker:
        found = (
            resident(options.worker, options.resident)
            if options.resident
            else worker(options.worker, options.quick, options.rounds, options.peers)
        )
        answer(found)
        return
    setup()
    for name in options.models.split(","):
        found = one_model(name, options)
        data = stored("checkpoint_front", {}) | {name: found}
        write("checkpoint_front", "Memory against recomputation", data, front_text(data))


if __name__ == "__main__":
    main()
