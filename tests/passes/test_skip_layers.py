"""Removing blocks: the result is the model that one would build by hand, and it is checked."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from block_models import FAMILIES, GROUPED, block_model, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt import GraphoptError, PlanError, SkipLayers, VerifyError
from graphopt.passes.blocks import find_stack
from graphopt.passes.layer_removal import _cut, index_names
from graphopt.passes.made_up_inputs import made_up_batch
from graphopt.passes.removal_checks import check_generation, check_rebuild, leading_tensor
from graphopt.passes.skip_plan import SkipPlan

KEPT = (0, 1, 4, 5, 7)
GENERATING = [name for name in FAMILIES if name not in ("bert", "vit")]
GOLDEN = Path(__file__).parent.parent / "golden" / "skip_layers.txt"
MOE = {"num_experts_per_tok": 1, "num_local_experts": 2, "num_experts": 2, "moe_intermediate_size": 8}
LLAMA4 = {"intermediate_size_mlp": 24, "attention_chunk_size": 8}


def shortened(model: nn.Module, kept: Any = KEPT, **options: Any) -> Any:
    return graphopt.optimize(model, passes=[SkipLayers(keep=kept, **options)])


def by_hand(model: Any, kept: tuple[int, ...]) -> Any:
    """A model built from a smaller configuration, with the weights of the blocks that stay."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in kept]
    built = type(model)(config).eval()
    path = find_stack(model, made_up_batch(model)).path
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith(f"{path}."):
            old, _, rest = name.removeprefix(f"{path}.").partition(".")
            if int(old) in kept:
                weights[f"{path}.{kept.index(int(old))}.{rest}"] = value
        else:
            weights[name] = value
    built.load_state_dict(weights)
    return built


def generated(model: Any, **options: Any) -> torch.Tensor:
    ids = token_batches(1, samples=1, tokens=7)[0]
    return model.generate(ids, max_new_tokens=8, min_new_tokens=8, do_sample=False, **options)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_model_built_by_hand(family: str, tmp_path: Path) -> None:
    model = block_model(family)
    weights = copy.deepcopy(model.state_dict())
    short, hand = shortened(model), by_hand(model, KEPT)
    batch = made_up_batch(model)
    expected = hand(**batch).logits
    assert type(short) is type(model)
    assert (short(**batch).logits - expected).abs().max() == 0
    short.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert (loaded(**batch).logits - expected).abs().max() == 0
    assert loaded.config.num_hidden_layers == len(KEPT)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.config.num_hidden_layers == 8


@pytest.mark.parametrize("family", GENERATING)
def test_generates_as_the_model_built_by_hand(family: str) -> None:
    model = block_model(family)
    short, hand = shortened(model), by_hand(model, KEPT)
    expected = generated(hand, use_cache=False)
    assert torch.equal(generated(short), expected)
    assert torch.equal(generated(short, use_cache=False), expected)
    assert torch.equal(generated(short, cache_implementation="static"), expected)


# Lists with an entry for each layer, or of layers' positions, and what is left of them.
LISTS: dict[str, tuple[str, dict[str, Any]]] = {
    "no_rope_layers": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 1, 0, 1, 1, 0]}),
    "mlp_only_layers": ("Qwen3Moe", {"mlp_only_layers": [1, 2, 5], **MOE}),
    "moe_layers": ("Llama4", {"moe_layers": [1, 3, 5, 7], **MOE, **LLAMA4}),
}
CUT = {"no_rope_layers": [1, 0, 0, 1, 0], "mlp_only_layers": [1, 3], "moe_layers": [1, 3, 4]}


@pytest.mark.parametrize("name", LISTS)
def test_lists_of_the_configuration(name: str, tmp_path: Path) -> None:
    """Left as they are, they would give the layers that stay the kinds of other ones at reload."""
    family, options = LISTS[name]
    config = getattr(transformers, f"{family}{'Text' if family == 'Llama4' else ''}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(
        config(**GROUPED, head_dim=8, num_hidden_layers=8, **options)
    ).eval()
    short = shortened(model)
    assert getattr(short.config, name) == CUT[name]
    assert getattr(model.config, name) == options[name]
    short.save_pretrained(tmp_path)
    batch = made_up_batch(model)
    loaded = type(model).from_pretrained(tmp_path)
    assert (loaded(**batch).logits - short(**batch).logits).abs().max() == 0
    assert torch.equal(generated(short), generated(short, use_cache=False))


def test_counts_of_leading_blocks() -> None:
    config = transformers.PretrainedConfig(num_hidden_layers=8, first_k_dense_replace=2, other_layers=[9])
    _cut(config, 8, KEPT[1:])
    assert (config.num_hidden_layers, config.first_k_dense_replace) == (4, 1)
    assert config.other_layers == [9]


@settings(max_examples=10)
@given(st.sets(st.integers(0, 5), min_size=1))
def test_any_blocks_of_a_llama(chosen: set[int]) -> None:
    kept = tuple(sorted(chosen))
    model = block_model("llama", 6)
    short, hand = shortened(model, kept), by_hand(model, kept)
    batch = made_up_batch(model)
    assert torch.equal(short(**batch).logits, hand(**batch).logits)
    assert torch.equal(generated(short), generated(hand, use_cache=False))


class Plain(nn.Module):
    """Blocks in a list of a module that has no configuration."""

    def __init__(self, blocks: int = 4) -> None:
        super().__init__()
        self.num_layers = blocks
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)) for _ in range(blocks))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts:
            x = part(x)
        return self.head(x)  # type: ignore[no-any-return]


class Scaled(Plain):
    """Each block is followed by a number that belongs to its place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scales = torch.arange(1.0, 5.0)
        for part, scale in zip(self.parts, scales, strict=False):
            part.scale = scale
            x = part(x)
        return self.head(x) * sum(float(part.scale) for part in self.parts)  # type: ignore[no-any-return]


def test_a_plain_module() -> None:
    model, x = Plain(), torch.randn(2, 6)
    short = shortened(model, [0, 3], calibration=[x])
    assert torch.equal(short(x), model.head(model.parts[3](model.parts[0](x))))
    assert (short.num_layers, model.num_layers) == (2, 4)


def test_a_model_that_depends_on_its_blocks_places_is_refused() -> None:
    model = Scaled()
    with pytest.raises(VerifyError, match="depend on their place"):
        shortened(model, [1, 3], calibration=[torch.randn(2, 6)])
    assert len(model.parts) == 4


def test_an_index_that_scales_the_attention_is_refused() -> None:
    model = block_model("gpt2", 4)
    for position, block in enumerate(model.transformer.h):
        block.attn.scale_attn_by_inverse_layer_idx = True
        block.attn.scaling = 1 / (1 + position)
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(VerifyError, match="GPT2LMHeadModel"):
        shortened(model, [0, 2])


def test_checks_see_what_they_are_for() -> None:
    short = shortened(block_model("qwen2"))
    batch = made_up_batch(short)
    stack = find_stack(block_model("qwen2"), batch)
    check_rebuild(short, stack, batch)
    check_generation(short, batch)
    for place, layer in zip(KEPT, short.model.layers, strict=True):
        layer.self_attn.layer_idx = place
    with pytest.raises(VerifyError, match=r"self_attn.layer_idx is \[0, 1, 4, 5, 7\] in its blocks"):
        check_rebuild(short, stack, batch)
    with pytest.raises(VerifyError, match="generation with a cache fails"):
        check_generation(short, batch)
    whole = block_model("qwen2").config
    short.config.num_hidden_layers, short.config.layer_types = 8, whole.layer_types
    with pytest.raises(VerifyError, match="generation with a cache differs"):
        check_generation(short, batch)


def test_indices_are_found_by_value() -> None:
    assert index_names(list(block_model("llama", 3).model.layers)) == {"layer_idx"}
    blocks = [nn.Linear(2, 2) for _ in range(3)]
    for position, block in enumerate(blocks):
        block.number = position + 1
        block.other = 5
    assert index_names(blocks) == {"number"}


def test_leading_tensor() -> None:
    assert leading_tensor((None, torch.ones(1))).item() == 1


def test_with_a_checkpoint_behind_it() -> None:
    model, x = Plain(), torch.randn(2, 6)
    skip = SkipLayers(keep=[0, 3], calibration=[x])
    passes = [skip, graphopt.Checkpoint(memory="min")]
    small = graphopt.optimize(model, passes=passes, device="cpu-generic")
    small(x).sum().backward()
    assert torch.equal(small(x), shortened(model, [0, 3], calibration=[x])(x))
    assert "kept     0 3" in str(small.original.report)


def test_golden(request: pytest.FixtureRequest) -> None:
    model = block_model("llama", 6)
    report = shortened(model, [0, 2, 5], calibration=token_batches()).report
    plan = report.steps[0].plan
    text = f"{report}\n\n{SkipLayers(remove=2, strategy='unified').plan(model)}\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
    assert SkipPlan.from_json(plan.to_json()) == plan


def test_a_plan_edited_by_hand() -> None:
    model, pass_ = block_model("llama", 4), SkipLayers(keep=[0, 3])
    plan = pass_.plan(model)
    edited = SkipPlan.from_json(plan.to_json().replace("0,", "1,", 1))
    assert edited.kept == (1, 3)
    assert len(pass_.apply(model, edited).model.layers) == 2  # type: ignore[union-attr,arg-type]
    with pytest.raises(PlanError, match=r"the plan is for 4 blocks at 'model\.layers'; the model has 3"):
        pass_.apply(block_model("llama", 3), plan)


CALIBRATION = token_batches(1)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"keep": [0, 9]}, r"keep=\[0, 9\]: the blocks of model.layers are 0 to 3"),
    ({"keep": []}, r"keep=\[\]: at least one"),
    ({"keep": [1, 0]}, r"keep=\[1, 0\]: positions ascend"),
    ({"keep": [True, 2]}, r"keep=\[True, 2\]"),
    ({"remove": 4, "calibration": CALIBRATION}, "remove=4: the model has 4 blocks"),
    ({"remove": 1}, "remove=1 with strategy='greedy' needs calibration="),
    ({"remove": 3, "strategy": "unified"}, "strategy='unified' keeps the first and the last"),
    ({"max_kl": 0.1}, "max_kl=0.1 needs calibration="),
    ({"max_kl": 1e-9, "calibration": CALIBRATION}, "max_kl=1e-09: the divergence is"),
    ({"min_top1": 1.1, "calibration": CALIBRATION}, "min_top1=1.1: the share is"),
    ({"max_ppl_increase": -0.9, "calibration": CALIBRATION}, "max_ppl_increase=-0.9: the perplexity"),
    ({"target_speedup": 2.0}, "target_speedup=2.0 needs calibration="),
    ({"target_speedup": 0.9, "calibration": CALIBRATION}, "target_speedup=0.9: how many times"),
    ({"keep": [0], "strategy": "best"}, "strategy='best' is none of greedy"),
    ({"keep": [0], "compensation": "mean"}, "compensation='mean' is none of none"),
    ({"keep": [0], "compensation": "linear"}, "compensation='linear' needs calibration="),
    ({"keep": [0], "phase": "train"}, "phase='train' is none of prefill"),
    ({"keep": [0], "remove": 1}, "given: keep, remove"),
    ({}, "given: none"),
    ({"remove": 1, "calibration": ["text"]}, "calibration holds a str"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        graphopt.optimize(block_model("llama", 4), passes=[SkipLayers(**options)])


def test_models_without_one_stack_of_blocks() -> None:
    x = torch.zeros(2, 6)
    with pytest.raises(PlanError, match="Linear: no inputs are known for Linear; give calibration"):
        shortened(nn.Linear(2, 2), [0])
    with pytest.raises(PlanError, match="Linear has no repeated blocks"):
        shortened(nn.Linear(6, 2), [0], calibration=[x])
    two = nn.ModuleDict({"a": nn.Sequential(*Plain().parts), "b": nn.Sequential(*Plain().parts)})
    two.forward = lambda x: two["b"](two["a"](x))
    with pytest.raises(PlanError, match=r"several stacks of blocks: a \(4 blocks\), b \(4 blocks\)"):
        shortened(two, [0], calibration=[x])


def test_order_of_passes_and_functions() -> None:
    passes = [graphopt.Checkpoint(), SkipLayers(keep=[0])]
    with pytest.raises(GraphoptError, match="skip-layers changes the module; put it before"):
        graphopt.optimize(block_model("llama", 2), passes=passes)
    with pytest.raises(GraphoptError, match="give either passes= or a budget"):
        graphopt.optimize(block_model("llama", 2), passes=[SkipLayers(keep=[0])], memory="1GiB")
    with pytest.raises(GraphoptError, match="skip-layers takes a module, not function"):
        graphopt.optimize(lambda x: x, passes=[SkipLayers(keep=[0])])
