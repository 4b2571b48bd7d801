"""What the first call of a generated kernel costs, without a cache and with one, beside Inductor.

    python benchmarks/cold_start.py [--rounds 7]

Every figure is of a process of its own. Torch, graphopt and (for ours) Numba are imported before the
clock starts, and their imports are listed by themselves. "Cold": the folders of compiled code are empty;
"warm": another process ran the same kernel before. The call is repeated, and the second is subtracted, so
that what is left is lookup, compilation and loading. Peers take turns; medians with quartiles.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from harness import answer, note, spawned, table, write

NAME, TITLE = "cold_start", "The first call of a kernel"
PEERS = ("graphopt", "inductor")
KERNELS = ("RMSNorm + residual", "LayerNorm", "softmax", "cross-entropy + gradient", "SwiGLU", "rotary")
BARS = {"cold": 2.0, "warm": 0.2}


def runs(kernel: str) -> dict[str, Callable[[], Any]]:
    """The call of each peer on small inputs."""
    from graphopt import kernels

    x, y, w = torch.randn(64, 256), torch.randn(64, 256), torch.randn(256)
    target = torch.randint(0, 256, (64,))

    def norm(x: Any, y: Any, w: Any) -> Any:
        return F.rms_norm(x + y, w.shape, w, 1e-6), x + y

    def loss(x: Any, target: Any) -> Any:
        log_p = torch.log_softmax(x, -1)
        hot = (torch.arange(256) == target[:, None]).float()
        return -log_p.gather(1, target[:, None]).mean(), (log_p.exp() - hot) / 64

    def rotate(x: Any, c: Any, s: Any) -> Any:
        a, b = x.chunk(2, -1)
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    c, s = y[:, :128], y[:, 128:]
    ours: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]] = {
        "RMSNorm + residual": (lambda x, y, w: kernels.rms_norm(x, w, 1e-6, y), norm, (x, y, w)),
        "LayerNorm": (kernels.layer_norm, lambda x, w, b: F.layer_norm(x, (256,), w, b), (x, w, w)),
        "softmax": (kernels.softmax, lambda x: x.softmax(-1), (x,)),
        "cross-entropy + gradient": (kernels.cross_entropy_with_gradient, loss, (x, target)),
        "SwiGLU": (kernels.swiglu, lambda x, y: F.silu(x) * y, (x, y)),
        "rotary": (kernels.rotary, rotate, (x, c, s)),
    }
    own, formula, inputs = ours[kernel]
    compiled = torch.compile(formula, dynamic=False)
    return {"graphopt": lambda: own(*inputs), "inductor": lambda: compiled(*inputs)}


def case(peer: str, kernel: str) -> dict[str, float]:
    """The first call in this process, beyond the second; and what imports took."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    import_module("numba" if peer == "graphopt" else "torch._inductor.compile_fx")
    imported = time.perf_counter() - begin
    run = runs(kernel)[peer]
    seconds = []
    for _ in range(2):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return {"import": imported, "first": seconds[0] - seconds[1]}


def measured(peer: str, kernel: str, rounds: int) -> dict[str, list[float]]:
    """Quartiles of a cold and a warm process, and of the import."""
    found: dict[str, list[float]] = {"cold": [], "warm": [], "import": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as home:
            variables = {"HOME": home, "TORCHINDUCTOR_CACHE_DIR": home, "OMP_NUM_THREADS": "1"}
            for state in ("cold", "warm"):
                row = spawned(__file__, ["--case", peer, kernel], variables)
                if "error" in row:
                    raise SystemExit(f"{peer}, {kernel}, {state}: {row['error']}")
                found[state].append(row["first"])
                found["import"].append(row["import"])
    return {k: statistics.quantiles(v, n=4) for k, v in found.items()}


def shown(rows: list[dict[str, Any]]) -> str:
    """The table, and whether the bars are met."""
    head = ["kernel", *(f"{peer}, {state}, s" for state in BARS for peer in PEERS), "met"]
    cells = []
    for row in rows:
        medians = {state: row["graphopt"][state][1] for state in BARS}
        met = all(medians[state] <= bar for state, bar in BARS.items())
        times = [_spread(row[peer][state]) for state in BARS for peer in PEERS]
        cells.append([row["kernel"], *times, met])
    imports = "; ".join(
        f"{peer} {statistics.median(row[peer]['import'][1] for row in rows):.2f} s" for peer in PEERS
    )
    return (
        f"{table(head, cells)}\n\nImports before the clock starts, after torch: {imports} (Numba, and "
        f"Inductor's compiler).\n\nBars: {BARS['cold']} s cold and {BARS['warm']} s warm."
    )


def _spread(quartiles: list[float]) -> str:
    low, middle, high = (f"{q:.2f}" for q in quartiles)
    return f"{middle} ({low}-{high})"


def main() -> None:
    """Measure all kernels, round by round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        answer(case(*options.case))
        return
    torch.set_num_threads(1)
    rows = []
    for kernel in KERNELS:
        if options.only in kernel:
            found = {peer: measured(peer, kernel, options.rounds) for peer in PEERS}
            note(f"{kernel}: {found}")
            rows.append({"kernel": kernel, **found})
    write(NAME, TITLE, rows, shown(rows))


if __name__ == "__main__":
    main()
