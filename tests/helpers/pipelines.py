"""Random costs of streamed layers, and a naive simulation of steps in exact fractions.

It shares no code with `graphopt.cost_models.layer_pipeline`: time passes from event to event, with a
set of free slots, a queue of blocks that are wanted and the block that computes.
"""

from fractions import Fraction

from hypothesis import strategies as st

from graphopt.cost_models.layer_pipeline import LayerCosts

HALVES = st.integers(1, 12).map(lambda n: n / 2)


@st.composite
def layer_costs(draw: st.DrawFn, most: int = 6, equal: bool | None = None) -> LayerCosts:
    """Of up to `most` blocks, of one size or (`equal=False`) of several."""
    count = draw(st.integers(2, most))
    if draw(st.booleans()) if equal is None else equal:
        load, compute = draw(HALVES), draw(HALVES)
        sizes, loads, computes = [8] * count, [load] * count, [compute] * count
    else:
        sizes = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
        loads = [size / 4 for size in sizes]
        computes = draw(st.lists(HALVES, min_size=count, max_size=count))
    rest = draw(st.integers(0, 6)) / 2
    numbers = tuple(computes), rest, tuple(loads), tuple(sizes)
    return LayerCosts(*numbers, draw(st.integers(0, 9)), draw(st.integers(0, 9)))


def slow_ends(costs: LayerCosts, resident: frozenset[int], slots: int, steps: int) -> list[Fraction]:
    """When each of `steps` steps in a row ends."""
    blocks = range(len(costs.block_bytes))
    loaded = [i for i in blocks if i not in resident]
    wanted = [(step, i) for step in range(steps) for i in loaded]
    work = [(step, i) for step in range(steps) for i in (*blocks, -1)]  # -1: the rest
    there: set[tuple[int, int]] = set()
    free, now, ends = slots, Fraction(0), list[Fraction]()
    loading: tuple[tuple[int, int], Fraction] | None = None
    running: tuple[tuple[int, int], Fraction] | None = None
    while len(ends) < steps:
        if loading is None and wanted and free:
            free -= 1
            loading = wanted[0], now + Fraction(costs.load_seconds[wanted.pop(0)[1]])
        if running is None and work and (work[0][1] not in loaded or work[0] in there):
            block = work[0][1]
            seconds = costs.rest_seconds if block < 0 else costs.compute_seconds[block]
            running = work.pop(0), now + Fraction(seconds)
        now = min(event[1] for event in (loading, running) if event is not None)
        if running is not None and running[1] == now:
            if running[0] in there:
                there.remove(running[0])
                free += 1
            if running[0][1] < 0:
                ends.append(now)
            running = None
        if loading is not None and loading[1] == now:
            there.add(loading[0])
            loading = None
    return ends


def slow_seconds(costs: LayerCosts, resident: frozenset[int], slots: int, steps: int) -> Fraction:
    """A step, in the mean over the second half."""
    ends = slow_ends(costs, resident, slots, steps)
    half = steps // 2
    return (ends[-1] - ends[half - 1]) / (steps - half)
