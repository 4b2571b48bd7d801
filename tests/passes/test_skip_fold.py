"""Blocks that share weights: as built by hand, saved and loaded, trained, with norms of least squares."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import FAMILIES, block_model, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt import PlanError, SkipLayers, VerifyError
from graphopt.passes import folding
from graphopt.passes.blocks import find_stack
from graphopt.passes.folding import LARGEST_GROUP, cheapest_groups, choose_groups
from graphopt.passes.layer_sharing import norm_parameters, saved_parameters, shared_tensors
from graphopt.passes.made_up_inputs import as_batch, made_up_batch
from graphopt.passes.removal_checks import check_shared
from graphopt.passes.skip_plan import SkipPlan
from graphopt.passes.skip_strategies import Evidence, block_influence
from graphopt.passes.sublayer_removal import without_units

GOLDEN = Path(__file__).parent.parent / "golden" / "skip_fold.txt"
GENERATING = [name for name in FAMILIES if name not in ("bert", "vit")]


def calibration(family: str) -> list[Any]:
    return [made_up_batch(block_model(family, 2))] if family == "vit" else token_batches(2)


def folded(model: nn.Module, family: str, **options: Any) -> tuple[Any, SkipPlan]:
    settings = {"remove": 2, "shared": 2, "calibration": calibration(family)} | options
    short = graphopt.optimize(model, passes=[SkipLayers(strategy="fold", **settings)])
    return short, short.report.steps[0].plan


def evidence_of(model: nn.Module, batches: Any) -> Evidence:
    inputs = tuple(as_batch(batch, model) for batch in batches)
    return Evidence(model, find_stack(model, inputs[0]), inputs)


def numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def by_hand(model: Any, short: Any, plan: SkipPlan) -> Any:
    """The whole model's weights in a smaller model; matrices of the first of a group, norms of `short`.

    A matrix, or the bias beside one, is shared by its name in the state; nothing of the pass is used.
    """
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(plan.kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in plan.kept]
    built = type(model)(config).eval()
    state, fitted_state, sources = model.state_dict(), short.state_dict(), dict[int, int]()
    for first, *others in plan.groups:
        sources |= dict.fromkeys(others, first)
    for name, parameter in list(built.named_parameters()):
        if not name.startswith(f"{plan.path}."):
            parameter.data.copy_(state[name])
            continue
        place, _, rest = name.removeprefix(f"{plan.path}.").partition(".")
        old = plan.kept[int(place)]
        matrix = state[f"{plan.path}.{old}.{rest.rpartition('.')[0]}.weight"].ndim > 1
        if old not in sources:
            parameter.data.copy_(state[f"{plan.path}.{old}.{rest}"])
        elif matrix:
            new = plan.kept.index(sources[old])
            owner, _, own = f"{plan.path}.{new}.{rest}".rpartition(".")
            path, _, last = name.rpartition(".")
            setattr(built.get_submodule(path), last, getattr(built.get_submodule(owner), own))
            built.get_parameter(name).data.copy_(state[f"{plan.path}.{sources[old]}.{rest}"])
        else:
            parameter.data.copy_(fitted_state[name])
    return built


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_model_built_by_hand(family: str, tmp_path: Path) -> None:
    model = block_model(family, 6)
    weights = copy.deepcopy(model.state_dict())
    short, plan = folded(model, family)
    hand, batch = by_hand(model, short, plan), made_up_batch(model)
    assert sum(len(group) - 1 for group in plan.groups) == 2 and len(plan.kept) == 4
    assert torch.equal(short(**batch).logits, hand(**batch).logits)
    assert numbers(short) == numbers(hand)
    only_removed = graphopt.optimize(model, passes=[SkipLayers(keep=plan.kept)])
    assert numbers(short) == numbers(only_removed) - plan.saved
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())

    short.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, hand(**batch).logits)
    assert numbers(loaded) == numbers(only_removed)  # memory is not shared after a reload
    assert graphopt.share_weights(loaded, plan) is loaded
    assert torch.equal(loaded(**batch).logits, hand(**batch).logits)
    assert numbers(loaded) == numbers(short)
    loaded.save_pretrained(tmp_path / "again")
    again = type(model).from_pretrained(tmp_path / "again")
    assert torch.equal(again(**batch).logits, hand(**batch).logits)


@pytest.mark.parametrize("family", GENERATING)
def test_generates_as_the_model_built_by_hand(family: str) -> None:
    model = block_model(family, 6)
    short, plan = folded(model, family)
    hand, ids = by_hand(model, short, plan), token_batches(1, samples=2, tokens=7, seed=5)[0]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    expected = hand.generate(ids, use_cache=False, **options)
    assert torch.equal(short.generate(ids, **options), expected)
    assert torch.equal(short.generate(ids, use_cache=False, **options), expected)
    assert torch.equal(short.generate(ids, cache_implementation="static", **options), expected)
    blocks = short.get_submodule(plan.path)
    places = {m.layer_idx for b in blocks for m in b.modules() if hasattr(m, "layer_idx")}
    assert places in (set(range(4)), set())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_gradients_add_up_in_what_is_shared(family: str) -> None:
    model = block_model(family, 6)
    short, plan = folded(model, family)
    free = copy.deepcopy(short)
    for parameter_name, value in list(free.named_parameters(remove_duplicate=False)):
        owner, _, own = parameter_name.rpartition(".")
        setattr(free.get_submodule(owner), own, nn.Parameter(value.detach().clone()))
    if free.get_output_embeddings() is not None:
        free.tie_weights()
    batch = made_up_batch(model)
    for m in (short, free):
        m(**batch).logits.square().mean().backward()
    for first, *others in plan.groups:
        blocks, split = (m.get_submodule(plan.path) for m in (short, free))
        places = [plan.kept.index(i) for i in (first, *others)]
        for name in shared_tensors(blocks[places[0]]):
            shared = [blocks[i].get_parameter(name) for i in places]
            assert all(parameter is shared[0] for parameter in shared)
            total = sum(split[i].get_parameter(name).grad for i in places)
            torch.testing.assert_close(shared[0].grad, total)
        for name in norm_parameters(blocks[places[1]]):
            own = [blocks[i].get_parameter(name) for i in places]
            assert len({id(parameter) for parameter in own}) == len(places)
            assert all(parameter.requires_grad for parameter in own)
    optimizer = torch.optim.SGD(short.parameters(), lr=0.1)
    assert len(optimizer.param_groups[0]["params"]) == len(list(short.parameters()))
    optimizer.step()
    for first, *others in plan.groups:
        blocks = short.get_submodule(plan.path)
        for name, value in shared_tensors(blocks[plan.kept.index(first)]).items():
            assert all(blocks[plan.kept.index(i)].get_parameter(name) is value for i in others)


@settings(max_examples=60)
@given(st.data())
def test_groups_are_the_cheapest_of_all(data: st.DataObject) -> None:
    blocks = data.draw(st.integers(1, 7))
    pairs = [(i, j) for i, j in itertools.permutations(range(blocks), 2) if abs(i - j) < LARGEST_GROUP]
    costs = {p: data.draw(st.integers(0, 20)) * 1.0 for p in pairs if data.draw(st.integers(0, 4))}
    shared = data.draw(st.integers(1, 4))
    best = math.inf
    for cuts in itertools.product([False, True], repeat=blocks - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [blocks]
        groups = [range(a, b) for a, b in itertools.pairwise([0, *ends])]
        if blocks - len(groups) != shared or max(map(len, groups)) > LARGEST_GROUP:
            continue
        least = (min(sum(costs.get((s, i), math.inf) for i in g if i != s) for s in g) for g in groups)
        best = min(best, sum(least))
    if math.isinf(best):
        with pytest.raises(PlanError, match=f"shared={shared}: only "):
            cheapest_groups(blocks, shared, costs)
        return
    found = cheapest_groups(blocks, shared, costs)
    assert sum(costs[group[0], i] for group in found for i in group[1:]) == best
    assert sum(len(group) - 1 for group in found) == shared
    assert all(max(g) - min(g) == len(g) - 1 for g in found)


@settings(max_examples=5, deadline=None)
@given(st.sets(st.integers(0, 4), min_size=2), st.data())
def test_any_blocks_and_groups(chosen: set[int], data: st.DataObject) -> None:
    """Plans edited by hand: blocks that are far apart, groups of any size."""
    kept = tuple(sorted(chosen))
    order = data.draw(st.permutations(kept))
    cut = data.draw(st.integers(2, len(order)))
    groups = tuple(tuple(part) for part in (order[:cut], order[cut:]) if len(part) > 1)
    model, batches = block_model("llama", 5), token_batches(1)
    pass_ = SkipLayers(keep=kept, strategy="fold", calibration=batches, shared=1)
    plan = SkipPlan("model.layers", 5, kept, "given", groups=groups)
    short: Any = pass_.apply(model, SkipPlan.from_json(plan.to_json()))
    hand, batch = by_hand(model, short, plan), made_up_batch(model)
    assert torch.equal(short(**batch).logits, hand(**batch).logits)
    assert numbers(short) == numbers(hand)
    ids = batch["input_ids"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    assert torch.equal(short.generate(ids, **options), hand.generate(ids, use_cache=False, **options))


def test_blocks_go_by_influence_and_similar_ones_share() -> None:
    model, batches = block_model("llama", 5), token_batches(2)
    short, plan = folded(model, "llama", calibration=batches, shared=1)
    e = evidence_of(model, batches)
    least = sorted(range(5), key=lambda i: block_influence(e.states)[i])[:2]
    assert plan.removed == tuple(sorted(least)) and plan.influence == e.influence
    only = without_units(model, e.stack, e.units, frozenset(least), share=True)
    assert numbers(only) == numbers(short) + plan.saved
    layers = model.model.layers
    layers[3].load_state_dict(layers[2].state_dict())  # then nothing is lost by sharing
    found = choose_groups(evidence_of(model, batches), model, list(range(5)), 1)
    assert set(found[0]) == {2, 3}


def test_predictions_are_those_of_the_result() -> None:
    for compensation in ("none", "linear"):
        model = block_model("gpt2", 4)
        short, plan = folded(model, "gpt2", shared=1, remove=1, compensation=compensation)
        kl, tokens = 0.0, 0
        with torch.no_grad():
            for ids in calibration("gpt2"):
                whole, other = (m(ids).logits.double().log_softmax(-1) for m in (model, short))
                kl += float((whole.exp() * (whole - other)).sum())
                tokens += ids.numel()
        assert plan.kl == pytest.approx(kl / tokens, rel=1e-3)
        assert short.report.steps[0].measured.quality.kl == pytest.approx(plan.kl, rel=1e-4)
        assert short.report.steps[0].measured.parameters == numbers(short)


def test_compensation_comes_first() -> None:
    """What is shared is the refitted projection; norms are fitted towards the refitted model."""
    model, batches = block_model("llama", 6), token_batches(4)
    options: dict[str, Any] = {"keep": [0, 2, 3, 5], "calibration": batches, "compensation": "linear"}
    refitted = graphopt.optimize(model, passes=[SkipLayers(**options)])
    short, plan = folded(model, "llama", remove=None, shared=1, **options)
    ((source, block),) = plan.groups
    places = plan.kept.index(source), plan.kept.index(block)
    weight = short.model.layers[places[0]].mlp.down_proj.weight
    assert weight is short.model.layers[places[1]].mlp.down_proj.weight
    torch.testing.assert_close(weight, refitted.model.layers[places[0]].mlp.down_proj.weight)


def test_only_the_sharing_is_chosen_for_blocks_that_are_given() -> None:
    model = block_model("llama", 4)
    short, plan = folded(model, "llama", remove=None, keep=range(4), shared=None)
    assert plan.kept == (0, 1, 2, 3) and sum(len(g) - 1 for g in plan.groups) == 1
    assert folded(model, "llama", remove=0)[1].kept == plan.kept
    assert numbers(short) == numbers(model) - plan.saved


def test_bounds_hold_for_the_folded_model() -> None:
    model, batches = block_model("llama", 3), token_batches(1)
    bound: dict[str, Any] = {"shared": 1, "calibration": batches}
    reached = folded(model, "llama", **bound, remove=1)[1]
    plan = folded(model, "llama", **bound, remove=None, max_kl=reached.kl)[1]
    assert plan.removed == reached.removed and plan.kl == reached.kl
    with pytest.raises(PlanError, match="already by sharing weights"):
        folded(model, "llama", **bound, remove=None, max_kl=1e-9)


def test_a_speed_up_with_sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that the target takes go, and some of the others share; it is not timed here."""
    monkeypatch.setattr(SkipLayers, "_fast", lambda *_: (frozenset({1}), 1.3))
    pass_ = SkipLayers(target_speedup=1.3, strategy="fold", calibration=CALIBRATION)
    plan = pass_.plan(block_model("llama", 4))
    assert (plan.removed, plan.speedup, len(plan.groups)) == ((1,), 1.3, 1)


def test_half_precision() -> None:
    model = block_model("llama", 6).bfloat16()
    short, plan = folded(model, "llama")
    assert {p.dtype for p in short.parameters()} == {torch.bfloat16} and plan.groups


def test_padding_is_not_fitted() -> None:
    model, ids = block_model("llama", 4), token_batches(1, samples=6)[0]
    padded = torch.cat([torch.zeros_like(ids[:, :5]), ids], dim=1)
    mask = (torch.arange(15) >= 5).long().expand(6, -1)
    options: dict[str, Any] = {"remove": None, "keep": range(4), "shared": 1}
    found = [
        folded(model, "llama", calibration=[batch], **options)[1]
        for batch in (ids, {"input_ids": padded, "attention_mask": mask})
    ]
    assert found[0].groups == found[1].groups
    assert found[0].kl == pytest.approx(found[1].kl, rel=1e-2)


class Uneven(nn.Module):
    """Blocks of one class, of which the last two have wider matrices inside."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(6), nn.Linear(6, size), nn.Linear(size, 6))
            for size in (4, 4, 8, 9)
        )

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


def test_a_plain_module_whose_blocks_differ() -> None:
    torch.manual_seed(0)
    model, x = Uneven(), torch.randn(5, 6)
    short, plan = folded(model, "llama", remove=None, keep=range(4), shared=1, calibration=[x])
    assert set(plan.groups[0]) == {0, 1} and plan.saved == 6 * 4 + 4 + 4 * 6 + 6
    assert short.parts[0][1].weight is short.parts[1][1].weight
    assert short.parts[0][0].weight is not short.parts[1][0].weight
    with pytest.raises(PlanError, match="shared=2: only 1 of the 4 blocks"):
        folded(model, "llama", remove=None, keep=range(4), shared=2, calibration=[x])
    pass_ = SkipLayers(keep=range(4), calibration=[x], strategy="fold")
    edited = SkipPlan("parts", 4, (0, 1, 2, 3), "given", groups=((1, 2),))
    with pytest.raises(PlanError, match="blocks 1 and 2 cannot share weights: their shapes differ"):
        pass_.apply(model, edited)


def test_a_folded_model_as_input(tmp_path: Path) -> None:
    """Copies keep sharing, what is written stays whole, and folding it again counts what is new."""
    model = block_model("llama", 5)
    short, plan = folded(model, "llama", remove=None, keep=range(5), shared=1)
    twice, second = folded(short, "llama", remove=None, keep=range(5), shared=2)
    assert numbers(twice) == numbers(short) - second.saved
    ((source, block),) = plan.groups
    less = graphopt.optimize(short, passes=[SkipLayers(keep=sorted({0, source, block}))])
    less.save_pretrained(tmp_path)
    batch = made_up_batch(model)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(**batch).logits, less(**batch).logits)
    assert numbers(less) < numbers(loaded)


def test_a_state_dict_comes_back(tmp_path: Path) -> None:
    model = block_model("gpt2", 4)
    short, plan = folded(model, "gpt2", remove=1, shared=1)
    torch.save(short.state_dict(), tmp_path / "state.pt")
    other, _ = folded(block_model("gpt2", 4, seed=1), "gpt2", remove=None, keep=plan.kept, shared=1)
    plain = by_hand(model, short, plan)
    for m in (plain, other):
        m.load_state_dict(torch.load(tmp_path / "state.pt"))
    batch = made_up_batch(model)
    assert torch.equal(plain(**batch).logits, short(**batch).logits)
    copied = copy.deepcopy(short)
    assert numbers(copied) == numbers(short)
    copied.save_pretrained(tmp_path)  # writes the copy, not what it was copied from


def test_with_a_checkpoint_behind_it() -> None:
    model, ids = block_model("gpt2", 3), token_batches(1)[0]
    skip = SkipLayers(remove=1, strategy="fold", calibration=[ids], shared=1)
    passes = [skip, graphopt.Checkpoint(memory="min")]
    small = graphopt.optimize(model, passes=passes, device="cpu-generic")
    plain = graphopt.optimize(model, passes=[skip])
    for m in (small, plain):
        m(input_ids=ids, labels=ids).loss.backward()
    grads = [[p.grad for p in m.parameters()] for m in (small, plain)]
    assert len(grads[0]) == len(grads[1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_golden(request: pytest.FixtureRequest) -> None:
    model = block_model("llama", 6).double()
    short, plan = folded(model, "llama")
    text = f"{short.report}\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
    assert SkipPlan.from_json(plan.to_json()) == plan


CALIBRATION = token_batches(1)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"keep": [0, 1], "shared": 1}, "shared=1 is for strategy='fold', not 'greedy'"),
    ({"keep": [0, 1], "strategy": "fold"}, "strategy='fold' needs calibration="),
    ({"remove": 1, "strategy": "fold"}, "strategy='fold' needs calibration="),
    (
        {"keep": [0, 1], "strategy": "fold", "shared": 0, "calibration": CALIBRATION},
        "shared=0: one block",
    ),
    ({"keep": [0], "strategy": "fold", "calibration": CALIBRATION}, "shared=1: of 1 blocks that stay at"),
    (
        {"remove": 0, "strategy": "fold", "shared": 3, "calibration": CALIBRATION},
        "shared=3: of 4 blocks that stay at most 2 can run with the weights of a neighbour, in groups",
    ),
    (
        {"remove": 1, "strategy": "fold", "granularity": "sublayers", "calibration": CALIBRATION},
        "strategy='fold' is for whole layers",
    ),
    ({"remove": 0, "strategy": "greedy", "calibration": CALIBRATION}, "remove=0: the model has 4 blocks"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        graphopt.optimize(block_model("llama", 4), passes=[SkipLayers(**options)])


GROUPS: list[tuple[Any, str]] = [
    (((0,),), r"groups=\[\[0\]\]: two blocks or more"),
    (((0, 1), (1, 3)), "two blocks or more share weights, each in one group"),
    (((0, 2),), r"groups=\[\[0, 2\]\]: 2 does not stay"),
]


@pytest.mark.parametrize(("groups", "message"), GROUPS)
def test_groups_that_cannot_be(groups: Any, message: str) -> None:
    model = block_model("llama", 4)
    pass_ = SkipLayers(keep=[0, 1, 3], strategy="fold", calibration=CALIBRATION)
    with pytest.raises(PlanError, match=message):
        pass_.apply(model, SkipPlan("model.layers", 4, (0, 1, 3), "given", groups=groups))


def test_a_plan_with_groups_needs_batches() -> None:
    plan = SkipPlan("model.layers", 4, (0, 1, 3), "given", groups=((0, 1),))
    with pytest.raises(PlanError, match="the plan's blocks share weights; give calibration="):
        SkipLayers(keep=[0, 1, 3]).apply(block_model("llama", 4), plan)
    named = SkipPlan("model.layers", 4, (0,), "given", names=("0.mlp",), groups=((0, 1),))
    with pytest.raises(PlanError, match="whole blocks share weights, not sublayers"):
        named.check()


def test_weights_that_are_not_equal_are_not_shared_again() -> None:
    model = block_model("llama", 4)
    short, plan = folded(model, "llama", remove=1, shared=1)
    with pytest.raises(PlanError, match=r"the plan keeps 3 blocks of 'model\.layers'; the model has 4"):
        graphopt.share_weights(model, plan)
    with pytest.raises(PlanError, match="the model has 0 there"):
        graphopt.share_weights(nn.Linear(2, 2), plan)
    loaded = by_hand(model, short, SkipPlan(plan.path, 4, plan.kept, "given"))
    with pytest.raises(PlanError, match=r"of model.layers do not have the same weights"):
        graphopt.share_weights(loaded, plan)


def test_the_check_sees_what_it_is_for() -> None:
    model = block_model("llama", 4)
    short, plan = folded(model, "llama", remove=1, shared=1)
    whole = numbers(short) + plan.saved
    check_shared(short, whole, plan.saved)
    copied = nn.Parameter(short.model.layers[0].mlp.up_proj.weight.detach().clone())
    for layer in short.model.layers:
        layer.mlp.up_proj.weight = copied if layer is short.model.layers[0] else nn.Parameter(copied.data)
    with pytest.raises(VerifyError, match="parameters with shared blocks"):
        check_shared(short, whole, plan.saved)


def test_saved_parameters_are_counted_once() -> None:
    blocks = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(3)]
    assert saved_parameters(blocks, ((0, 1, 2),)) == 2 * 20
    blocks[1][1].weight = blocks[0][1].weight
    assert saved_parameters(blocks, ((0, 1),)) == 4  # only the bias is left to share
    assert folding.shared_count(None, 3) == 1
