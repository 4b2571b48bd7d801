"""Offloaded values in the order as captured, and in that of `OverlapComm`: waiting, time, memory.

    python benchmarks/offload_overlap.py [--rounds 11] [--depth 8] [--rows 1024] [--budgets 0.5,0.35]

One thread; the stack of `offload.py`. `OffloadSaved` takes the step to a share of its plain peak by a
file, behind a channel of so many GB/s or as fast as it is; what operators take is measured first. "as
offloaded" is the order that it makes, which `OverlapComm` captures; "planned" is that of `OverlapComm` in
no more memory, "with a quarter more" in that. All take turns, a step each, after two that do not count.
Waiting is what the thread that computes spends in waits for the channel: the exposed time of transfers.
"""

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from harness import megabytes, note, setup, table, write
from offload import Stack
from torch import Tensor, nn

import graphopt
from graphopt import OffloadSaved, OverlapComm
from graphopt.measurement import measure
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.passes.transfer_thread import Request

WAYS = ("as offloaded", "planned", "with a quarter more")


@contextmanager
def waits() -> Iterator[list[float]]:
    """The seconds of each wait for a channel."""
    found: list[float] = []
    plain = Request.wait

    def timed(request: Request) -> None:
        begin = time.perf_counter()
        plain(request)
        found.append(time.perf_counter() - begin)

    Request.wait = timed  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Request.wait = plain  # type: ignore[method-assign]


def optimized(model: nn.Module, x: Tensor, passes: list[Any]) -> tuple[Any, Any]:
    """A copy of the model that ran twice, and the record of its graph."""
    ours = graphopt.optimize(copy.deepcopy(model), passes=passes, profile=True)
    for _ in range(2):
        ours(x).backward()
        ours.zero_grad()
    return ours, ours._graphopt.log.records[-1]


def built(model: nn.Module, x: Tensor, pass_: OffloadSaved) -> tuple[dict[str, Any], OverlapPlan, Any]:
    """The step of each way, the plan of the second, and the record of the first's graph."""
    found: dict[str, Any] = {}
    found[WAYS[0]], first = optimized(model, x, [pass_])
    found[WAYS[1]], record = optimized(model, x, [pass_, OverlapComm(memory=1.0)])
    plan = record.steps[-1].plan
    more = OverlapComm(memory=plan.peak_bytes_before * 5 // 4)
    found[WAYS[2]], last = optimized(model, x, [pass_, more])
    return found, (plan, last.steps[-1].plan), first


def row(model: nn.Module, x: Tensor, share: float, rate: float | None, rounds: int) -> dict[str, Any]:
    """What each way takes and holds, as planned and as measured."""
    pass_ = OffloadSaved(memory=share, bytes_per_s=rate, recompute=False)
    steps, plans, first = built(model, x, pass_)
    seconds: dict[str, list[float]] = {way: [] for way in steps}
    waited: dict[str, list[float]] = {way: [] for way in steps}
    expected: list[Tensor] = []
    equal = True
    for number in range(rounds):
        for way, ours in steps.items():
            ours.zero_grad()
            torch.manual_seed(number)
            with waits() as found:
                begin = time.perf_counter()
                ours(x).backward()
                seconds[way].append(time.perf_counter() - begin)
            waited[way].append(sum(found))
            gradients = [p.grad.clone() for p in ours.parameters()]
            expected = gradients if way == WAYS[0] else expected
            equal &= all(map(torch.equal, gradients, expected))
    peaks = {way: measure(lambda o=ours: o(x).backward()).peak_bytes for way, ours in steps.items()}
    plan, more = plans
    exposed = [sum(r[i] for r in p.transfers) for p, i in ((plan, 5), (plan, 6), (more, 6))]  # type: ignore[misc]
    found_row = {
        "budget": share,
        "rate": rate,
        "offloaded_bytes": first.steps[0].plan.offloaded_bytes,
        "transfers": len(plan.transfers),
        "bound": plan.bound_seconds,
        "predicted": dict(zip(WAYS, (plan.seconds_before, plan.seconds, more.seconds), strict=True)),
        "exposed": dict(zip(WAYS, exposed, strict=True)),
        "planned_bytes": dict(
            zip(WAYS, (plan.peak_bytes_before, plan.peak_bytes, more.peak_bytes), strict=True)
        ),
        "static_bytes": first.static_bytes,
        "seconds": {way: statistics.median(s) for way, s in seconds.items()},
        "waiting": {way: statistics.median(s) for way, s in waited.items()},
        "measured_bytes": peaks,
        "equal": equal,
    }
    note(str(found_row))
    note(plan.table())
    return found_row


def lines(r: dict[str, Any]) -> list[list[str]]:
    """The rows of the table for one budget and rate."""
    rate = "file" if r["rate"] is None else f"{r['rate'] / 1e9:g} GB/s"
    found = []
    for way in WAYS:
        planned = r["planned_bytes"][way] - r["static_bytes"]
        found.append(
            [
                f"{r['budget']}, {rate}",
                way,
                f"{megabytes(r['offloaded_bytes'])} in {r['transfers']}",
                f"{1e3 * r['exposed'][way]:.1f}",
                f"{1e3 * r['waiting'][way]:.1f}",
                f"{1e3 * r['predicted'][way]:.1f}",
                f"{1e3 * r['seconds'][way]:.1f}",
                f"{r['predicted'][way] / r['bound']:.3f}",
                megabytes(planned),
                megabytes(r["measured_bytes"][way]),
                r["equal"],
            ]
        )
    return found


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rates", default="0.5,1,0", help="GB/s; 0: as fast as the file is")
    parser.add_argument("--budgets", default="0.5,0.35")
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    setup()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, x = Stack(given.depth, given.width), torch.randn(given.rows, given.width)
    rows = []
    for share in map(float, given.budgets.split(",")):
        for rate in map(float, given.rates.split(",")):
            rows.append(row(model, x, share, 1e9 * rate or None, given.rounds))
            gc.collect()
    head = ["budget, channel", "order", "MB, transfers", "exposed ms", "waiting ms", "predicted ms"]
    head += ["step ms", "/ bound", "planned MB", "measured MB", "equal"]
    text = (
        f"{given.depth} blocks of width {given.width}, {given.rows} rows; medians of {given.rounds} "
        "steps. Exposed and the step are predicted, waiting and the step behind it measured; no order "
        "takes less than the bound of the model. Peaks are without parameters and inputs.\n\n"
    )
    data = {"rows": rows, "depth": given.depth, "width": given.width, "batch": given.rows}
    cells = [line for r in rows for line in lines(r)]
    write("offload_overlap", "Offloaded values in a planned order", data, text + table(head, cells))


if __name__ == "__main__":
    main()
