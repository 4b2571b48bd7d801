"""Offloaded values: the same gradients, in the planned memory and time, nothing left over."""

import contextlib
import gc
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from eager_steps import assert_same, records, step
from texts import program_text
from tiny_models import CrossAttention, Residual
from torch import Tensor, nn

import graphopt
from graphopt import OffloadSaved, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.link_costs import Line
from graphopt.cost_models.memory import dataflow
from graphopt.cost_models.schedule import Step, simulate
from graphopt.measurement import measure
from graphopt.passes import offload_store
from graphopt.passes.offload_choice import choose_offloads, least_bytes
from graphopt.passes.offload_ops import ops
from graphopt.passes.offload_saved import OffloadPlan
from graphopt.passes.offload_schedule import OffloadProblem, Transfers
from graphopt.program import Program
from graphopt.split import late_nodes, saved_nodes

CPU = get_device("cpu-generic")
LOSS_BYTES = 8  # the loss and its own gradient, which the caller holds during the backward
FAST, SLOW = 4e9, 2e8  # bytes/s


class Stack(nn.Module):
    """Words (rows, width) through linear maps, each with a norm and dropout."""

    def __init__(self, depth: int = 4, width: int = 64, dropout: float = 0.2) -> None:
        super().__init__()
        self.dropout = dropout
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + F.dropout(torch.tanh(layer(norm(x))), self.dropout)
        return x.square().mean()


class Images(nn.Module):
    """Images (batch, 3, height, width) through convolutions with batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        return F.max_pool2d(x, 2).square().mean()


class Words(CrossAttention):
    """A small transformer to one number."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, y).square().mean()


class Chain(Residual):
    """Residual blocks to one number."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


MODELS = {
    "stack": (Stack, ((256, 64),)),
    "chain": (Chain, ((512, 32),)),
    "images": (Images, ((4, 3, 24, 24),)),
    "words": (Words, ((4, 48, 32), (4, 48, 32))),
}


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """After each test there is no place, no file and no thread of a channel."""
    yield
    gc.collect()
    assert not offload_store._PLACES and not offload_store._CHANNELS
    end = time.monotonic() + 5
    while (left := _left()) and time.monotonic() < end:
        time.sleep(0.01)
    assert not left


def _left() -> list[str]:
    files = Path("/proc/self/fd")
    links = [os.readlink(f) for f in files.iterdir() if f.is_symlink()] if files.exists() else []
    found = [link for link in links if "graphopt-offload" in link]
    return found + [t.name for t in threading.enumerate() if t.name == "offload"]


def made(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    kind, shapes = MODELS[name]
    return kind(), tuple(torch.randn(shape) for shape in shapes)


@pytest.mark.parametrize("recompute", [False, True], ids=["offload", "both"])
@pytest.mark.parametrize("rate", [FAST, SLOW], ids=["fast", "slow"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_memory(name: str, rate: float, recompute: bool) -> None:
    """Bitwise those of eager PyTorch; the peak is the planned one, less the handles."""
    model, x = made(name)
    want = step(model, *x)
    for memory in (0.75, "min"):
        pass_ = OffloadSaved(memory=memory, bytes_per_s=rate, recompute=recompute)
        ours = graphopt.optimize(made(name)[0], passes=[pass_], device="cpu-generic")
        assert_same(step(ours, *x), want)
        record = records(ours)[-1]
        plan = record.steps[-1].plan
        ours.zero_grad()
        measured = measure(lambda ours=ours: ours(*x).backward()).peak_bytes
        planned = plan.peak_bytes - record.static_bytes
        assert 0 <= planned - measured + LOSS_BYTES <= 16 * len(plan.offloads) + LOSS_BYTES
        assert plan.peak_bytes <= (plan.budget_bytes or plan.baseline_bytes)
        assert recompute or (plan.offloads and plan.recompute_seconds == 0)
        ours.zero_grad()


def program_and_costs(model: nn.Module, *x: Tensor) -> tuple[Program, Costs]:
    program = graphopt.trace(model, dict(zip(("x", "y"), x, strict=False)))
    return program, Costs.of(program, CPU)


def walked_seconds(program: Program, seconds: dict[str, float], rate: float) -> float:
    """The step on two clocks, node by node: nothing of the planner's."""
    late = late_nodes(program)
    clock = channel = 0.0
    ends: dict[str, float] = {}
    for node in sorted(program.operators(), key=lambda n: n in late):
        target, first = node.target, node.args[0] if node.args else None
        if target in (ops.offload.default, ops.fetch.default):
            value = first if target is ops.offload.default else node
            nbytes = value.meta["val"].numel() * value.meta["val"].element_size()
            channel = max(clock, channel) + nbytes / rate
            ends[node.name] = channel
        elif target in (ops.offload_wait.default, ops.fetch_wait.default):
            clock = max(clock, ends[first.name])
        else:
            clock += seconds.get(node.name, 0.0)
    return clock


def walked_peak(program: Program) -> int:
    """The peak of `program` as it stands, by the simulation that is measured elsewhere."""
    flow = dataflow(program)
    steps = [Step(i, o.writes) for i, o in enumerate(flow.operators)]
    half = flow.forward.stop
    saved = {v for n in saved_nodes(program) if n.op != "placeholder" for v in flow.value_of[n.name]}
    forward = simulate(flow, steps[:half], (), saved | set(flow.outputs))
    backward = simulate(flow, steps[half:], saved, flow.gradients)
    return flow.static_bytes + max(forward.peak_bytes, backward.peak_bytes)


@pytest.mark.parametrize("share", [0.9, 0.8, 0.7])
@pytest.mark.parametrize("rate", [FAST, SLOW])
@pytest.mark.parametrize("name", ["stack", "chain", "words"])
def test_time_and_peak_of_the_program(name: str, rate: float, share: float) -> None:
    """What the plan predicts is what two clocks and the simulated memory say of the program that runs."""
    model, x = made(name)
    program, costs = program_and_costs(model, *x)
    costs = replace(costs, workspace_bytes={})
    pass_ = OffloadSaved(memory=share, bytes_per_s=rate, recompute=False)
    plan = pass_.plan(program, costs)
    after = pass_.apply(program, plan)
    seconds = {name: cost.seconds for name, cost in costs.nodes.items()}
    assert walked_seconds(after, seconds, rate) == pytest.approx(plan.predicted_seconds)
    assert plan.predicted_seconds >= plan.least_seconds - 1e-12
    assert plan.peak_bytes - 16 * len(plan.offloads) <= walked_peak(after) <= plan.peak_bytes
    assert plan.peak_bytes <= int(share * plan.baseline_bytes)


def problem_of(model: nn.Module, x: Tensor, rate: float) -> OffloadProblem:
    program, costs = program_and_costs(model, x)
    plan = OffloadSaved(memory=1.0, bytes_per_s=rate).plan(program, costs)
    base = OffloadSaved(bytes_per_s=rate)._base(program, costs, plan.checkpoint)
    assert base.problem.write == Line(0.0, 1 / rate)
    return base.problem


def clocks(problem: OffloadProblem, transfers: Transfers, subset: tuple) -> float:
    """The step's seconds with these waits and reads, on two clocks."""
    clock = channel = 0.0
    ends: dict[tuple[str, int], float] = {}
    for index, operator in enumerate(problem.flow.operators):
        for c in sorted(subset, key=lambda c: (c.first, c.value)):
            if transfers.begun[c.value] == index:
                channel = max(clock, channel) + problem.read.seconds(c.nbytes)
                ends["read", c.value] = channel
        for c in subset:
            if c.first == index:
                clock = max(clock, ends["read", c.value])
        clock += operator.seconds
        for c in subset:
            if c.made == index:
                channel = max(clock, channel) + problem.write.seconds(c.nbytes)
                ends["write", c.value] = channel
        for c in subset:
            if transfers.awaited[c.value] == index:
                clock = max(clock, ends["write", c.value])
    return clock


@pytest.mark.parametrize("rate", [3e8, 3e9])
def test_no_other_schedule_of_one_value_is_quicker(rate: float) -> None:
    """Every place of the wait and of the read, in every room: those that fit take no less time."""
    problem = problem_of(Stack(2, dropout=0.0), torch.randn(64, 64), rate)
    half, end = problem.flow.forward.stop, len(problem.flow.operators)
    for c in problem.candidates:
        plain = problem.heights((c,))
        every = []
        for awaited in range(c.last, half):
            for begun in range(half, c.first + 1):
                heights = plain.copy()
                heights[c.last + 1 : awaited + 1] += c.nbytes
                heights[begun : c.first] += c.nbytes
                found = Transfers({c.value: awaited}, {c.value: begun}, 0.0)
                every.append((int(heights.max()), clocks(problem, found, (c,))))
        for room in {height for height, _ in every}:
            best = problem.scheduled((c,), room)
            assert best is not None
            assert problem.peak_bytes((c,), best) - 16 <= room
            assert best.seconds == pytest.approx(clocks(problem, best, (c,)))
            assert best.seconds <= min(s for h, s in every if h <= room) + 1e-12
    assert end > half


@pytest.mark.parametrize("rate", [3e8, 1e9, 3e9])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_choice_against_all_subsets(rate: float, share: float) -> None:
    """The values found by exchanges cost little more than the best of all subsets."""
    problem = problem_of(Stack(3, dropout=0.0), torch.randn(64, 64), rate)
    assert 8 <= len(problem.candidates) <= 11
    top, low = int(problem.heights(()).max()), least_bytes(problem)
    room = low + int(share * (top - low))
    best = float("inf")
    for size in range(len(problem.candidates) + 1):
        for subset in combinations(problem.candidates, size):
            found = problem.scheduled(subset, room)
            if found is not None:
                best = min(best, clocks(problem, found, subset))
    choice = choose_offloads(problem, room)
    assert choice is not None
    mine = clocks(problem, choice.transfers, choice.offloaded)
    assert best <= mine + 1e-12
    assert mine <= 1.1 * best
    assert choose_offloads(problem, low - 1) is None


OURS = OffloadSaved(memory="min", bytes_per_s=FAST, recompute=False)


def test_steps_in_flight() -> None:
    """Two forwards before two backwards, in any order."""
    model, (x,) = made("stack")
    ours = graphopt.optimize(model, passes=[OURS], device="cpu-generic")
    y = torch.randn(256, 64)
    parameters = list(model.parameters())
    for order in ((0, 1), (1, 0)):
        wants, losses = [], []
        torch.manual_seed(3)
        for words in (x, y):
            wants.append(torch.autograd.grad(model(words), parameters))
        torch.manual_seed(3)
        for words in (x, y):
            losses.append(ours(words))
        for i in order:
            got = torch.autograd.grad(losses[i], parameters)
            assert all(map(torch.equal, got, wants[i]))


def test_a_backward_twice() -> None:
    """The places stay as long as the graph that autograd keeps."""
    model, (x,) = made("stack")
    parameters = list(model.parameters())
    torch.manual_seed(3)
    want = torch.autograd.grad(model(x), parameters)
    ours = graphopt.optimize(model, passes=[OURS], device="cpu-generic")
    with torch._functorch.config.patch(donated_buffer=False):  # or torch refuses every such graph
        torch.manual_seed(3)
        loss = ours(x)
        for retain in (True, True, False):
            got = torch.autograd.grad(loss, parameters, retain_graph=retain)
            assert all(map(torch.equal, got, want))


def test_a_forward_without_backward_gives_its_places_back() -> None:
    model, (x,) = made("stack")
    slow = OffloadSaved(memory="min", bytes_per_s=SLOW, recompute=False)
    ours = graphopt.optimize(model, passes=[slow], device="cpu-generic")

    def fails() -> None:
        loss = ours(x)
        (channel,) = offload_store._CHANNELS.values()
        assert channel.taken_bytes > 0
        raise ValueError(float(loss))

    with pytest.raises(ValueError):
        fails()
    gc.collect()
    assert not offload_store._PLACES


def test_places_are_used_again() -> None:
    """A place that is given back is taken by the next value that fits; others are left alone."""
    values = [torch.full((2000,), float(i)) for i in range(4)]
    handles = [ops.offload(v, None, None) for v in values[:3]]
    places = [ops.offload_wait(h, v) for h, v in zip(handles, values, strict=False)]
    (channel,) = offload_store._CHANNELS.values()
    assert channel.taken_bytes == 3 * 8000
    offset = offload_store.place_of(places[1]).offset
    handles[1] = places[1] = ops.offload(values[0], None, 1e9)  # of another channel
    handles[1] = places[1] = ops.offload(values[3], None, None)
    assert offload_store.place_of(places[1]).offset == offset
    for place, i in zip(places, (0, 3, 2), strict=True):
        buffer = ops.fetch(place, [2000], [1], torch.float32)
        assert torch.equal(ops.fetch_wait(buffer, place), values[i])


def test_the_operators_are_registered_well() -> None:
    value = torch.randn(30, 40)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.offload, (value, None, None), test_utils=checks)
    handle = ops.offload(value, None, None)
    torch.library.opcheck(ops.offload_wait, (handle, value), test_utils=checks)
    layout = (handle, [30, 40], [40, 1], torch.float32)
    assert ops.fetch_wait(ops.fetch(*layout), handle).equal(value)


def test_faults_have_names(tmp_path: Path) -> None:
    value = torch.randn(2000)
    with pytest.raises(graphopt.GraphoptError, match=r"values cannot be offloaded to .*missing"):
        ops.offload(value, str(tmp_path / "missing"), None)
    handle = ops.offload(value, None, None)
    copied = handle.clone()
    del handle
    with pytest.raises(graphopt.GraphoptError, match="its handle was copied"):
        ops.fetch(copied, [2000], [1], torch.float32)


def test_what_cannot_be_done() -> None:
    program, costs = program_and_costs(Stack(2), torch.randn(64, 64))
    with pytest.raises(PlanError, match="bytes_per_s=0 must be positive"):
        OffloadSaved(bytes_per_s=0)
    with pytest.raises(PlanError, match="cannot read 'much' as a size"):
        OffloadSaved(memory="much")
    with pytest.raises(PlanError, match="runs in eager order"):
        OffloadSaved().plan(program, replace(costs, fused=True))
    with pytest.raises(PlanError, match="smallest reachable peak") as caught:
        OffloadSaved(memory=1000, bytes_per_s=FAST).plan(program, costs)
    reachable = caught.value.reachable_bytes
    assert reachable is not None
    fits = OffloadSaved(memory=reachable, bytes_per_s=FAST)
    plan = fits.plan(program, costs)
    assert plan.peak_bytes <= reachable
    bad = replace(plan, offloads=(("absent", 1, "a", "b"),))
    with pytest.raises(PlanError, match="'absent' is no value of this program"):
        fits.apply(program, bad)
    (name, nbytes, awaited, begun), *_ = plan.offloads
    with pytest.raises(PlanError, match="'nowhere' is no operator"):
        fits.apply(program, replace(plan, offloads=((name, nbytes, "nowhere", begun),)))
    with pytest.raises(PlanError, match="cannot be away"):
        fits.apply(program, replace(plan, offloads=((name, nbytes, begun, awaited),)))


def test_a_forward_alone_is_left() -> None:
    model, (x,) = made("stack")
    ours = graphopt.optimize(model, passes=[OURS], device="cpu-generic")
    with torch.no_grad():
        torch.manual_seed(1)
        got = ours(x)
        torch.manual_seed(1)
        assert torch.equal(got, model(x))
    assert records(ours)[-1].steps[0].plan.offloads == ()


def test_without_a_bound_nothing_waits() -> None:
    """A fast channel takes much, one that is hopelessly slow nothing."""
    program, costs = program_and_costs(Stack(6), torch.randn(256, 64))
    fast = OffloadSaved(bytes_per_s=1e12).plan(program, costs)
    slow = OffloadSaved(bytes_per_s=1e3).plan(program, costs)
    assert fast.offloads and fast.peak_bytes < 0.8 * fast.baseline_bytes
    assert fast.exposed_seconds <= 0.01 * fast.step_seconds
    assert slow.offloads == () and slow.peak_bytes == slow.baseline_bytes


@pytest.mark.slow
def test_both_are_no_slower_than_either() -> None:
    program, costs = program_and_costs(Stack(6), torch.randn(256, 64))
    for rate in (1e8, 1e9, 1e10):
        for share in (0.9, 0.7, 0.6):
            both = OffloadSaved(memory=share, bytes_per_s=rate).plan(program, costs)
            alone = OffloadSaved(memory=share, bytes_per_s=rate, recompute=False)
            checkpoint = graphopt.Checkpoint(memory=share).plan(program, costs)
            least = checkpoint.step_seconds + checkpoint.recompute_seconds
            with contextlib.suppress(PlanError):
                least = min(least, alone.plan(program, costs).predicted_seconds)
            assert both.predicted_seconds <= least * (1 + 1e-9)


def test_the_channel_is_measured(tmp_path: Path) -> None:
    write, read = offload_store.measured_lines(str(tmp_path))
    assert 0 < write.seconds(2**23) < 10 and 0 < read.seconds(2**23) < 10
    assert offload_store.measured_lines(str(tmp_path)) == (write, read)
    assert not list(tmp_path.iterdir())


GOLDEN = Path(__file__).parent.parent / "golden" / "offload_saved.txt"


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    program, costs = program_and_costs(Stack(2, dropout=0.0), torch.randn(64, 64))
    pass_ = OffloadSaved(memory=0.8, bytes_per_s=1e9, recompute=False)
    plan = pass_.plan(program, costs)
    assert OffloadPlan.from_json(plan.to_json()) == plan
    data = json.loads(plan.to_json())
    timeless = {k: v for k, v in data.items() if not k.endswith("seconds") and k != "checkpoint"}
    parts = [program_text(program), str(plan), json.dumps(timeless, indent=1)]
    text = "\n\n".join([*parts, program_text(pass_.apply(program, plan))]) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert GOLDEN.read_text(encoding="utf-8") == text
