"""Which blocks go, what that costs to find out, and whether the targets are kept."""

import itertools
import math
from typing import Any

import pytest
import torch
from block_models import block_model, token_batches

import graphopt
from graphopt import PlanError, SkipLayers
from graphopt.passes import skip_strategies
from graphopt.passes.blocks import find_stack
from graphopt.passes.compensation import block_calls, least_squares, residual_projection, scale_of
from graphopt.passes.layer_trials import LayerTrials
from graphopt.passes.made_up_inputs import as_batch, made_up_batch
from graphopt.passes.skip_strategies import (
    STRATEGIES,
    Evidence,
    Greedy,
    angular_distances,
    block_influence,
    naive_runs,
    unified_kept,
    unified_published_kept,
)


def evidence(model: Any, batches: Any) -> Evidence:
    return Evidence(
        model,
        find_stack(model, made_up_batch(model)),
        tuple(as_batch(batch, model) for batch in batches),
    )


def quality(model: Any, other: Any, batches: Any) -> tuple[float, float, float]:
    """KL, top-1 agreement and perplexity from the definitions."""
    kl, same, losses = [], [], []
    for ids in batches:
        logs, short = model(ids).logits.log_softmax(-1), other(ids).logits.log_softmax(-1)
        kl.append((logs.exp() * (logs - short)).sum(-1).flatten())
        same.append((logs.argmax(-1) == short.argmax(-1)).flatten())
        losses.append(-short[:, :-1].gather(-1, ids[:, 1:, None]).flatten())
    means = [float(torch.cat(x).float().mean()) for x in (kl, same, losses)]
    return means[0], means[1], math.exp(means[2])


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_predictions_are_those_of_the_result(family: str) -> None:
    model, batches = block_model(family, 6), token_batches()
    short = graphopt.optimize(model, passes=[SkipLayers(keep=[0, 2, 5], calibration=batches)])
    step = short.report.steps[0]
    with torch.no_grad():
        expected = quality(model, short, batches)
    found = (step.plan.kl, step.plan.top1, step.plan.perplexity)
    assert found == pytest.approx(expected, rel=1e-4)
    measured = step.measured.quality
    assert (measured.kl, measured.top1, measured.perplexity) == pytest.approx(expected, rel=1e-4)


def test_padding_does_not_count() -> None:
    model, ids = block_model("llama", 4), token_batches(1)[0]
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded = {"input_ids": ids, "attention_mask": mask}
    figures = [SkipLayers(keep=[0, 3], calibration=[batch]).plan(model) for batch in (padded, ids[:, :6])]
    assert figures[0].kl == pytest.approx(figures[1].kl, rel=1e-4)
    assert figures[0].perplexity == pytest.approx(figures[1].perplexity, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_a_prefix_changes_nothing(family: str) -> None:
    model = block_model(family, 5)
    e = evidence(model, token_batches())
    removed = frozenset({0, 3})
    whole = e.trials.kl(removed)
    for start in (1, 2, 3):
        states = e.trials.states_without(frozenset({0}))
        assert e.trials.kl(removed, (start, states)) == pytest.approx(whole, rel=1e-6)
    assert e.trials.kl(removed, bound=whole / 4) > whole / 4


def test_exact_tries_all() -> None:
    e = evidence(block_model("llama", 6), token_batches())
    sets = [frozenset(chosen) for chosen in itertools.combinations(range(6), 2)]
    assert STRATEGIES["exact"](e)(2) == min(sets, key=e.trials.kl)


def random_evidence(family: str, blocks: int, seed: int, batches: int = 2) -> Evidence:
    """Of a model and texts that are drawn with `seed`."""
    return evidence(block_model(family, blocks, seed=seed), token_batches(batches, seed=seed))


def test_greedy_finds_the_best_of_all() -> None:
    """In all of these random models but one, where it is less than a tenth above."""
    excess = []
    for family, seed in itertools.product(("llama", "gpt2", "opt"), range(3)):
        e = random_evidence(family, 8, seed)
        for count in (2, 3):
            found, best = (e.trials.kl(STRATEGIES[name](e)(count)) for name in ("greedy", "exact"))
            excess.append(found / best - 1)
    assert min(excess) >= -1e-6 and max(excess) < 0.1
    assert sum(value > 1e-6 for value in excess) <= 1


def test_the_beam_finds_what_one_set_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    e = evidence(block_model("gpt2", 8), token_batches(2))  # the best of all is two swaps away
    best = STRATEGIES["exact"](e)(3)
    assert STRATEGIES["greedy"](e)(3) == best
    monkeypatch.setattr(skip_strategies, "BEAM", 1)
    assert STRATEGIES["greedy"](e)(3) != best


def test_no_swap_improves_on_greedy() -> None:
    e = random_evidence("gpt2", 7, 5)
    found = STRATEGIES["greedy"](e)(3)
    least = e.trials.kl(found)
    for back, gone in itertools.product(found, set(range(7)) - found):
        assert e.trials.kl(found - {back} | {gone}) >= least * (1 - 1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_greedy_runs_few_layers(family: str, scale: float) -> None:
    """Less than a third of what trying all at every step runs, whatever the blocks are worth."""
    layers, count = 24, 6
    batches = token_batches(2, samples=1)
    e = evidence(block_model(family, layers, scale), batches)
    trials = LayerTrials(e.model, e.stack, e.batches, e.units)
    search = Greedy(trials, e.influence)
    search(count)
    naive = sum((layers - k) * (layers - k - 1) for k in range(count))
    assert naive_runs(layers, layers, count) == naive == 2662
    assert trials.layer_runs == search.runs + layers * len(batches)  # and the whole run
    assert trials.layer_runs < len(batches) * naive / 3
    assert search.runs > len(batches) * naive / 10  # it is counted


def test_published_scores() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    turned = torch.tensor([[[1.0, 1.0], [-1.0, 0.0]]])
    states = ((x, 2 * x, turned),)
    assert block_influence(states) == pytest.approx((0.0, 1 - (0.5**0.5 + 0) / 2))
    assert angular_distances(states, 1) == pytest.approx((0.0, 0.5), abs=1e-3)
    assert angular_distances(states, 2) == pytest.approx((0.5,), abs=1e-3)


def test_rules_by_score() -> None:
    e = evidence(block_model("llama", 8), token_batches())
    least = sorted(range(8), key=lambda i: e.influence[i])[:3]
    assert STRATEGIES["block_influence"](e)(3) == frozenset(least)
    chosen = sorted(STRATEGIES["angular"](e)(3))
    assert chosen == list(range(chosen[0], chosen[0] + 3))


def test_rules_by_place() -> None:
    assert unified_published_kept(32, 25) == (*range(24), 31)
    assert unified_kept(32, 8) == (0, 4, 9, 13, 18, 22, 27, 31)
    for blocks, kept in itertools.product(range(2, 40), range(2, 40)):
        if kept <= blocks:
            found = unified_kept(blocks, kept)
            gaps = {b - a for a, b in itertools.pairwise(found)}
            assert len(set(found)) == kept and max(gaps) - min(gaps) <= 1
            assert len(set(unified_published_kept(blocks, kept))) == kept


def test_too_many_sets() -> None:
    with pytest.raises(PlanError, match="strategy='exact' would try 12870 sets of 8 of 16 units"):
        SkipLayers(remove=8, strategy="exact", calibration=token_batches(1)).plan(
            block_model("llama", 16)
        )


@pytest.mark.parametrize(
    "bound", [{"max_kl": 0.1}, {"min_top1": 0.5}, {"max_ppl_increase": 0.1}], ids=str
)
def test_bounds_are_kept_and_used(bound: dict[str, float]) -> None:
    model, batches = block_model("llama"), token_batches()
    pass_ = SkipLayers(**bound, calibration=batches)  # type: ignore[arg-type]
    short = graphopt.optimize(model, passes=[pass_])
    plan, measured = short.report.steps[0].plan, short.report.steps[0].measured
    assert plan.removed and pass_._excess(measured.quality) is None
    more = SkipLayers(remove=len(plan.removed) + 1, calibration=batches)
    e = evidence(model, batches)
    assert pass_._excess(e.trials.quality(frozenset(more.plan(model).removed))) is not None


def test_a_model_without_logits() -> None:
    model = block_model("llama", 4).model
    batches = token_batches()
    plan = SkipLayers(remove=1, strategy="block_influence", calibration=batches).plan(model)
    assert plan.kl is None and len(plan.kept) == 3
    with pytest.raises(PlanError, match="returns no logits"):
        SkipLayers(remove=1, calibration=batches).plan(model)
    with pytest.raises(PlanError, match="needs a model that predicts the next token"):
        SkipLayers(max_ppl_increase=0.1, calibration=batches).plan(block_model("bert", 3))


def test_compensation_maps() -> None:
    torch.manual_seed(0)
    source, matrix = torch.randn(40, 5).double(), torch.randn(5, 5).double()
    torch.testing.assert_close(least_squares(source, source @ matrix), matrix, rtol=1e-4, atol=1e-4)
    assert scale_of(source, 3 * source) == pytest.approx(3)


def test_greedy_chooses_for_the_refitted_model() -> None:
    """As the best of all sets does, and what it predicts is what the result has."""
    model, batches = block_model("llama", 5), token_batches(4)
    options: dict[str, Any] = {"calibration": batches, "compensation": "linear"}
    found, best = (
        SkipLayers(remove=2, strategy=strategy, **options).plan(model) for strategy in ("greedy", "exact")
    )
    assert best.kl <= found.kl <= best.kl * 1.05
    short = graphopt.optimize(model, passes=[SkipLayers(remove=2, **options)])
    with torch.no_grad():
        assert found.kl == pytest.approx(quality(model, short, batches)[0], rel=1e-3)
    plain = SkipLayers(keep=found.kept, calibration=batches).plan(model)
    assert plain.kl > found.kl


def test_the_loss_by_states_is_that_of_the_model() -> None:
    for granularity, removed in (("layers", {0, 3}), ("sublayers", {3, 5, 8, 9})):
        model = block_model("gpt2", 5)
        batches = tuple(as_batch(ids, model) for ids in token_batches())
        stack = find_stack(model, batches[0])
        e = Evidence(model, stack, batches, granularity, "linear")
        chosen = frozenset(removed)
        assert e.loss(chosen) == pytest.approx(e.quality(chosen).kl, rel=1e-4)
        assert e.loss(chosen) < e.trials.kl(chosen)


def test_padding_is_not_fitted() -> None:
    """Left padding, whose states are others than without it, changes nothing of the fit."""
    model, ids = block_model("llama", 4), token_batches(1, samples=6)[0]
    padded = torch.cat([torch.zeros_like(ids[:, :5]), ids], dim=1)
    mask = (torch.arange(15) >= 5).long().expand(6, -1)
    batches = [ids, {"input_ids": padded, "attention_mask": mask}]
    kls = [
        SkipLayers(keep=[0, 2, 3], compensation="linear", calibration=[batch]).plan(model).kl
        for batch in batches
    ]
    assert kls[0] == pytest.approx(kls[1], rel=1e-3)


def test_half_precision_is_fitted_in_full() -> None:
    model, batches = block_model("llama", 4).bfloat16(), token_batches(4)
    options: dict[str, Any] = {"keep": [0, 2, 3], "calibration": batches}
    plain, fitted = (
        SkipLayers(**options, compensation=kind).plan(model).kl for kind in ("none", "linear")
    )
    assert fitted < 0.7 * plain


def test_the_ridge_is_for_rows_that_were_not_fitted() -> None:
    """Few noisy rows: the least squares of the seen ones are worse than the zero matrix."""
    torch.manual_seed(0)
    source, target = torch.randn(24, 16), torch.randn(24, 3)
    plain = torch.linalg.lstsq(source, target).solution
    assert least_squares(source, target).norm() < 0.8 * plain.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox", "vit"])
def test_compensation_lowers_the_error(family: str) -> None:
    model = block_model(family, 6)
    batches = [made_up_batch(model)] if family == "vit" else token_batches(8)
    found = {}
    for kind in ("none", "scalar", "linear"):
        pass_ = SkipLayers(keep=[0, 1, 4, 5], calibration=batches, compensation=kind)
        short = graphopt.optimize(model, passes=[pass_])
        found[kind] = gap_error(model, short, batches)
    assert found["linear"] < min(found["scalar"], found["none"])
    assert found["scalar"] <= found["none"]


def gap_error(model: Any, short: Any, batches: Any) -> float:
    """Squared distance of the hidden states behind the gap after block 1."""
    inputs = tuple(as_batch(batch, model) for batch in batches)
    whole, left = (Evidence(m, find_stack(m, inputs[0]), inputs).states for m in (model, short))
    return sum(float((a[4] - b[2]).pow(2).sum()) for a, b in zip(whole, left, strict=True))


def test_projection_before_the_residual_sum() -> None:
    for family, name in (("llama", "down_proj"), ("gpt2", "c_proj"), ("opt", "fc2")):
        model = block_model(family, 2)
        batch = made_up_batch(model)
        stack = find_stack(model, batch)
        (given,) = block_calls(model, stack, [batch])
        hidden = torch.randn(1, 12, 16)
        found = residual_projection(stack.blocks[0], stack.with_hidden(*given[0], hidden))
        assert dict(stack.blocks[0].named_modules())[f"mlp.{name}" if name != "fc2" else name] is found
    with pytest.raises(PlanError, match="added at the end of Gemma3DecoderLayer"):
        SkipLayers(keep=[0, 2], compensation="linear", calibration=token_batches(1)).apply(
            block_model("gemma3", 3), SkipLayers(keep=[0, 2]).plan(block_model("gemma3", 3))
        )
