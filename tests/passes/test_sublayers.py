"""Removing attention and MLP sublayers: found in the graph, exact, with caches of the right length."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import FAMILIES, block_model, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt import PlanError, SkipLayers
from graphopt.passes.blocks import find_stack
from graphopt.passes.made_up_inputs import as_batch, made_up_batch
from graphopt.passes.skip_plan import SkipPlan
from graphopt.passes.skip_strategies import Evidence, Greedy
from graphopt.passes.sublayers import find_branches

GOLDEN = Path(__file__).parent.parent / "golden" / "skip_sublayers.txt"
REMOVED = frozenset({1, 2, 4, 6})  # 0.mlp 1.attention 2.attention 3.attention
LAST = {  # of each family: what adds to the hidden states at the end of attention and of the MLP
    "llama": ("self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "opt": ("self_attn.out_proj", "fc2"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "bert": ("attention.output.dense", "output.dense"),
    "vit": ("attention.o_proj", "mlp.fc2"),
}


def without(model: nn.Module, removed: frozenset[int], units: int = 16, **options: Any) -> Any:
    keep = [i for i in range(units) if i not in removed]
    passes = [SkipLayers(keep=keep, granularity="sublayers", **options)]
    return graphopt.optimize(model, passes=passes)


def silenced(model: nn.Module, family: str, removed: frozenset[int]) -> Any:
    """The whole model with zeros for the weights that write the removed sublayers' output."""
    by_hand = copy.deepcopy(model)
    blocks = find_stack(by_hand, made_up_batch(by_hand)).blocks
    for unit in removed:
        last = blocks[unit // 2].get_submodule(LAST[family][unit % 2])
        for name, parameter in last.named_parameters():
            gemma = family.startswith("gemma") and name == "weight"  # its norms multiply by 1 + weight
            nn.init.constant_(parameter, -1.0 if gemma else 0.0)
    return by_hand


def generated(model: Any, **options: Any) -> torch.Tensor:
    ids = token_batches(1, samples=2, tokens=7)[0]
    return model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_model_that_adds_zeros(family: str) -> None:
    model = block_model(family)
    short, by_hand = without(model, REMOVED), silenced(model, family, REMOVED)
    batch = made_up_batch(model)
    assert (short(**batch).logits - by_hand(**batch).logits).abs().max() == 0
    left = {name for name, _ in short.named_parameters()}
    assert len(left) < len(dict(model.named_parameters()))
    if family in ("bert", "vit"):
        return
    expected = generated(by_hand, use_cache=False)
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(generated(short, **options), expected)


@settings(max_examples=6)
@given(st.sets(st.integers(1, 7), max_size=7), st.sampled_from(["llama", "gemma2"]))
def test_any_sublayers(removed: set[int], family: str) -> None:
    model = block_model(family, 4)
    short = without(model, frozenset(removed), 8)
    by_hand = silenced(model, family, frozenset(removed))
    batch = made_up_batch(model)
    assert torch.equal(short(**batch).logits, by_hand(**batch).logits)
    assert torch.equal(generated(short), generated(by_hand, use_cache=False))


def test_the_first_attention_can_go() -> None:
    """Left where it was, the cache's first place would stay empty, and the cache's length be zero."""
    model = block_model("qwen2")
    short, by_hand = without(model, frozenset({0, 8})), silenced(model, "qwen2", frozenset({0, 8}))
    assert torch.equal(generated(short), generated(by_hand, use_cache=False))
    with torch.no_grad():
        cache = short(token_batches(1)[0], use_cache=True).past_key_values
    lengths = [cache.get_seq_length(i) for i in range(8)]
    assert lengths == [10, 10, 10, 0, 10, 10, 10, 0]  # four places of full attention, four of sliding


def test_a_removed_sublayer_runs_nothing() -> None:
    model = block_model("llama", 2)
    short = without(model, frozenset({1, 2}), 4)
    one = without(model, frozenset({1, 2, 3}), 4)
    with torch.profiler.profile() as profile:
        short(token_batches(1)[0])
    products = sum(e.count for e in profile.key_averages() if e.key == "aten::mm")
    assert products == 4 + 3 + 1  # the attention of the first block, the MLP of the second, the head
    assert len(one.model.layers) == 1 and one.config.num_hidden_layers == 1


def test_compiles() -> None:
    short = without(block_model("llama", 2), frozenset({1, 2}), 4)
    ids = token_batches(1)[0]
    compiled = torch.compile(short, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, short(ids).logits)


def test_saved_by_plan_and_weights() -> None:
    model = block_model("gemma3")
    short = without(model, REMOVED)
    plan = SkipPlan.from_json(short.report.steps[0].plan.to_json())
    weights = pickle.loads(pickle.dumps(short.state_dict()))
    other = type(model)(copy.deepcopy(model.config)).eval()
    loaded: Any = SkipLayers(keep=[0]).apply(other, plan)
    loaded.load_state_dict(weights)
    ids = token_batches(1)[0]
    assert (loaded(ids).logits - short(ids).logits).abs().max() == 0
    assert torch.equal(pickle.loads(pickle.dumps(short))(ids).logits, short(ids).logits)


def test_whole_layers_can_be_saved(tmp_path: Path) -> None:
    short = without(block_model("llama", 4), frozenset({2, 3}), 8)
    short.save_pretrained(tmp_path)
    ids = token_batches(1)[0]
    assert torch.equal(type(short).from_pretrained(tmp_path)(ids).logits, short(ids).logits)


def test_save_pretrained_is_refused(tmp_path: Path) -> None:
    short = without(block_model("llama", 2), frozenset({1}), 4)
    with pytest.raises(PlanError, match="LlamaForCausalLM cannot say that a layer has no attention"):
        short.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


class Parallel(nn.Module):
    """A block that adds three branches to its hidden states at once, two of them without attention."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.norm = nn.Linear(6, 6), nn.Linear(6, 6), nn.LayerNorm(6)
        self.look = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)  # for two branches, so that it belongs to neither
        return self.one(y) + x + self.look(y, y, y, need_weights=False)[0] + self.two(x).relu()  # type: ignore[no-any-return]


class Flat(nn.Module):
    """Blocks of one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


def test_branches_of_a_parallel_block() -> None:
    model, x = nn.Sequential(Parallel(), Parallel()), torch.randn(2, 3, 6)
    found = find_branches(model, find_stack(model, (x,)), (x,))
    names = {branch.name: branch.modules for branch in found[:3]}
    assert names == {"0.mlp": ("one",), "0.attention": ("look",), "0.mlp2": ("two",)}
    flat = nn.Sequential(Flat(), Flat())
    with pytest.raises(PlanError, match="Flat adds 1 branches"):
        find_branches(flat, find_stack(flat, (x,)), (x,))


def test_greedy_on_sublayers() -> None:
    model = block_model("llama", 4)
    batches = tuple(as_batch(ids, model) for ids in token_batches())
    evidence = Evidence(model, find_stack(model, batches[0]), batches, "sublayers")
    greedy = Greedy(evidence.trials, evidence.scores, None, evidence.possible)
    first = greedy(1)
    assert first == {min(range(8), key=lambda i: evidence.trials.kl(frozenset({i})))}
    found = greedy(3)
    least = evidence.trials.kl(found)
    plan = SkipLayers(remove=3, granularity="sublayers", calibration=token_batches()).plan(model)
    assert frozenset(plan.removed) == found and plan.kl == pytest.approx(least, rel=1e-4)
    assert not evidence.possible(frozenset({0, 2, 4, 6}))


def test_refused() -> None:
    model, batches = block_model("llama", 3), token_batches()
    with pytest.raises(PlanError, match=r"one of 0\.attention, 1\.attention, 2\.attention has"):
        without(model, frozenset({0, 2, 4}), 6)
    with pytest.raises(PlanError, match=r"keep=\[7\]: the sublayers of model.layers are 0 to 5"):
        without(model, frozenset(range(7)), 8)
    with pytest.raises(PlanError, match="strategy='angular' is for whole layers"):
        SkipLayers(remove=1, granularity="sublayers", strategy="angular", calibration=batches)
    with pytest.raises(PlanError, match="granularity='heads' is none of layers, sublayers"):
        SkipLayers(remove=1, granularity="heads")
    with pytest.raises(PlanError, match="remove=6: the model has 6 sublayers"):
        SkipLayers(remove=6, granularity="sublayers", calibration=batches).plan(model)
    plan = SkipLayers(keep=[0, 1], granularity="sublayers").plan(block_model("llama", 2))
    with pytest.raises(PlanError, match="the plan is for 2 blocks"):
        SkipLayers(keep=[0]).apply(model, plan)


def test_golden(request: pytest.FixtureRequest) -> None:
    report = without(block_model("gpt2", 3), frozenset({1, 2}), 6, calibration=token_batches()).report
    text = f"{report}\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
