"""The rules by which generated CPU kernels are launched, one by one, beside what they do not choose.

    python benchmarks/launch_rules.py [--threads 1,2] [--rounds 7]

Softmax and cross-entropy in one pass and in two, over short and long rows; and large float32 kernels
with outputs past the caches or through them, and with other tiles. Ratios are the time of the other
launch over that of the rules, from rounds in which both run in turn: the median, and quartiles in the
data. Above 1 the rules are right. Compiled kernels are kept in `build/launch_rules`.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from harness import answer, note, spawned, table, write

from graphopt.codegen import regions
from graphopt.codegen.layout import output_shape
from graphopt.codegen.numba_choice import STREAM_ALL
from graphopt.codegen.numba_cpu import NumbaKernel
from graphopt.codegen.region import Dtype, Extent, Region
from graphopt.codegen.tuning import measured

TITLE = "Rules for launches of CPU kernels"
NAME = "launch_rules"
FOLDER = Path(__file__).parent.parent / "build" / NAME
WIDE = (3072, 4096)
NUMBERS = 8_000_000  # in a softmax
CHANGES: dict[str, dict[str, Any]] = {
    "one pass": {"online": True},
    "two passes": {"online": False},
    "caches": {"stream_cost": 0},
    "past caches": {"stream_cost": STREAM_ALL},
    "tile 256": {"tile": 256},
    "tile 2048": {"tile": 2048},
}

Case = tuple[str, Region, tuple[int, ...]]


def cases() -> Iterator[Case]:
    """Names, kernels and shapes."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        for columns in (300, 1000, 3000, 8000, 32000, 100_000):
            shape = (NUMBERS // columns, columns)
            yield f"softmax {dtype}", regions.softmax(dtype), shape
            yield f"loss and gradient {dtype}", regions.cross_entropy(dtype, True), shape
            yield f"loss {dtype}", regions.cross_entropy(dtype, False), (2 * shape[0], columns)
    yield "RMSNorm + residual", regions.rms_norm("float32", True), WIDE
    yield "LayerNorm", regions.layer_norm("float32"), WIDE
    yield "LayerNorm backward", regions.layer_norm_backward("float32"), WIDE
    yield "softmax backward", regions.softmax_backward("float32"), WIDE
    yield "rotary", regions.rotary("float32"), WIDE
    yield "AdamW", regions.adamw("float32"), WIDE
    yield "SwiGLU", regions.swiglu("float32"), WIDE
    yield "SwiGLU backward", regions.swiglu_backward("float32"), WIDE
    yield "bias + GELU(tanh) + residual", regions.bias_gelu_residual("float32", "tanh"), WIDE
    yield "bias + GELU(erf) + residual", regions.bias_gelu_residual("float32", "none"), WIDE


def inputs(region: Region, shape: tuple[int, ...]) -> list[Any]:
    """Normal numbers, and for integers places of a row."""
    found: list[Any] = []
    for value in region.inputs:
        own = () if value.extent is Extent.SCALAR else output_shape(value.extent, shape)
        if "float" not in value.dtype:
            found.append(torch.randint(0, shape[-1], own) if own else -100)
        else:
            found.append(torch.randn(own).to(getattr(torch, value.dtype)) if own else 0.5)
    return found


def run(threads: int, rounds: int) -> list[dict[str, Any]]:
    """All cases in this process."""
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    rows = []
    for name, region, shape in cases():
        bench = NumbaKernel(region, FOLDER).bench(*inputs(region, shape))
        softmax = shape != WIDE
        names = list(CHANGES)[:2] if softmax else list(CHANGES)[2:]
        other = {n: replace(bench.default, **CHANGES[n]) for n in names}
        other = {n: c for n, c in other.items() if c != bench.default}
        first, *trials = measured(bench, [bench.default, *other.values()], rounds)
        rows.append(
            {
                "kernel": name,
                "shape": shape,
                "threads": threads,
                "default": vars(bench.default),
                "seconds": first.seconds,
                "ratios": {n: t.ratios for n, t in zip(other, trials, strict=True)},
            }
        )
        note(f"{threads} {name} {shape}: {rows[-1]['ratios']}")
    return rows


def shown(rows: list[dict[str, Any]]) -> str:
    """One table for each group of rules."""
    parts = []
    for names in (list(CHANGES)[:2], list(CHANGES)[2:]):
        own = [r for r in rows if {*r["ratios"]} & {*names}]
        cells = [
            [
                r["kernel"],
                "x".join(map(str, r["shape"])),
                r["threads"],
                f"{r['seconds'] * 1e3:.2f}",
                *(f"{r['ratios'][n][1]:.2f}" if n in r["ratios"] else "" for n in names),
            ]
            for r in own
        ]
        parts.append(table(["kernel", "shape", "threads", "rules, ms", *names], cells))
    return "\n\n".join(
        ["Time of another launch over that of the rules; above 1 the rules are right.", *parts]
    )


def main() -> None:
    """Measure with each number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", type=int)
    options = parser.parse_args()
    if options.case:
        answer(run(options.case, options.rounds))
        return
    rows = []
    for threads in options.threads.split(","):
        variables = {"OMP_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        arguments = ["--rounds", str(options.rounds), "--case", threads]
        rows += spawned(__file__, arguments, variables)
    write(NAME, TITLE, rows, shown(rows))


if __name__ == "__main__":
    main()
