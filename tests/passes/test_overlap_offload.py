"""OverlapComm behind OffloadSaved: when values go and come, in time and memory, with the same bits."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_steps import assert_same, records, step
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from programs import arguments, run_joint, run_split
from random_tasks import slow_peak
from texts import program_text
from torch import Tensor, nn

import graphopt
from graphopt import OffloadSaved, OverlapComm, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU
from graphopt.cost_models.link_costs import put_in_bytes
from graphopt.cost_models.overlap_run import run_order
from graphopt.cost_models.program_tasks import NodeSeconds, task_graphs
from graphopt.cost_models.task_graph import COMPUTE, DEVICE_TO_HOST, HOST_TO_DEVICE, Task, TaskGraph
from graphopt.measurement import measure
from graphopt.passes.exposure import exposures
from graphopt.passes.offload_ops import ops
from graphopt.passes.offload_store import measured_lines
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.program import Program
from graphopt.split import backward_module, forward_module, late_nodes, saved_nodes
from graphopt.verify import verify

GOLDEN = Path(__file__).parent.parent / "golden" / "overlap_offload.txt"
STARTS, WAITS = (
    (ops.offload.default, ops.fetch.default),
    (ops.offload_wait.default, ops.fetch_wait.default),
)
FUNCTIONS = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "softmax": lambda x: x.softmax(-1),
    "square": torch.square,
}


class Layers(nn.Module):
    """Rows through layers: each a function of a product of what came before, some added to another."""

    def __init__(self, layers: list[tuple[str, int, float]], width: int = 32) -> None:
        super().__init__()
        self.layers = layers
        self.linears = nn.ModuleList(nn.Linear(width, width) for _ in layers)

    def forward(self, x: Tensor) -> Tensor:
        """x [rows, width]; a number."""
        found = [x]
        for (name, source, dropped), linear in zip(self.layers, self.linears, strict=True):
            hidden = FUNCTIONS[name](linear(found[-1]))
            found.append(F.dropout(hidden, dropped) + found[source % len(found)])
        return found[-1].square().mean()


FIVE = [("tanh", 0, 0.0), ("gelu", 1, 0.0), ("softmax", 1, 0.0), ("gelu", 3, 0.0), ("tanh", 2, 0.0)]


def captured(layers: list[tuple[str, int, float]], rows: int = 128) -> tuple[Program, dict[str, Tensor]]:
    """The joint program of the layers, and what it is given."""
    torch.manual_seed(0)
    model, x = Layers(layers), torch.randn(rows, 32)
    program = graphopt.trace(model, {"x": x})
    return program, arguments(program, model, {"x": x})


def offloaded(program: Program, **options: Any) -> Program:
    pass_ = OffloadSaved(**{"memory": "min", "bytes_per_s": 2e9, "recompute": False, **options})
    return pass_.apply(program, pass_.plan(program, Costs.of(program, GENERIC_CPU)))


def planned(program: Program, **options: Any) -> OverlapPlan:
    return OverlapComm(**options).plan(program, Costs.of(program, GENERIC_CPU))


def targets(nodes: Any) -> list[Any]:
    return [n.target for n in nodes if n.target in (*STARTS, *WAITS)]


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    before = offloaded(captured(FIVE[:3])[0])
    plan = planned(before)
    after = OverlapComm().apply(before, plan)
    verify(after, before=before)
    rounded = {
        k: round(v, 9) if isinstance(v, float) else v for k, v in json.loads(plan.to_json()).items()
    }
    parts = [program_text(before), json.dumps(rounded, indent=1), program_text(after), plan.table()]
    text = "\n\n".join(parts) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


@settings(max_examples=8)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(FUNCTIONS)), st.integers(0, 5), st.sampled_from([0.0, 0.3])),
        min_size=2,
        max_size=5,
    ),
    st.sampled_from([2e8, 1e9, 4e9]),
    st.sampled_from([0.6, 0.8, "min"]),
    st.booleans(),
    st.sampled_from([None, 1.0, "1MB"]),
)
def test_any_model(layers: Any, rate: float, share: Any, recompute: bool, memory: Any) -> None:
    """The schedule is valid, within the memory, and gives the same bits."""
    program, values = captured(layers, rows=96)
    try:
        before = offloaded(program, memory=share, bytes_per_s=rate, recompute=recompute)
    except PlanError:
        assume(False)
    costs = Costs.of(before, GENERIC_CPU)
    plan = OverlapComm(memory=memory).plan(before, costs)
    after = OverlapComm(memory=memory).apply(before, plan)
    verify(after, before=before)
    seconds = {n.name: costs.nodes[n.name].seconds for n in before.operators()}
    seconds |= {n.name: put_in_bytes(n) / rate for n in before.operators() if n.target in STARTS}
    graphs = task_graphs(after, NodeSeconds(seconds, costs.workspace_bytes))
    assert [t.name for g in graphs for t in g.tasks] == list(plan.order)
    for graph in graphs:
        graph.check_order(range(len(graph.tasks)))
    orders = [tuple(range(len(graph.tasks))) for graph in graphs]
    peak = max(slow_peak(graph, order) for graph, order in zip(graphs, orders, strict=True))
    assert peak == plan.peak_bytes <= (plan.memory_bytes or 0)
    runs = [run_order(graph, order) for graph, order in zip(graphs, orders, strict=True)]
    assert plan.seconds == pytest.approx(sum(run.seconds for run in runs))
    assert plan.bound_seconds <= plan.seconds <= plan.seconds_before * (1 + 1e-9)
    expected = run_joint(program, values)
    for found in (run_joint(after, values), run_split(after, values)):
        pairs = zip(found, expected, strict=True)
        assert all(a is b if b is None else torch.equal(a, b) for a, b in pairs)


def test_every_transfer_is_in_its_half() -> None:
    program = offloaded(captured(FIVE)[0])
    after = OverlapComm().apply(program, planned(program, memory="2MB"))
    saved, late = saved_nodes(after), late_nodes(after)
    forward = forward_module(after, saved)
    backward = backward_module(after, [n.name for n in saved])
    assert set(targets(forward.graph.nodes)) == {STARTS[0], WAITS[0]}
    assert set(targets(backward.graph.nodes)) == {STARTS[1], WAITS[1]}
    assert len(targets(forward.graph.nodes)) == len(targets(backward.graph.nodes)) >= 6
    kinds = [n in late for n in after.operators() if n.target in (*STARTS, *WAITS)]
    assert kinds == sorted(kinds)  # the forward's first
    graphs = task_graphs(after, NodeSeconds({}))
    assert [graph.channels for graph in graphs] == [(COMPUTE, DEVICE_TO_HOST), (COMPUTE, HOST_TO_DEVICE)]


def test_what_transfers_take() -> None:
    program = captured(FIVE)[0]
    given_rate = planned(offloaded(program, bytes_per_s=1e9))
    assert {row[1] for row in given_rate.transfers} == {"device_to_host", "host_to_device"}
    nbytes = 128 * 32 * 4
    assert all(row[2:5] == (nbytes, nbytes / 1e9, "given") for row in given_rate.transfers)
    found = planned(offloaded(program, bytes_per_s=None))
    lines = dict(zip(("device_to_host", "host_to_device"), measured_lines(None), strict=True))
    assert all(row[3] == lines[row[1]].seconds(nbytes) for row in found.transfers)
    assert {row[4] for row in found.transfers} == {"fitted"}


def test_memory_buys_time() -> None:
    """What may be held longer is fetched earlier, and no order holds more than it may."""
    program = offloaded(captured(FIVE[:3])[0])
    tight, free = planned(program), planned(program, memory="2MB")
    assert tight == planned(program, memory=1.0)
    assert tight.peak_bytes <= tight.peak_bytes_before == tight.memory_bytes < free.peak_bytes
    assert free.bound_seconds <= free.seconds < tight.seconds <= tight.seconds_before
    assert "memory" in {row[7] for row in tight.transfers}
    assert sum(row[6] for row in free.transfers) < sum(row[6] for row in tight.transfers)
    places = [p.order.index(next(n for n in p.order if n.endswith("_fetch"))) for p in (free, tight)]
    assert places[0] < places[1]
    assert OverlapPlan.from_json(free.to_json()) == free and "host-to-device" in free.svg()


@pytest.mark.parametrize("memory", [1.0, "2MB"])
def test_what_runs(memory: float | str) -> None:
    """As the pipeline runs it: the bits of eager PyTorch, and the planned peak as measured."""
    torch.manual_seed(0)
    layers = [(name, source, 0.1) for name, source, _ in FIVE]
    model, x = Layers(layers), torch.randn(512, 32)
    want = step(model, x)
    passes = [OffloadSaved("min", bytes_per_s=1e9, recompute=False), OverlapComm(memory=memory)]
    ours = graphopt.optimize(model, passes=passes, device="cpu-generic")
    assert_same(step(ours, x), want)
    record = records(ours)[-1]
    plan = record.steps[-1].plan
    assert len(plan.transfers) >= 8 and str(plan) in str(ours.report)
    assert all(line in str(ours.report) for line in plan.table().splitlines())
    ours.zero_grad()
    measured = measure(lambda: ours(x).backward()).peak_bytes + record.static_bytes
    assert measured <= plan.peak_bytes + 8  # the loss
    assert measured >= plan.peak_bytes - 16 * len(plan.transfers) or memory != 1.0


def test_what_cannot_be_planned_or_applied() -> None:
    program = offloaded(captured(FIVE[:3])[0])
    plan = planned(program)
    with pytest.raises(PlanError, match=r"no order of the operators found fits 1\.00 kB") as caught:
        planned(program, memory=1000)
    assert caught.value.reachable_bytes is not None and caught.value.reachable_bytes <= plan.peak_bytes
    fetch = next(name for name in plan.order if name.endswith("_fetch"))
    order = [name for name in plan.order if name != fetch]
    order.insert(order.index(f"{fetch}ed") + 1, fetch)
    with pytest.raises(PlanError, match=f"the plan runs {fetch}ed before {fetch}, which it needs"):
        OverlapComm().apply(program, replace(plan, order=tuple(order)))
    with pytest.raises(PlanError, match=r"split=2: .*offload.* is not known to treat samples apart"):
        planned(program, split=2)


def test_why_a_value_that_leaves_is_waited_for() -> None:
    make, rest = Task("make", COMPUTE, 1.0, (), (), (0,)), Task("rest", COMPUTE, 1.0, (0,), (), (1,))
    send = Task("send", DEVICE_TO_HOST, 3.0, (0,), (0,), (2,))
    gone = Task("gone", COMPUTE, 0.0, (2,), (0, 2), (3,))
    graph = TaskGraph((make, rest, send, gone), (8, 8, 1, 1), kept=(3,))
    early, late = run_order(graph, (0, 2, 3, 1)), run_order(graph, (0, 2, 1, 3))
    assert [(e.seconds, e.reason) for e in exposures(early)] == [(3.0, "memory")]
    assert [(e.seconds, e.reason) for e in exposures(late)] == [(2.0, "dependency")]
    assert (early.peak_bytes, late.peak_bytes) == (10, 17)
