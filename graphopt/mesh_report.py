"""The report on one rank of a mesh that need not be there: its memory, its collectives and their time.

Tensor parallelism is captured with its collectives, by the model's own plan (`graphopt.mesh`). Of a deep
model of equal layers, three and four layers are captured, and the others repeated (`graphopt.deepened`).
Data parallel ranks see batches of their own and average their gradients as torch's
DistributedDataParallel does: in place, in buckets of 25 MiB that are sent when the last of their
gradients is made (Li et al., "PyTorch Distributed: Experiences on Accelerating Data Parallel Training",
VLDB 2020, section 3.2). All ranks of a mesh then run the same program on tensors of the same sizes, so
that the report on one is the report on each.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import fx

from graphopt import ops
from graphopt.analysis import analyse, trace_loaded
from graphopt.cost_models.collectives import Collective
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import Device, group_of
from graphopt.cost_models.link_costs import LinkCosts, Timing, collective_of
from graphopt.cost_models.overlap_run import Run, run_order
from graphopt.cost_models.program_tasks import NodeSeconds, channel_of, task_graphs
from graphopt.cost_models.task_graph import COMPUTE, Task, TaskGraph
from graphopt.deepened import deepened, tensors_only
from graphopt.errors import GraphoptError
from graphopt.graph_report import costs_of
from graphopt.mesh import Mesh, ranks_of, split_over
from graphopt.mesh_facts import CollectiveFact, LinkFact, MeshFacts
from graphopt.models import LoadedModel
from graphopt.passes.base import Pass
from graphopt.passes.exposure import exposures
from graphopt.program import Program, Role, tensors_of
from graphopt.report import Report

SHALLOW = 3  # layers that are captured of a deep model, and one more
BUCKET_BYTES = 25 * 2**20  # torch.nn.parallel.DistributedDataParallel's bucket_cap_mb
_END = "gradients averaged"
Advance = Callable[[int, int], None]


@dataclass(frozen=True)
class MeshModel:
    """`load(layers)` gives the model, with all its layers for None; `layers` is how many these are.

    None where it cannot be had with fewer.
    """

    name: str
    load: Callable[[int | None], LoadedModel]
    layers: int | None = None


@dataclass(frozen=True)
class Capture:
    """The step of one rank; `captured_layers` is the most layers that were captured, None: all."""

    program: Program
    captured_layers: int | None


def capture(
    model: MeshModel, mesh: Mesh, training: bool = True, advance: Advance | None = None
) -> Capture:
    """The step of `model` on one rank of `mesh`, without its data parallel collectives.

    `advance` is told how many captures are done, of how many. GraphoptError for a model without a plan
    of tensor parallelism, and degrees that do not divide.
    """
    deep = model.layers if model.layers is not None and model.layers > SHALLOW + 1 else None
    found: list[Program] = []
    with ranks_of(mesh.tp) as ranks:

        def captured(layers: int | None) -> Program:
            loaded = model.load(layers)
            if mesh.tp > 1:
                split_over(loaded.model, model.name, ranks)
            found.append(tensors_only(trace_loaded(loaded, training=training)))
            if advance is not None:
                advance(len(found), max(len(found), 1 if deep is None else 2))
            return found[-1]

        if deep is not None:
            shallow, deeper = captured(SHALLOW), captured(SHALLOW + 1)
            try:
                return Capture(deepened(shallow, deeper, deep - SHALLOW), SHALLOW + 1)
            except GraphoptError:  # the layers are not alike
                pass
        return Capture(captured(None), None)


def report_on(
    model: MeshModel,
    mesh: Mesh,
    device: Device,
    passes: Sequence[Pass] = (),
    links: LinkCosts | None = None,
    training: bool = True,
    advance: Advance | None = None,
) -> Report:
    """The report on a step of each rank of `mesh`, with `passes` applied on it.

    `links` are measured costs of collectives (`graphopt calibrate`) between as many ranks as each axis
    has; None takes the device's link, and a network between nodes. `advance` is as in `capture`.
    """
    begin = time.perf_counter()
    found = capture(model, mesh, training, advance)
    seconds = time.perf_counter() - begin
    chosen = passes if found.program.is_joint else ()
    report = analyse(found.program, model.name, chosen, device, seconds)
    (record,) = report.records
    facts = mesh_facts(record.after, costs_of(record, record.after), mesh, links)
    layers = None if found.captured_layers is None else model.layers
    return replace(report, mesh=replace(facts, layers=layers, captured_layers=found.captured_layers))


def mesh_facts(program: Program, costs: Costs, mesh: Mesh, links: LinkCosts | None = None) -> MeshFacts:
    """The collectives of `program`, the step of a rank of `mesh`, and when they run in its order."""
    known = {axis: _costs_of(axis, mesh, costs.device, links) for axis in ("tp", "dp")}
    timings = {n.name: known["tp"].timing(c) for n, c in _collectives(program)}
    seconds = {name: cost.seconds for name, cost in costs.nodes.items()}
    seconds |= {name: timing.seconds for name, timing in timings.items()}
    contention = {channel_of(n): known["tp"].contention for n, _ in _collectives(program)}
    graphs = list(task_graphs(program, NodeSeconds(seconds, costs.workspace_bytes, contention)))
    graphs = [_renamed(graph) for graph in graphs]
    orders: list[Sequence[int]] = [range(len(graph.tasks)) for graph in graphs]
    if mesh.dp > 1 and program.is_joint:
        buckets = gradient_buckets(program, graphs[-1])
        graphs[-1], orders[-1] = _averaging(graphs[-1], buckets, known["dp"], timings)
    runs = tuple(run_order(graph, order) for graph, order in zip(graphs, orders, strict=True))
    sizes = {n.name: c for n, c in _collectives(program)}
    if mesh.dp > 1 and program.is_joint:
        sizes |= {_bucket_name(i): Collective("all_reduce", b.nbytes) for i, b in enumerate(buckets)}
    compute = sum(t.seconds for g in graphs for t in g.tasks if t.channel == COMPUTE)
    step = sum(run.seconds for run in runs)
    degrees = {"tp": mesh.tp, "dp": mesh.dp}
    return MeshFacts(
        mesh=str(mesh),
        dp=mesh.dp,
        tp=mesh.tp,
        ranks=mesh.ranks,
        layers=None,
        captured_layers=None,
        links=tuple(_link(axis, known[axis]) for axis in known if degrees[axis] > 1),
        collectives=_rows(runs, sizes, timings, degrees),
        compute_seconds=compute,
        communication_seconds=sum(t.seconds for t in timings.values()),
        exposed_seconds=max(0.0, step - compute),
        step_seconds=step,
        runs=runs,
    )


def _collectives(program: Program) -> list[tuple[fx.Node, Collective]]:
    found = ((n, collective_of(n)) for n in program.operators() if ops.transfer_of(n) is not None)
    return [(n, c) for n, c in found if c is not None]


def _costs_of(axis: str, mesh: Mesh, device: Device, links: LinkCosts | None) -> LinkCosts:
    """What collectives of the ranks of one axis take; those of `tp` are neighbours."""
    ranks = getattr(mesh, axis)
    if ranks == 1:
        return LinkCosts(group_of(device, 1)) if device.link else _nothing(device)
    if links is None:
        return LinkCosts(group_of(device, ranks, mesh.tp if axis == "dp" else 1))
    if links.cluster.count != ranks:
        raise GraphoptError(
            f"the links were measured between {links.cluster.count} ranks; {axis} has {ranks}"
        )
    return links


@dataclass(frozen=True)
class Bucket:
    """Gradients that are averaged together: bytes, and the tasks that make them."""

    nbytes: int
    tasks: tuple[int, ...]


def gradient_buckets(program: Program, backward: TaskGraph) -> list[Bucket]:
    """The gradients of parameters in buckets, in the order in which `backward` makes them."""
    place = {task.name: i for i, task in enumerate(backward.tasks)}
    inputs = [i for i in program.inputs if i.role is not Role.TANGENT]
    pairs = zip(inputs, program.gradients, strict=True)
    made = {g: None for i, g in pairs if i.role is Role.PARAMETER and isinstance(g, fx.Node)}
    order = sorted((place[g.name], _nbytes(g)) for g in made if g.name in place)
    buckets: list[Bucket] = []
    tasks: list[int] = []
    total = 0
    for number, (task, nbytes) in enumerate(order):
        tasks.append(task)
        total += nbytes
        if total >= BUCKET_BYTES or number == len(order) - 1:
            buckets.append(Bucket(total, tuple(tasks)))
            tasks, total = [], 0
    return buckets


def _averaging(
    graph: TaskGraph, buckets: Sequence[Bucket], links: LinkCosts, timings: dict[str, Timing]
) -> tuple[TaskGraph, list[int]]:
    """`graph` with an all-reduce for each bucket, sent when it is full, and all awaited at the end."""
    count, channel = len(graph.tasks), "group dp"
    behind: dict[int, int] = {}
    more = []
    for number, bucket in enumerate(buckets):
        name = _bucket_name(number)
        timings[name] = links.timing(Collective("all_reduce", bucket.nbytes))
        behind[max(bucket.tasks)] = count + number
        more.append(Task(name, channel, timings[name].seconds, bucket.tasks))
    ends = tuple(range(count, count + len(buckets)))
    tasks = (*graph.tasks, *more, Task(_END, COMPUTE, 0.0, ends))
    order = []
    for index in range(count):
        order.append(index)
        if index in behind:
            order.append(behind[index])
    contention = {**graph.contention, channel: links.contention}
    return replace(graph, tasks=tasks, contention=contention), [*order, count + len(buckets)]


def _bucket_name(number: int) -> str:
    return f"gradients_{number}"


def _nbytes(node: fx.Node) -> int:
    return sum(t.numel() * t.element_size() for t in tensors_of(node) if t is not None)


def _rows(
    runs: Sequence[Run],
    sizes: Mapping[str, Collective],
    timings: Mapping[str, Timing],
    degrees: Mapping[str, int],
) -> tuple[CollectiveFact, ...]:
    """Collectives of one kind and size together."""
    groups: dict[tuple[str, str, str, int], list[tuple[Timing, float]]] = {}
    for half, run in zip(("forward", "backward"), runs, strict=False):
        for found in exposures(run):
            task = run.graph.tasks[found.task]
            collective = sizes[task.name]
            axis = task.channel.removeprefix("group ")
            key = axis, collective.kind, half, collective.nbytes
            groups.setdefault(key, []).append((timings[task.name], found.seconds))
    rows = []
    for (axis, kind, half, nbytes), each in groups.items():
        collective = Collective(kind, nbytes)  # type: ignore[arg-type]
        rows.append(
            CollectiveFact(
                axis=axis,
                kind=kind,
                half=half,
                count=len(each),
                nbytes=nbytes,
                sent_bytes=len(each) * collective.sent_bytes(degrees[axis]),
                seconds=sum(timing.seconds for timing, _ in each),
                exposed_seconds=sum(exposed for _, exposed in each),
                source=each[0][0].source,
            )
        )
    return tuple(sorted(rows, key=lambda r: (-r.seconds, r.axis, r.kind, r.half, r.nbytes)))


def _renamed(graph: TaskGraph) -> TaskGraph:
    """`graph` with the channel of the captured collectives called after their axis."""
    names = {c: "group tp" for c in graph.channels if c.startswith("group ")}
    tasks = tuple(replace(t, channel=names.get(t.channel, t.channel)) for t in graph.tasks)
    contention = {names.get(c, c): k for c, k in graph.contention.items()}
    return replace(graph, tasks=tasks, contention=contention)


def _link(axis: str, links: LinkCosts) -> LinkFact:
    cluster = links.cluster
    measured = "measured, " if links.samples else ""
    return LinkFact(
        axis,
        cluster.count,
        cluster.link_bytes_per_s,
        cluster.link_latency_s,
        f"{measured}{cluster.source}",
    )


def _nothing(device: Device) -> LinkCosts:
    """Of an axis of one rank: nothing is sent."""
    from graphopt.cost_models.devices import Cluster

    return LinkCosts(Cluster(device, 1, 1.0, 0.0, ""))
