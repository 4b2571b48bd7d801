"""Formulas of the peak against captured steps at random sizes, and `fit` against measured steps.

    python benchmarks/symbolic.py [--models gpt2,vit] [--sizes 50] [--parts sizes,fit,deep]

Part "sizes": the formulas of the plain step, and of one under a `Checkpoint` plan, are compared with what
is predicted for the step captured at random batches and sequence lengths. Part "fit": the batch that
`fit` finds for a small budget is trained, and one more, both under the plan that it found; the peak is
the allocator's. Part "deep": the time for 24 layers, and for a Llama of 70e9 parameters. Results of
models that are not named are kept.
"""

import argparse
import random
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from harness import LLAMA_70B, Size, build, fresh, note, peak_of, replaced, setup, stored, table, write

import graphopt
from graphopt.cost_models.devices import GiB, get_device, parse_bytes
from graphopt.cost_models.training_state import ALONE, TrainingSetup
from graphopt.fitting import Fitting, fit
from graphopt.passes.checkpoint import Checkpoint, choice_of, plan_of
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.passes.held_plan import HeldPlan
from graphopt.passes.nested_choice import choose_best
from graphopt.passes.symbolic_peak import PeakFormula, SymbolicStep
from graphopt.sized_model import LEAST, Captures, sized_model

MODELS = ("gpt2", "llama", "bert", "vit")
LONGEST = 128  # positions of the small GPT-2 and BERT
EVALUATIONS = 20_000
BUDGET, SEQ = "24MiB", 64
DEVICE = get_device("cpu-generic")


def microseconds(formula: PeakFormula, sizes: tuple[int, ...]) -> float:
    """The time of one evaluation of the compiled formula."""
    function = formula.compiled
    begin = time.perf_counter()
    for _ in range(EVALUATIONS):
        function(*sizes)
    return (time.perf_counter() - begin) / EVALUATIONS * 1e6


def equal_sizes(name: str, count: int) -> dict[str, Any]:
    """Formulas against the predictions for `count` captured steps."""
    model = sized_model(name, size="small")
    captures = Captures(model, DEVICE)
    begin = time.perf_counter()
    flow = captures.flow({}, LEAST, high=LONGEST)
    captured, begin = time.perf_counter() - begin, time.perf_counter()
    reference = (8, LONGEST)[: len(model.variables)]
    concrete = flow.at(reference, DEVICE)
    plan = plan_of(concrete, choose_best(concrete, True, None), None, 0)
    formulas = [SymbolicStep.of(flow, p).formula(ALONE) for p in (None, plan)]
    after = time.perf_counter() - begin
    generator, equal, looked = random.Random(0), [0, 0], set[tuple[int, ...]]()
    while len(looked) < count:
        sizes = tuple(generator.randint(2, top) for top in (64, LONGEST)[: len(model.variables)])
        if sizes in looked and len(looked) < 63:
            continue
        looked.add(sizes)
        alone = Captures(model, DEVICE)  # captured anew
        named = dict(zip(model.variables, sizes, strict=True))
        step = alone.costs(alone.program(named), named).dataflow(alone.program(named))
        choices = everything(step), choice_of(step, plan)
        for index, (choice, formula) in enumerate(zip(choices, formulas, strict=True)):
            peak = step.static_bytes + step_of(step, choice).peak_bytes
            equal[index] += peak == formula.at(*sizes)
    return {
        "model": name,
        "sizes": count,
        "equal": equal[0],
        "equal_with_plan": equal[1],
        "captures": captures.count,
        "capture_seconds": captured,
        "after_seconds": after,
        "pieces": [len(f.pieces) for f in formulas],
        "microseconds": microseconds(formulas[1], reference),
    }


def measured(name: str, batch: int, passes: list[Any]) -> int:
    """All bytes of a measured step at its peak."""
    fresh()
    model, inputs = build(name, Size({}, batch, SEQ))
    tensors = [*model.parameters(), *model.buffers(), *inputs.values()]
    static = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    return static + peak_of(graphopt.optimize(model, passes=passes), inputs).peak


def proven(name: str) -> dict[str, Any]:
    """The answers of `fit`, each trained, and one sample more."""
    limit, has_seq = parse_bytes(BUDGET), name != "vit"
    asked = {"seq": SEQ} if has_seq else {}
    least = Checkpoint(memory="min")
    found = fit(
        name,
        memory=limit,
        size="small",
        device="cpu-generic",
        passes=[least],
        scratch="measured",
        **asked,
    )
    row: dict[str, Any] = {"model": name, "budget": limit}
    for answer, kind in zip(found.rows, ("plain", "checkpoint"), strict=True):
        batch = answer.largest_batch
        assert batch is not None
        passes = [] if answer.plan is None else [HeldPlan(least, answer.plan)]
        within, above = (measured(name, b, passes) for b in (batch, batch + 1))
        row[kind] = {"batch": batch, "predicted": answer.peak_bytes, "measured": within}
        row[kind] |= {"measured_one_more": above, "proven": within <= limit < above}
    return row


def deep(name: str, overrides: dict[str, Any], dtype: torch.dtype, seq: int) -> dict[str, Any]:
    """Time and memory of the process for a deep model: the plain step, and one planned for least peak."""
    device = get_device("h100")
    model = sized_model(name, size="small", overrides=overrides, dtype=dtype)
    setup = TrainingSetup("adam", True, 3, 64)
    fitting = Fitting(model, device, setup)
    begin = time.perf_counter()
    found = fitting.fit(80 * GiB, seq, None, [Checkpoint(memory="min")])
    return {
        "model": f"{name}, {overrides['num_hidden_layers']} layers",
        "seconds": time.perf_counter() - begin,
        "capture_seconds": found.capture_seconds,
        "solve_seconds": found.solve_seconds,
        "captures": found.captures,
        "batch": found.rows[0].largest_batch,
        "batch_with_plan": found.rows[1].largest_batch,
        "resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def deep_models() -> list[dict[str, Any]]:
    """Two models of 24 layers, and one of 80."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    return [
        deep("gpt2", {"num_hidden_layers": 24, "n_positions": 1024}, float32, 1024),
        deep("llama", {"num_hidden_layers": 24}, float32, 1024),
        deep("llama", LLAMA_70B, bfloat16, 4096),
    ]


def report(data: dict[str, list[dict[str, Any]]]) -> str:
    """Three tables."""
    head = ["model", "sizes", "equal to the byte", "with a plan", "captures", "capturing s"]
    head += ["after it s", "pieces", "with a plan", "us per evaluation"]
    keys = ("model", "sizes", "equal", "equal_with_plan", "captures", "capture_seconds", "after_seconds")
    rows = [[*(r[k] for k in keys), *r["pieces"], r["microseconds"]] for r in data["sizes"]]
    text = [table(head, rows)]
    head = ["model", "passes", "batch", "predicted", "measured", "one more, measured", "budget", "proven"]
    rows = []
    for r in data["fit"]:
        for kind in ("plain", "checkpoint"):
            keys = ("batch", "predicted", "measured", "measured_one_more")
            rows.append([r["model"], kind, *(r[kind][k] for k in keys), r["budget"], r[kind]["proven"]])
    text.append(f"Bytes; {SEQ} tokens.\n\n{table(head, rows)}")
    head = [
        "model",
        "s in all",
        "capturing s",
        "the rest s",
        "captures",
        "batch",
        "with a plan",
        "resident GB",
    ]
    keys = (
        "model",
        "seconds",
        "capture_seconds",
        "solve_seconds",
        "captures",
        "batch",
        "batch_with_plan",
    )
    rows = [[*(r[k] for k in keys), f"{r['resident_bytes'] / 1e9:.2f}"] for r in data["deep"]]
    setup = "80 GiB, Adam, master weights, ZeRO 3 over 64 ranks"
    text.append(
        f"`fit` for an H100 ({setup}), plain and planned for the least peak.\n\n{table(head, rows)}"
    )
    return "\n\n".join(text)


def main() -> None:
    """The parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sizes", type=int, default=50)
    parser.add_argument("--parts", default="sizes,fit,deep")
    options = parser.parse_args()
    setup()
    data = stored("symbolic", {"sizes": [], "fit": [], "deep": []})
    looks: dict[str, Callable[[str], dict[str, Any]]] = {
        "sizes": lambda name: equal_sizes(name, options.sizes),
        "fit": proven,
    }
    parts = options.parts.split(",")
    for part, look in looks.items():
        for name in options.models.split(",") if part in parts else ():
            data[part] = replaced(data[part], [look(name)])
            note(f"{part} {name}: {data[part]}")
            write("symbolic", "Formulas of the peak", data, report(data))
    if "deep" in parts:
        data["deep"] = deep_models()
        write("symbolic", "Formulas of the peak", data, report(data))


if __name__ == "__main__":
    main()
