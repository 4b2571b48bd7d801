"""Linear projection and cross-entropy over a vocabulary: peak memory, time and error, side by side.

    python benchmarks/stream_loss.py [--cases float32,bfloat16,frozen] [--rounds 5] [--large]

One thread. All peers of a case run in one process and in turn, round by round; seconds are the CPU
time of a step (forward and backward), the median of the rounds, after one round that warms up. Peaks
are of the allocator, above x, the weight and the targets. The bound is what every exact method holds in
the end: the gradients of x and of the weight. Errors are those of the gradients against float64, relative
in the Frobenius norm. `--large` adds a case that needs some 13 GB for the plain step: it has no other
peers, no errors and one round; where that much memory is not free, the peak of plain is computed as three
times the logits (they, or their gradient, beside log-probabilities and the gradient of those).
"""

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from harness import answer, fresh, note, setup, spawned, stored, table, write
from torch import Tensor, nn

import graphopt
from graphopt.measurement import measure

MIB = 2**20
LARGE_BELOW = 20  # times that the peak of the large case has to lie below plain
TITLE = "Linear projection and cross-entropy over a vocabulary"


@dataclass(frozen=True)
class Case:
    """N tokens, D hidden, V words; `bars`: most bounds (MiB if frozen), and of the time of plain."""

    dtype: torch.dtype = torch.float32
    frozen: bool = False
    n: int = 2048
    d: int = 512
    v: int = 50257
    bars: tuple[float, float] = (1.25, 0.85)
    brief: bool = False

    @property
    def bound_bytes(self) -> int:
        """The gradients: N D and, if the weight is trained, V D numbers."""
        rows = self.n if self.frozen else self.n + self.v
        return rows * self.d * self.dtype.itemsize

    @property
    def plain_bytes(self) -> int:
        """The peak of plain: log-probabilities, their gradient, and that of the logits."""
        return 3 * self.n * self.v * self.dtype.itemsize


CASES = {
    "float32": Case(),
    "bfloat16": Case(torch.bfloat16, bars=(1.5, 1.1)),
    "frozen": Case(frozen=True, bars=(20.0, 0.7)),
    "large": Case(n=8192, v=128256, brief=True),
}


class Head(nn.Module):
    """The loss of x (N, D) on a vocabulary, by `loss(x, weight, targets)`."""

    def __init__(self, case: Case, loss: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        weight = torch.randn(case.v, case.d) / case.d**0.5
        self.weight = nn.Parameter(weight.to(case.dtype), requires_grad=not case.frozen)
        self.loss = loss

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return self.loss(x, self.weight, targets)


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits, and their cross-entropy."""
    return F.cross_entropy(F.linear(x, weight), targets)


def chunked(rows: int | None) -> Callable[..., Tensor]:
    """The chunked form that PyTorch has from 2.13 on, with chunks of its own or of our choice."""
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows)

    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, targets, options=options)

    return loss


def peers(case: Case) -> dict[str, nn.Module]:
    """What is compared, by name; plain first."""
    found: dict[str, nn.Module] = {"plain": Head(case, plain)}
    if not case.brief:
        found["torch.compile"] = Head(case, plain)
        found["torch.compile"].compile(fullgraph=True, dynamic=False)
    if not case.brief and hasattr(nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy, auto"] = Head(case, chunked(None))
        found["F.linear_cross_entropy, 128 rows"] = Head(case, chunked(128))
    ways = {"StreamLoss()": graphopt.StreamLoss()}
    if not case.brief:
        ways["StreamLoss(memory='min')"] = graphopt.StreamLoss(memory="min")
    return found | {
        name: graphopt.optimize(Head(case, plain), passes=[way]) for name, way in ways.items()
    }


def run_step(module: nn.Module, x: Tensor, targets: Tensor) -> None:
    """Forward and backward; gradients are made anew."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    module(x, targets).backward()


def exact_gradients(case: Case, x: Tensor, targets: Tensor) -> list[Tensor]:
    """The gradients in float64, in parts of the rows."""
    weight = Head(case, plain).weight.detach().double().requires_grad_(not case.frozen)
    wide = x.detach().double().requires_grad_()
    for rows in torch.arange(case.n).split(512):
        (plain(wide[rows], weight, targets[rows]) * (len(rows) / case.n)).backward()
    return [g for g in (wide.grad, weight.grad) if g is not None]


def plan_of(module: nn.Module) -> str | None:
    """How one of ours runs."""
    if not hasattr(module, "_graphopt"):
        return None
    plan = module._graphopt.log.records[-1].steps[0].plan
    return ", ".join(f"{variant} in blocks of {block}" for _, variant, block in plan.heads) or "plain"


def predicted_of(module: nn.Module) -> int | None:
    """The predicted peak of one of ours, less what was there before the step."""
    if not hasattr(module, "_graphopt"):
        return None
    record = module._graphopt.log.records[-1]
    return int(record.steps[-1].plan.peak_bytes - record.static_bytes)


def compare(case: Case, rounds: int) -> list[dict[str, Any]]:
    """Every peer of one case."""
    torch.manual_seed(0)
    x = torch.randn(case.n, case.d).to(case.dtype).requires_grad_()
    targets = torch.randint(case.v, (case.n,))
    exact = [] if case.brief else exact_gradients(case, x, targets)
    fresh()
    rows = []
    modules = peers(case)
    if case.brief and free_bytes() < 1.1 * case.plain_bytes:
        del modules["plain"]
        rows.append({"peer": "plain, computed", "peak": case.plain_bytes, "errors": [], "plan": None})
        rows[0] |= {"predicted": None, "seconds": []}
    for name, module in modules.items():
        errors = [] if case.brief else errors_of(module, x, targets, exact)
        peak = measure(lambda module=module: run_step(module, x, targets)).peak_bytes
        row = {"peer": name, "peak": peak, "errors": errors, "plan": plan_of(module)}
        rows.append(row | {"predicted": predicted_of(module), "seconds": []})
        clear(x, module)
        note(f"{row}")
    for _ in range(1 if case.brief else rounds):
        for row, module in zip(rows[-len(modules) :], modules.values(), strict=True):
            begin = time.process_time()
            run_step(module, x, targets)
            row["seconds"].append(time.process_time() - begin)
            clear(x, module)
    return rows


def errors_of(module: nn.Module, x: Tensor, targets: Tensor, exact: list[Tensor]) -> list[float]:
    """How far the gradients of one step are from `exact`."""
    run_step(module, x, targets)
    found = [g for g in (x.grad, *(p.grad for p in module.parameters())) if g is not None]
    errors = [float((g - e).norm() / e.norm()) for g, e in zip(found, exact, strict=True)]
    clear(x, module)
    return errors


def clear(x: Tensor, module: nn.Module) -> None:
    """Drop all gradients."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    gc.collect()


def free_bytes() -> int:
    """Physical memory that is free (Linux), in bytes."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def report(results: dict[str, list[dict[str, Any]]]) -> str:
    """A table for each case, and whether the bars are met."""
    parts = []
    head = ["", "peak MiB", "x bound", "CPU s", "x plain", "error dX", "error dW", "predicted", "way"]
    for name, rows in results.items():
        case = CASES[name]
        size = f"N={case.n}, D={case.d}, V={case.v}, bound {case.bound_bytes / MIB:.1f} MiB"
        lines = [_cells(case, row, rows[0]) for row in rows]
        parts.append(f"## {name}: {size}\n\n{table(head, lines)}\n\n{verdict(case, rows)}")
    return "\n\n".join(parts)


def _cells(case: Case, row: dict[str, Any], plain: dict[str, Any]) -> list[Any]:
    peak, seconds, share = row["peak"], None, _share(row, plain)
    if row["seconds"]:
        seconds = f"{statistics.median(row['seconds']):.2f}"
    errors = [*(f"{error:.1e}" for error in row["errors"]), None, None][:2]
    shown = [f"{peak / MIB:.1f}", f"{peak / case.bound_bytes:.2f}", seconds]
    predicted = row["predicted"] and f"{row['predicted'] / peak - 1:+.2%}"
    return [row["peer"], *shown, share and f"{share:.2f}", *errors, predicted, row["plan"]]


def _share(row: dict[str, Any], plain: dict[str, Any]) -> float | None:
    """The time of `row` as a part of that of plain; None where one has not run."""
    if not row["seconds"] or not plain["seconds"]:
        return None
    return statistics.median(row["seconds"]) / statistics.median(plain["seconds"])


def verdict(case: Case, rows: list[dict[str, Any]]) -> str:
    """One line: the default plan against its bars."""
    ours = next(r for r in rows if r["peer"] == "StreamLoss()")
    below = rows[0]["peak"] / ours["peak"]
    if case.brief:
        met = "met" if below >= LARGE_BELOW else "NOT met"
        return f"`StreamLoss()` is {below:.1f} times below plain, of {LARGE_BELOW} at least: {met}."
    share = _share(ours, rows[0])
    assert share is not None, "plain runs in every case that is not brief"
    peak = ours["peak"] / (MIB if case.frozen else case.bound_bytes)
    unit = "MiB" if case.frozen else "bounds"
    most, longest = case.bars
    met = "met" if peak <= most and share <= longest else "NOT met"
    return (
        f"Bars for `StreamLoss()`: {peak:.2f} of {most} {unit}, {share:.2f} of {longest} of the plain "
        f"time: {met}. {below:.1f} times below plain."
    )


def main() -> None:
    """Each case in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="float32,bfloat16,frozen")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="N=8192, V=128256 too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    setup()
    torch.set_num_threads(1)
    if options.worker:
        answer(compare(CASES[options.worker], options.rounds))
        return
    names = options.cases.split(",") + (["large"] if options.large else [])
    results = stored("stream_loss", {})
    for name in names:
        found = spawned(__file__, ["--worker", name, "--rounds", str(options.rounds)])
        if isinstance(found, dict):
            raise SystemExit(f"{name}: {found['error']}")
        results = {k: v for k, v in (results | {name: found}).items() if k in CASES}
        ordered = {k: results[k] for k in CASES if k in results}
        write("stream_loss", TITLE, ordered, report(ordered))


if __name__ == "__main__":
    main()
