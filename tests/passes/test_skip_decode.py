"""Blocks skipped after the prompt: the tokens are those of loops without a cache, or written by hand."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import block_model
from decode_reference import BLOCKS, PlainLlama, decoder, skipping_loop
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import graphopt
from graphopt import GraphoptError, PlanError, SkipDecode, VerifyError
from graphopt.passes.blocks import find_stack
from graphopt.passes.decode_checks import check_decoding
from graphopt.passes.decode_plan import DecodePlan
from graphopt.passes.made_up_inputs import made_up_batch

GOLDEN = Path(__file__).parent.parent / "golden" / "skip_decode.txt"
NEW = 7


def skipping(model: Any, **options: Any) -> Any:
    return graphopt.optimize(model, passes=[SkipDecode(**options)])


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def written(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    batch = padded(prompts)
    options = {
        "max_new_tokens": NEW,
        "eos_token_id": None,
        "pad_token_id": 0,
        "do_sample": False,
    } | options
    ids = model.generate(**batch, **options)
    return ids[:, batch["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


PROMPTS = [[5, 9, 30, 22, 41, 7, 13], [60, 3, 8], [11, 12, 13, 14, 55]]


@pytest.mark.parametrize("family", BLOCKS)
def test_equals_the_loop_without_a_cache(family: str) -> None:
    model = decoder(family)
    sets = {1: (0, 1, 3, 5), 3: (0, 3, 5), 5: (0, 5)}
    expected = [skipping_loop(family, model, prompt, sets, NEW) for prompt in PROMPTS]
    short = skipping(model, keep=sets)
    assert written(short, PROMPTS) == expected
    assert written(short, PROMPTS, cache_implementation="static") == expected
    assert written(short, PROMPTS[:1]) == expected[:1]
    assert written(model, PROMPTS) != expected


tokens = st.lists(st.integers(3, 60), min_size=1, max_size=6)


@st.composite
def shrinking_sets(draw: Any, blocks: int = 5) -> dict[int, tuple[int, ...]]:
    """Up to three sets, each within the one before."""
    found: dict[int, tuple[int, ...]] = {}
    left, first = set(draw(st.sets(st.integers(1, blocks - 1), max_size=blocks - 2))), 1
    for _ in range(draw(st.integers(1, 3))):
        found[first] = (0, *sorted(left))
        left, first = left & draw(st.sets(st.integers(1, blocks - 1))), first + draw(st.integers(1, 3))
    return found


@settings(max_examples=25)
@given(shrinking_sets(), st.lists(tokens, min_size=1, max_size=3))
def test_equals_a_llama_written_by_hand(
    sets: dict[int, tuple[int, ...]], prompts: list[list[int]]
) -> None:
    model = decoder("llama", 5)
    expected = []
    for prompt in prompts:
        plain, row = PlainLlama(model), []
        for token in prompt:
            logits = plain.feed(token, set(range(5)))
        for number in range(1, NEW + 1):
            row.append(int(logits.float().argmax()))
            running = [kept for first, kept in sets.items() if first <= number][-1]
            logits = plain.feed(row[-1], set(running))
        expected.append(row)
    assert written(skipping(model, keep=sets), prompts) == expected


@settings(max_examples=15)
@given(
    st.sampled_from(["qwen2", "gemma3", "gpt2"]),
    shrinking_sets(),
    st.lists(tokens, min_size=1, max_size=3),
)
def test_any_schedule(family: str, sets: dict[int, tuple[int, ...]], prompts: list[list[int]]) -> None:
    model = decoder(family, 5)
    expected = [skipping_loop(family, model, prompt, sets, NEW) for prompt in prompts]
    assert written(skipping(model, keep=sets), prompts) == expected


class Reads(TorchDispatchMode):
    """Which storages the operators of a step are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs or {}))
        self.seen |= {leaf.untyped_storage().data_ptr() for leaf in leaves if isinstance(leaf, Tensor)}
        return function(*args, **(kwargs or {}))


def test_skipped_blocks_leave_no_work_and_no_traffic() -> None:
    short = skipping(decoder("gemma2"), keep=[0, 2, 5])
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        cache = short(ids).past_key_values
        for step in (1, 2):
            with Reads() as reads:
                output = short(torch.tensor([[9]]), past_key_values=cache)
            assert output.past_key_values is cache
            for i, block in enumerate(short.model.layers):
                read = [p.untyped_storage().data_ptr() in reads.seen for p in block.parameters()]
                assert all(read) if i in (0, 2, 5) else not any(read)
                grown = step if i in (0, 2, 5) else 0
                assert cache.layers[i].get_seq_length() == len(PROMPTS[0]) + grown


def test_the_model_itself_stays_and_is_what_is_saved(tmp_path: Path) -> None:
    model = decoder("llama")
    short, before = skipping(model, keep=[0, 3]), written(model, PROMPTS)
    assert written(model, PROMPTS) == before != written(short, PROMPTS)
    expected = written(short, PROMPTS)
    assert written(copy.deepcopy(short), PROMPTS) == expected
    assert written(pickle.loads(pickle.dumps(short)), PROMPTS) == expected
    short.save_pretrained(tmp_path)
    assert written(type(model).from_pretrained(tmp_path, dtype=torch.float64), PROMPTS) == before
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(short(ids).logits, model(ids).logits)
    short.load_state_dict(decoder("llama").state_dict(), assign=True)
    assert written(short, PROMPTS) == expected
    cache = short(ids).past_key_values
    more = short(ids[:, :1], past_key_values=cache, return_dict=False)
    assert any(part is cache for part in more)


def test_a_set_that_grows_is_wrong_and_seen() -> None:
    short = skipping(decoder("llama", 4), keep=[0, 1])
    batch = made_up_batch(short)
    stack = find_stack(short, batch)
    check_decoding(
        short, stack, DecodePlan("model.layers", 4, (1, 2), ((0, 1), (0,))), batch["input_ids"]
    )
    with pytest.raises(VerifyError, match="LlamaForCausalLM: logits after the prompt differ"):
        growing = DecodePlan("model.layers", 4, (1, 2), ((0, 1), (0, 2)))
        check_decoding(short, stack, growing, batch["input_ids"])


def test_skipdecode_schedule() -> None:
    plan = SkipDecode(depths=(6, 3), tokens=10, warmup=2).plan(block_model("llama", 8))
    depths = [len(plan.kept_at(token)) for token in range(1, 12)]
    assert depths == [6, 6, 5, 5, 5, 4, 4, 4, 3, 3, 3]
    assert plan.kept[0] == (0, 1, 4, 5, 6, 7)
    assert plan.kept[-1] == (0, 1, 7)


def test_golden(request: pytest.FixtureRequest) -> None:
    model = block_model("llama", 6)
    report = skipping(model, keep=[0, 2, 5]).report
    schedule = SkipDecode(depths=(5, 2), tokens=9).plan(model)
    text = f"{report}\n\n{schedule}\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
    assert DecodePlan.from_json(schedule.to_json()) == schedule


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "give one of keep, depths; given: none"),
    ({"keep": [0], "depths": (2, 1)}, "given: keep, depths"),
    ({"keep": [0, 4]}, r"keep=\[0, 4\]: the blocks of model.layers are 0 to 3"),
    ({"keep": [0, 2, 1]}, r"keep=\[0, 2, 1\]: positions ascend"),
    ({"keep": [1, 2]}, r"keep=\[1, 2\]: block 0 always runs"),
    ({"keep": [0, 1, 2, 3]}, r"keep=\[0, 1, 2, 3\]: all 4 blocks stay"),
    ({"keep": {2: [0]}}, r"sets of blocks begin at tokens \[2\]; the first token is 1"),
    ({"keep": {1: [0, 1], 4: [0, 2]}}, "block 2 runs again from token 4 on"),
    ({"keep": {1: [0, 1], 4: [1]}}, r"keep=\[1\] from token 4 on: block 0 always runs"),
    ({"depths": (4, 1)}, r"depths=\(4, 1\), warmup=1: the model has 4 blocks"),
    ({"depths": (2, 1), "tokens": 1}, "tokens=1: the depth falls over two tokens"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        skipping(block_model("llama", 4), **options)


def test_models_and_plans_that_do_not_fit() -> None:
    pass_ = SkipDecode(keep=[0, 1])
    with pytest.raises(PlanError, match="Linear is not a decoder of transformers"):
        pass_.plan(nn.Linear(2, 2))
    with pytest.raises(PlanError, match="BertForMaskedLM is not a decoder"):
        pass_.plan(block_model("bert", 3))
    plan = pass_.plan(block_model("llama", 4))
    with pytest.raises(PlanError, match=r"the plan is for 4 blocks at 'model\.layers'; the model has 3"):
        pass_.apply(block_model("llama", 3), plan)
    with pytest.raises(PlanError, match="the model skips blocks after the prompt already"):
        pass_.plan(pass_.apply(block_model("llama", 4), plan))


def test_uses_that_would_be_wrong() -> None:
    short = skipping(block_model("llama", 4), keep=[0, 1])
    ids = torch.tensor([[4, 5, 6]])
    cache = short(ids).past_key_values
    short(ids, past_key_values=cache)  # more of the prompt
    short(ids[:, :1], past_key_values=cache)
    with pytest.raises(GraphoptError, match="3 tokens at once, 1 tokens after the prompt"):
        short(ids, past_key_values=cache)
    with pytest.raises(GraphoptError, match="use_cache=False: without a cache every token"):
        short.generate(ids, use_cache=False)
    with pytest.raises(GraphoptError, match="prefill_chunk_size=: a piece of one token passes"):
        short.generate(ids, prefill_chunk_size=2)
    cache.layers.pop()
    with pytest.raises(GraphoptError, match="the DynamicCache has 3 entries for 4 blocks"):
        short(ids[:, :1], past_key_values=cache)
    cache = short(ids).past_key_values
    cache.layers[2].__class__ = type("OtherLayer", (type(cache.layers[2]),), {})
    with pytest.raises(GraphoptError, match="a cache of OtherLayer is not supported, only of DynamicL"):
        short(ids[:, :1], past_key_values=cache)
