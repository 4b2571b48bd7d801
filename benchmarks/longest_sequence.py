"""The longest sequence that trains within a budget of memory: a small Llama, four ways.

    python benchmarks/longest_sequence.py [--budget 256] [--grain 64] [--rounds 3] [--times]

One sample, float32, one thread, a vocabulary of 32000. The budget (MB) is for the peak of a step above
parameters and batch, gradients included, as the allocator measured it; every length is run. The ways:

- "plain": transformers' model as it is;
- "per-block": its own checkpointing of each block (`torch.utils.checkpoint`, not reentrant);
- "per-block, chunked loss": the same, and `F.linear_cross_entropy` in chunks, where torch has it;
- "ours": `StreamLoss`, `StreamBlocks` and `Checkpoint(memory=budget)` in one call of `graphopt.optimize`.

The longest length is found by bisection, to `--grain` tokens or 3 %. Step times are of all ways in turn
at the length that per-block reaches, the median of the rounds after one that does not count, and of
each at its own longest; `--times` takes them again at the lengths that the last run found.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from harness import (
    MB,
    answer,
    fresh,
    note,
    peak_of,
    records,
    run_step,
    spawned,
    stored,
    table,
    twin,
    write,
)
from torch import Tensor, nn

import graphopt
from graphopt import Checkpoint, PlanError, StreamBlocks, StreamLoss

BAR = 2.5  # times the longest sequence of per-block checkpointing
VOCABULARY = 32000
OURS, PER_BLOCK = "ours", "per-block"
SHARE = 0.03  # of a length: how closely the longest is found


def llama() -> nn.Module:
    """A Llama of 22 million parameters, 16 of them in the embedding and the projection."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=2**17,
        use_cache=False,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).train()


def batch_of(length: int) -> dict[str, Tensor]:
    """One sample (1, length) that is its own label."""
    ids = torch.randint(VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))
    return {"input_ids": ids, "labels": ids}


class ChunkedLoss(nn.Module):
    """A causal language model whose loss is PyTorch's chunked one; it returns no logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.options = nn.LinearCrossEntropyOptions()

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """The loss of the next words."""
        hidden = self.model.model(input_ids=input_ids).last_hidden_state[0, :-1]
        weight = self.model.lm_head.weight
        loss = F.linear_cross_entropy(hidden, weight, labels[0, 1:], options=self.options)
        return SimpleNamespace(loss=loss)


def _per_block(model: nn.Module) -> nn.Module:
    copy: Any = twin(model)
    copy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return copy  # type: ignore[no-any-return]


def _static_bytes(model: nn.Module, length: int) -> int:
    """Parameters, buffers and batch: what is there before a step."""
    tensors = [*model.parameters(), *model.buffers(), *batch_of(length).values()]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


def _ours(model: nn.Module, budget: int, length: int) -> nn.Module:
    memory = budget + _static_bytes(model, length)
    passes = [StreamLoss(returns="loss"), StreamBlocks(), Checkpoint(memory=memory)]
    return graphopt.optimize(model, passes=passes)


Way = Callable[[nn.Module, int, int], nn.Module]  # of a model, the budget in bytes, and a length
WAYS: dict[str, Way] = {
    "plain": lambda model, budget, length: model,
    PER_BLOCK: lambda model, budget, length: _per_block(model),
    "per-block, chunked loss": lambda model, budget, length: ChunkedLoss(_per_block(model)),
    OURS: _ours,
}
if not hasattr(nn, "LinearCrossEntropyOptions"):
    del WAYS["per-block, chunked loss"]


@dataclass(frozen=True)
class Trial:
    """One length, and the bytes that a step of it needs; `ran` is False where no plan fits."""

    length: int
    peak: int
    ran: bool = True


def trial(way: str, model: nn.Module, budget: int, length: int) -> Trial:
    """The peak of a step, or the least that could be planned where that is above the budget."""
    fresh()
    module, batch = WAYS[way](model, budget, length), batch_of(length)
    try:
        found = Trial(length, peak_of(module, batch, warm=1).peak)
    except PlanError as error:
        if error.reachable_bytes is None:
            raise
        least = error.reachable_bytes - _static_bytes(model, length)
        found = Trial(length, max(least, budget + 1), False)
    note(f"{way}: {found.length} tokens need {found.peak / MB:.1f} MB{'' if found.ran else ', planned'}")
    return found


def longest(run: Callable[[int], Trial], budget: int, grain: int) -> Trial:
    """The longest trial within `budget`, to `grain` tokens or SHARE of its length."""
    low, high = Trial(0, 0), run(8 * grain)
    while high.peak <= budget:
        low, high = high, run(4 * high.length)
    while True:
        middle = round((max(low.length, grain) * high.length) ** 0.5 / grain) * grain
        step = max(grain, SHARE * high.length)
        if min(middle - low.length, high.length - middle) < step / 2:
            return low
        found = run(middle)
        low, high = (found, high) if found.peak <= budget else (low, found)


def search(way: str, budget: int, grain: int) -> dict[str, Any]:
    """The longest sequence of one way, its peak, its step time and its plans."""
    model = llama()
    found = longest(lambda length: trial(way, model, budget, length), budget, grain)
    if not found.length:
        return {"way": way, "length": 0, "peak": None, "seconds": None, "plan": None}
    return {"peak": found.peak, **step_at(way, budget, found.length)}


def step_at(way: str, budget: int, length: int) -> dict[str, Any]:
    """The step time of one way at a length, the least of three, and its plans."""
    fresh()
    module, batch = WAYS[way](llama(), budget, length), batch_of(length)
    run_step(module, batch)
    seconds = min(timed(module, batch) for _ in range(3))
    plans = [str(s.plan) for s in records(module)[-1].steps] if way == OURS else None
    return {"way": way, "length": length, "seconds": seconds, "plan": plans}


def timed(module: nn.Module, batch: dict[str, Tensor]) -> float:
    """Seconds of a step."""
    begin = time.perf_counter()
    run_step(module, batch)
    return time.perf_counter() - begin


def side_by_side(ways: list[str], budget: int, length: int, rounds: int) -> dict[str, Any]:
    """Median step time of each way at one length, run in turn."""
    model, batch = llama(), batch_of(length)
    modules = {way: WAYS[way](model, budget, length) for way in ways}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for way, module in modules.items():
            seconds[way].append(timed(module, batch))
    return {way: statistics.median(found[1:]) for way, found in seconds.items()}


def report(rows: list[dict[str, Any]], budget: int, common: int) -> str:
    """One line for each way, and whether the bar is met."""
    by = {row["way"]: row for row in rows}
    base = by[PER_BLOCK]["length"]
    head = ["way", "longest", "of per-block", "peak MB", "s there", "ms a token", f"s at {common}"]
    lines = []
    for row in rows:
        length, seconds = row["length"], row["seconds"]
        times = (f"{seconds:.2f}", f"{1e3 * seconds / length:.2f}") if length else (None, None)
        peak = f"{row['peak'] / MB:.1f}" if length else None
        lines.append([row["way"], length, f"{length / base:.2f}", peak, *times, f"{row['common']:.2f}"])
    ratio = by[OURS]["length"] / base
    slower = by[OURS]["common"] / by[PER_BLOCK]["common"]
    verdict = (
        f"Budget {budget / MB:.0f} MB. Ours reaches {ratio:.2f} x the length of per-block checkpointing "
        f"(bar {BAR}: {'met' if ratio >= BAR else 'NOT met'}) and takes {slower:.2f} x its time at "
        f"{common} tokens."
    )
    plans = "\n".join(f"- {plan}" for plan in by[OURS]["plan"] or ())
    return "\n\n".join((table(head, lines), verdict, f"Ours at its longest:\n\n{plans}"))


def main() -> None:
    """Each way in a process of its own, then all of them at one length."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=256, help="MB")
    parser.add_argument("--grain", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--times", action="store_true", help="only time again what was found before")
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    before = stored("longest_sequence", None) if options.times else None
    if before:
        options.budget = before["budget"] / MB
    budget = int(options.budget * MB)
    if options.worker and options.length:
        answer(step_at(options.worker, budget, options.length))
        return
    if options.length:
        answer(side_by_side(list(WAYS), budget, options.length, options.rounds))
        return
    if options.worker:
        answer(search(options.worker, budget, options.grain))
        return
    numbers = {"budget": options.budget, "grain": options.grain, "rounds": options.rounds}
    given = [text for key, number in numbers.items() for text in (f"--{key}", str(number))]
    known = {row["way"]: row for row in before["rows"]} if before else {}
    rows = []
    for way in WAYS:
        row = known.get(way, {})
        at = ["--length", str(row["length"])] if row.get("length") else []
        if not row or at:
            row = row | _checked(spawned(__file__, [*given, "--worker", way, *at]))
        rows.append(row)
    common = next(row["length"] for row in rows if row["way"] == PER_BLOCK)
    if not common:
        raise SystemExit(
            f"{options.budget} MB are too few for any length with checkpointing of each block"
        )
    times = _checked(spawned(__file__, [*given, "--length", str(common)]))
    rows = [{**row, "common": times[row["way"]]} for row in rows]
    data = {"budget": budget, "common": common, "rows": rows}
    title = "The longest sequence that trains within a budget"
    write("longest_sequence", title, data, report(rows, budget, common))


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    if "error" in found:
        raise SystemExit(found["error"])
    return found


if __name__ == "__main__":
    main()
