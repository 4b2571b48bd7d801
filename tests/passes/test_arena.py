"""Arenas: the bits of eager, the peak as predicted, blocks that no two calls share; refusals by name."""

import copy
import pickle
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_steps import records
from fused_programs import CPU, as_program, traced
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from programs import traced as tiny
from random_chains import Chain, drawn_inputs
from texts import program_text
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt import Arena, Checkpoint, Fuse, PlanError, PlanFile, VerifyError, measure, zoo
from graphopt.arena_blocks import Blocks
from graphopt.arena_facts import SPOTS, Block, Spot
from graphopt.cost_models.costs import Costs
from graphopt.eager_modules import eager
from graphopt.numerics import compare_numerics
from graphopt.passes.arena import ArenaPlan
from graphopt.program import Program
from graphopt.verify import verify

LOSS_BYTES = 8  # the loss and its own gradient, which the caller holds during the backward
SMALL = Arena(min_bytes=1)


class Net(nn.Module):
    """Gated blocks with norms [rows, 64], and a loss."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(depth))
        self.up = nn.ModuleList(nn.Linear(64, 256) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(128, 64) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for norm, up, down in zip(self.norms, self.up, self.down, strict=True):
            gate, wide = up(norm(x)).chunk(2, -1)
            x = x + down(F.silu(gate) * wide)
        return x.square().mean()


X = torch.linspace(-2, 2, 192 * 64).sin().view(192, 64)


def run(model: Any, *inputs: Any, **batch: Any) -> list[Tensor]:
    """Loss and gradients of one step."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    found = model(*inputs, **batch)
    loss = found if isinstance(found, Tensor) else found.loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def same(found: list[Tensor], want: list[Tensor]) -> bool:
    return len(found) == len(want) and all(map(torch.equal, found, want))


def optimized(model: nn.Module, *passes: Any, **options: Any) -> Any:
    return graphopt.optimize(copy.deepcopy(model), passes=passes, device="cpu-generic", **options)


def planned(ours: Any) -> ArenaPlan:
    plan = records(ours)[-1].steps[-1].plan
    assert isinstance(plan, ArenaPlan)
    return plan


def outside_bytes(plan: ArenaPlan, record: Any) -> int:
    """What a step is predicted to allocate once its block is there."""
    return plan.peak_bytes - record.static_bytes - (plan.nbytes if plan.keep else 0)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


PASSES: dict[str, tuple[Any, ...]] = {
    "kept": (Checkpoint(), SMALL),
    "freed": (Checkpoint(), replace(SMALL, keep=False)),
    "least memory": (Checkpoint(memory="min"), SMALL),
    "more memory": (Checkpoint(), replace(SMALL, memory="4MB")),
    "more memory, freed": (Checkpoint(), replace(SMALL, memory="4MB", keep=False)),
}


@pytest.mark.parametrize("passes", PASSES)
def test_training(net: Net, passes: str) -> None:
    """Bits of eager; the allocator's peak is the predicted one; it is not above that without an arena."""
    want = run(net, X)
    ours = optimized(net, *PASSES[passes], verify="full")
    for _ in range(3):
        assert same(run(ours, X), want)
    record, plan = records(ours)[-1], planned(ours)
    assert len(plan.placed) >= 5
    limit = records(ours)[-1].steps[0].plan.peak_bytes if passes == "least memory" else None
    assert plan.peak_bytes <= max(limit or plan.baseline_bytes * 1.001, plan.budget_bytes or 0)
    if plan.budget_bytes:
        assert {why for _, _, why in plan.left_out} == {
            "it is returned",
            "its operator allocates what it returns",
        }
    ours.zero_grad(set_to_none=True)
    found = measure(lambda: ours(X).backward()).peak_bytes
    assert found - outside_bytes(plan, record) in (0, LOSS_BYTES)
    assert ours.report.graphs[-1].peak_bytes == plan.peak_bytes
    if plan.keep:
        assert ours.report.graphs[-1].after.alive_bytes[0].max() == record.static_bytes + plan.nbytes


@pytest.mark.parametrize("keep", [True, False])
def test_inference(net: Net, keep: bool) -> None:
    ours = optimized(net, Arena(min_bytes=1, keep=keep))
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(ours(X), net(X))
        plan, record = planned(ours), records(ours)[-1]
        assert len(plan.placed) >= 4
        assert measure(lambda: ours(X)).peak_bytes == outside_bytes(plan, record)


SLOW = [pytest.param(name, True, marks=pytest.mark.slow) for name in ("llama", "vit")]


@pytest.mark.parametrize(("name", "keep"), [("gpt2", True), ("llama", False), ("vit", False), *SLOW])
def test_models(name: str, keep: bool) -> None:
    torch.manual_seed(0)
    model = zoo.build(name, "small")
    batch = zoo.example_batch(name, model, 2, 16)
    want = run(model, **batch)
    ours = optimized(model, Checkpoint(), replace(SMALL, memory="64MB", keep=keep))
    for _ in range(2):
        assert same(run(ours, **batch), want)
    plan, record = planned(ours), records(ours)[-1]
    assert len(plan.placed) > 20 and plan.peak_bytes <= 64e6
    ours.zero_grad(set_to_none=True)
    found = measure(lambda: ours(**batch).loss.backward()).peak_bytes
    assert found - outside_bytes(plan, record) in (0, LOSS_BYTES)


def test_beside_kernels(net: Net) -> None:
    """Generated kernels write into the arena."""
    want = run(optimized(net, Fuse()), X)
    ours = optimized(net, Fuse(), replace(SMALL, memory="4MB"))
    for _ in range(2):
        assert same(run(ours, X), want)
    assert any(name.startswith("fused_") for name, *_ in planned(ours).placed)


@settings(max_examples=25, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(st.data())
def test_random_programs(data: st.DataObject) -> None:
    """Chains over tensors of drawn layouts: the lowered graph has the bits of the graph, twice."""
    chain, inputs = Chain(data, 8), drawn_inputs(data, torch.float32, [])
    program = as_program(make_fx(chain, tracing_mode="fake")(*inputs))
    budget = data.draw(st.sampled_from([None, "1MB"]))
    pass_ = replace(SMALL, memory=budget, keep=data.draw(st.booleans()))
    plan = pass_.plan(program, Costs.of(program, CPU))
    after = pass_.apply(program, plan)
    verify(after, before=program)
    assert ArenaPlan.from_json(plan.to_json()) == plan
    assert plan.least_bytes <= plan.nbytes
    assert Costs.of(after, CPU).dataflow(after).static_bytes >= plan.nbytes * plan.keep
    lowered = eager(after.copy().module, Blocks())
    want = chain(*inputs)
    for _ in range(2):
        assert same(list(lowered(list(inputs))), list(want))


@settings(max_examples=10, phases=[Phase.explicit, Phase.generate], deadline=None)
@given(st.data())
def test_random_training(data: st.DataObject) -> None:
    """Forward and backward in one block, as they are lowered, beside the graph run node by node."""
    chain, inputs = Chain(data, 6), drawn_inputs(data, torch.float32, [])
    program = traced(lambda *given: sum(y.square().mean() for y in chain(*given)), *inputs)
    pass_ = replace(SMALL, memory="1MB", keep=data.draw(st.booleans()))
    after = pass_.apply(program, pass_.plan(program, Costs.of(program, CPU)))
    compare_numerics(after, program, tolerance=0.0)


# --- two calls at once -------------------------------------------------------------------------


@pytest.fixture
def ours(net: Net) -> Any:
    model = optimized(net, Checkpoint(), replace(SMALL, memory="4MB"))
    run(model, X)
    return model


def test_two_forwards_before_their_backwards(net: Net, ours: Any) -> None:
    """The second takes a block of its own, and both have their own saved tensors."""
    both = [X, X.flip(0) * 1.5]
    want = []
    for x in both:
        net.zero_grad(set_to_none=True)
        net(x).backward()
        want.append([p.grad for p in net.parameters()])
    losses = [ours(x) for x in both]
    assert measure(lambda: losses.append(ours(X))).peak_bytes > planned(ours).nbytes
    for loss, gradients in zip(losses, want, strict=False):
        ours.zero_grad(set_to_none=True)
        loss.backward()
        assert same([p.grad for p in ours.parameters()], gradients)


def test_a_block_is_there_again(net: Net, ours: Any) -> None:
    """After a forward whose result is dropped, and after a step that failed."""
    del net

    def step() -> None:
        ours(X).backward()

    ours.zero_grad(set_to_none=True)
    usual = measure(step).peak_bytes
    assert usual < planned(ours).nbytes
    ours(X)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: x, _fail)
    with pytest.raises(RuntimeError, match="stop"), hooks:
        step()
    ours.zero_grad(set_to_none=True)
    assert measure(step).peak_bytes == usual


def _fail(_: Tensor) -> Tensor:
    raise RuntimeError("stop")


@functorch.patch(donated_buffer=False)
def test_the_backward_twice(net: Net) -> None:
    """What is saved must be there for the second."""
    want = run(net, X)[1:]
    ours = optimized(net, Checkpoint(), replace(SMALL, memory="4MB"))
    loss = ours(X)
    for last in (False, False, True):
        ours.zero_grad(set_to_none=True)
        loss.backward(retain_graph=not last)
        assert same([p.grad for p in ours.parameters()], want)


def test_saved_tensors_elsewhere(net: Net, ours: Any) -> None:
    """Hooks that keep copies: the backward takes a block of its own, and its inputs stay."""
    want, kept = run(net, X)[1:], []

    def pack(x: Tensor) -> int:
        kept.append(x.clone())
        return len(kept) - 1

    ours.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda n: kept[n]):
        loss = ours(X)
    before = [x.clone() for x in kept]
    loss.backward()
    assert same([p.grad for p in ours.parameters()], want)
    assert same(kept, before)


def test_threads(net: Net, ours: Any) -> None:
    inputs = [X * (1 + n / 8) for n in range(8)]
    with torch.no_grad():
        want = [net(x) for x in inputs]
        ours(X)  # compiled
    found: dict[int, list[bool]] = {}

    def work(number: int) -> None:
        with torch.no_grad():
            found[number] = [
                torch.equal(ours(inputs[n]), want[n]) for n in range(number, 8, 4) for _ in range(20)
            ]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(all, found.values())) and len(found) == 4


def test_copies_share_nothing(net: Net, ours: Any) -> None:
    want = run(net, X)
    loss = ours(X)  # its block is in use
    assert same(run(copy.deepcopy(ours), X), want)
    assert same(run(pickle.loads(pickle.dumps(ours)), X), want)
    ours.zero_grad(set_to_none=True)
    loss.backward()
    assert same([p.grad for p in ours.parameters()], want[1:])
    assert not pickle.loads(pickle.dumps(Blocks()))._kept


def test_blocks() -> None:
    blocks, block, device = Blocks(), Block(4096, True), torch.device("cpu")
    first = blocks.take(block, device)
    second = blocks.take(block, device)
    assert first.data_ptr() != second.data_ptr() and first.data_ptr() % 64 == 0
    address = first.data_ptr()
    part = first[64:128]
    del first
    assert blocks.take(block, device).data_ptr() != address  # a view is left
    del part
    assert blocks.take(block, device).data_ptr() == address
    assert blocks.take(Block(8192, True), device).nbytes == 8192
    assert not Blocks()._kept and blocks.take(Block(64, False), device).nbytes == 64


# --- plans -------------------------------------------------------------------------------------


def plan_of(program: Program, **options: Any) -> ArenaPlan:
    return replace(SMALL, **options).plan(program, Costs.of(program, CPU))


def test_plan_files(net: Net, tmp_path: Path) -> None:
    ours = optimized(net, Checkpoint(memory="min"), SMALL)
    want = run(ours, X)
    PlanFile.of(ours.report).save(tmp_path / "plan.json")
    plan = PlanFile.load(tmp_path / "plan.json")
    again = graphopt.optimize(copy.deepcopy(net), plan=plan, device="cpu-generic")
    assert same(run(again, X), want)
    assert planned(again) == planned(ours)


def test_a_budget_is_kept(net: Net) -> None:
    """With what a Checkpoint was allowed, whatever the arena holds."""
    plain = optimized(net, Checkpoint())
    run(plain, X)
    record = records(plain)[-1]
    for share in (0.7, 0.85):
        ours = optimized(net, Checkpoint(memory=share), SMALL)
        run(ours, X)
        budget = records(ours)[-1].steps[0].plan.budget_bytes
        assert planned(ours).peak_bytes <= budget < record.steps[-1].plan.baseline_bytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("silu", 0, 8, 0), "'silu' has 98304 bytes, and its place is 8 bytes at 0"),
        (("silu", 0, 98304, 32), "places begin at multiples of 64"),
        (("silu", 0, 98304, -64), "places begin at multiples of 64"),
        (("silu", 0, 98304, 64 * 10**6), "silu does not end in its arena"),
        (("view", 0, 98304, 0), "'view' allocates no tensor 0 in this program"),
        (("native_layer_norm", 0, 49152, 0), "its operator allocates what it returns"),
        (("mm_1", 0, 32768, 0), "'mm_1' cannot lie in an arena: it is returned"),
    ],
)
def test_rejected(net: Net, change: tuple[str, int, int, int], message: str) -> None:
    program = graphopt.trace(net, {"x": X})
    plan = plan_of(program, memory="4MB")
    with pytest.raises(PlanError, match=message):
        SMALL.apply(program, replace(plan, placed=(change,)))


def test_two_in_one_place(net: Net) -> None:
    program = graphopt.trace(net, {"x": X})
    plan = plan_of(program, memory="4MB")
    stacked = tuple((*row[:3], 0) for row in plan.placed)
    with pytest.raises(PlanError, match=r"not an arena of this program: .* are needed at once"):
        SMALL.apply(program, replace(plan, placed=stacked))
    after = SMALL.apply(program, plan)
    for node in after.graph.nodes:  # as a pass behind Arena might have moved them
        if SPOTS in node.meta:
            node.meta[SPOTS] = tuple(s and Spot(s.block, 0) for s in node.meta[SPOTS])
    with pytest.raises(VerifyError, match="did a pass behind Arena move them"):
        compare_numerics(after, program)


def test_options() -> None:
    for options in ({"keep": 1}, {"min_bytes": 0}, {"memory": -1}, {"min_bytes": "64"}):
        with pytest.raises(PlanError):
            Arena(**options)  # type: ignore[arg-type]


def test_inductor_is_refused(net: Net) -> None:
    program = graphopt.trace(net, {"x": X})
    with pytest.raises(PlanError, match='compiler="inductor" plans its own'):
        SMALL.plan(program, replace(Costs.of(program, CPU), fused=True))


def test_nothing_to_place(net: Net) -> None:
    program = graphopt.trace(net, {"x": X})
    plan = Arena().plan(program, Costs.of(program, CPU))
    assert str(plan) == "nothing lies in an arena" and plan.peak_bytes == plan.baseline_bytes
    after = Arena().apply(program, plan)
    assert not any(SPOTS in n.meta for n in after.graph.nodes)


def lines(program: Program) -> Iterator[str]:
    """Where the tensors of `program` lie."""
    for node in program.graph.nodes:
        offsets = [None if s is None else s.offset for s in node.meta.get(SPOTS, ())]
        if offsets:
            yield f"{node.name}: {offsets}"


GOLDEN = Path(__file__).parent.parent / "golden" / "arena.txt"


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    program, _, _ = tiny("residual")
    plan = plan_of(program)
    after = SMALL.apply(program, plan)
    parts = [program_text(program), str(plan), plan.table(), plan.to_json(), "\n".join(lines(after))]
    text = "\n\n".join(parts) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert GOLDEN.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", ["perceptron", "dropouts", "convolutions"])
def test_tiny_models(name: str) -> None:
    """What is drawn at random, too."""
    program, _, _ = tiny(name)
    after = SMALL.apply(program, plan_of(program, memory="4MB"))
    compare_numerics(after, program, tolerance=0.0)
