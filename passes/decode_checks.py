"""What must hold of a model that skips blocks after the prompt."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.passes.blocks import Forward, Stack, evaluation, forwards
from graphopt.passes.decode_plan import DecodePlan
from graphopt.passes.removal_checks import check_close


def check_decoding(model: nn.Module, stack: Stack, plan: DecodePlan, ids: Tensor) -> None:
    """Steps with a cache give the logits of one run without it, up to rounding, through all sets.

    Without a cache, a block that stops running at some token passes on the hidden states of all tokens
    from there unchanged; no token sees a later one, so that this is the same function. `ids` has shape
    (samples, tokens); the last tokens come after the prompt. The tolerance is the square root of the
    precision of the dtype, relative to the largest logit. VerifyError where the logits differ.
    """
    steps = min(len(plan.kept) + 1, ids.shape[1] - 1)
    short = replace(plan, first_tokens=tuple(range(1, len(plan.kept) + 1)))
    prompt = ids.shape[1] - steps
    with evaluation(model):
        cached = _cached_logits(model, short, ids, prompt)
        with forwards(_stopping(stack, short, prompt, steps)):
            whole = _plain(model, input_ids=ids, use_cache=False).logits[:, prompt:]
    failure = "logits after the prompt differ from those of a run without a cache"
    check_close(cached, whole, f"{type(model).__name__}: {failure}")


def _plain(model: Any, **inputs: Any) -> Any:
    return model(**inputs)


def _cached_logits(model: Any, plan: DecodePlan, ids: Tensor, prompt: int) -> Tensor:
    """Logits of the tokens after the prompt, one step each, shape (samples, steps, classes)."""
    own = model._skip_decode
    model._skip_decode = (plan, own[1])
    try:
        cache = model(input_ids=ids[:, :prompt], use_cache=True).past_key_values
        steps = [
            model(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            for i in range(prompt, ids.shape[1])
        ]
    finally:
        model._skip_decode = own
    return torch.cat(steps, dim=1)


def _stopping(stack: Stack, plan: DecodePlan, prompt: int, steps: int) -> dict[nn.Module, Forward]:
    """For each block a forward that changes only the tokens for which the block runs."""
    runs = [prompt] * plan.blocks
    for step in range(1, steps + 1):
        for i in plan.kept_at(step):
            runs[i] = prompt + step

    def until(end: int, run: Forward) -> Forward:
        def forward(*args: Any, **kwargs: Any) -> Any:
            before, output = stack.hidden(args, kwargs), run(*args, **kwargs)
            after = output if isinstance(output, Tensor) else output[0]
            joined = torch.cat([after[:, :end], before[:, end:]], dim=1)
            return joined if isinstance(output, Tensor) else (joined, *output[1:])

        return forward

    return {block: until(end, block.forward) for block, end in zip(stack.blocks, runs, strict=True)}
