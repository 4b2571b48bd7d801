"""Projection and cross-entropy of a vocabulary split over two processes: memory, time, collectives.

    python benchmarks/vocab_parallel.py [--rounds 5]

Two gloo ranks with one thread each; one token in ten is ignored. All peers run in the same two processes
and in turn, round by round; "one process" runs on one rank while the other waits. Seconds are the CPU
time of a step (forward and backward) of the slower rank, all its threads counted, the median of the
rounds, after one round that warms up. Peaks are of the allocator, above x, the weight and the targets, on
the rank with more. Collectives are counted as they run, and their bytes are what a rank puts in. Errors
are those of the gradients against float64, relative in the Frobenius norm.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from harness import answer, note, setup, spawned, table, write
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, loss_parallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.cost_models.calibrate import calibrated_cpu
from graphopt.cost_models.devices import Cluster
from graphopt.cost_models.split_vocab import cheapest, exchanges, peak_bytes
from graphopt.measurement import measure
from graphopt.vocab_exchange import SplitSizes, Way
from graphopt.vocab_parallel import vocab_parallel_cross_entropy
from graphopt.vocab_shard import Shard as VocabShard

MIB = 2**20
RANKS = 2
N, D, V = 2048, 512, 32000
TOP_MIB, TOP_SHARE = 60, 0.75
NO_COLLECTIVES = ("wait_tensor", "_wrap_tensor_autograd")  # of the same namespace
OURS = "ours, as planned"
WAYS = (
    Way("three-barrier", "tokens", 128),
    Way("two-barrier", "tokens", 128),
    Way("one-barrier", "tokens", 128),
    Way("one-barrier", "tokens", 256),
    Way("two-barrier", "words", 1024),
    Way("one-barrier", "words", 1024),
)


class Counter(TorchDispatchMode):
    """The collectives that run, as (name, bytes that this rank puts in)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its own operators come back here
        name = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" and name not in NO_COLLECTIVES:
            self.seen.append((name, args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))


class Head(nn.Module):
    """The loss of x (N, D), by `loss(x, weight, targets)`."""

    def __init__(self, weight: Tensor, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.loss = loss

    def step(self, x: Tensor, targets: Tensor) -> None:
        """Forward and backward."""
        self.loss(x, self.weight, targets).backward()


class LossParallel(nn.Module):
    """A column-parallel linear layer under `loss_parallel`."""

    def __init__(self, weight: Tensor, mesh: DeviceMesh) -> None:
        super().__init__()
        linear = nn.Linear(D, V, bias=False)
        linear.weight = nn.Parameter(weight.clone())
        way = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
        self.linear = parallelize_module(linear, mesh, way)

    def step(self, x: Tensor, targets: Tensor) -> None:
        """Forward and backward."""
        with loss_parallel():
            F.cross_entropy(self.linear(x), targets).backward()


def planned_way() -> Way:
    """What the cost model takes: the same on both ranks."""
    cluster = Cluster(calibrated_cpu(), RANKS, 2e9, 1e-4, "two processes of one machine")
    found = [cheapest(SplitSizes(N, D, V, RANKS), cluster).way]
    dist.broadcast_object_list(found)
    return found[0]


def split_loss(way: Way, shard: VocabShard) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Ours, run in this way."""
    return lambda x, weight, targets: vocab_parallel_cross_entropy(x, weight, targets, shard, way=way)


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Logits, and their cross-entropy."""
    return F.cross_entropy(F.linear(x, weight), targets)


def peers(mesh: DeviceMesh, weight: Tensor) -> dict[str, tuple[Any, Way | None]]:
    """What is compared, by name, with the way of ours."""
    shard = VocabShard.on_mesh(V, mesh)
    own = shard.part(weight)
    found: dict[str, tuple[Any, Way | None]] = {
        "one process": (Head(weight, plain) if mesh.get_rank() == 0 else None, None),
        "DTensor loss_parallel": (LossParallel(weight, mesh), None),
    }
    chosen = planned_way()
    found[OURS] = (Head(own, split_loss(chosen, shard)), chosen)
    for way in WAYS:
        name = f"ours, {way.algorithm}, {way.block} {way.stream}"
        found[name] = (Head(own, split_loss(way, shard)), way)
    return found


def exact_gradients(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and the weight in float64, in parts of the rows."""
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    counted = int((targets != -100).sum())
    for rows in torch.arange(N).split(256):
        z = F.linear(wide[0][rows], wide[1])
        (F.cross_entropy(z, targets[rows], reduction="sum") / counted).backward()
    return wide[0].grad, wide[1].grad  # type: ignore[return-value]


def clear(x: Tensor, module: nn.Module) -> None:
    """Drop all gradients."""
    x.grad = None
    module.zero_grad(set_to_none=True)
    gc.collect()


def facts(module: Any, x: Tensor, targets: Tensor, exact: Any, shard: VocabShard) -> dict[str, Any]:
    """Collectives, errors and peak of one peer on this rank."""
    with Counter() as counter:
        module.step(x, targets)
    gradient = next(module.parameters()).grad
    gradient = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    whole = gradient.shape[0] == V
    pairs = ((x.grad, exact[0]), (gradient, exact[1] if whole else shard.part(exact[1])))
    errors = [float((g - e).norm() / e.norm()) for g, e in pairs]
    del gradient, pairs
    clear(x, module)
    peak = measure(lambda: module.step(x, targets)).peak_bytes
    clear(x, module)
    sent = sum(nbytes for _, nbytes in counter.seen)
    return {"peak": peak, "errors": errors, "collectives": len(counter.seen), "bytes": sent}


def compare(rank: int, rounds: int, folder: str) -> None:
    """All peers on one rank; what was found goes to a file."""
    setup()
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,))
    torch.manual_seed(0)
    weight = torch.randn(V, D) / D**0.5
    x = torch.randn(N, D).requires_grad_()
    targets = torch.randint(V, (N,))
    targets[torch.rand(N) < 0.1] = -100
    exact = exact_gradients(x, weight, targets)
    found = {}
    modules = peers(mesh, weight)
    for name, (module, way) in modules.items():
        dist.barrier()
        found[name] = {"way": way, "seconds": []}
        if module is not None:
            found[name] |= facts(module, x, targets, exact, VocabShard.on_mesh(V, mesh))
    for _ in range(rounds):
        for name, (module, _) in modules.items():
            dist.barrier()
            if module is None:
                continue
            begin = time.process_time()
            module.step(x, targets)
            found[name]["seconds"].append(time.process_time() - begin)
            clear(x, module)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def merged(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per peer: of the two ranks the slower, and the one with the higher peak."""
    rows = []
    for name in ranks[0]:
        sides = [r[name] for r in ranks if r[name]["seconds"]]
        row = {"peer": name, **sides[0]}
        row["seconds"] = max(statistics.median(side["seconds"]) for side in sides)
        row["peak"] = max(side["peak"] for side in sides)
        row["errors"] = [max(pair) for pair in zip(*(side["errors"] for side in sides), strict=True)]
        rows.append(row)
    return rows


def report(rows: list[dict[str, Any]]) -> str:
    """The table, and whether the bars are met."""
    base = next(r for r in rows if r["peer"] == "DTensor loss_parallel")
    head = ["", "peak MiB", "predicted", "CPU s", "x loss_parallel", "collectives", "MB", "as planned"]
    lines = []
    for row in rows:
        predicted, planned = None, None
        if row["way"]:
            way, sizes = Way(*row["way"]), SplitSizes(N, D, V, RANKS)
            predicted = f"{peak_bytes(sizes, way) / row['peak'] - 1:+.1%}"
            steps = exchanges(sizes, way)
            planned = (len(steps), sum(s.nbytes for s in steps)) == (row["collectives"], row["bytes"])
        seconds = row["seconds"]
        shown = [f"{row['peak'] / MIB:.1f}", predicted, f"{seconds:.2f}"]
        shown += [f"{seconds / base['seconds']:.2f}", row["collectives"], f"{row['bytes'] / 1e6:.2f}"]
        lines.append([_name(row), *shown, planned, *(f"{e:.1e}" for e in row["errors"])])
    return f"{table([*head, 'error dX', 'error dW'], lines)}\n\n{verdict(rows, base)}"


def _name(row: dict[str, Any]) -> str:
    if row["peer"] != OURS:
        return str(row["peer"])
    algorithm, stream, block = row["way"]
    return f"{OURS}: {algorithm}, {block} {stream}"


def verdict(rows: list[dict[str, Any]], base: dict[str, Any]) -> str:
    """One line: the planned way against its bars."""
    ours = next(r for r in rows if r["peer"] == OURS)
    peak, share = ours["peak"] / MIB, ours["seconds"] / base["seconds"]
    met = "met" if peak <= TOP_MIB and share <= TOP_SHARE else "NOT met"
    return (
        f"N={N}, D={D}, V={V}, float32, {RANKS} ranks. Bars for the planned way: {peak:.1f} of {TOP_MIB} "
        f"MiB, {share:.2f} of {TOP_SHARE} of the time of loss_parallel: {met}."
    )


def main() -> None:
    """Two ranks in fresh processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(compare, (options.rounds, folder), nprocs=RANKS, start_method="spawn")
            answer([json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)])
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    setup()
    torch.set_num_threads(1)
    found = spawned(__file__, ["--worker", "--rounds", str(options.rounds)])
    if isinstance(found, dict):
        raise SystemExit(found["error"])
    rows = merged(found)
    note(f"{len(rows)} peers")
    title = "Projection and cross-entropy of a vocabulary split over two processes"
    write("vocab_parallel", title, rows, report(rows))


if __name__ == "__main__":
    main()
