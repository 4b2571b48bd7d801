"""What a model loses without some of its blocks, on calibration batches."""

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.errors import PlanError
from graphopt.passes.blocks import Batch, Stack, call, evaluation, forwards
from graphopt.passes.skip_units import Unit, bypassed

States = tuple[tuple[Tensor, ...], ...]  # of each batch, the hidden states before each block


@dataclass(frozen=True)
class Quality:
    """How a shortened model compares with the whole one on the same tokens.

    `kl` is the mean KL divergence from the whole model's distribution, in nats per token; `top1` the
    share of tokens whose most likely prediction is the same; `perplexity` and `whole_perplexity` are
    of the next token, None for models that do not predict it.
    """

    kl: float
    top1: float
    perplexity: float | None
    whole_perplexity: float | None

    @property
    def perplexity_increase(self) -> float | None:
        """Relative to the whole model: 0.05 is 5 % more."""
        if self.perplexity is None or self.whole_perplexity is None:
            return None
        return self.perplexity / self.whole_perplexity - 1


class LayerTrials:
    """Runs of one model with some of its units bypassed, against its whole run.

    Keeps the whole model's log probabilities of every batch. `layer_runs` counts how often a block
    ran on a batch, with all its sublayers or some, the whole run included.
    """

    def __init__(
        self, model: nn.Module, stack: Stack, batches: Sequence[Batch], units: Sequence[Unit]
    ) -> None:
        self.model, self.stack, self.batches = model, stack, tuple(batches)
        self.units = tuple(units)
        self.layer_runs = 0
        self.whole = tuple(self._log_probabilities(batch, frozenset()) for batch in self.batches)
        self.tokens = sum(len(whole) for whole in self.whole)

    def states_without(self, removed: frozenset[int]) -> States:
        """The hidden states before each block and after the last, of runs without `removed`."""
        whole = sum(self.units[i].branch is None for i in removed)
        self.layer_runs += len(self.batches) * (len(self.stack.blocks) - whole)
        with bypassed(self.units, removed):
            return hidden_states(self.model, self.stack, self.batches)

    def kl(
        self, removed: frozenset[int], prefix: tuple[int, States] | None = None, bound: float = math.inf
    ) -> float:
        """Mean KL divergence in nats per token without the units `removed`.

        `prefix` is a block's position and states of runs that agree with this one on all blocks
        before it; only the blocks behind it run, none where it is the number of blocks. Batches stop
        where the sum is above `bound` already, since every further one could only raise it; the result
        is then some number above `bound`.
        """
        total = 0.0
        for number, (batch, whole) in enumerate(zip(self.batches, self.whole, strict=True)):
            start, state = (0, None) if prefix is None else (prefix[0], prefix[1][number][prefix[0]])
            logs = self._log_probabilities(batch, removed, start, state)
            total += float(_kl(whole, logs).sum()) / self.tokens
            if total > bound:
                break
        return total

    def quality(self, removed: frozenset[int], model: nn.Module | None = None) -> Quality:
        """All figures without the units `removed`, or of a `model` that stands for it."""
        kl = same = loss = whole_loss = 0.0
        targets = 0
        for batch, whole in zip(self.batches, self.whole, strict=True):
            if model is None:
                logs = self._log_probabilities(batch, removed)
            else:
                with evaluation(model):
                    logs = _log_probabilities(call(model, batch), batch)
            kl += float(_kl(whole, logs).sum())
            same += float((whole.argmax(-1) == logs.argmax(-1)).sum())
            if (following := self._following(batch)) is not None:
                at, tokens = following
                targets += len(tokens)
                loss += float(F.nll_loss(logs[at], tokens, reduction="sum"))
                whole_loss += float(F.nll_loss(whole[at], tokens, reduction="sum"))
        ppl = [math.exp(value / targets) if targets else None for value in (loss, whole_loss)]
        return Quality(kl / self.tokens, same / self.tokens, *ppl)

    def _following(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """Rows of the log probabilities that predict a token, and these tokens; None where none do."""
        predicts = getattr(self.model, "can_generate", None)
        if predicts is None or not predicts() or not isinstance(batch, Mapping):
            return None
        ids, mask = batch["input_ids"], _mask(batch)
        rows = torch.full(ids.shape, -1, device=ids.device)
        rows[mask] = torch.arange(int(mask.sum()), device=ids.device)
        both = mask[:, :-1] & mask[:, 1:]
        return rows[:, :-1][both], ids[:, 1:][both]

    def _log_probabilities(
        self,
        batch: Batch,
        removed: frozenset[int],
        start: int = 0,
        state: Tensor | None = None,
    ) -> Tensor:
        with evaluation(self.model), self._routed(removed, start, state):
            return _log_probabilities(call(self.model, batch), batch)

    @contextlib.contextmanager
    def _routed(self, removed: frozenset[int], start: int, state: Tensor | None) -> Iterator[None]:
        """Blocks before `start` and units `removed` do nothing; the block at `start` is given `state`."""
        stack = self.stack
        replaced = {module: f for i in removed for module, f in self.units[i].forwards.items()}

        def route(position: int, block: nn.Module) -> Any:
            run = replaced.get(block, block.forward)

            def forward(*args: Any, **kwargs: Any) -> Any:
                if position == start and state is not None:
                    args, kwargs = stack.with_hidden(args, kwargs, state)
                if position < start:
                    last = position + 1 == start == len(stack.blocks)
                    given = state if last and state is not None else stack.hidden(args, kwargs)
                    return stack.output(given)
                self.layer_runs += block not in replaced
                return run(*args, **kwargs)

            return forward

        routes = {block: route(i, block) for i, block in enumerate(stack.blocks)}
        with forwards(replaced | routes):
            yield


def logits_of(output: Any) -> Tensor | None:
    """The logits of an output: the attribute, or the output itself where it is a tensor."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else None


def _log_probabilities(output: Any, batch: Batch) -> Tensor:
    """Of the output's logits, shape (tokens, classes), in float32; padding is left out."""
    logits = logits_of(output)
    if logits is None:
        raise PlanError(
            "the model returns no logits, so its quality cannot be measured; use keep=, or remove= "
            "with strategy='block_influence' or 'angular'"
        )
    mask = token_mask(batch)
    rows = logits[mask] if mask is not None and mask.shape == logits.shape[:-1] else logits
    return rows.flatten(0, -2).float().log_softmax(-1)


def token_mask(batch: Batch) -> Tensor | None:
    """Which tokens of a batch are no padding; None where all are text, or it has no tokens."""
    return _mask(batch) if isinstance(batch, Mapping) and "attention_mask" in batch else None


def _mask(batch: Mapping[str, Any]) -> Tensor:
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _kl(whole: Tensor, short: Tensor) -> Tensor:
    """KL divergence of each row, in nats."""
    return F.kl_div(short, whole, log_target=True, reduction="none").sum(-1)


def hidden_states(model: nn.Module, stack: Stack, batches: Sequence[Batch]) -> States:
    """The hidden states before each block and after the last, of each batch."""
    seen: dict[int, Tensor] = {}

    def watch(position: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[position] = stack.hidden(args, kwargs)
            seen[position + 1] = output if isinstance(output, Tensor) else output[0]

        return hook

    hooks = [
        block.register_forward_hook(watch(i), with_kwargs=True) for i, block in enumerate(stack.blocks)
    ]
    found = []
    try:
        with evaluation(model):
            for batch in batches:
                call(model, batch)
                found.append(tuple(seen[i] for i in range(len(stack.blocks) + 1)))
    finally:
        for handle in hooks:
            handle.remove()
    return tuple(found)
