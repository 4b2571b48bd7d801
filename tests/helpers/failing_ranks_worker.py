"""Pairs of gloo ranks of which one stops, stays away, or does something else; what both of them say.

    python failing_ranks_worker.py FOLDER

Writes FOLDER/results.json: for each case and rank what was raised, and the seconds since it
went wrong.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fake_ranks import fake_mesh
from torch import Tensor

import graphopt
from graphopt import OverlapComm
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.passes import overlap_comm
from graphopt.program import Program

TIMEOUT_S = 3.0
HANGS_S = 40.0
LINKS = LinkCosts(Cluster(GENERIC_CPU, 2, 50e6, 20e-6, "a link that is worth hiding"))
GIVEN = OverlapComm(links=LINKS, split=1)
BEGIN: list[float] = []  # of this process: when it went wrong
collectives: Any = torch.ops._c10d_functional


def traced() -> Program:
    """Two chains, each with a sum over the ranks."""
    assert dist.group.WORLD is not None
    group = dist.group.WORLD.group_name

    def f(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        first = collectives.wait_tensor(collectives.all_reduce(x @ w, "sum", group)) @ w
        second = collectives.wait_tensor(collectives.all_reduce(y @ w, "sum", group)) @ w
        return torch.relu(first) + second

    return graphopt.trace(f, [torch.ones(64, 64) for _ in range(3)], training=False)


def planned(chosen: OverlapComm = GIVEN) -> Program:
    """The program in the order that all ranks agree on."""
    program = traced()
    return chosen.apply(program, chosen.plan(program, Costs.of(program, GENERIC_CPU)))


def run(program: Program) -> None:
    """One step."""
    with torch.no_grad():
        program.module(*(torch.ones(64, 64) for _ in range(3)))


def stops(rank: int) -> None:
    """The second rank ends without a word."""
    BEGIN.append(time.perf_counter())
    if rank:
        os._exit(0)


def stays_away(rank: int) -> None:
    """The second rank comes when the first has lost its patience."""
    BEGIN.append(time.perf_counter())
    time.sleep(1.5 * TIMEOUT_S * rank)


def while_planning(rank: int, fault: Callable[[int], None]) -> None:
    """At the first comparison."""
    fault(rank)
    planned()


def while_measuring(rank: int, fault: Callable[[int], None]) -> None:
    """Between the comparison of the graphs and the first collective that is timed."""
    plain = overlap_comm.measured_links

    def measured(*given: Any) -> LinkCosts:
        fault(rank)
        return plain(*given)

    overlap_comm.measured_links = measured
    planned(replace(GIVEN, links=None))


def while_running(rank: int, fault: Callable[[int], None]) -> None:
    """After a step that both have run."""
    program = planned()
    run(program)
    fault(rank)
    run(program)


def another_order(rank: int) -> None:
    """The search of the second rank finds an order of its own."""
    plain = overlap_comm.schedule

    def schedule(graph: Any, **options: Any) -> Any:
        found = plain(graph, **options)
        captured = overlap_comm.run_order(graph, range(len(graph.tasks)))
        return replace(found, order=captured.order, run=captured) if rank else found

    overlap_comm.schedule = schedule
    planned()


def another_link(rank: int) -> None:
    """Only one rank is told what transfers take; the other would measure them."""
    planned(replace(GIVEN, links=LINKS if rank else None))


CASES: dict[str, Callable[[int], None]] = {
    "stops, planning": lambda rank: while_planning(rank, stops),
    "stops, measuring": lambda rank: while_measuring(rank, stops),
    "stops, running": lambda rank: while_running(rank, stops),
    "stays away, planning": lambda rank: while_planning(rank, stays_away),
    "stays away, running": lambda rank: while_running(rank, stays_away),
    "another order": another_order,
    "another link": another_link,
}


def place_of(case: str, folder: str) -> Path:
    """Where the files of a case begin."""
    return Path(folder, case.replace(",", "").replace(" ", "-"))


def work(rank: int, case: str, folder: str) -> None:
    """One rank of one case."""
    place, wait = place_of(case, folder), timedelta(seconds=TIMEOUT_S)
    store = dist.FileStore(f"{place}-store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=wait)
    dist.barrier()  # both are connected
    BEGIN.append(time.perf_counter())
    try:
        CASES[case](rank)
        said = "nothing"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    found = json.dumps([said, time.perf_counter() - BEGIN[-1]])
    Path(f"{place}-{rank}.json").write_text(found)
    while "away" in case and not rank and not Path(f"{place}-1.json").exists():
        time.sleep(0.1)  # so that it is not the end of this process that the late rank sees
    os._exit(0)


def started(case: str, folder: str) -> list[Any]:
    """The processes of `case`."""
    ranks = [mp.get_context("fork").Process(target=work, args=(rank, case, folder)) for rank in range(2)]
    for process in ranks:
        process.start()
    return ranks


def said(case: str, folder: str, ranks: list[Any]) -> list[Any]:
    """What the ranks of `case` said; None for one that ended without a word, "hangs" where one does."""
    end = time.monotonic() + HANGS_S
    found: list[Any] = []
    for rank, process in enumerate(ranks):
        process.join(max(0.0, end - time.monotonic()))
        found.append("hangs" if process.is_alive() else None)
        with suppress(FileNotFoundError):
            found[-1] = json.loads(Path(f"{place_of(case, folder)}-{rank}.json").read_text())
        process.kill()
    return found


def main(folder: str) -> None:
    """The cases in which a rank waits, beside each other and beside the others, one after the other."""
    torch.set_num_threads(1)
    with fake_mesh(2):
        planned()  # what this loads and compiles need not be done in every process
    waiting = {case: started(case, folder) for case in CASES if "away" in case}
    quick = [case for case in CASES if case not in waiting]
    found = {case: said(case, folder, started(case, folder)) for case in quick}
    found |= {case: said(case, folder, ranks) for case, ranks in waiting.items()}
    Path(folder, "results.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
