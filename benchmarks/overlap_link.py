"""Tensor parallel Llama blocks over a slow link: captured order, planned order, parts of the batch.

    sudo python benchmarks/overlap_link.py [--mbit 1000] [--rounds 25] [--mode inference]

Makes two network namespaces joined by a pair of veth devices (MTU 60000), each sending through a token
bucket (`tc tbf`), and runs a gloo rank in each, on a core of its own where there are two. The namespaces
are removed in the end. That needs root and iproute2: where it is not allowed, nothing is measured.

Every variant runs once a round. Reported is the least time of a round, that of the slower rank, beside
what the plan predicted from costs measured before, on the same link. "inductor" is the order of
torch/_inductor/fx_passes/overlap_scheduling.py with the same costs, on the captured graph and on the
parts that the pass makes of it.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from harness import setup, table, write
from torch import fx

import graphopt
from graphopt.cost_models.costs import Costs
from graphopt.passes.batch_rules import Batch
from graphopt.passes.batch_split import cut
from graphopt.passes.overlap_comm import OverlapComm, OverlapPlan
from graphopt.program import Program

MTU, BURST, LATENCY = 60000, "256kb", "400ms"
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29713
RANKS = 2
MODES = ("inference", "training")


def parse_arguments() -> argparse.Namespace:
    """The options of the command line; `--rank` is for the processes that it starts."""
    parser = argparse.ArgumentParser(
        description="Times orders of tensor parallel Llama blocks on a slow link."
    )
    parser.add_argument("--mbit", type=int, default=1000, help="rate of the link (default 1000)")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers (default 3)")
    parser.add_argument("--width", type=int, default=512, help="hidden size (default 512)")
    parser.add_argument("--batch", type=int, default=2, help="sequences (default 2)")
    parser.add_argument("--length", type=int, default=192, help="tokens of a sequence (default 192)")
    parser.add_argument("--rounds", type=int, default=25, help="timed rounds (default 25)")
    parser.add_argument("--mode", choices=MODES, action="append", help="default: both")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--results", help=argparse.SUPPRESS)
    return parser.parse_args()


# --- the link ----------------------------------------------------------------------------------


def command(*words: str) -> None:
    """Run a command; SystemExit with what it said where it fails."""
    ran = subprocess.run(words, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(
            f"overlap_link: {' '.join(words)} failed: {ran.stderr.strip()}\nNothing was measured."
        )


@contextmanager
def link(mbit: int) -> Iterator[list[str]]:
    """Two namespaces joined by a link of `mbit` in each direction; their names."""
    if os.geteuid() or not (shutil.which("ip") and shutil.which("tc")):
        raise SystemExit(
            "overlap_link: making network namespaces needs root, `ip` and `tc` (iproute2); nothing was "
            "measured. A transfer slowed down by sleeping would not share the processor with computing."
        )
    names = [f"graphopt-{os.getpid()}-{rank}" for rank in range(RANKS)]
    made = []
    try:
        for name in names:
            command("ip", "netns", "add", name)
            made.append(name)
        ends = [("veth", "netns", name) for name in names]
        pair = ("ip", "link", "add", "gopt0", "netns", names[0], "type", "veth", "peer", "name", "gopt1")
        command(*pair, *ends[1][1:])
        for rank, name in enumerate(names):
            inside = ("ip", "netns", "exec", name)
            command(*inside, "ip", "addr", "add", f"{ADDRESSES[rank]}/24", "dev", f"gopt{rank}")
            command(*inside, "ip", "link", "set", f"gopt{rank}", "mtu", str(MTU), "up")
            command(*inside, "ip", "link", "set", "lo", "up")
            bucket = ("rate", f"{mbit}mbit", "burst", BURST, "latency", LATENCY)
            command(*inside, "tc", "qdisc", "add", "dev", f"gopt{rank}", "root", "tbf", *bucket)
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


# --- one rank ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class InductorOrder(OverlapComm):
    """The order that Inductor's scheduler gives the captured graph, or its parts, with the same costs."""

    name = "inductor-order"
    parts: int = 1
    seen: list[str] = field(default_factory=list, compare=False)

    def plan(self, program: Program, costs: Costs) -> OverlapPlan:
        """What `OverlapComm` plans, but for the order."""
        plan = OverlapComm(split=self.parts).plan(program, costs)
        changed = cut(program, Batch(plan.batch, plan.parts), plan.cut).program if plan.cut else program
        order = inductor_order(changed, costs.with_nodes(changed.graph.nodes), plan)
        return replace(plan, order=tuple(order))


def inductor_order(program: Program, costs: Costs, plan: OverlapPlan) -> list[str]:
    """The operators of `program` in the order of Inductor's scheduler."""
    from torch._inductor.fx_passes.overlap_scheduling import schedule_overlap_bucketing

    takes = {row[0]: row[3] * 1e3 for row in plan.transfers}
    takes |= {n: c.seconds * 1e3 for n, c in costs.nodes.items() if n not in takes}
    copy = program.copy()

    def estimate(node: fx.Node, _size: int | None) -> float:
        return takes.get(node.name, 0.0)

    done = schedule_overlap_bucketing(
        copy.module,
        custom_runtime_estimation=estimate,
        max_memory_increase_gb=4.0,
        compute_estimator="analytical",
    )
    movable = set(plan.order)
    return [n.name for n in done.graph.nodes if n.name in movable]


def make_model(options: argparse.Namespace, mesh: Any) -> torch.nn.Module:
    """The Llama of the example, tensor parallel over `mesh`."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import tensor_parallel

    return tensor_parallel.make_model(mesh, options.layers, options.width)


def variants() -> dict[str, list[Any]]:
    """The passes of each variant."""
    found: dict[str, list[Any]] = {
        "captured": [],
        "planned": [OverlapComm(split=1)],
        "planned, split": [OverlapComm(split=2)],
        "as the model chooses": [OverlapComm()],
    }
    return found | {"inductor": [InductorOrder()], "inductor, split": [InductorOrder(parts=2)]}


def runner(
    model: torch.nn.Module, passes: list[Any], ids: torch.Tensor, mode: str
) -> tuple[Callable[[], Any], Any]:
    """A call that runs a step, and the plan (None without passes)."""
    torch._dynamo.reset()
    optimized = graphopt.optimize(model, passes=passes, profile=True)

    def step() -> Any:
        if mode == "inference":
            with torch.no_grad():
                return [optimized(input_ids=ids).logits]
        model.zero_grad(set_to_none=True)
        output = optimized(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = [getattr(p.grad, "_local_tensor", p.grad) for p in model.parameters()]
        return [output.logits.detach(), *gradients]

    step()
    (record,) = optimized._graphopt.log.records
    return step, record.steps[0].plan if record.steps else None


def slowest(seconds: float) -> float:
    """The largest of the ranks' numbers."""
    numbers = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return float(numbers)


def timed(step: Callable[[], Any]) -> float:
    """Seconds of one step of both ranks, which begin together."""
    dist.barrier()
    begin = time.perf_counter()
    step()
    return slowest(time.perf_counter() - begin)


def measured(options: argparse.Namespace, mesh: Any, mode: str) -> dict[str, Any]:
    """All variants in one mode."""
    torch.manual_seed(1)
    ids = torch.randint(0, 1024, (options.batch, options.length))
    model = make_model(options, mesh)
    steps: dict[str, Callable[[], Any]] = {}
    found: dict[str, Any] = {}
    reference: list[torch.Tensor] = []
    for name, passes in variants().items():
        try:
            steps[name], plan = runner(model, passes, ids, mode)
        except Exception as error:  # Inductor's scheduler does not run in every build of torch
            if not name.startswith("inductor"):
                raise
            found[name] = {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        results = steps[name]()
        reference = reference or results  # of the first one, in the captured order
        same = all(torch.equal(a, b) for a, b in zip(results, reference, strict=True))
        found[name] = {"same bits": same, "plan": "" if plan is None else plan.to_json()}
    for name in steps:
        found[name]["seconds"] = []
    for _ in range(options.rounds):
        for name, step in steps.items():
            found[name]["seconds"].append(timed(step))
    return found


def work(options: argparse.Namespace) -> None:
    """One rank."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[options.rank % len(cores)]})
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = f"gopt{options.rank}"
    where = f"tcp://{ADDRESSES[0]}:{PORT}"
    dist.init_process_group("gloo", init_method=where, rank=options.rank, world_size=RANKS)
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    found = {mode: measured(options, mesh, mode) for mode in options.mode or MODES}
    if options.rank == 0:
        Path(options.results).write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's threads may wait for a connection that the other rank closed


# --- the comparison ----------------------------------------------------------------------------


def ranks_found(options: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder, link(options.mbit) as names:
        results = Path(folder, "results.json")
        given = [*sys.argv[1:], "--results", str(results)]
        runs = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, sys.executable, __file__, *given, "--rank", str(rank)]
            )
            for rank, name in enumerate(names)
        ]
        try:
            codes = [run.wait() for run in runs]
        finally:
            for run in runs:
                run.kill()
        if any(codes):
            raise SystemExit(f"overlap_link: the ranks ended with {codes}")
        return json.loads(results.read_text())  # type: ignore[no-any-return]


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """The table of a mode."""
    base = min(found["captured"]["seconds"])
    before = json.loads(found["planned"]["plan"])["seconds_before"]
    rows = []
    for name, item in found.items():
        if "failed" in item:
            rows.append([name, item["failed"], "", "", "", "", "", ""])
            continue
        plan = json.loads(item["plan"]) if item["plan"] else {}
        least, middle = min(item["seconds"]), statistics.median(item["seconds"])
        ours = not name.startswith("inductor")
        predicted = (plan["seconds"] if plan else before) if ours else None
        gap = f"{plan['seconds'] / plan['bound_seconds']:.2f}" if plan and ours else ""
        said = [f"{predicted * 1e3:.1f}", f"{predicted / least - 1:+.0%}"] if predicted else ["", ""]
        times = [f"{least * 1e3:.1f}", f"{middle * 1e3:.1f}", f"{base / least:.2f}x"]
        rows.append([name, *times, *said, gap, "yes" if item["same bits"] else "no"])
    return rows


def main() -> None:
    """Measure and print."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces are removed
    options = parse_arguments()
    if options.rank is not None:
        work(options)
    found = ranks_found(options)
    heads = ["variant", "least ms", "median ms", "gain", "predicted ms", "off by", "gap", "same bits"]
    sizes = f"{options.layers} layers of width {options.width}, {options.batch} x {options.length} tokens"
    parts = [f"{mode}: {sizes}\n\n{table(heads, rows_of(item))}" for mode, item in found.items()]
    title = f"Tensor parallel Llama, two ranks joined by {options.mbit} Mbit/s"
    write("overlap_link", title, {"options": vars(options), "found": found}, "\n\n".join(parts))


if __name__ == "__main__":
    setup()
    main()
