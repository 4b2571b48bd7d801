"""What `SkipDecode` decides, and the published schedule over token positions."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from graphopt.errors import PlanError
from graphopt.plan import Plan


@dataclass(frozen=True)
class DecodePlan(Plan):
    """Which blocks of the list `path` run for the tokens after the prompt.

    From token `first_tokens[s]` on (the first after the prompt is 1) the blocks `kept[s]` run. Each set
    holds block 0 and is part of the one before: a block that a token ran through has then seen all
    tokens before it, so that no state is ever missing.
    """

    path: str
    blocks: int
    first_tokens: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...]
    rule: str = "given"

    def kept_at(self, token: int) -> tuple[int, ...]:
        """The blocks that run for one token after the prompt, counted from 1.

        >>> DecodePlan("layers", 4, (1, 5), ((0, 1, 3), (0, 3))).kept_at(4)
        (0, 1, 3)
        """
        return [kept for first, kept in zip(self.first_tokens, self.kept, strict=True) if first <= token][
            -1
        ]

    @property
    def never_run(self) -> int:
        """A block that runs for prompts only."""
        return min(set(range(self.blocks)) - set(self.kept[0]))

    def check(self) -> None:
        """PlanError where the sets do not exist, do not shrink, or leave out block 0."""
        firsts = list(self.first_tokens)
        if not firsts or firsts[0] != 1 or sorted(set(firsts)) != firsts or len(firsts) != len(self.kept):
            raise PlanError(f"keep=: sets of blocks begin at tokens {firsts}; the first token is 1")
        for first, kept in zip(firsts, self.kept, strict=True):
            self._check_set(first, list(kept))
        for first, (before, kept) in zip(firsts[1:], itertools.pairwise(self.kept), strict=True):
            if new := sorted(set(kept) - set(before)):
                raise PlanError(
                    f"keep=: block {new[0]} runs again from token {first} on, without the states of "
                    "the tokens it skipped; the blocks that run may only get fewer"
                )

    def _check_set(self, first: int, kept: list[int]) -> None:
        where = f"keep={kept}" + (f" from token {first} on" if len(self.kept) > 1 else "")
        if any(type(i) is not int or not 0 <= i < self.blocks for i in kept):
            raise PlanError(f"{where}: the blocks of {self.path} are 0 to {self.blocks - 1}")
        if sorted(set(kept)) != kept:
            raise PlanError(f"{where}: positions ascend, each once")
        if 0 not in kept:
            raise PlanError(f"{where}: block 0 always runs; a model counts tokens by its cache")
        if len(kept) == self.blocks:
            raise PlanError(f"{where}: all {self.blocks} blocks stay; at least one is left out")

    def __str__(self) -> str:
        lines = [f"after the prompt, some of the {self.blocks} blocks of {self.path} run ({self.rule})"]
        ends = [f"to {first - 1}" for first in self.first_tokens[1:]] + ["on"]
        for first, end, kept in zip(self.first_tokens, ends, self.kept, strict=True):
            lines.append(f"  token {first} {end}: {len(kept)}: {' '.join(map(str, kept))}")
        return "\n".join(lines)


def given_sets(keep: Sequence[int] | Mapping[int, Sequence[int]]) -> Mapping[int, tuple[int, ...]]:
    """Sets of blocks by their first tokens, of one set or of several."""
    sets = keep if isinstance(keep, Mapping) else {1: keep}
    return {first: tuple(sets[first]) for first in sorted(sets)}


def skipdecode_sets(
    blocks: int, depths: tuple[int, int], tokens: int, warmup: int
) -> Mapping[int, tuple[int, ...]]:
    """The sets of SkipDecode: depth falls linearly with the position, and the lower blocks go first.

    Del Corro et al. (arXiv 2307.02628): of `depths[0]` blocks at the first token, and `depths[1]` from
    token `tokens` on, the first `warmup` are at the bottom and the others at the top. The position is
    counted from the end of the prompt, since prompts run whole here, and depths are rounded.

    >>> skipdecode_sets(6, (4, 2), 3, 1)
    {1: (0, 3, 4, 5), 2: (0, 4, 5), 3: (0, 5)}
    """
    most, least = depths
    if not 1 <= warmup <= least <= most < blocks:
        raise PlanError(
            f"depths={depths}, warmup={warmup}: the model has {blocks} blocks; "
            "1 <= warmup <= last depth <= first depth < blocks"
        )
    if type(tokens) is not int or tokens < 2:
        raise PlanError(f"tokens={tokens!r}: the depth falls over two tokens or more")
    sets: dict[int, tuple[int, ...]] = {}
    for token in range(1, tokens + 1):
        depth = round(most - (most - least) * (token - 1) / (tokens - 1))
        kept = (*range(warmup), *range(blocks - depth + warmup, blocks))
        if kept not in sets.values():
            sets[token] = kept
    return sets
