"""Same numbers as eager? Losses, gradients, buffers, mixed precision and training of 17 models.

    python benchmarks/correctness.py [--models gpt2,bert] [--steps 30]

Small zoo models (two layers), fp32, without dropout, each against its own eager run. An error of a
gradient is relative to the parameter's largest gradient, or to a thousandth of the model's largest
where that is more.
"""

import argparse
import contextlib
import time
from typing import Any

import torch
from harness import Size, build, fresh, megabytes, note, replaced, setup, stored, table, twin, write

import graphopt
from graphopt import PlanError, zoo
from graphopt.capture import CaptureSettings

BUDGETS = (None, 0.5, "min")
SIZE = Size({}, batch=8, seq=64)


def outcome(module: Any, batch: Any, bf16: bool = False) -> dict[str, torch.Tensor]:
    """Loss, gradients and buffers of one step."""
    module.zero_grad(set_to_none=True)
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    with context:
        loss = module(**batch).loss
    loss.backward()
    found = {"loss": loss.detach().clone()}
    found |= {
        f"grad {name}": p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
    }
    return found | {f"buffer {name}": b.clone() for name, b in module.named_buffers()}


def errors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Relative errors of the loss and of the worst gradient, and whether every bit is the same."""
    largest = max(float(g.abs().max()) for k, g in expected.items() if k.startswith("grad"))
    worst, where = 0.0, ""
    for key, value in expected.items():
        if not key.startswith("grad") or key not in found:
            continue
        scale = max(float(value.abs().max()), 1e-3 * largest)
        error = float((found[key] - value).abs().max()) / scale
        if not error <= worst:
            worst, where = error, key
    loss = abs(float(found["loss"] - expected["loss"]) / float(expected["loss"]))
    same = found.keys() == expected.keys()
    differing = [k for k in expected if k not in found or not torch.equal(found[k], expected[k])]
    return {
        "loss": loss,
        "gradient": worst,
        "worst": where,
        "bitwise": same and not differing,
        "differing": len(differing),
    }


def optimized_at(model: Any, batch: Any, budget: Any, bf16: bool = False) -> tuple[Any, str]:
    """`model` within the budget, or at the smallest one where that cannot be met."""
    context = torch.autocast("cpu", torch.bfloat16) if bf16 else contextlib.nullcontext()
    candidate = graphopt.optimize(model, memory=budget)
    before = {name: b.clone() for name, b in model.named_buffers()}
    label = str(budget)
    try:
        with context:
            candidate(**batch)
    except PlanError as error:
        fresh()
        label = f"{budget} -> {megabytes(error.reachable_bytes)} MB"
        candidate = graphopt.optimize(model, memory=error.reachable_bytes)
    with torch.no_grad():  # statistics are as before
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
    return candidate, label


def compare(name: str, steps: int) -> list[dict[str, Any]]:
    """Every check of one model: a row for each budget."""
    rows = []
    base, batch = build(name, SIZE)
    expected = outcome(twin(base), batch)
    again = errors(outcome(twin(base), batch), expected)
    noise = errors(*[_with_threads(count, base, batch) for count in (1, 2)])
    expected_bf16 = outcome(twin(base), batch, bf16=True)
    traced, traced_bf16 = [as_traced(base, batch, bf16) for bf16 in (False, True)]
    for budget in BUDGETS:
        fresh()
        row: dict[str, Any] = {"model": name, "budget": str(budget)}
        rows.append(row)
        try:
            model = twin(base)
            ours, row["budget"] = optimized_at(model, batch, budget)
            found = outcome(ours, batch)
            row |= errors(found, expected)
            row["as_traced"] = errors(found, traced)["bitwise"]
            row["eager_again_bitwise"] = again["bitwise"]
            with torch.no_grad():
                model.load_state_dict(base.state_dict())
            row["training"] = train(name, base, ours, steps) if steps else None
            if budget == "min":
                fresh()
                ours, _ = optimized_at(twin(base), batch, budget, bf16=True)
                found = outcome(ours, batch, bf16=True)
                row["bf16"] = errors(found, expected_bf16)
                row["bf16_as_traced"] = errors(found, traced_bf16)["bitwise"]
                row["bf16_noise"] = noise
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {str(error)[:200]}"
    return rows


def as_traced(base: Any, batch: Any, bf16: bool) -> dict[str, torch.Tensor]:
    """What torch's own capture gives without any plan: its order of sums is not always eager's."""
    fresh()
    with CaptureSettings():
        compiled = torch.compile(twin(base), backend="aot_eager_default_partitioner")
        found = outcome(compiled, batch, bf16)
    return {key.replace("_orig_mod.", ""): value for key, value in found.items()}


def _with_threads(count: int, base: Any, batch: Any) -> dict[str, torch.Tensor]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return outcome(twin(base), batch, bf16=True)
    finally:
        torch.set_num_threads(before)


def train(name: str, base: Any, ours: Any, steps: int) -> dict[str, float]:
    """AdamW on the same batches; the largest difference of the losses."""
    models = [twin(base), ours]
    batches = [zoo.example_batch(name, base, SIZE.batch, SIZE.seq, seed=s) for s in range(3)]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in models]
    worst, first, last = 0.0, 0.0, 0.0
    for step in range(steps):
        losses = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss = model(**batches[step % 3]).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        worst = max(worst, abs(losses[0] - losses[1]))
        first, last = first or losses[0], losses[0]
    return {"max_loss_difference": worst, "first_loss": first, "last_loss": last, "steps": steps}


def report(rows: list[dict[str, Any]]) -> str:
    """The table, then the cells that differ."""
    head = ["model", "budget", "loss error", "gradient error", "bitwise", "as traced"]
    head += ["bf16 gradient error", "bf16 bitwise", "bf16 as traced", "bf16 eager 1 vs 2 threads"]
    head += ["training, max loss difference"]
    lines = []
    for row in rows:
        if "error" in row:
            lines.append([row["model"], row["budget"], row["error"].replace("|", "/"), *[None] * 8])
            continue
        trained = row["training"]["max_loss_difference"] if row["training"] else None
        half = [None] * 4
        if "bf16" in row:
            half = [row["bf16"]["gradient"], row["bf16"]["bitwise"], row.get("bf16_as_traced")]
            half += [row["bf16_noise"]["gradient"]]
        exact = [row.get(k) for k in ("model", "budget", "loss", "gradient", "bitwise", "as_traced")]
        lines.append([*exact, *half, trained])
    passed = sum("error" not in r and r["bitwise"] for r in rows)
    traced = sum("error" not in r and r.get("as_traced", False) for r in rows)
    halves = [r["bf16"]["bitwise"] for r in rows if "bf16" in r]
    return (
        f"{table(head, lines)}\n\nBitwise equal: {passed} of {len(rows)} cells; "
        f"bf16: {sum(halves)} of {len(halves)}. Bitwise equal to what torch's capture gives without "
        f"a plan (`aot_eager_default_partitioner`): {traced} of {len(rows)} cells."
    )


def main() -> None:
    """All models, and what differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(zoo.names()))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    setup()
    rows = stored("correctness", [])
    for name in options.models.split(","):
        begin = time.perf_counter()
        rows = replaced(rows, compare(name, options.steps))
        note(f"{name}: {time.perf_counter() - begin:.0f} s")
        write("correctness", "Correctness against eager", rows, report(rows))


if __name__ == "__main__":
    main()
