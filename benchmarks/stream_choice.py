"""Does the cost model of `StreamLoss` choose well? Every way to stream a loss, predicted and timed.

    python benchmarks/stream_choice.py [--rounds 5] [--shapes 0,3]

One thread. For each (N tokens, D hidden, V words) all candidates of the pass, plain among them, run as
forward and backward of one linear projection and cross-entropy, in turn, round by round; seconds are CPU
time, the least of the rounds. A cell is a shape with a budget: a place between the peak of plain and the
least one. It holds where the choice takes at most 5 % longer than the fastest that was eligible.
Results of shapes that are not named are kept, so the predictions of a changed model need new runs.
"""

import argparse
import time
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from harness import answer, fresh, note, setup, spawned, stored, table, write
from torch import Tensor, nn

import graphopt
from graphopt import Program, StreamLoss
from graphopt.cost_models.calibrate import calibrated_cpu
from graphopt.cost_models.costs import Costs
from graphopt.passes.loss_choice import Candidate, best, candidates, eligible, plain_candidate
from graphopt.passes.loss_rewrite import streamed
from graphopt.passes.stream_loss import StreamLossPlan

SHAPES = (
    (256, 128, 8192),
    (256, 512, 16384),
    (512, 256, 8192),
    (512, 256, 32000),
    (512, 768, 16384),
    (1024, 128, 16384),
    (1024, 256, 50257),
    (1024, 512, 8192),
    (2048, 256, 16384),
    (2048, 512, 32000),
)
# Where between the least peak (0) and that of plain (1) the budget lies; None is the default of the pass.
BUDGETS = (None, 0.5, 0.15)
BAR = 1.05


class Projection(nn.Module):
    """The cross-entropy of a projection of x (N, D) onto V words."""

    def __init__(self, d: int, v: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(v, d) / d**0.5)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, self.weight), targets)


def programs_of(program: Program, costs: Costs) -> list[tuple[Candidate, Program]]:
    """Every candidate of the pass, plain first, and the program that it makes."""
    base = streamed(program)
    plain = plain_candidate(program, costs)
    tried = [plain, *candidates(base, costs, None, None, False, True)]
    way = StreamLoss()
    found = []
    for candidate in tried:
        rest = (False, True, "logits", (), None, candidate.peak_bytes, plain.peak_bytes)
        plan = StreamLossPlan(candidate.heads, *rest, candidate.seconds, plain.seconds)
        found.append((candidate, way.apply(program, plan)))
    return found


def compare(shape: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    """All candidates of one shape, with their times."""
    n, d, v = shape
    torch.manual_seed(0)
    x, targets = torch.randn(n, d).requires_grad_(), torch.randint(v, (n,))
    model = Projection(d, v)
    program = graphopt.trace(model, (x, targets))
    made = programs_of(program, Costs.of(program, calibrated_cpu()))
    known = {"weight": model.weight.detach(), "x": x.detach(), "targets": targets}
    rows = [asdict(candidate) | {"measured": []} for candidate, _ in made]
    for number in range(rounds + 1):
        for row, (_, ready) in zip(rows, made, strict=True):
            values = [known.get(i.label, torch.ones(())) for i in ready.inputs]
            with torch.no_grad():
                begin = time.process_time()
                ready.module(*values)
                seconds = time.process_time() - begin
            if number:  # the first round warms up
                row["measured"].append(seconds)
    return rows


def cells(shape: tuple[int, int, int], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choice at each budget against the fastest that it could have taken."""
    if not rows:
        return []
    tried, found = [], []
    took: dict[Candidate, float] = {}
    for row in rows:
        heads = tuple(tuple(head) for head in row["heads"])
        tried.append(Candidate(heads, row["peak_bytes"], row["own_bytes"], row["seconds"]))  # type: ignore[arg-type]
        took[tried[-1]] = min(row["measured"])
    least = min(candidate.peak_bytes for candidate in tried)
    for budget in BUDGETS:
        bound = None if budget is None else round(least + budget * (tried[0].peak_bytes - least))
        able, chosen = eligible(tried, None, bound), best(tried, None, bound)
        fastest = min(able, key=took.__getitem__)
        found.append(
            {
                "shape": shape,
                "budget": "default" if budget is None else f"{budget:.0%}",
                "chosen": _name(chosen),
                "fastest": _name(fastest),
                "of": len(able),
                "ratio": took[chosen] / took[fastest],
                "predicted": chosen.seconds / took[chosen],
            }
        )
    return found


def _name(candidate: Candidate) -> str:
    return " ".join(map(str, candidate.heads[0][1:])) if candidate.heads else "plain"


def report(found: dict[str, list[dict[str, Any]]]) -> str:
    """A line for each cell, and how many hold."""
    every = [cell for shape in SHAPES for cell in cells(shape, found.get(_key(shape), []))]
    head = ["N, D, V", "budget", "chosen", "fastest", "of", "chosen / fastest", "predicted / measured"]
    lines = []
    for cell in every:
        shown = [_key(cell["shape"]), cell["budget"], cell["chosen"], cell["fastest"], cell["of"]]
        lines.append([*shown, f"{cell['ratio']:.3f}", f"{cell['predicted']:.2f}"])
    good = sum(cell["ratio"] <= BAR for cell in every)
    worst = max(cell["ratio"] for cell in every)
    return (
        f"{table(head, lines)}\n\n{good} of {len(every)} choices are within {BAR - 1:.0%} of the fastest "
        f"eligible one; the worst takes {worst:.3f} times as long."
    )


def _key(shape: tuple[int, int, int]) -> str:
    return ", ".join(map(str, shape))


def main() -> None:
    """Each shape in its own process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shapes", default=",".join(map(str, range(len(SHAPES)))), help="their numbers")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    setup()
    torch.set_num_threads(1)
    if options.worker is not None:
        answer(compare(SHAPES[options.worker], options.rounds))
        return
    results = stored("stream_choice", {})
    for number in map(int, options.shapes.split(",")):
        fresh()
        found = spawned(__file__, ["--worker", str(number), "--rounds", str(options.rounds)])
        if isinstance(found, dict):
            raise SystemExit(f"{SHAPES[number]}: {found['error']}")
        results[_key(SHAPES[number])] = found
        note(f"{SHAPES[number]}: {len(found)} ways")
        write("stream_choice", "The choice of a way to stream a loss", results, report(results))


if __name__ == "__main__":
    main()
