"""An optimizer's step with a quarter of its state in memory, beside what else can be done with it.

    python benchmarks/optimizer_interleaving.py [--rounds 7] [--folder /dev/shm]

The parameters of a Llama (31 million) and random gradients, one thread. The state is in a file behind a
channel that moves so many GB/s in either direction; the host updates in that file so many million
elements per second (both are throttled: a GPU's host is slower than the GPU, and the cores of one machine
are not). "in memory" is torch's own optimizer; "one by one" fetches, updates and puts back one subgroup
after the other, with nothing resident, and "with residents" does so with those that the plan keeps;
"all on host" updates everything there, overlapped; "rest on host" and "rest on device" are the best plans
in which all that does not stay is updated on one side. All take turns, a step each.
"""

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import megabytes, note, setup, table, write
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from graphopt import OffloadOptimizer, PlanError
from graphopt.cost_models.optimizer_tasks import update_tasks
from graphopt.measurement import measure
from graphopt.passes.offloaded_optimizer import OffloadedOptimizer
from graphopt.passes.optimizer_plan import OffloadOptimizerPlan
from graphopt.passes.overlap_search import schedule

BLOCKS, WIDTH = 4, 768
SHARE = 0.25  # of the whole state: the cap
KINDS: dict[str, Callable[[Any], Optimizer]] = {
    "AdamW": lambda p: AdamW(p, lr=1e-3),
    "SGD": lambda p: SGD(p, lr=1e-3, momentum=0.9),
}
ROWS = (
    ("AdamW", 5e8, 1e8),
    ("AdamW", 5e8, 5e7),
    ("AdamW", 5e8, 2.5e7),
    ("AdamW", 1e9, 1e8),
    ("SGD", 5e8, 1e8),
)
WAYS = (
    "interleaved",
    "one by one",
    "with residents",
    "all on host",
    "rest on host",
    "rest on device",
)


def built() -> nn.Module:
    """The model with random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=WIDTH,
        intermediate_size=2048,
        num_attention_heads=12,
        num_key_value_heads=12,
        num_hidden_layers=BLOCKS,
    )
    return transformers.LlamaForCausalLM(config)


def one_by_one(plan: OffloadOptimizerPlan, resident: int) -> OffloadOptimizerPlan:
    """The subgroups of `plan` with the first ones resident, all updated here, one after the other.

    Fewer are resident where one that visits would not fit beside them.
    """
    places = ["resident"] * resident + ["device"] * (len(plan.places) - resident)
    kinds = {"resident": ("update",), "device": ("fetch", "update", "put", "done")}
    order = [(kind, number) for number, place in enumerate(places) for kind in kinds[place]]
    found = replace(plan, places=tuple(places), order=tuple(order))
    try:
        found.check()
    except PlanError:
        return one_by_one(plan, resident - 1)
    return found


def all_on_host(plan: OffloadOptimizerPlan) -> OffloadOptimizerPlan:
    """The subgroups of `plan`, all updated on the host, in the best order within the memory."""
    places = ("host",) * len(plan.places)
    base = plan.cutting.base_bytes(places)
    graph, steps = update_tasks(plan.cutting.subgroups, places, plan.costs, base)
    found = schedule(graph, memory_bytes=plan.memory_bytes)
    return replace(plan, places=places, order=tuple(steps[task] for task in found.order))


def ways(
    kind: str, channel: float, host: float, model: nn.Module, folder: str
) -> tuple[dict[str, Optimizer], dict[str, nn.Module]]:
    """The optimizer in memory, and all that is compared with it, each with a model of its own."""
    models = {way: copy.deepcopy(model) for way in ("in memory", *WAYS)}
    found = {way: KINDS[kind](m.parameters()) for way, m in models.items()}
    rates: dict[str, Any] = {"bytes_per_s": channel, "host_elements_per_s": host}
    pass_ = OffloadOptimizer(SHARE, folder, **rates)
    plan = pass_.plan(found["interleaved"])
    note(f"{kind}, {channel / 1e9:g} GB/s, {host / 1e6:g} M/s: {plan}")
    plans = {
        "interleaved": (pass_, plan),
        "one by one": (pass_, one_by_one(plan, 0)),
        "with residents": (pass_, one_by_one(plan, plan.places.count("resident"))),
        "all on host": (pass_, all_on_host(plan)),
    }
    for way, share in (("rest on host", 1.0), ("rest on device", 0.0)):
        plans[way] = (pass_, replace(pass_, host_share=share).plan(found[way]))
    for way, (own, chosen) in plans.items():
        found[way] = own.apply(found[way], chosen)
    return found, models


def give_gradients(models: dict[str, nn.Module], seed: int) -> None:
    """The same to all, in place."""
    torch.manual_seed(seed)
    for same in zip(*(m.parameters() for m in models.values()), strict=True):
        same[0].grad = torch.randn_like(same[0]).mul_(0.01)
        for parameter in same[1:]:
            parameter.grad = same[0].grad


def row(
    kind: str, channel: float, host: float, model: nn.Module, folder: str, rounds: int
) -> dict[str, Any]:
    """All ways in turns: medians of seconds, and what the interleaved one holds."""
    optimizers, models = ways(kind, channel, host, model, folder)
    seconds: dict[str, list[float]] = {way: [] for way in optimizers}
    for number in range(rounds + 1):  # the first does not count: pages are touched, momenta begin
        give_gradients(models, number)
        for way, optimizer in optimizers.items():
            begin = time.perf_counter()
            optimizer.step()
            seconds[way].append(time.perf_counter() - begin)
    ours: Any = optimizers["interleaved"]
    plan: OffloadOptimizerPlan = ours.plan
    equal = {
        way: same(optimizers["in memory"], models["in memory"], o, models[way])
        for way, o in optimizers.items()
    }
    held = sum(map(len, ours._store.resident.values())) + measure(ours.step).peak_bytes
    lanes = plan.lane_seconds()
    busiest = max(lanes.values())
    counted = [found[1:] for found in seconds.values()]
    found = {
        "kind": kind,
        "channel": channel,
        "host_rate": host,
        "rounds": rounds,
        "state_bytes": sum(plan.state_bytes),
        "cap_bytes": plan.memory_bytes,
        "planned_peak_bytes": plan.peak_bytes,
        "peak_bytes": held,
        "places": {place: plan.places.count(place) for place in ("resident", "device", "host")},
        "lanes": lanes,
        "contention": dict(plan.contention),
        "predicted": plan.seconds,
        "gap": plan.gap,
        "seconds": {way: statistics.median(s) for way, s in zip(seconds, counted, strict=True)},
        "to_busiest": statistics.median(seconds["interleaved"][1:]) / busiest,
        "worst_to_busiest": max(seconds["interleaved"][1:]) / busiest,
        "equal": all(equal.values()),
    }
    for optimizer in optimizers.values():
        if isinstance(optimizer, OffloadedOptimizer):
            optimizer.close()
    note(str(found))
    return found


def same(expected: Optimizer, first: nn.Module, found: Optimizer, second: nn.Module) -> bool:
    """Whether parameters and state are the same, bit for bit."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        return False
    theirs, ours = expected.state_dict()["state"], found.state_dict()["state"]
    return theirs.keys() == ours.keys() and all(
        torch.equal(value, ours[number][name])
        for number, held in theirs.items()
        for name, value in held.items()
    )


def report(rows: list[dict[str, Any]]) -> str:
    """One line for each pair of rates."""
    head = ["optimizer, GB/s, host M/s", "cap MB", "peak MB", "stay, visit, host", "device, host ms"]
    head += [
        "in, out ms",
        "k: host, in, out",
        "interleaved ms",
        "predicted",
        "/ max (worst)",
        "/ bound",
        *WAYS[1:],
    ]
    head += ["in memory", "equal"]
    lines = []
    lanes = ("host", "host-to-device", "device-to-host")
    for r in rows:
        ms = {way: f"{1e3 * s:.0f}" for way, s in r["seconds"].items()}
        busy = {lane: f"{1e3 * s:.0f}" for lane, s in r["lanes"].items()}
        lines.append(
            [
                f"{r['kind']}, {r['channel'] / 1e9:g}, {r['host_rate'] / 1e6:g}",
                megabytes(r["cap_bytes"]),
                megabytes(r["peak_bytes"]),
                ", ".join(str(count) for count in r["places"].values()),
                f"{busy['compute']}, {busy['host']}",
                f"{busy['host-to-device']}, {busy['device-to-host']}",
                ", ".join(f"{r['contention'][lane]:.2f}" for lane in lanes),
                ms["interleaved"],
                f"{1e3 * r['predicted']:.0f}",
                f"{r['to_busiest']:.3f} ({r['worst_to_busiest']:.3f})",
                f"{r['gap'] * r['seconds']['interleaved'] / r['predicted']:.3f}",
                *(ms[way] for way in (*WAYS[1:], "in memory")),
                r["equal"],
            ]
        )
    return "\n\n".join(
        [
            f"{megabytes(rows[0]['state_bytes'])} MB of AdamW's state; medians of "
            f"{rows[0]['rounds']} rounds.",
            table(head, lines),
            "Busy times (device, host, and the two directions) are those of the plan; max is the largest "
            "of them, and the bound considers what waits for what, and contention k. Equal: parameters "
            "and state of every way are those of torch's optimizer, bit for bit, after all rounds.",
        ]
    )


def main() -> None:
    """All pairs of rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    options = parser.parse_args()
    setup()
    torch.set_num_threads(1)
    model, rows = built(), []
    for kind, channel, host in ROWS:
        rows.append(row(kind, channel, host, model, options.folder, options.rounds))
        gc.collect()
    write("optimizer_interleaving", "Optimizer state behind a channel", {"rows": rows}, report(rows))


if __name__ == "__main__":
    main()
