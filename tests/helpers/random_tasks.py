"""Random small task graphs, and a naive way to run their orders in exact fractions.

The interpreter shares no code with `graphopt.cost_models.overlap_run`: it asks at every event what
runs now, from the order and from what has ended, and lets time pass until the first of it ends.
"""

import itertools
from collections.abc import Iterator
from fractions import Fraction

from hypothesis import strategies as st

from graphopt.cost_models.task_graph import COMPUTE, Task, TaskGraph

LINKS = ("link", "other link")


@st.composite
def task_graphs(
    draw: st.DrawFn, most: int = 7, contention: bool = True, overwriting: bool = True
) -> TaskGraph:
    """A graph of up to `most` tasks on up to three channels; every buffer is written by one task.

    With `overwriting` some of what computes may write over what it reads.
    """
    tasks: list[Task] = []
    count = draw(st.integers(1, most))
    for index in range(count):
        before = (
            st.lists(st.sampled_from(range(index)), unique=True, max_size=3) if index else st.just([])
        )
        after = tuple(sorted(draw(before)))
        channel = draw(st.sampled_from((COMPUTE, COMPUTE, *LINKS)))
        seconds = draw(st.integers(0, 6)) / 2
        scratch, over = draw(st.integers(0, 3)), ()
        if overwriting and channel == COMPUTE and after:
            over = tuple(draw(st.lists(st.sampled_from(after), unique=True)))
        tasks.append(Task(f"t{index}", channel, seconds, after, after, (index,), scratch, over))
    sizes = tuple(draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)))
    kept = tuple(draw(st.lists(st.sampled_from(range(count)), unique=True, max_size=2)))
    shares = st.sampled_from((0.0, 0.5, 1.0)) if contention else st.just(0.0)
    return TaskGraph(tuple(tasks), sizes, (), kept, 5, {link: draw(shares) for link in LINKS})


def orders(graph: TaskGraph) -> Iterator[tuple[int, ...]]:
    """All orders that keep every task behind those that it waits for."""
    tasks = range(len(graph.tasks))
    for order in itertools.permutations(tasks):
        place = {task: i for i, task in enumerate(order)}
        if all(place[b] < place[t] for t in tasks for b in graph.tasks[t].after):
            yield order


def slow_run(graph: TaskGraph, order: tuple[int, ...]) -> dict[int, tuple[Fraction, Fraction]]:
    """When each task begins and ends."""
    left = {i: Fraction(t.seconds) for i, t in enumerate(graph.tasks)}
    begin: dict[int, Fraction] = {}
    end: dict[int, Fraction] = {}
    started: list[int] = []
    now = Fraction(0)
    while len(end) < len(order):
        todo = [t for t in order if t not in started]
        computing = [t for t in started if t not in end and graph.tasks[t].channel == COMPUTE]
        if todo and not computing and all(b in end for b in graph.tasks[todo[0]].after):
            started.append(todo[0])
            if graph.tasks[todo[0]].channel == COMPUTE:
                begin[todo[0]] = now
                if left[todo[0]] == 0:
                    end[todo[0]] = now
            continue
        heads = {}  # of each link, the first transfer that has not ended
        for task in started:
            if task not in end and graph.tasks[task].channel != COMPUTE:
                heads.setdefault(graph.tasks[task].channel, task)
        share = {t: Fraction(graph.contention.get(c, 0.0)) for c, t in heads.items()}
        rates = {t: 1 / (1 + k) if computing else Fraction(1) for t, k in share.items()}
        rates |= {t: 1 / (1 + sum(share.values(), Fraction(0))) for t in computing}
        for task in heads.values():
            begin.setdefault(task, now)
        step = min(left[t] / rate for t, rate in rates.items())
        now += step
        for task, rate in rates.items():
            left[task] -= step * rate
            if left[task] == 0:
                end[task] = now
    return {t: (begin[t], end[t]) for t in order}


def slow_seconds(graph: TaskGraph, order: tuple[int, ...]) -> Fraction:
    """The end of the last task."""
    return max(end for _, end in slow_run(graph, order).values())


def slow_peak(graph: TaskGraph, order: tuple[int, ...]) -> int:
    """The most bytes alive at once: at each task, the buffers that exist and are still needed.

    The first buffer that a task may write over, and that dies with it, counts for its result.
    """
    place = {task: i for i, task in enumerate(order)}
    life: dict[int, list[int]] = {}
    for index, task in enumerate(graph.tasks):
        for buffer in (*task.writes, *task.reads):
            life.setdefault(buffer, [0] if buffer in graph.alive else []).append(place[index])
    peak = 0
    for moment, task in enumerate(order):
        alive = [b for b, p in life.items() if min(p) <= moment <= max(p)]
        alive += [b for b in graph.kept if min(life[b]) <= moment and b not in alive]
        dying = [b for b in graph.tasks[task].over if b not in graph.kept and max(life[b]) == moment]
        alive = [b for b in alive if b not in dying[:1]]
        bytes_now = sum(graph.nbytes[b] for b in alive) + graph.tasks[task].scratch_bytes
        peak = max(peak, bytes_now + graph.base_bytes)
    return peak
