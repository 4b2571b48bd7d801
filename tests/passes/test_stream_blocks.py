"""Blocks in parts of their tokens: equal to eager, narrow; what is left alone; a golden text."""

import copy
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arguments, run_joint, run_split, traced
from texts import program_text
from token_blocks import Blocks, Form
from torch import Tensor, nn

import graphopt
from graphopt import Checkpoint, PlanError, Program, StreamBlocks, StreamLoss, optimize, zoo
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.passes import stream_blocks
from graphopt.passes.pipeline import PassStep
from graphopt.passes.segments import spans
from graphopt.passes.stream_blocks import StreamBlocksPlan, run_or_stream
from graphopt.passes.token_rules import places
from graphopt.program import Role, tensors_of
from graphopt.verify import verify

CPU = get_device("cpu-generic")


def planned(program: Program, **options: Any) -> StreamBlocksPlan:
    return StreamBlocks(**options).plan(program, Costs.of(program, CPU))


def applied(program: Program, **options: Any) -> Program:
    result = StreamBlocks().apply(program, planned(program, **options))
    verify(result, before=program)
    return result


def captured(form: Form, batch: int = 2, length: int = 6, **options: Any) -> tuple[Any, ...]:
    """A program in float64, its model, its input, and the loss and gradients of eager PyTorch."""
    torch._dynamo.reset()
    torch.manual_seed(1)
    model = Blocks(form, **options).double()
    x = torch.randn(batch, length, form.width, dtype=torch.float64, requires_grad=True)
    program = graphopt.trace(model, {"x": x})
    model.zero_grad()
    x.grad = None
    loss = model(x)
    loss.backward()
    known = {**dict(model.named_parameters()), "x": x}
    labels = [i.label for i in program.inputs if i.role is not Role.TANGENT]
    return program, model, {"x": x}, [loss.detach(), *(known[label].grad for label in labels)]


def assert_close(found: list[Any], want: list[Any], tolerance: float = 1e-12) -> None:
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            assert float((a - b).abs().max()) <= tolerance * max(1e-3, float(b.abs().max()))


def most_elements(program: Program) -> int:
    """The elements of the largest tensor."""
    values = (t for n in program.operators() for t in tensors_of(n) if t is not None)
    return max(t.numel() for t in values)


# --- equal to eager ------------------------------------------------------------------------------

FORMS = st.builds(
    Form,
    width=st.sampled_from([4, 6, 12]),
    wide=st.sampled_from([24, 32]),
    norm=st.sampled_from(["rms", "layer", "fused", "none"]),
    gated=st.booleans(),
    bias=st.booleans(),
    residual=st.booleans(),
    attends=st.booleans(),
    activation=st.sampled_from(["silu", "gelu", "relu", "tanh"]),
)


@settings(max_examples=10)
@given(FORMS, st.integers(1, 3), st.integers(1, 8), st.integers(1, 9), st.booleans())
def test_losses_and_gradients_are_those_of_eager(
    form: Form, batch: int, length: int, parts: int, tied: bool
) -> None:
    program, model, given_, want = captured(form, batch, length, tied=tied)
    plan = planned(program, parts=parts)
    assert bool(plan.blocks) is (batch * length > 1)
    result = applied(program, parts=parts)
    values = arguments(program, model, given_)
    assert_close(run_joint(result, values), want)
    assert_close(run_split(result, values), want)
    recomputed = Checkpoint(memory="min").plan(result, Costs.of(result, CPU))
    assert_close(run_split(Checkpoint().apply(result, recomputed), values), want)


@pytest.mark.parametrize("frozen", ["up", "down", "norm", "x"])
def test_gradients_that_nobody_needs(frozen: str) -> None:
    torch._dynamo.reset()
    model = Blocks(Form(bias=True)).double()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name.split("."))
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=frozen != "x")
    program = graphopt.trace(model, {"x": x})
    assert len(planned(program, parts=3).blocks) == 2
    values = arguments(program, model, {"x": x})
    assert_close(run_split(applied(program, parts=3), values), run_joint(program, values))


def test_a_forward_alone() -> None:
    program = graphopt.trace(Blocks(Form()).eval().requires_grad_(False), {"x": torch.ones(2, 6, 8)})
    assert not program.is_joint
    assert len(planned(program, parts=3).blocks) == 2
    assert most_elements(program) == 12 * 32 and most_elements(applied(program, parts=3)) < 12 * 32


# --- the blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["rms", "layer", "fused"])
def test_a_block_is_its_norm_its_mlp_and_its_residual(norm: str) -> None:
    program, *_ = captured(Form(norm=norm, width=8, wide=32), batch=1, length=40)
    result = applied(program, parts=8)
    wholes = [n for n in result.operators() if n.target is torch.ops.aten.cat.default]
    assert len(wholes) == 2 * 2  # of each block its result, and the gradient of its operand
    assert most_elements(result) == 40 * 8


def test_no_place_inside_a_block_is_a_border() -> None:
    program = applied(captured(Form(), batch=1, length=64)[0], parts=8)
    flow = Costs.of(program, CPU).dataflow(program)
    for cut in spans(flow).cuts[1:-1]:
        before, after = flow.operators[cut - 1], flow.operators[cut]
        assert before.block is None or before.block != after.block


@pytest.mark.parametrize(
    ("shape", "tokens", "expected"),
    [((2, 8, 16), 16, [(0, 1), (2,)]), ((1, 8, 3), 8, [(1,)]), ((8, 8), 8, [(0,), (1,)]), ((), 1, [])],
)
def test_dimensions_that_may_count_tokens(
    shape: tuple[int, ...], tokens: int, expected: list[tuple[int, ...]]
) -> None:
    assert list(places(shape, tokens)) == expected


class Gram(nn.Module):
    """Its wide values depend on all tokens, although each operator could be a linear layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.up(x)
        return self.down(z - z.mean(0)).square().sum()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "x", "reason"),
    [
        (Gram(), torch.ones(8, 8), "mixes tokens"),
        (Blocks(Form(drop="inside")), torch.ones(2, 6, 8), "random"),
        (nn.Sequential(nn.Linear(8, 32), nn.ReLU()), torch.ones(6, 8), "leaves it"),
    ],
)
def test_what_cannot_be_cut_is_left_alone_and_named(model: nn.Module, x: Tensor, reason: str) -> None:
    program = graphopt.trace(model, x)
    plan = planned(program, parts=2)
    assert not plan.blocks and plan.remarks
    text = str(plan)
    assert "no block is streamed" in text and reason in text
    assert program_text(StreamBlocks().apply(program, plan)) == program_text(program)


@pytest.mark.parametrize("name", ["perceptron", "residual", "convolutions"])
def test_models_without_wide_blocks_are_left_alone(name: str) -> None:
    program = traced(name)[0]
    plan = planned(program)
    assert plan.blocks == plan.remarks == () and plan.parts == 1
    assert program_text(StreamBlocks().apply(program, plan)) == program_text(program)


def test_a_dropout_behind_a_block_stays_out_of_it() -> None:
    program, model, given_, _ = captured(Form(drop="behind"))
    assert len(planned(program, parts=4).blocks) == 2
    values = arguments(program, model, given_)
    assert_close(run_joint(applied(program, parts=4), values, seed=3), run_joint(program, values, seed=3))


# --- attentions whose scores are in memory -------------------------------------------------------


class Attention(nn.Module):
    """Texts (batch, length, width) through an attention as written by hand, and a residual."""

    def __init__(self, width: int, heads: int, mask: str = "none", drop: float = 0.0) -> None:
        super().__init__()
        self.heads, self.mask, self.drop = heads, mask, drop
        self.inside, self.outside = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.inside(x).view(batch, length, 3, self.heads, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        scores = q @ k.transpose(2, 3) / (width // self.heads) ** 0.5
        if self.mask != "none":
            shape = {"causal": (1, 1, length, length), "text": (batch, 1, 1, length)}[self.mask]
            scores = scores + torch.linspace(0, -3, torch.Size(shape).numel()).view(shape)
        weights = F.dropout(scores.softmax(-1), self.drop, self.drop > 0)
        y = (weights @ v).transpose(1, 2).reshape(batch, length, width)
        return (x + self.outside(y)).square().mean()  # type: ignore[no-any-return]


@settings(max_examples=12)
@given(st.integers(1, 3), st.integers(12, 20), st.integers(1, 4), st.integers(2, 9), st.booleans())
def test_an_attention_in_parts_is_eagers(
    batch: int, length: int, heads: int, parts: int, causal: bool
) -> None:
    torch._dynamo.reset()
    model = Attention(4 * heads, heads, "causal" if causal else "none").double()
    x = torch.randn(batch, length, 4 * heads, dtype=torch.float64, requires_grad=True)
    program = graphopt.trace(model, {"x": x})
    want = [torch.zeros(()), *torch.autograd.grad(model(x), (*model.parameters(), x))]
    want[0] = model(x).detach()
    plan = planned(program, parts=parts)
    assert len([b for b in plan.blocks if b.startswith("bmm")]) == (batch * heads > 1)
    result = applied(program, parts=parts)
    labels = [i.label for i in program.inputs if i.role is not Role.TANGENT]
    known = dict(zip([*(n for n, _ in model.named_parameters()), "x"], want[1:], strict=True))
    values = arguments(program, model, {"x": x})
    assert_close(run_split(result, values), [want[0], *(known[label] for label in labels)])


def test_the_scores_of_all_heads_are_never_in_memory() -> None:
    model, x = Attention(16, 4), torch.randn(2, 64, 16, requires_grad=True)
    program = graphopt.trace(model, {"x": x})
    assert most_elements(program) == 2 * 4 * 64 * 64
    assert most_elements(applied(program, parts=8)) == max(64 * 64, 2 * 64 * 3 * 16)


@pytest.mark.parametrize(("mask", "drop", "reason"), [("text", 0.0, "repeats"), ("none", 0.5, "random")])
def test_an_attention_that_cannot_be_cut_is_named(mask: str, drop: float, reason: str) -> None:
    program = graphopt.trace(Attention(8, 2, mask, drop), {"x": torch.randn(2, 16, 8)})
    plan = planned(program, parts=2)
    assert not plan.blocks and any(reason in remark for remark in plan.remarks)


# --- the choice ----------------------------------------------------------------------------------


def test_the_number_of_parts_follows_from_the_peak() -> None:
    wide, *_ = captured(Form(width=8, wide=256), batch=1, length=512)
    plan = planned(wide)
    assert plan.parts > 1 and plan.peak_bytes < 0.7 * plan.baseline_bytes
    assert planned(wide, memory="min") == plan
    short, *_ = captured(Form(width=32, wide=48), batch=1, length=2)  # its parameters are its peak
    assert planned(short).parts == 1


def test_a_budget_that_needs_parts_gets_them() -> None:
    program, model, given_, want = captured(Form(width=8, wide=256), batch=1, length=512)
    costs = Costs.of(program, CPU)
    plain = Checkpoint().plan(program, costs).baseline_bytes
    assert planned(program, memory=plain).parts == 1
    alone = Checkpoint(memory="min").plan(program, costs).peak_bytes
    budget = int(0.8 * alone)
    with pytest.raises(PlanError):
        Checkpoint(memory=budget).plan(program, costs)
    plan = planned(program, memory=budget)
    assert plan.parts > 1 and plan.budget_bytes == budget
    result = StreamBlocks().apply(program, plan)
    checkpoints = Checkpoint(memory=budget).plan(result, Costs.of(result, CPU))
    assert checkpoints.peak_bytes <= budget
    values = arguments(program, model, given_)
    assert_close(run_split(Checkpoint().apply(result, checkpoints), values), want)
    with pytest.raises(PlanError, match="streamed blocks or not") as error:
        planned(program, memory=1000)
    reachable = error.value.reachable_bytes
    assert reachable is not None and reachable < budget
    assert planned(program, memory=reachable).parts > 1


def test_plans_go_through_json() -> None:
    plan = planned(captured(Form())[0], parts=4)
    assert StreamBlocksPlan.from_json(plan.to_json()) == plan


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [0, -1, True, 2.0, "many", None])
def test_parts_that_are_none(parts: Any) -> None:
    with pytest.raises(PlanError, match="neither a positive number"):
        StreamBlocks(parts=parts)


def test_parts_and_a_budget() -> None:
    with pytest.raises(PlanError, match="not both"):
        StreamBlocks(parts=2, memory="1MiB")
    with pytest.raises(PlanError, match="memory="):
        StreamBlocks(memory=-1)


def test_the_plan_of_another_program() -> None:
    plan = planned(captured(Form())[0], parts=2)
    with pytest.raises(PlanError, match="begins no block"):
        StreamBlocks().apply(traced("perceptron")[0], plan)


# --- through optimize ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
def test_beside_a_streamed_loss_and_checkpoints(name: str) -> None:
    model = zoo.build(name, "small", {"n_positions": 256} if name == "gpt2" else {})
    batch = zoo.example_batch(name, model, batch=2, seq=96)
    model(**batch).loss.backward()
    want = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    passes = [StreamLoss(returns="loss"), StreamBlocks(parts=4), Checkpoint(memory="min")]
    ours = optimize(model, passes=passes, device="cpu-generic")

    def step() -> list[Tensor]:
        model.zero_grad()
        ours(**batch).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert_close(step(), want, tolerance=1e-4)
    assert len(_plans(ours)[1].blocks) == 2
    model.zero_grad()
    predicted = _plans(ours)[2].peak_bytes - ours._graphopt.log.records[0].static_bytes
    step()
    model.zero_grad()
    measured = graphopt.measure(step).peak_bytes
    assert measured == pytest.approx(predicted, rel=0.02)


def _plans(model: Any) -> list[Any]:
    return [step.plan for step in model._graphopt.log.records[0].steps]


def test_two_steps_add_to_the_gradients() -> None:
    model, x = Blocks(Form(bias=True), tied=True).double(), torch.randn(2, 6, 8, dtype=torch.float64)
    twin = copy.deepcopy(model)
    ours = optimize(model, passes=[StreamBlocks(parts=5), Checkpoint(memory="min")], device="cpu-generic")
    for factor in (1.0, 0.3):
        (factor * twin(x)).backward()
        (factor * ours(x)).backward()
    found, want = ([p.grad for p in m.parameters()] for m in (model, twin))
    assert_close(found, want)


def test_a_budget_alone_streams_blocks_where_it_has_to() -> None:
    model, x = Blocks(Form(width=8, wide=256)).double(), torch.randn(1, 512, 8, dtype=torch.float64)
    model(x).backward()
    want = [p.grad for p in model.parameters()]
    model.zero_grad()
    least = optimize(model, memory="min", device="cpu-generic")
    least(x).backward()
    reached = _plans(least)[0].peak_bytes
    for budget, count in ((reached, 1), (int(0.8 * reached), 2)):
        model.zero_grad()
        ours = optimize(model, memory=budget, device="cpu-generic")
        ours(x).backward()
        plans = _plans(ours)
        assert len(plans) == count and plans[-1].peak_bytes <= budget
        assert_close([p.grad for p in model.parameters()], want)
    for limited in ({"passes": [Checkpoint(memory=budget)]}, {"memory": 1000}):
        with pytest.raises(PlanError) as error:
            optimize(model, **limited, device="cpu-generic")(x)
        assert (error.value.reachable_bytes or 0) > 1000


@pytest.mark.parametrize(("seconds", "expected"), [(2.0, "streamed"), (9.0, "nested"), (None, "nested")])
def test_the_faster_of_streamed_blocks_and_nested_recomputation(
    monkeypatch: pytest.MonkeyPatch, seconds: float | None, expected: str
) -> None:
    """They are compared where a plan forgets values; where none does, blocks are not tried."""
    program, *_ = captured(Form())
    plan = Checkpoint().plan(program, Costs.of(program, CPU))
    nested = replace(plan, forget=(("mul", ("sin",)),), recompute_seconds=5.0, budget_bytes=1000)
    tried: list[str] = []

    def run(program: Any, passes: Any, *_: Any) -> tuple[str, tuple[PassStep, ...]]:
        name = "streamed" if len(passes) == 2 else "nested"
        tried.append(name)
        if name == "streamed" and seconds is None:
            raise PlanError("not with streamed blocks")
        found = nested if name == "nested" else replace(plan, recompute_seconds=seconds or 0.0)
        return name, (PassStep(passes[-1], found, 0.0),)

    monkeypatch.setattr(stream_blocks, "run_passes", run)
    given = (program, [Checkpoint(memory=1000)], lambda p: Costs.of(p, CPU), time.perf_counter)
    assert run_or_stream(*given)[0] == expected
    assert tried == ["nested", "streamed"]
    nested = replace(nested, forget=())
    assert run_or_stream(*given)[0] == "nested"
    assert tried[2:] == ["nested"]


# --- golden text ---------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent.parent / "golden" / "stream_blocks.txt"


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    model = Blocks(Form(2, 8, norm="none", gated=False, attends=False, activation="relu"), depth=1)
    program = graphopt.trace(model, {"x": torch.ones(2, 3, 2, requires_grad=True)})
    plan = planned(program, parts=2)
    parts = {
        "before": program_text(program),
        "plan": str(plan),
        "after": program_text(applied(program, parts=2)),
    }
    text = "".join(f"# {title}\n{part}\n\n" for title, part in parts.items())
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
