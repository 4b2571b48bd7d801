"""Speculative decoding of a model with itself: some of its blocks draft, all of them verify.

Zhang et al., "Draft & Verify" (arXiv 2309.08168), skip blocks to draft; Elhoushi et al., LayerSkip
(arXiv 2404.16710), section 4.3, keep one cache and do not run the blocks again that draft and
verification have in common. Here the draft is any set of blocks, and rows of a batch may differ in how
many drafts they accept.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.draft_length import LENGTHS, DraftLength, FixedLength
from graphopt.errors import GraphoptError, PlanError
from graphopt.passes.cached_runs import check_entries
from graphopt.passes.skip_decode import decoder_stack
from graphopt.speculative_rounds import Rounds

CACHES = ("DynamicLayer", "DynamicSlidingWindowLayer")  # that can let tokens go again
INPUTS = ("attention_mask", "logits_to_keep", "past_key_values", "position_ids", "use_cache")
CRITERIA = ("MaxLengthCriteria", "EosTokenCriteria")


@dataclass(frozen=True)
class Speculation:
    """What happened in one generation, summed over the rows of the batch.

    `tokens` were made; `drafted` were proposed, `accepted` of them were the whole model's choice and
    `relaxed` were not but passed; `draft_lengths` has one entry for each verification.
    """

    tokens: int
    drafted: int
    accepted: int
    relaxed: int
    draft_lengths: tuple[int, ...]

    @property
    def verifications(self) -> int:
        """How often the whole model ran after the prompt."""
        return len(self.draft_lengths)

    @property
    def mean_draft_length(self) -> float:
        """Tokens for each verification and row."""
        return sum(self.draft_lengths) / max(1, self.verifications)

    def __str__(self) -> str:
        relaxed = f", {self.relaxed} more by relaxed acceptance" if self.relaxed else ""
        return (
            f"{self.tokens} tokens in {self.verifications} verifications; {self.drafted} drafted, "
            f"{self.accepted} accepted{relaxed}; mean draft length {self.mean_draft_length:.2f}"
        )


class SpeculativeDecoder:
    """Greedy generation by drafts of the blocks `keep` and verifications by all blocks of `model`.

    The tokens are those of `model.generate(..., do_sample=False)`, whatever is drafted, up to rounding:
    several tokens are verified at once, and where the two best tokens are closer than the rounding of
    a sum, either may be chosen. The draft reads the states of the whole model; blocks before the first
    that it leaves out do not run again to verify.

    `length` is the number of tokens of a draft, or how it adapts (see `graphopt.draft_length`):
    "expected", by the expected number of tokens for each block that runs, or "adasd", by AdaSD's
    threshold of entropy. `relaxed=True` lets drafts pass that are not the whole model's choice but whose
    distributions are close, by AdaSD's threshold of distance: then the text is another one.

    Use `decoder.generate(ids, ...)` with the arguments of the model's `generate`, or
    `model.generate(ids, custom_generate=decoder, ...)`; prompts may differ in length (padded on the
    left). `statistics` is the `Speculation` of the last generation. PlanError where the blocks do not fit
    the model; GraphoptError for what cannot be verified: sampling, beams, logits processors, caches that
    let no token go again.
    """

    def __init__(
        self,
        model: nn.Module,
        keep: Sequence[int],
        *,
        length: int | str = "expected",
        relaxed: bool = False,
    ) -> None:
        if length not in LENGTHS and (type(length) is not int or length < 1):
            raise PlanError(f"length={length!r} is no number of tokens, and none of {', '.join(LENGTHS)}")
        self.model: Any = model
        self.stack = decoder_stack(model)
        self.keep, self.length, self.relaxed = tuple(keep), length, relaxed
        self.statistics: Speculation | None = None
        _check_draft(self.keep, self.stack.path, len(self.stack.blocks))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own `generate`, by speculation."""
        return self.model.generate(*args, custom_generate=self, **kwargs)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Iterable[Any],
        stopping_criteria: Iterable[Any],
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """What `generate` runs for `custom_generate`: token ids of shape (samples, tokens)."""
        if model is not self.model:
            raise GraphoptError("custom_generate=: this SpeculativeDecoder is of another model")
        _check_options(logits_processor, stopping_criteria, generation_config)
        _check_inputs(model_kwargs)
        cache = model_kwargs.get("past_key_values")
        if cache is None or not model_kwargs.get("use_cache", True):
            raise GraphoptError("use_cache=False: drafts are verified against a cache")
        check_entries(cache, len(self.stack.blocks), CACHES)
        if cache.get_seq_length():
            raise GraphoptError("past_key_values=: speculation begins with an empty cache")
        rounds = Rounds(model, self.stack, self.keep, self._length, self.relaxed)
        with torch.no_grad():
            written = rounds.run(
                input_ids,
                model_kwargs.get("attention_mask"),
                cache,
                generation_config.max_length - input_ids.shape[1],
                _end_tokens(generation_config),
            )
        self.statistics = Speculation(
            sum(map(len, written)), rounds.drafted, rounds.accepted, rounds.relaxed, tuple(rounds.lengths)
        )
        return _output(input_ids, written, generation_config)

    def _length(self) -> DraftLength:
        """A rule that has learnt nothing yet: each row of each generation begins anew."""
        if isinstance(self.length, int):
            return FixedLength(self.length)
        blocks = len(self.stack.blocks)
        return LENGTHS[self.length](len(self.keep), blocks - min(set(range(blocks)) - set(self.keep)))


def _check_draft(keep: tuple[int, ...], path: str, blocks: int) -> None:
    if not keep or any(type(i) is not int or not 0 <= i < blocks for i in keep):
        raise PlanError(
            f"keep={list(keep)}: a draft has blocks, and those of {path} are 0 to {blocks - 1}"
        )
    if sorted(set(keep)) != list(keep):
        raise PlanError(f"keep={list(keep)}: positions ascend, each once")
    if len(keep) == blocks:
        raise PlanError(f"keep={list(keep)}: a draft leaves out at least one of the {blocks} blocks")


def _check_options(processors: Iterable[Any], criteria: Iterable[Any], config: Any) -> None:
    if config.do_sample or config.num_beams != 1 or (config.num_return_sequences or 1) != 1:
        raise GraphoptError("speculation is greedy: do_sample=False, num_beams=1, num_return_sequences=1")
    if names := [type(processor).__name__ for processor in processors]:
        raise GraphoptError(f"speculation does not run logits processors: {', '.join(names)}")
    if names := [type(c).__name__ for c in criteria if type(c).__name__ not in CRITERIA]:
        raise GraphoptError(f"speculation stops at a length or an end token, not by {', '.join(names)}")
    asked = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
    if names := [name for name in asked if getattr(config, name, False)]:
        raise GraphoptError(f"speculation returns tokens, not what {', '.join(names)} asks for")


def _check_inputs(given: Mapping[str, Any]) -> None:
    if names := [name for name, value in given.items() if name not in INPUTS and value is not None]:
        raise GraphoptError(f"speculation takes token ids and their mask, not {', '.join(names)}")
    mask = given.get("attention_mask")
    if mask is not None and bool((mask[:, 1:] < mask[:, :-1]).any()):
        raise GraphoptError("attention_mask=: speculation takes prompts that are padded on the left only")


def _end_tokens(config: Any) -> frozenset[int]:
    ends = getattr(config, "_eos_token_tensor", None)
    return frozenset() if ends is None else frozenset(ends.flatten().tolist())


def _output(prompts: Tensor, written: Sequence[Sequence[int]], config: Any) -> Any:
    """Prompts and what was written behind them, shorter rows filled with the padding token."""
    width, pad = max(map(len, written)), getattr(config, "_pad_token_tensor", None)
    filler = 0 if pad is None else int(pad)
    rows = [[*row, *[filler] * (width - len(row))] for row in written]
    ids = torch.cat([prompts, torch.tensor(rows, dtype=prompts.dtype, device=prompts.device)], dim=1)
    if not config.return_dict_in_generate:
        return ids
    from transformers.generation import GenerateDecoderOnlyOutput

    return GenerateDecoderOnlyOutput(sequences=ids)
