"""The solvers of chains: their time, and what the objectives reach on equal, random and real chains.

    python benchmarks/solvers.py [--runs 5]

Times are the least of some runs after one that compiles. Networks are built on the meta device; their
states are the results of all layers (VGG-16) or of all blocks (ResNet), for a batch of 32 images of
224 x 224. Peaks count states, and with `gradients` also their gradients, in float32.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from harness import megabytes, note, setup, table, write
from torch import nn

from graphopt.passes import rotor
from graphopt.passes.published_solvers import (
    Selection,
    StateChain,
    dp,
    linear,
    linear_within,
    periodic,
    sqrt,
    true_peak,
)

BAR_LINEAR_SECONDS = 1.0
BAR_DP_SECONDS = 2.0
LONG = 10**6
DP_STATES = 400
BATCH, IMAGE = 32, 224
SOLVERS: dict[str, Callable[[StateChain], Selection]] = {
    "sqrt": sqrt,
    "periodic": periodic,
    "dp": dp,
    "linear": linear,
}


def sizes(kind: str, count: int, seed: int = 0) -> np.ndarray:
    """Bytes of `count` states: equal, uniform up to 100 MB, or log-normal around 1 MB."""
    draw = np.random.default_rng(seed)
    if kind == "equal":
        return np.full(count, 10**6)
    if kind == "uniform":
        return draw.integers(1, 10**8, count)
    return np.exp(draw.normal(np.log(1e6), 1.5, count)).astype(np.int64)


# --- time --------------------------------------------------------------------------------------


def least_seconds(call: Callable[[], Any], runs: int) -> tuple[float, float]:
    """Seconds of the first call, and the least of `runs` others."""
    found = []
    for _ in range(runs + 1):
        begin = time.perf_counter()
        call()
        found.append(time.perf_counter() - begin)
    return found[0], min(found[1:])


def times(runs: int) -> list[dict[str, Any]]:
    """One row for each solver and kind of chain."""
    rows = []
    for kind in ("equal", "uniform", "log-normal"):
        long, short = StateChain(sizes(kind, LONG)), StateChain(sizes(kind, DP_STATES))
        graded = StateChain(long.sizes, np.append(0, long.sizes))
        budget = 2 * linear(long).peak_bytes
        calls: list[tuple[str, int, float | None, Callable[[], Any]]] = [
            ("linear", LONG, BAR_LINEAR_SECONDS, lambda c=long: linear(c)),
            ("linear, gradients", LONG, BAR_LINEAR_SECONDS, lambda c=graded: linear(c)),
            ("linear, one budget", LONG, None, lambda c=long, b=budget: linear_within(c, b)),
            ("periodic", LONG, None, lambda c=long: periodic(c)),
            ("dp", DP_STATES, BAR_DP_SECONDS, lambda c=short: dp(c)),
        ]
        for name, states, bar, call in calls:
            first, seconds = least_seconds(call, runs)
            rows.append({"solver": name, "chain": kind, "states": states, "first_seconds": first})
            rows[-1] |= {"seconds": seconds, "bar_seconds": bar}
            note(str(rows[-1]))
    for count in (50, 100, 200):
        chain = random_stages(count)
        budget = 2 * rotor.least_budget(chain)
        first, seconds = least_seconds(lambda c=chain, b=budget: rotor.within(c, b), 1)
        rows.append({"solver": "rotor, 5 options, 500 slots", "chain": "uniform", "states": count})
        rows[-1] |= {"first_seconds": first, "seconds": seconds, "bar_seconds": None}
        note(str(rows[-1]))
    return rows


def random_stages(count: int) -> rotor.StageChain:
    """Stages of random sizes with five options each."""
    draw = np.random.default_rng(0)

    def option() -> rotor.Option:
        return rotor.Option(int(draw.integers(0, 2 * 10**8)), draw.random(), 2 * draw.random())

    return rotor.StageChain(
        tuple(
            rotor.Stage(
                int(draw.integers(1, 5 * 10**7)),
                int(draw.integers(1, 5 * 10**7)),
                draw.random(),
                tuple(option() for _ in range(5)),
            )
            for _ in range(count)
        )
    )


# --- peaks of made-up chains -------------------------------------------------------------------


def equal_chains() -> list[dict[str, Any]]:
    """Peaks in states of equal size; of `dp` its objective and the true peak of what it chose."""
    rows = []
    for count in (16, 50, 100, 400):
        chain = StateChain(np.ones(count, dtype=np.int64))
        found = {name: solve(chain) for name, solve in SOLVERS.items()}
        rows.append({"states": count} | {name: s.peak_bytes for name, s in found.items()})
        rows[-1]["dp_objective"] = found["dp"].objective_bytes
    return rows


def unequal_chains(count: int = 60, chains: int = 50) -> list[dict[str, Any]]:
    """True peaks relative to the least one, over log-normal chains."""
    ratios: dict[str, list[float]] = {name: [] for name in SOLVERS}
    for seed in range(chains):
        chain = StateChain(sizes("log-normal", count, seed))
        least = linear(chain).peak_bytes
        for name, solve in SOLVERS.items():
            ratios[name].append(solve(chain).peak_bytes / least)
    return [
        {"solver": name, "mean": float(np.mean(r)), "least": min(r), "most": max(r)}
        for name, r in ratios.items()
    ]


# --- networks ----------------------------------------------------------------------------------


def vgg16() -> nn.Sequential:
    """Simonyan and Zisserman, 2015 (arXiv 1409.1556), table 1, column D."""
    layers: list[nn.Module] = []
    width = 3
    for more, repeats in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(repeats):
            layers += [nn.Conv2d(width, more, 3, padding=1), nn.ReLU()]
            width = more
        layers.append(nn.MaxPool2d(2))
    dense = [
        nn.Linear(512 * 49, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, 1000),
    ]
    return nn.Sequential(*layers, nn.Flatten(), *dense)


class Bottleneck(nn.Module):
    """He et al., 2016 (arXiv 1512.03385), figure 5 right; the stride is in the 3 x 3 convolution."""

    def __init__(self, width: int, inner: int, stride: int) -> None:
        super().__init__()
        outer = 4 * inner
        steps = [(width, inner, 1, 1), (inner, inner, 3, stride), (inner, outer, 1, 1)]
        self.body = nn.Sequential()
        for a, b, size, step in steps:
            self.body.extend([nn.Conv2d(a, b, size, step, size // 2, bias=False), nn.BatchNorm2d(b)])
            self.body.append(nn.ReLU() if b == inner and len(self.body) < 6 else nn.Identity())
        self.side = nn.Sequential()
        if width != outer or stride > 1:
            self.side.extend([nn.Conv2d(width, outer, 1, stride, bias=False), nn.BatchNorm2d(outer)])
        self.join = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of both ways, rectified."""
        done: torch.Tensor = self.join(self.body(x) + self.side(x))
        return done


def resnet(depths: tuple[int, ...]) -> nn.Sequential:
    """He et al., 2016, table 1: the stem, the blocks, the head."""
    stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    blocks: list[nn.Module] = [stem, nn.MaxPool2d(3, 2, 1)]
    width = 64
    for number, depth in enumerate(depths):
        inner = 64 * 2**number
        for place in range(depth):
            blocks.append(Bottleneck(width, inner, 2 if place == 0 and number else 1))
            width = 4 * inner
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 1000))
    return nn.Sequential(*blocks, head)


NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "VGG-16": vgg16,
    "ResNet-50": lambda: resnet((3, 4, 6, 3)),
    "ResNet-152": lambda: resnet((3, 8, 36, 3)),
}


def layers_of(network: nn.Sequential) -> Iterator[tuple[int, int, float]]:
    """For each layer or block: bytes of its result, bytes of all results inside it, FLOPs."""
    x = torch.empty(BATCH, 3, IMAGE, IMAGE, device="meta")
    for layer in network:
        inside, work = [0], [0.0]

        def watch(module: Any, _: Any, y: torch.Tensor, inside: Any = inside, work: Any = work) -> None:
            if isinstance(module, (nn.Identity, nn.Flatten)):
                return
            inside[0] += y.nbytes
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                work[0] += 2.0 * y.numel() * module.weight[0].numel()

        leaves = [m for m in layer.modules() if not list(m.children())]
        handles = [m.register_forward_hook(watch) for m in leaves]
        x = layer(x)
        for handle in handles:
            handle.remove()
        if not isinstance(layer, nn.Flatten):
            yield x.nbytes, inside[0], work[0]


def network_rows(name: str) -> list[dict[str, Any]]:
    """Every solver on the states of one network, without and with gradients."""
    with torch.device("meta"):
        found = list(layers_of(NETWORKS[name]()))
    states = np.array([f[0] for f in found])
    flops = np.array([f[2] for f in found])
    rows = []
    for graded in (False, True):
        chain = StateChain(states, np.append(0, states) if graded else None, None, flops)
        every = tuple(range(1, len(chain) + 1))
        plain = true_peak(chain, every)
        ways = {"keep all": Selection(every, int(states.sum()), plain, 0.0)}
        ways |= {solver: solve(chain) for solver, solve in SOLVERS.items()}
        for solver, way in ways.items():
            row: dict[str, Any] = {"network": name, "states": len(chain), "gradients": graded}
            row |= {"solver": solver, "checkpoints": way.checkpoints, "peak_bytes": way.peak_bytes}
            row |= {"objective_bytes": way.objective_bytes, "share": way.peak_bytes / plain}
            row["recomputed_share"] = way.recompute_seconds / flops.sum()
            rows.append(row)
    return rows


def nested_rows(name: str) -> list[dict[str, Any]]:
    """Persistent schedules of the blocks of one network, with what each saves inside."""
    with torch.device("meta"):
        found = list(layers_of(NETWORKS[name]()))
    stages = tuple(
        rotor.Stage(out, out, work, (rotor.Option(max(0, inside - out), work, 2 * work),))
        for out, inside, work in found
    )
    chain = rotor.StageChain(stages)
    least = rotor.least_budget(chain)
    work = sum(f[2] for f in found)
    plain = rotor.within(chain, 2 * sum(f[1] for f in found))
    assert plain is not None
    rows = []
    for share in (1.0, 0.75, 0.5, 0.25, 0.0):
        budget = least + int(share * (plain.peak_bytes - least))
        fitting = rotor.within(chain, budget)
        assert fitting is not None
        row: dict[str, Any] = {"network": name, "stages": len(chain), "budget_bytes": budget}
        row |= {"peak_bytes": fitting.peak_bytes, "recomputed_share": fitting.seconds / work - 3}
        rows.append(row)
    return rows


# --- the report --------------------------------------------------------------------------------


def report(data: dict[str, Any]) -> str:
    """Times, then peaks."""
    rows = []
    for r in data["times"]:
        met = None if r["bar_seconds"] is None else r["seconds"] < r["bar_seconds"]
        rows.append([*(r[k] for k in ("solver", "chain", "states", "first_seconds", "seconds")), met])
    head = ["solver", "sizes", "states", "first call s", "seconds", "in the bar"]
    parts = [f"## Time (bars: linear {BAR_LINEAR_SECONDS} s, dp {BAR_DP_SECONDS} s)", table(head, rows)]
    keys = ("states", "sqrt", "periodic", "dp_objective", "dp", "linear")
    head = ["states", "sqrt", "periodic", "dp, its objective A", "dp, true peak", "linear (B)"]
    parts += ["## Equal states: peak in states (keep all: their number)"]
    parts += [table(head, [[r[k] for k in keys] for r in data["equal"]])]
    parts += ["## 50 chains of 60 log-normal states: true peak relative to the least"]
    rows = [[r[k] for k in ("solver", "mean", "least", "most")] for r in data["unequal"]]
    parts += [table(["solver", "mean", "least", "most"], rows)]
    parts += [f"## Networks, batch {BATCH}, {IMAGE} x {IMAGE}"]
    rows = []
    for r in data["networks"]:
        mine = [r["network"], "with" if r["gradients"] else "without", r["solver"], len(r["checkpoints"])]
        mine += [megabytes(r["peak_bytes"]), f"{r['share']:.1%}", f"{r['recomputed_share']:.1%}"]
        places = " ".join(map(str, r["checkpoints"]))
        rows.append([*mine, "all" if r["solver"] == "keep all" else places])
    head = ["network", "gradients", "solver", "count", "peak MB", "of keep all", "forward FLOPs again"]
    parts += [table([*head, "checkpoints"], rows)]
    parts += ["## Nested recomputation (rotor): blocks that save all inside, or nothing"]
    rows = []
    for r in data["nested"]:
        shown = [megabytes(r["budget_bytes"]), megabytes(r["peak_bytes"])]
        rows.append([r["network"], r["stages"], *shown, f"{r['recomputed_share']:.1%}"])
    head = ["network", "stages", "budget MB", "peak MB", "forward FLOPs again"]
    return "\n\n".join([*parts, table(head, rows)])


def main() -> None:
    """All tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    setup()
    data: dict[str, Any] = {"times": times(options.runs)}
    data |= {"equal": equal_chains(), "unequal": unequal_chains()}
    data["networks"] = [row for name in NETWORKS for row in network_rows(name)]
    data["nested"] = [row for name in ("ResNet-50", "ResNet-152") for row in nested_rows(name)]
    write("solvers", "Solvers of chains", data, report(data))


if __name__ == "__main__":
    main()
