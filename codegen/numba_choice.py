"""What a launch of a Numba kernel chooses, by which rules, and what else is worth a measurement."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from graphopt.codegen.choices import Choice
from graphopt.codegen.layout import Grid
from graphopt.codegen.numba_forms import BLOCK, KNOWN_COLUMNS, TILE
from graphopt.codegen.region import Region, cost
from graphopt.codegen.stages import RECOMPUTE_ALL, RECOMPUTE_COST, Stage, may_overwrite, stages

# Below this many bytes of inputs and outputs, threads take longer to start than they save.
PARALLEL_BYTES = 1 << 18
# From here on, outputs bypass the caches: they would not be there any more when they are read. It saves
# reading their memory before it is written. Outputs of 16-bit numbers do not: their kernels compute more
# for each byte, and the copy from the tile costs more than it saves (measured on a Zen 5 server). Nor do
# outputs in memory that the system has yet to provide: it clears a page in the caches first.
STREAM_BYTES = 24 << 20
# Nor do outputs of passes that take more instructions than this for each number that they store
# (benchmarks/launch_rules.py: SwiGLU with 26 gains by it, bias + GELU with 33 does not).
STREAM_COST = 30
STREAM_ALL = 1_000_000  # more than any pass takes
_TILES = (256, 512, 1024, 2048)
_BLOCKS = (512, 1024, 2048, 4096, 8192)
_BLOCK_STEP, _MOST_BLOCK = 64, 1 << 16  # a block is so many columns, or a multiple
_NEAR_PARALLEL = 16  # times more or fewer bytes than PARALLEL_BYTES, both ways are measured
_NEAR_STREAM = 8


@dataclass(frozen=True)
class NumbaChoice(Choice):
    """`block`: columns that a pass does at a time. `tile`: and one whose outputs bypass the caches.

    `stream_cost`: instructions for a number that a pass stores, up to which it bypasses the caches.
    `threads`: at most so many, 0 for all that torch has. `recompute_cost`: instructions above which a
    number that a later pass needs is kept. `online`: a maximum and the sum of exponentials below it take
    one pass.
    """

    block: int = BLOCK
    tile: int = TILE
    stream_cost: int = 0
    threads: int = 0
    recompute_cost: int = RECOMPUTE_COST
    online: bool = True


def default_choice(region: Region, nbytes: int) -> NumbaChoice:
    """What the rules say for a launch that reads and writes so many bytes.

    A softmax takes one pass less only where its exponentials are not kept: those of one pass have to be
    scaled, block by block, when they are read again (benchmarks/launch_rules.py).
    """
    return NumbaChoice(
        stream_cost=STREAM_COST if nbytes >= STREAM_BYTES else 0,
        threads=0 if nbytes >= PARALLEL_BYTES else 1,
        online=not any(stage.online and stage.kept for stage in stages(region)),
    )


def passes_of(region: Region, choice: NumbaChoice) -> tuple[Stage, ...]:
    """The passes over a row with this choice."""
    return stages(region, choice.recompute_cost, choice.online)


def stored_costs(region: Region, choice: NumbaChoice) -> dict[str, float]:
    """About how many instructions a pass takes for each number that it stores, by the output's name."""
    return {
        region.outputs[k].name: sum(cost(region.values[i]) for i in stage.places) / len(stage.outputs)
        for stage in passes_of(region, choice)
        for k in stage.outputs
    }


def fits(region: Region, choice: NumbaChoice) -> bool:
    """Whether kernels of a region may be launched so: on any grid the result is right.

    That takes passes that allow all that those of the default allow of outputs written over inputs.
    """
    sizes = _BLOCK_STEP <= choice.tile <= choice.block <= _MOST_BLOCK
    if not sizes or choice.tile % _BLOCK_STEP or choice.block % choice.tile:
        return False  # a tile lies in one block, of which an exponential that was kept knows the maximum
    passes, usual = passes_of(region, choice), stages(region)
    return passes == usual or all(
        may_overwrite(region, number, output, passes)
        for number in range(len(region.inputs))
        for output in range(len(region.outputs))
        if may_overwrite(region, number, output, usual)
    )


def candidates(
    region: Region, grid: Grid, nbytes: int, may_stream: bool, threads: int
) -> list[NumbaChoice]:
    """Choices worth a measurement beside the default, each with one field that differs from it.

    `may_stream` says that there are outputs that can bypass the caches, `threads` how many torch has.
    """
    default = default_choice(region, nbytes)
    changed = [
        *_blocks(default, grid),
        *_streams(default, region, grid, nbytes, may_stream),
        *_threads(default, nbytes, threads),
        *_passes(default, region),
    ]
    return [choice for choice in changed if fits(region, choice)]


def _blocks(default: NumbaChoice, grid: Grid) -> Iterator[NumbaChoice]:
    """Others than the default of which a row, or all of a flat grid, has more than one."""
    if not grid.flat and grid.columns <= KNOWN_COLUMNS:
        return
    most = grid.rows * grid.columns if grid.flat else grid.columns
    for block in _BLOCKS:
        if block != default.block and min(block, default.block) < most and block < 2 * most:
            yield replace(default, block=block)


def _streams(
    default: NumbaChoice, region: Region, grid: Grid, nbytes: int, may_stream: bool
) -> Iterator[NumbaChoice]:
    """More and fewer outputs past the caches, and for those that do, other tiles."""
    if not may_stream or nbytes * _NEAR_STREAM < STREAM_BYTES:
        return
    costs = stored_costs(region, default).values()
    count = {limit: sum(c <= limit for c in costs) for limit in (0, STREAM_COST, STREAM_ALL)}
    usual = count[default.stream_cost]
    for number in dict.fromkeys(n for n in count.values() if n != usual):
        yield replace(default, stream_cost=next(limit for limit, n in count.items() if n == number))
    most = grid.rows * grid.columns if grid.flat else grid.columns
    for tile in _TILES if usual else ():
        if tile != default.tile and min(tile, default.tile) < most:
            yield replace(default, tile=tile)


def _threads(default: NumbaChoice, nbytes: int, threads: int) -> Iterator[NumbaChoice]:
    if threads == 1:
        return
    if PARALLEL_BYTES / _NEAR_PARALLEL <= nbytes <= PARALLEL_BYTES * _NEAR_PARALLEL:
        yield replace(default, threads=0 if default.threads else 1)
    if threads >= 4 and not default.threads:
        yield replace(default, threads=threads // 2)


def _passes(default: NumbaChoice, region: Region) -> Iterator[NumbaChoice]:
    """Numbers kept that are computed again, the other way round, and two passes in place of one."""
    usual = passes_of(region, default)
    for limit in (0, RECOMPUTE_ALL):
        changed = replace(default, recompute_cost=limit)
        if passes_of(region, changed) != usual:
            yield changed
    if any(stage.online for stage in stages(region)):
        yield replace(default, online=not default.online)
