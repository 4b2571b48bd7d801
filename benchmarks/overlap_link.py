"""Tensor parallel models over a slow link: captured order, planned order, parts of the batch.

    sudo python benchmarks/overlap_link.py [--mbit 1000] [--rounds 25] [--model llama] [--mode inference]

Makes two network namespaces joined by a pair of veth devices (MTU 60000), each sending through a token
bucket (`tc tbf`), and runs a gloo rank in each, on a core of its own where there are two. The namespaces
are removed in the end. That needs root and iproute2: where it is not allowed, nothing is measured.

The bucket holds little more than a packet: a larger one lets the transfers that follow a pause go faster
than the link. gloo's threads get a real-time priority, in all variants alike, so that they run when a
packet arrives, as the engine of a network card does, and not when the scheduler of the operating system
takes the processor from the model; `--plain-threads` leaves them as they are.

Every variant runs once a round, first another one in each. Reported are times of the slower rank, the
median of the gains of the rounds, and what the plan predicted, from costs measured before on the same
link, beside the median. "inductor" is the order of torch/_inductor/fx_passes/overlap_scheduling.py with
the same costs, on the captured graph and on the parts that the pass makes of it.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from harness import setup, stored, table, write
from parallel_models import MODELS, build
from torch import fx

import graphopt
from graphopt.cost_models.costs import Costs
from graphopt.passes.batch_rules import Batch
from graphopt.passes.batch_split import cut
from graphopt.passes.overlap_comm import OverlapComm, OverlapPlan
from graphopt.program import Program
from graphopt.ranks import groups_of, largest

MTU, BURST, LATENCY = 60000, "72kb", "400ms"
ADDRESSES = ("10.213.7.1", "10.213.7.2")
PORT = 29713
RANKS = 2
MODES = ("inference", "training")


def parse_arguments() -> argparse.Namespace:
    """The options of the command line; `--rank` is for the processes that it starts."""
    parser = argparse.ArgumentParser(
        description="Times orders of the operators of tensor parallel models on a slow link."
    )
    parser.add_argument("--mbit", type=int, default=1000, help="rate of the link (default 1000)")
    parser.add_argument("--layers", type=int, default=3, help="decoder layers (default 3)")
    parser.add_argument("--width", type=int, default=384, help="hidden size (default 384)")
    parser.add_argument("--batch", type=int, default=2, help="sequences (default 2)")
    parser.add_argument("--length", type=int, default=384, help="tokens of a sequence (default 384)")
    parser.add_argument("--rounds", type=int, default=25, help="timed rounds (default 25)")
    parser.add_argument("--model", choices=MODELS, default="llama", help="default: llama")
    parser.add_argument("--mode", choices=MODES, action="append", help="default: both")
    parser.add_argument("--plain-threads", action="store_true", help="no real-time priority for gloo")
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

    def plan(self, program: Program, costs: Costs) -> OverlapPlan:
        """What `OverlapComm` plans, but for the order."""
        plan, changed = OverlapComm(split=self.parts).plan(program, costs), program
        if plan.cut:
            changed = cut(program, Batch(plan.batch, plan.parts, plan.along), plan.cut).program
        order = inductor_order(changed, costs.with_nodes(changed.graph.nodes), plan)
        return replace(plan, order=tuple(order))


def inductor_order(program: Program, costs: Costs, plan: OverlapPlan) -> list[str]:
    """The operators of `program` in the order of Inductor's scheduler.

    That asks triton for the memory rate of a GPU, whatever times it is given; here it is given these for
    what it would estimate from that, too.
    """
    from torch._inductor.fx_passes import overlap_scheduling

    names = sorted(n.name for n in program.operators())
    own = [costs.nodes[n].seconds if n in costs.nodes else 0.0 for n in names]
    agreed = largest(groups_of(program), own, "the costs")
    takes = dict(zip(names, agreed, strict=True)) | {row[0]: row[3] for row in plan.transfers}
    copy = program.copy()

    def estimate(node: fx.Node, _size: int | None = None) -> float:
        return takes.get(node.name, 0.0) * 1e3

    with mock.patch.object(overlap_scheduling, "estimate_roofline_runtime_ms", estimate):
        done = overlap_scheduling.schedule_overlap_bucketing(
            copy.module,
            custom_runtime_estimation=estimate,
            max_memory_increase_gb=4.0,
            compute_estimator="analytical",
        )
    movable = set(plan.order)
    return [n.name for n in done.graph.nodes if n.name in movable]


def variants() -> dict[str, list[Any]]:
    """The passes of each variant."""
    found: dict[str, list[Any]] = {
        "captured": [],
        "planned": [OverlapComm(split=1)],
        "planned, split": [OverlapComm(split=2)],
        "as the pass chooses": [OverlapComm()],
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
    model = build(options.model, mesh, options.layers, options.width, options.length)
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
    names = list(steps)
    for number in range(options.rounds + 1):  # one more: the first round does not count
        for name in names[number % len(names) :] + names[: number % len(names)]:
            seconds = timed(steps[name])
            found[name]["seconds"] += [seconds] if number else []
    return found


def threads() -> set[int]:
    """The threads of this process."""
    return {int(name) for name in os.listdir("/proc/self/task")}


def work(options: argparse.Namespace) -> None:
    """One rank."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[options.rank % len(cores)]})
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = f"gopt{options.rank}"
    where, before = f"tcp://{ADDRESSES[0]}:{PORT}", threads()
    dist.init_process_group("gloo", init_method=where, rank=options.rank, world_size=RANKS)
    mesh = dist.device_mesh.init_device_mesh("cpu", (RANKS,))
    for thread in () if options.plain_threads else threads() - before:
        os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
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
    base = found["captured"]["seconds"]
    before = json.loads(found["planned"]["plan"])["seconds_before"]
    rows = []
    for name, item in found.items():
        if "failed" in item:
            rows.append([name, item["failed"], "", "", "", "", "", ""])
            continue
        plan = json.loads(item["plan"]) if item["plan"] else {}
        least, middle = min(item["seconds"]), statistics.median(item["seconds"])
        gain = statistics.median(a / b for a, b in zip(base, item["seconds"], strict=True))
        ours = not name.startswith("inductor")
        predicted = (plan["seconds"] if plan else before) if ours else None
        gap = f"{plan['seconds'] / plan['bound_seconds']:.3f}" if plan and ours else ""
        said = [f"{predicted * 1e3:.1f}", f"{predicted / middle - 1:+.0%}"] if predicted else ["", ""]
        times = [f"{least * 1e3:.1f}", f"{middle * 1e3:.1f}", f"{gain:.2f}x"]
        rows.append([name, *times, *said, gap, "yes" if item["same bits"] else "no"])
    return rows


def text_of(kept: dict[str, Any]) -> str:
    """The tables of all that was measured so far."""
    heads = ["variant", "least ms", "median ms", "gain", "predicted ms", "off by", "gap", "same bits"]
    parts = []
    for case, item in sorted(kept.items()):
        options = item["options"]
        shape = f"{options['layers']} layers of width {options['width']}, "
        shape += f"{options['batch']} x {options['length']} tokens, {options['mbit']} Mbit/s"
        said = next(json.loads(i["plan"]) for n, i in item["found"].items() if n == "planned, split")
        shape += f", k = {said['contention']:.2f}"
        parts.append(f"{case}: {shape}\n\n{table(heads, rows_of(item['found']))}")
    return "\n\n".join(parts)


def main() -> None:
    """Measure and print; other cases that were measured before stay in the results."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces are removed
    options = parse_arguments()
    if options.rank is not None:
        work(options)
    found = ranks_found(options)
    kept = stored("overlap_link", {})
    for mode, item in found.items():
        case = f"{options.model}, {mode}{', one text' if options.batch == 1 else ''}"
        case += ", plain threads" if options.plain_threads else ""
        kept[case] = {"options": vars(options), "found": item}
    write("overlap_link", "Tensor parallel models, two ranks joined by a slow link", kept, text_of(kept))


if __name__ == "__main__":
    setup()
    main()
