"""Gradients against eager's, budgets against the allocator, choices against brute force, refusals."""

import copy
import functools
from collections.abc import Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_steps import records
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arguments, run_split, traced
from texts import program_text
from tiny_models import Convolutions, SharedBlock
from torch import nn

import graphopt
from graphopt import Checkpoint, PlanError, Program, SparseUpdate, calibration_gradients
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.memory import dataflow
from graphopt.measurement import measure
from graphopt.passes.base import Pass
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.passes.frozen_gradients import gradient_of, without_gradients_of
from graphopt.passes.sparse_update import SparseUpdatePlan
from graphopt.passes.update_memory import UpdateMemory
from graphopt.passes.update_selection import Group, Selection
from graphopt.program import Role
from graphopt.split import saved_nodes
from graphopt.verify import verify

CPU = get_device("cpu-generic")
LOSS_BYTES = 8  # the loss and its own gradient, which the caller holds during the backward


class Images(nn.Module):
    """A small classifier of images [batch, 1, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()),
        )
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Words(nn.Module):
    """A small transformer over word indices [batch, 24], with two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.embed(x)
        for block in self.blocks:
            y = block(y)
        return self.head(y.mean(1))


def task(name: str) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A model, a batch for it and the classes of that."""
    target = torch.randint(0, 10, (16,))
    if name == "images":
        return Images(), torch.randn(16, 1, 16, 16), target
    return Words(), torch.randint(0, 40, (16, 24)), target


def optimized(model: nn.Module, passes: list[Pass]) -> Any:
    return graphopt.optimize(model, passes=passes, loss=F.cross_entropy, device=CPU)


def contributions(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> list[dict[str, Any]]:
    return list(calibration_gradients(copy.deepcopy(model), [(x, target)], F.cross_entropy))


# --- steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "words"])
@pytest.mark.parametrize("further", [[], [Checkpoint("min")]], ids=["alone", "then checkpoint"])
def test_what_is_updated_and_its_peak(name: str, further: list[Pass]) -> None:
    model, x, target = task(name)
    want = copy.deepcopy(model)
    scores = contributions(model, x, target)
    ours = optimized(model, [SparseUpdate(0.9, calibration=scores), *further])
    for twin in (want, ours):
        twin.zero_grad(set_to_none=True)
    F.cross_entropy(want(x), target).backward()
    ours(x, target=target).backward()
    record = records(ours)[-1]
    plan: SparseUpdatePlan = record.steps[0].plan
    expected = dict(want.named_parameters())
    assert plan.update and plan.frozen and {*plan.update, *plan.frozen} == {*expected}
    for label, parameter in model.named_parameters():
        if label in plan.frozen:
            assert parameter.grad is None, label
        else:
            torch.testing.assert_close(parameter.grad, expected[label].grad, rtol=1e-5, atol=1e-7)

    before = {label: p.detach().clone() for label, p in model.named_parameters()}
    torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1).step()
    moved = {label for label, p in model.named_parameters() if not torch.equal(p, before[label])}
    assert moved == {*plan.update}

    model.zero_grad(set_to_none=True)
    measured = measure(lambda: ours(x, target=target).backward()).peak_bytes
    static = record.costs.dataflow(record.before).static_bytes
    last: Any = record.steps[-1].plan
    held = measured - (last.peak_bytes - static)
    assert held in (0, LOSS_BYTES)  # the peak is in the forward, or in the backward
    assert plan.peak_bytes <= plan.budget_bytes == int(0.9 * plan.baseline_bytes)
    assert not further or held == 0 or last.peak_bytes < plan.peak_bytes
    assert "of the contribution" in str(ours.report)


def test_every_budget_is_kept_and_more_memory_updates_more() -> None:
    model, x, target = task("images")
    program = graphopt.trace(WithLoss(model), {"x": x, "target": target})
    costs = Costs.of(program, CPU)
    scores = contributions(model, x, target)
    found = []
    for share in (1.0, 0.97, 0.94, 0.91):
        plan = SparseUpdate(share, scores=prefixed(scores)).plan(program, costs)
        assert plan.budget_bytes is not None and plan.peak_bytes <= plan.budget_bytes
        found.append(plan.contribution)
    assert found == sorted(found, reverse=True) and found[-1] < found[0] == plan.total
    pass_ = SparseUpdate(0.95, scores=prefixed(scores), optimizer="adam")
    adam = pass_.plan(program, costs)
    sizes = {f"model.{n}": p.nbytes for n, p in model.named_parameters()}
    assert adam.state_bytes == 2 * sum(sizes[label] for label in adam.update)
    assert adam.baseline_bytes == plan.baseline_bytes + 2 * sum(sizes.values())


class WithLoss(nn.Module):
    """A classifier and its loss in one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(x), target)


def prefixed(calibration: list[dict[str, torch.Tensor]]) -> dict[str, float]:
    return {f"model.{n}": float(g.square().sum()) for n, g in calibration[0].items()}


def test_parameters_of_a_layer_go_together() -> None:
    model, x, target = task("words")
    program = graphopt.trace(WithLoss(model), {"x": x, "target": target})
    pass_ = SparseUpdate(0.6, scores=prefixed(contributions(model, x, target)), by="layer")
    plan = pass_.plan(program, Costs.of(program, CPU))
    layers = [{label.rpartition(".")[0] for label in part} for part in (plan.update, plan.frozen)]
    assert all(layers) and not layers[0] & layers[1]


# --- the pruned program, over random choices -----------------------------------------------------


class Shortcut(nn.Module):
    """Two convolutions of one map, which nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.near, self.far = (nn.Conv2d(2, 2, size, padding=size // 2) for size in (3, 1, 3))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.first(image)
        return (self.near(x) + self.far(x)).exp().mean((2, 3))


@functools.cache
def example(name: str) -> tuple[Program, nn.Module, dict[str, torch.Tensor]]:
    """A joint program, its model and inputs."""
    if name != "shortcut":
        return traced(name)
    torch.manual_seed(0)
    model, inputs = Shortcut(), {"image": torch.randn(3, 2, 8, 8)}
    return graphopt.trace(model, inputs), model, inputs


NAMES = (
    *("shortcut", "convolutions", "residual", "u-net"),
    *("shared block", "cross attention", "multi-output"),
)


@settings(max_examples=25)
@given(st.sampled_from(NAMES), st.data())
def test_a_pruned_step_is_a_part_of_the_whole(name: str, data: st.DataObject) -> None:
    program, model, inputs = example(name)
    gradients = gradient_of(program)
    labels = {i.name: i.label for i in program.inputs if i.role is Role.PARAMETER}
    frozen = data.draw(st.sets(st.sampled_from([n for n in gradients if n in labels]), min_size=1))
    pruned, _ = without_gradients_of(program, frozen)
    verify(pruned, before=program, may_drop_gradients=True)
    given_ = arguments(program, model, inputs)
    full, part = run_split(program, given_), run_split(pruned, given_)
    count = program.num_forward_outputs
    assert all(torch.equal(a, b) for a, b in zip(full[:count], part[:count], strict=True))
    inputs_of = [i.name for i in program.inputs if i.role is not Role.TANGENT]
    for graph_input, want, got in zip(inputs_of, full[count:], part[count:], strict=True):
        if graph_input in frozen or want is None:
            assert got is None
        else:
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    flow, written = dataflow(program), dataflow(pruned)
    kept = (v for n, g in gradients.items() if n not in frozen for v in flow.value_of[g.name])
    peak = written.static_bytes + step_of(written, everything(written)).peak_bytes
    assert UpdateMemory(program, flow).peak_bytes(kept) == peak


def test_a_map_that_only_gives_its_shape_is_not_kept() -> None:
    program, _, _ = example("shortcut")
    labels = {i.label: i.name for i in program.inputs}
    pruned, _ = without_gradients_of(program, {labels["near.weight"], labels["far.weight"]})
    kept = [{n.name for n in saved_nodes(p) if n.op != "placeholder"} for p in (program, pruned)]
    assert "convolution" in kept[0] and kept[1] == kept[0] - {"convolution"}


def test_a_map_that_is_kept_anyway_gives_its_shape_itself() -> None:
    program, _, _ = example("convolutions")
    weights = {i.name for i in program.inputs if i.label in ("first.0.weight", "second.0.weight")}
    pruned, new = without_gradients_of(program, weights)  # what a ReLU made, its backward reads too
    assert new and torch.ops.aten.empty_strided.default not in {n.target for n in new}
    assert len(weights) == 2 and {*map(str, saved_nodes(pruned))} <= {*map(str, saved_nodes(program))}


def test_a_bias_without_its_weight_is_a_sum() -> None:
    program, _, _ = example("shortcut")
    weights = {i.name for i in program.inputs if i.label.endswith("weight")}
    pruned, _ = without_gradients_of(program, weights)
    masks = [n.args[-1] for n in pruned.operators() if "convolution_backward" in str(n.target)]
    assert masks == [[True, False, False]] * 2  # of three, the first makes no gradient of its input


# --- the choice --------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=7),
    st.integers(0, 40),
)
def test_few_groups_are_chosen_as_brute_force_does(rows: list[tuple[int, int, int]], limit: int) -> None:
    """Each group takes memory of its own, and the chosen share the depth of the deepest."""
    groups = [Group((str(i),), float(score), own) for i, (score, own, _) in enumerate(rows)]

    def peak(chosen: frozenset[int]) -> int:
        return sum(rows[i][1] for i in chosen) + max((rows[i][2] for i in chosen), default=0)

    found = Selection(groups, peak).best(limit)
    every = (frozenset(c) for n in range(len(rows) + 1) for c in combinations(range(len(rows)), n))
    best = max(sum(rows[i][0] for i in c) for c in every if peak(c) <= limit or not c)
    assert sum(rows[i][0] for i in found) == best
    assert not found or peak(found) <= limit


# --- refusals ----------------------------------------------------------------------------------


def test_a_budget_for_not_one_parameter_says_what_can_be_reached() -> None:
    program, model, _ = traced("convolutions")
    costs = Costs.of(program, CPU)
    scores = {label: 1.0 for label, _ in model.named_parameters()}
    with pytest.raises(PlanError, match="not one parameter can be updated within 1 B") as caught:
        SparseUpdate(1, scores=scores).plan(program, costs)
    reachable = caught.value.reachable_bytes
    assert reachable is not None
    plan = SparseUpdate(reachable, scores=scores).plan(program, costs)
    assert plan.update and plan.peak_bytes <= reachable < plan.baseline_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "min"}, "would update nothing"),
        ({"memory": "plenty", "scores": {"a": 1.0}}, "memory='plenty'"),
        ({"memory": 0.5}, "needs scores= or calibration="),
        ({"memory": 0.5, "scores": {"a": -1.0}}, "score of a is -1.0"),
        ({"memory": 0.5, "scores": {"a": float("nan")}}, "score of a is nan"),
        ({"by": "channel"}, "by='channel' is none of"),
        ({"scores": {"a": 1.0}, "calibration": []}, "not both"),
        ({"optimizer": "newton"}, "optimizer='newton' is none of \"sgd\""),
    ],
)
def test_bad_options_are_named_at_once(options: Mapping[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SparseUpdate(**options)


def test_a_parameter_without_a_score_is_named() -> None:
    program = traced("perceptron")[0]
    with pytest.raises(PlanError, match=r"layers\.0\.weight has no score; scores are given for a"):
        SparseUpdate(0.5, scores={"a": 1.0}).plan(program, Costs.of(program, CPU))


def by_hand(update: tuple[str, ...], frozen: tuple[str, ...]) -> SparseUpdatePlan:
    return SparseUpdatePlan(update, frozen, 1.0, 2.0, None, 0, 0, 0)


def test_plans_are_carried_out_as_they_are_or_refused() -> None:
    program, model, _ = traced("perceptron")
    labels = [label for label, _ in model.named_parameters()]
    plan = by_hand((labels[-1],), tuple(labels[:-1]))
    assert SparseUpdatePlan.from_json(plan.to_json()) == plan
    after = SparseUpdate().apply(program, plan)
    assert len(gradient_of(after)) == 1 and len(gradient_of(program)) == len(labels)
    with pytest.raises(PlanError, match="made for another program: it names 'elsewhere'"):
        SparseUpdate().apply(program, by_hand((), ("elsewhere",)))
    with pytest.raises(PlanError, match=r"both updates and freezes 'layers\.0\.bias'"):
        SparseUpdate().apply(program, replace(plan, update=("layers.0.bias",)))
    forward = graphopt.trace(model, {"x": torch.ones(3, 32)}, training=False)
    with pytest.raises(PlanError, match="no backward"):
        SparseUpdate().apply(forward, plan)
    assert SparseUpdate(0.5, scores={"a": 1.0}).plan(forward, Costs.of(forward, CPU)).frozen == ()


def test_only_a_pass_that_says_so_drops_gradients() -> None:
    program = traced("perceptron")[0]
    pruned, _ = without_gradients_of(program, {program.inputs[0].name})
    with pytest.raises(graphopt.VerifyError, match="became None"):
        verify(pruned, before=program)


# --- calibration -------------------------------------------------------------------------------


def test_calibration_leaves_the_model_as_it_was() -> None:
    model = Convolutions()
    image = torch.randn(3, 2, 8, 8)
    model(image).sum().backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    batches = [image, (image,), {"image": image}]
    found = list(calibration_gradients(model, batches, torch.sum))
    assert len(found) == 3
    for gradients in found:
        torch.testing.assert_close(gradients, before)
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())


def test_a_tied_parameter_has_all_its_names() -> None:
    model = SharedBlock()
    (found,) = calibration_gradients(model, [torch.randn(4, 32)], torch.sum)
    assert found["head.weight"] is found["block.0.weight"]


# --- golden text -------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent.parent / "golden" / "sparse_update.txt"


class Tiny(nn.Module):
    """Below the norm the backward takes more memory than above it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 8)
        self.norm = nn.LayerNorm(8)
        self.second = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.norm(self.first(x))).exp().sum()


def golden_program() -> Program:
    return graphopt.trace(Tiny(), torch.ones(100, 2))


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    program = golden_program()
    scores = {label: 1.0 for label, _ in Tiny().named_parameters()}
    pass_ = SparseUpdate(0.8, scores=scores)
    plan = pass_.plan(program, Costs.of(program, CPU))
    decided = f"update {', '.join(plan.update)}\nfrozen {', '.join(plan.frozen)}"
    parts = {
        "before": program_text(program),
        "plan": f"{decided}\npeak {plan.peak_bytes} of {plan.baseline_bytes} bytes",
        "after": program_text(pass_.apply(program, plan)),
    }
    text = "".join(f"# {title}\n{part}\n\n" for title, part in parts.items())
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
