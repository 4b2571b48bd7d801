"""Speculative decoding: the tokens of greedy generation, and the counts of a loop without a cache."""

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from block_models import block_model
from decode_reference import BLOCKS, SpeculationLoop, decoder, skipping_loop
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt import GraphoptError, PlanError, SkipDecode, SpeculativeDecoder
from graphopt.cache_rows import realign
from graphopt.draft_length import EntropyThreshold, ExpectedGain, Midpoint

PROMPT = [5, 9, 30, 22, 41, 7, 13]


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def greedy(new: int, ends: list[int] | None = None) -> dict[str, Any]:
    return {"max_new_tokens": new, "do_sample": False, "eos_token_id": ends, "pad_token_id": 0}


def predictable(family: str, blocks: int = 5, scale: float = 3.0) -> Any:
    """A model whose drafts are often right: later blocks change little."""
    model = decoder(family, blocks)
    with torch.no_grad():
        for block in BLOCKS[family](model)[2:]:
            for weight in block.parameters():
                if weight.dim() > 1:
                    weight.div_(scale)
    return model


tokens = st.lists(st.integers(3, 60), min_size=1, max_size=8)


@settings(max_examples=40)
@given(
    st.sampled_from(list(BLOCKS)),
    st.sets(st.integers(0, 4), min_size=1, max_size=4),
    st.lists(tokens, min_size=1, max_size=4),
    st.sampled_from(["expected", "adasd", 1, 6]),
    st.integers(1, 14),
    st.sampled_from([None, [7, 19, 33, 41, 52]]),
)
def test_equals_greedy_generation(
    family: str,
    keep: set[int],
    prompts: list[list[int]],
    length: int | str,
    new: int,
    ends: list[int] | None,
) -> None:
    model, batch = predictable(family), padded(prompts)
    decoding = SpeculativeDecoder(model, sorted(keep), length=length)
    expected = model.generate(**batch, **greedy(new, ends))
    assert torch.equal(decoding.generate(**batch, **greedy(new, ends)), expected)
    counts = decoding.statistics
    assert counts is not None and counts.accepted <= counts.drafted and counts.relaxed == 0
    longest = expected.shape[1] - batch["input_ids"].shape[1]
    assert longest <= counts.tokens <= longest * len(prompts)


@pytest.mark.parametrize("length", ["expected", "adasd", 4])
@pytest.mark.parametrize("relaxed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_counts_as_the_loop_without_a_cache(family: str, relaxed: bool, length: int | str) -> None:
    model, keep, new = predictable(family), (0, 1, 3), 24
    loop = SpeculationLoop(family, model, keep, length, relaxed)
    expected = loop.run(PROMPT, new)
    decoding = SpeculativeDecoder(model, keep, length=length, relaxed=relaxed)
    ids = torch.tensor([PROMPT])
    assert decoding.generate(ids, **greedy(new))[0, len(PROMPT) :].tolist() == expected
    counts = decoding.statistics
    assert counts is not None
    assert list(counts.draft_lengths) == loop.lengths
    assert (counts.drafted, counts.tokens) == (sum(loop.lengths), new)
    assert (counts.accepted, counts.relaxed) == (loop.accepted, loop.passed)
    if not relaxed:
        assert expected == skipping_loop(family, model, PROMPT, {1: tuple(range(5))}, new)


def test_drafts_that_are_always_right() -> None:
    model = decoder("llama", 4)
    with torch.no_grad():
        for block in (model.model.layers[2], model.model.layers[3]):
            block.self_attn.o_proj.weight.zero_()
            block.mlp.down_proj.weight.zero_()
    ids = torch.tensor([PROMPT, PROMPT[::-1]])
    fixed = SpeculativeDecoder(model, [0, 1], length=4)
    expected = model.generate(ids, **greedy(17))
    assert torch.equal(fixed.generate(ids, **greedy(17)), expected)
    assert str(fixed.statistics) == (
        "34 tokens in 4 verifications; 32 drafted, 32 accepted; mean draft length 4.00"
    )
    adaptive = SpeculativeDecoder(model, [0, 1], length="adasd")
    assert torch.equal(adaptive.generate(ids, **greedy(17)), expected)
    assert adaptive.statistics is not None
    assert adaptive.statistics.draft_lengths == (1, 3, 7, 5)


def test_common_blocks_run_once_for_each_token() -> None:
    model = predictable("gpt2")
    ran: Counter[int] = Counter()
    for i, block in enumerate(model.transformer.h):
        block.attn.register_forward_pre_hook(lambda module, args, i=i: ran.update({i: args[0].shape[1]}))
    decoding = SpeculativeDecoder(model, [0, 1, 4], length=3)
    ran.clear()
    decoding.generate(torch.tensor([PROMPT]), **greedy(13))
    counts = decoding.statistics
    assert counts is not None
    once = len(PROMPT) + counts.drafted  # in drafts, or in verifications
    assert ran == {0: once, 1: once, 2: once, 3: once, 4: once + counts.drafted}


def test_plugs_into_generate() -> None:
    model = predictable("llama")
    decoding, ids = SpeculativeDecoder(model, [0, 1]), torch.tensor([PROMPT])
    expected = model.generate(ids, **greedy(9))
    found = model.generate(ids, custom_generate=decoding, **greedy(9), return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected)
    assert torch.equal(decoding.generate(ids, **greedy(1)), expected[:, : len(PROMPT) + 1])


def test_relaxed_acceptance_is_reported() -> None:
    model = predictable("llama", scale=1.5)
    batch = padded([PROMPT, PROMPT[2:], PROMPT[:3]])
    decoding = SpeculativeDecoder(model, [0, 1, 2, 3], relaxed=True)
    text = decoding.generate(**batch, **greedy(24))
    assert decoding.statistics is not None and decoding.statistics.relaxed > 0
    assert "more by relaxed acceptance" in str(decoding.statistics)
    assert not torch.equal(text, model.generate(**batch, **greedy(24)))


def test_thresholds() -> None:
    midpoint = Midpoint()
    midpoint.add(1.0, True)
    assert midpoint.value is None
    midpoint.add(4.0, False)
    midpoint.add(3.0, True)
    assert midpoint.value == 3.0  # between 2 and 4
    rule = EntropyThreshold()
    assert rule.stops([9.0])
    rule.learn([0.5], passed=1)
    assert [rule.stops([9.0] * count) for count in (1, 2, 3)] == [False, False, True]
    rule.learn([0.5, 0.5, 1.5], passed=2)
    assert [rule.stops([0.4, h]) for h in (0.9, 1.1)] == [False, True]
    assert not rule.stops([1.1, 0.9])


def test_expected_gain() -> None:
    rule = ExpectedGain(draft=1, verify=3)
    rule.learn([0.3] * 8 + [0.6, 9.0], passed=8)
    assert rule.chance(0.3) == pytest.approx((8 + 9 / 11) / 9)
    assert rule.chance(0.7) == pytest.approx((0 + 9 / 11) / 2)
    assert rule.chance(9.0) == pytest.approx(9 / 11)
    sure, unsure = rule.chance(0.3), rule.chance(0.7)
    alive = [1.0, sure, sure * unsure, sure * unsure**2]
    rates = [sum(alive[:k]) / (k + 3) for k in range(1, 5)]
    found = [rule.stops([0.3, 0.7, 0.7][:k]) for k in (1, 2, 3)]
    assert found == [later <= now for now, later in pairwise(rates)] == [False, False, True]


class _Entry:
    def __init__(self, states: Tensor, window: int | None) -> None:
        self.keys, self.values, self.is_sliding = states, -states, window is not None
        self.sliding_window, self.cumulative_length = window, states.shape[2]


@settings(max_examples=40)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(5, 7), st.data())
def test_rows_are_put_in_line(dropped: list[int], slots: int, data: Any) -> None:
    rows = sorted(data.draw(st.sets(st.integers(0, len(dropped) - 1), min_size=1)))
    width = data.draw(st.integers(1, max(slots - dropped[row] for row in rows)))
    window = data.draw(st.sampled_from([None, 3, 9]))
    states = torch.arange(float(len(dropped) * slots)).view(-1, 1, slots, 1).repeat(1, 2, 1, 3)
    cache = type("Cache", (), {"layers": [_Entry(states, window)]})()
    realign(cache, slots, rows, [slots - dropped[row] for row in rows], width)
    kept = width if window is None else min(width, window - 1)
    (entry,) = cache.layers
    assert entry.keys.shape == (len(rows), 2, kept, 3)
    for new, row in enumerate(rows):
        own = states[row, :, : slots - dropped[row]]
        own = own[:, max(0, own.shape[1] - kept) :]
        assert torch.equal(entry.keys[new][:, kept - own.shape[1] :], own)
    assert torch.equal(entry.values, -entry.keys)


BAD_DRAFTS: list[tuple[list[int], dict[str, Any], str]] = [
    ([], {}, r"keep=\[\]: a draft has blocks, and those of model.layers are 0 to 3"),
    ([0, 4], {}, r"keep=\[0, 4\]: a draft has blocks"),
    ([1, 0], {}, r"keep=\[1, 0\]: positions ascend"),
    ([0, 1, 2, 3], {}, "a draft leaves out at least one of the 4 blocks"),
    ([0], {"length": 0}, "length=0 is no number of tokens, and none of expected, adasd"),
]


@pytest.mark.parametrize(("keep", "options", "message"), BAD_DRAFTS)
def test_drafts_that_do_not_fit(keep: list[int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        SpeculativeDecoder(block_model("llama", 4), keep, **options)


BAD_USES: list[tuple[dict[str, Any], str]] = [
    ({"do_sample": True}, "speculation is greedy: do_sample=False"),
    ({"num_beams": 2}, "num_beams=1"),
    ({"repetition_penalty": 1.5}, "logits processors: RepetitionPenaltyLogitsProcessor"),
    ({"max_time": 5.0}, "stops at a length or an end token, not by MaxTimeCriteria"),
    ({"output_logits": True, "return_dict_in_generate": True}, "not what output_logits asks for"),
    ({"use_cache": False}, "use_cache=False: drafts are verified against a cache"),
    ({"cache_implementation": "static"}, "a cache of StaticLayer is not supported"),
    ({"attention_mask": torch.tensor([[1] * 6 + [0]])}, "padded on the left only"),
    ({"inputs_embeds": torch.zeros(1, 7, 16)}, "takes token ids and their mask, not inputs_embeds"),
]


@pytest.mark.parametrize(("options", "message"), BAD_USES)
def test_generation_that_cannot_be_verified(options: dict[str, Any], message: str) -> None:
    decoding = SpeculativeDecoder(block_model("llama", 4), [0, 1])
    with pytest.raises(GraphoptError, match=message):
        decoding.generate(torch.tensor([PROMPT]), **(greedy(4) | options))


def test_models_that_do_not_fit() -> None:
    with pytest.raises(PlanError, match="Linear is not a decoder"):
        SpeculativeDecoder(nn.Linear(2, 2), [0])
    model = block_model("llama", 4)
    decoding, ids = SpeculativeDecoder(model, [0, 1]), torch.tensor([PROMPT])
    with pytest.raises(GraphoptError, match="this SpeculativeDecoder is of another model"):
        block_model("llama", 4).generate(ids, custom_generate=decoding, **greedy(4))
    cache = model(ids[:, :-1]).past_key_values
    with pytest.raises(GraphoptError, match="speculation begins with an empty cache"):
        decoding.generate(ids, past_key_values=cache, **greedy(4))
    pass_ = SkipDecode(keep=[0, 1])
    with pytest.raises(PlanError, match="the model skips blocks after the prompt already"):
        SpeculativeDecoder(pass_.apply(model, pass_.plan(model)), [0, 1])
