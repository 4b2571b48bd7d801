"""The rounds of speculative decoding: draft, verify, put the rows of the cache in line."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.cache_rows import crop, masks, realign
from graphopt.draft_length import DraftLength, Midpoint, entropies, js_distance
from graphopt.errors import GraphoptError
from graphopt.passes.blocks import Forward, Stack, forwards
from graphopt.passes.cached_runs import cache_seen_by, straight, tokens_seen


@dataclass(frozen=True)
class _Rows:
    """Rows still being written: of each its place in the batch and its tokens in the cache.

    The cache has `slots` of them, those of a row at the right edge; `last`, of shape (rows,), are the
    tokens behind, which no block has seen.
    """

    places: list[int]
    counts: list[int]
    slots: int
    last: Tensor

    def mask(self, more: int) -> Tensor | None:
        """For `more` tokens behind the cache; None where no slot is empty."""
        if min(self.counts) == self.slots:
            return None
        counts = [count + more for count in self.counts]
        return masks(counts, self.slots + more, self.last.device)

    def positions(self, tokens: range) -> Tensor:
        """Of tokens behind the cache, shape (rows, tokens)."""
        first = torch.tensor(self.counts, device=self.last.device)[:, None]
        return first + torch.tensor(tokens, device=self.last.device)


@dataclass(frozen=True)
class _Draft:
    """Tokens, of shape (rows, tokens), with the logits they were chosen by and the entropies of these."""

    tokens: Tensor
    entropies: list[list[float]]  # of each token, in each row
    logits: Tensor | None
    shared: Tensor | None  # hidden states before the first block that the draft leaves out


class Rounds:
    """One generation by the blocks `keep` of `stack` and by all of them; counts what happens."""

    def __init__(
        self,
        model: Any,
        stack: Stack,
        keep: Sequence[int],
        length: Callable[[], DraftLength],
        relaxed: bool,
    ) -> None:
        self.model, self.stack, self.keep = model, stack, tuple(keep)
        self.new_length = length
        self.distance = Midpoint() if relaxed else None
        self.first = min(set(range(len(stack.blocks))) - set(keep))
        self.takes = inspect.signature(model.forward).parameters
        self.drafted = self.accepted = self.relaxed = 0
        self.lengths: list[int] = []

    def run(
        self, ids: Tensor, mask: Tensor | None, cache: Any, most: int, ends: frozenset[int]
    ) -> list[list[int]]:
        """The tokens behind each prompt, at most `most`, up to the first of `ends`."""
        self.cache, self.most, self.ends = cache, most, ends
        rows = self._prompt(ids, mask)
        self.written: list[list[int]] = [[token] for token in rows.last.tolist()]
        self.rules = [self.new_length() for _ in self.written]
        cache.activate_past_recording()  # entries with a window let tokens go only when told
        self.seen_by_draft = cache_seen_by(cache, self.keep)
        self.seen_behind = cache_seen_by(cache, range(self.first, len(self.stack.blocks)))
        going = self._going(rows)
        if 0 < len(going) < len(rows.places):
            rows = self._next(rows, 0, [0] * len(rows.places), going)
        while going:
            draft = self._draft(rows, most - min(len(self.written[i]) for i in rows.places))
            taken = self._verify(rows, draft)
            going = self._going(rows)
            if going:
                rows = self._next(rows, draft.tokens.shape[1], taken, going)
        return self.written

    def _going(self, rows: _Rows) -> list[int]:
        return [place for place in rows.places if not self._ended(place)]

    def _ended(self, place: int) -> bool:
        row = self.written[place]
        return len(row) >= self.most or row[-1] in self.ends

    def _prompt(self, ids: Tensor, mask: Tensor | None) -> _Rows:
        """Run the prompts through all blocks."""
        samples, slots = ids.shape
        counts = [slots] * samples if mask is None else mask.sum(-1).tolist()
        whole = torch.ones_like(ids) if mask is None else mask
        positions = (whole.long().cumsum(-1) - 1).clamp(min=0)
        last = {"logits_to_keep": 1} if "logits_to_keep" in self.takes else {}
        logits = self._logits(ids, mask, positions, self.cache, **last)[:, -1]
        return _Rows(list(range(samples)), counts, slots, logits.argmax(-1))

    def _logits(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: Any, **more: Any
    ) -> Tensor:
        """In float32, as `generate` compares them."""
        if "position_ids" in self.takes:
            more["position_ids"] = positions
        output = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more
        )
        return output.logits.float()  # type: ignore[no-any-return]

    def _draft(self, rows: _Rows, most: int) -> _Draft:
        """Draft up to `most` tokens by the blocks `keep`, whose states of them stay in the cache."""
        shared: list[Tensor] = []
        spreads: list[list[float]] = []
        tokens, every = [rows.last], []
        behind = min(range(len(rows.places)), key=lambda row: len(self.written[rows.places[row]]))
        rule = self.rules[rows.places[behind]]  # the batch ends when this row does
        with forwards(self._passing(shared)):
            while not spreads or (
                len(spreads) < most and not rule.stops([row[behind] for row in spreads])
            ):
                step = len(spreads)
                positions = rows.positions(range(step, step + 1))
                mask, last = rows.mask(step + 1), tokens[-1][:, None]
                logits = self._logits(last, mask, positions, self.seen_by_draft)[:, -1]
                tokens.append(logits.argmax(-1))
                spreads.append(entropies(logits) if rule.needs_entropy else [0.0] * len(last))
                if self.distance is not None:
                    every.append(logits)
        return _Draft(
            torch.stack(tokens[1:], 1),
            spreads,
            torch.stack(every, 1) if every else None,
            torch.cat(shared, 1) if self.first else None,
        )

    def _passing(self, shared: list[Tensor]) -> dict[Any, Forward]:
        """Blocks that the draft leaves out do nothing; the first notes the hidden states before it."""
        blocks = self.stack.blocks
        left_out = (block for i, block in enumerate(blocks) if i not in self.keep)
        passing = {block: straight(self.stack) for block in left_out}
        return passing | {blocks[self.first]: straight(self.stack, shared.append)}

    def _verify(self, rows: _Rows, draft: _Draft) -> list[int]:
        """Run the blocks from `first` on for the tokens that drafts followed; write what is accepted.

        Returns how many tokens each row got.
        """
        count = draft.tokens.shape[1]
        crop(self.cache, [i for i in self.keep if i > self.first], count)
        ids = torch.cat([rows.last[:, None], draft.tokens[:, :-1]], 1)
        with forwards(self._resuming(draft.shared)):
            logits = self._logits(ids, rows.mask(count), rows.positions(range(count)), self.seen_behind)
        self._check_cache()
        self.lengths.append(count)
        self.drafted += count * len(rows.places)
        apart = None if draft.logits is None else js_distance(logits, draft.logits).tolist()
        choices, drafts = logits.argmax(-1).tolist(), draft.tokens.tolist()
        taken = []
        for row, place in enumerate(rows.places):
            spreads = [of_rows[row] for of_rows in draft.entropies]
            passed = self._passed(drafts[row], choices[row], apart and apart[row])
            self.rules[place].learn(spreads, passed)
            taken.append(self._write(place, drafts[row][:passed], choices[row]))
        return taken

    def _resuming(self, shared: Tensor | None) -> dict[Any, Forward]:
        """Blocks before `first` do nothing, and that one is given their hidden states."""
        if shared is None:
            return {}
        blocks = self.stack.blocks
        run = blocks[self.first].forward

        def resumed(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = self.stack.with_hidden(args, kwargs, shared)
            return run(*args, **kwargs)

        before = {block: straight(self.stack) for block in blocks[: self.first]}
        return before | {blocks[self.first]: resumed}

    def _check_cache(self) -> None:
        if len({tokens_seen(self.cache, i) for i in range(len(self.stack.blocks))}) > 1:
            raise GraphoptError(
                f"{type(self.model).__name__}: its blocks and the entries of its cache do not match"
            )

    def _passed(self, drafts: list[int], choices: list[int], apart: list[float] | None) -> int:
        """How many drafts pass before the first that does not."""
        for number, (token, choice) in enumerate(zip(drafts, choices, strict=True)):
            close = apart is not None and self._close(apart[number], token == choice)
            if token != choice and not close:
                return number
        return len(drafts)

    def _close(self, distance: float, agreed: bool) -> bool:
        """Whether a draft at this distance may pass; the distance then counts for the next."""
        assert self.distance is not None
        threshold = self.distance.value
        self.distance.add(distance, agreed)
        return threshold is not None and distance < threshold

    def _write(self, place: int, drafts: list[int], choices: list[int]) -> int:
        """Write drafts that passed, and the choice in place of the next; returns how many tokens."""
        row = self.written[place]
        tokens = [*drafts, *choices[len(drafts) : len(drafts) + 1]]
        for number, (token, choice) in enumerate(zip(tokens, choices, strict=False), start=1):
            if number <= len(drafts):
                self.accepted += token == choice
                self.relaxed += token != choice
            row.append(token)
            if self._ended(place):
                return number
        return len(tokens)

    def _next(self, rows: _Rows, drafted: int, taken: list[int], going: list[int]) -> _Rows:
        """The rows still `going`, with the states of the tokens that each got and no others."""
        chosen = [row for row, place in enumerate(rows.places) if place in going]
        counts = [rows.counts[row] + taken[row] for row in chosen]
        slots, width = rows.slots + drafted, max(counts)
        ends = [rows.slots + taken[row] for row in chosen]
        if len(chosen) == len(rows.places) and set(ends) == {width}:
            crop(self.cache, range(len(self.stack.blocks)), slots - width)
        else:
            realign(self.cache, slots, chosen, ends, width)
        last = torch.tensor([self.written[place][-1] for place in going], device=rows.last.device)
        return _Rows(going, counts, width, last)
