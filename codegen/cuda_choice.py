"""What a launch of a CUDA kernel chooses, and what is worth measuring beside `cuda_form`'s rules."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from graphopt.codegen.choices import Choice
from graphopt.codegen.cuda_form import BLOCK, HELD_BYTES, MAX_TEAM, Form, Traits
from graphopt.codegen.layout import Grid

_HELD = (1, 2, 3, 4, 6, 8)
_MOST_ACROSS = 65535
_MOST = 16  # candidates


@dataclass(frozen=True)
class CudaChoice(Choice):
    """`pack`: columns of a pack. `team`: threads of a row. `teams`: rows of a block.

    `held`: packs of a thread in registers, 0 where it goes through its row in a loop; `lean`: of these,
    numbers from memory alone.
    """

    pack: int
    team: int
    teams: int
    held: int
    lean: bool


def choice_of(form: Form) -> CudaChoice:
    """What a form has of a choice."""
    return CudaChoice(form.pack, form.team, form.teams, form.held, form.lean)


def form_with(form: Form, grid: Grid, choice: CudaChoice) -> Form:
    """The form of a grid with another choice."""
    return replace(form, **vars(choice), tail=_columns(grid) % choice.pack != 0)


def _columns(grid: Grid) -> int:
    return grid.rows * grid.columns if grid.flat else grid.columns


def fits(traits: Traits, grid: Grid, default: Form, choice: CudaChoice) -> bool:
    """Whether a kernel of this choice is right on a grid for which the rules choose `default`."""
    pack, team, teams, held = choice.pack, choice.team, choice.teams, choice.held
    powers = all(n >= 1 and n & (n - 1) == 0 for n in (pack, team, teams))
    if not powers or pack > default.pack or not 32 <= team * teams <= MAX_TEAM:
        return False
    if choice.lean and not (held and traits.reduces):
        return False
    if grid.flat:
        return teams == 1 and held == 0
    packs = max(-(-grid.columns // pack), 1)
    if not traits.reduces:
        return 1 <= held <= _HELD[-1] and -(-packs // (team * held)) <= _MOST_ACROSS
    return (held == 0 or packs <= team * held) and (team <= 32 or teams == 1) and held <= _HELD[-1]


def candidates(traits: Traits, grid: Grid, default: Form) -> list[CudaChoice]:
    """Choices worth a measurement beside the default, those nearest to it first."""
    usual = choice_of(default)
    if grid.flat:
        found = [replace(usual, team=team) for team in (128, 512, 1024)]
        found += [replace(usual, pack=default.pack // 2)]
    elif not traits.reduces:
        found = list(_spread(usual))
    else:
        found = list(_reducing(traits, grid, usual))
    distinct = dict.fromkeys(c for c in found if c != usual and fits(traits, grid, default, c))
    return list(distinct)[:_MOST]


def _spread(usual: CudaChoice) -> Iterator[CudaChoice]:
    """Other numbers of packs for a thread, of threads for a row, and of rows for a block."""
    for held in (1, 2, 4):
        yield replace(usual, held=held)
    for team, threads in itertools.product(
        (usual.team, usual.team // 2, usual.team * 2), (256, 128, 512)
    ):
        yield replace(usual, team=team, teams=max(threads // max(team, 1), 1))
    yield replace(usual, pack=usual.pack // 2)


def _reducing(traits: Traits, grid: Grid, usual: CudaChoice) -> Iterator[CudaChoice]:
    """Teams around that of the default, each with as few packs as hold a row; and loops."""
    threads = usual.team * usual.teams
    if usual.team <= 32:
        for block in (BLOCK // 2, BLOCK, 2 * BLOCK):
            yield replace(usual, teams=max(block // usual.team, 1))
    if grid.columns >= BLOCK * usual.pack:
        for team in (BLOCK, 2 * BLOCK, MAX_TEAM):
            yield CudaChoice(usual.pack, team, 1, 0, False)
    for pack, lean in itertools.product((usual.pack, usual.pack // 2), (usual.lean, not usual.lean)):
        packs = -(-grid.columns // max(pack, 1))
        for team in (usual.team, usual.team * 2, usual.team // 2, usual.team * 4, usual.team // 4):
            held = next((h for h in _HELD if team * h >= packs), 0)
            most = 2 * HELD_BYTES[max(BLOCK, min(team, MAX_TEAM))]
            if held and held * pack * traits.column_bytes(lean, held <= 4) <= most:
                teams = max(threads // team, 1) if team <= 32 else 1
                yield CudaChoice(pack, team, teams, held, lean)
