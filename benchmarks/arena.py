"""Forward and training step with `Arena`, beside eager PyTorch and Inductor, where tensors are large.

    python benchmarks/arena.py [--cases swiglu-forward,swiglu-step,llama-step] [--rounds 9]

Each case has a process of its own. The peers run in turn on the same batch, round by round: eager;
`torch.compile`; graphopt without `Arena` (`Checkpoint` alone in a step); with it; with `keep=False`; and
with a block for everything (`memory="1TB"`). Times are medians with quartiles, ratios are medians of the
ratios round by round. Faults are the minor page faults of the process during a run (`getrusage`), their
median. Peaks are bytes that the allocator held above what was there before the run; a block that is kept
was there, and is given beside them. Results with `Arena` are compared bit for bit with those without.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    Size,
    answer,
    build,
    environment,
    fresh,
    gradients,
    megabytes,
    note,
    peak_of,
    records,
    run_step,
    setup,
    spawned,
    stored,
    table,
    twin,
    write,
)
from torch import Tensor, nn

import graphopt
from graphopt.measurement import measure

NAME, TITLE = "arena", "Steps in one planned block of memory"
CASES = ("swiglu-forward", "swiglu-step", "llama-step")
PEERS = ("eager", "inductor", "without", "arena", "arena, freed", "arena, more memory")
ROWS, WIDTH, HIDDEN = 262144, 64, 256  # tensors of 64 MiB and 256 MiB in float32
WARM = 2
LLAMA = Size(
    {
        "num_hidden_layers": 2,
        "hidden_size": 192,
        "intermediate_size": 2304,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 4096,
    },
    4,
    1024,
)


class Loss:
    """What a model returns: its loss."""

    def __init__(self, loss: Tensor) -> None:
        self.loss = loss


class SwiGLU(nn.Module):
    """A residual block [rows, width] with a gated MLP; its mean square as the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.down(F.silu(self.gate(x)) * self.up(x))).square().mean()


class WithLoss(nn.Module):
    """A module that returns a number, as one that returns an object with a loss."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **batch: Any) -> Loss:
        return Loss(self.inner(**batch))


def model_of(case: str) -> tuple[nn.Module, Mapping[str, Any]]:
    """The model of a case, and its batch."""
    torch.manual_seed(0)
    if case.startswith("swiglu"):
        return SwiGLU(), {"x": torch.randn(ROWS, WIDTH)}
    return build("llama", LLAMA)


def made(peer: str, model: nn.Module, is_step: bool) -> nn.Module:
    """`model` as a peer runs it."""
    if peer == "eager":
        return model
    if peer == "inductor":
        return torch.compile(model, dynamic=False)  # type: ignore[return-value]
    passes: list[Any] = [graphopt.Checkpoint()] if is_step else []
    if peer == "arena, more memory":
        passes.append(graphopt.Arena(memory="1TB"))
    elif peer != "without":
        passes.append(graphopt.Arena(keep=peer == "arena"))
    found: nn.Module = graphopt.optimize(model, passes=passes)
    return found


def run(module: nn.Module, batch: Mapping[str, Any], is_step: bool) -> tuple[float, int]:
    """One step, or one forward: seconds and minor page faults."""
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    begin = time.perf_counter()
    if is_step:
        run_step(module, batch)
    else:
        with torch.no_grad():
            float(module(**batch).loss)
    seconds = time.perf_counter() - begin
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def peak(module: nn.Module, batch: Mapping[str, Any], is_step: bool) -> int:
    """The peak of one run, in bytes."""
    if is_step:
        return peak_of(module, batch, warm=0).peak
    return measure(lambda: run(module, batch, False)).peak_bytes


def results_of(module: nn.Module, batch: Mapping[str, Any], is_step: bool) -> list[Tensor]:
    """The loss, and gradients where there are some."""
    if not is_step:
        with torch.no_grad():
            return [module(**batch).loss]
    return [torch.tensor(run_step(module, batch)), *(g.clone() for g in gradients(module))]


def measured(case: str, rounds: int) -> dict[str, Any]:
    """All peers of one case, in this process."""
    setup()
    fresh()
    model, batch = model_of(case)
    is_step = case.endswith("step")
    peers: dict[str, nn.Module] = {}
    plans: dict[str, Any] = {}
    expected: list[Tensor] = []
    for peer in PEERS:
        own = made(peer, twin(model), is_step)
        peers[peer] = WithLoss(own) if case.startswith("swiglu") else own
        results = results_of(peers[peer], batch, is_step)
        expected = results if peer == "without" else expected
        same = all(map(torch.equal, results, expected)) if peer.startswith("arena") else None
        plans[peer] = _plan(own) | {"same_bits": same}
        note(f"{case}: {peer} is ready")
        if is_step:
            peers[peer].zero_grad(set_to_none=True)
    runs: dict[str, list[tuple[float, int]]] = {peer: [] for peer in PEERS}
    for number in range(WARM + rounds):
        for peer, module in peers.items():
            found = run(module, batch, is_step)
            module.zero_grad(set_to_none=True)
            if number >= WARM:
                runs[peer].append(found)
    base = {other: [s for s, _ in runs[other]] for other in ("eager", "inductor", "without")}
    rows = []
    for peer in PEERS:
        seconds = [s for s, _ in runs[peer]]
        rows.append(
            {
                "peer": peer,
                "seconds": statistics.quantiles(seconds, n=4),
                "faults": statistics.median(f for _, f in runs[peer]),
                "peak_bytes": peak(peers[peer], batch, is_step),
                **{f"of_{o}": _ratio(seconds, others) for o, others in base.items()},
                **plans[peer],
            }
        )
    return {"case": case, "rounds": rounds, "environment": environment(), "peers": rows}


def _plan(module: Any) -> dict[str, Any]:
    """What was planned: the block, the predicted peak above what is there, how much is placed."""
    if not hasattr(module, "_graphopt"):
        return {"block_bytes": 0, "predicted_bytes": None, "placed_bytes": 0}
    record = records(module)[-1]
    plan = record.steps[-1].plan if record.steps else None
    if not hasattr(plan, "placed_bytes"):
        return {"block_bytes": 0, "predicted_bytes": None, "placed_bytes": 0}
    kept = plan.nbytes if plan.keep else 0
    predicted = plan.peak_bytes - record.static_bytes - kept
    return {"block_bytes": kept, "predicted_bytes": predicted, "placed_bytes": plan.placed_bytes}


def _ratio(mine: list[float], others: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, others, strict=True))


def text_of(cases: list[dict[str, Any]]) -> str:
    """The tables."""
    head = ("peer", "ms", "/eager", "/inductor", "/without", "page faults", "peak, MB", "block, MB")
    parts = []
    for case in cases:
        rows = [
            (
                row["peer"],
                "{1:.0f} ({0:.0f}-{2:.0f})".format(*(1e3 * s for s in row["seconds"])),
                *(row[f"of_{o}"] for o in ("eager", "inductor", "without")),
                int(row["faults"]),
                megabytes(row["peak_bytes"]),
                megabytes(row["block_bytes"]),
                megabytes(row["predicted_bytes"]),
                megabytes(row["placed_bytes"]),
                row["same_bits"],
            )
            for row in case["peers"]
        ]
        body = table((*head, "predicted, MB", "in the arena, MB", "same bits"), rows)
        parts.append(f"## {case['case']}\n\n{case['rounds']} rounds.\n\n{body}")
    return "\n\n".join(parts)


def main() -> None:
    """Measure the cases that are asked for, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--case")
    given = parser.parse_args()
    if given.case:
        answer(measured(given.case, given.rounds))
        return
    setup()
    known = {case["case"]: case for case in stored(NAME, [])}
    for case in given.cases.split(","):
        known[case] = spawned(__file__, ["--case", case, "--rounds", str(given.rounds)])
    cases = [known[case] for case in CASES if case in known]
    write(NAME, TITLE, cases, text_of(cases))


if __name__ == "__main__":
    main()
