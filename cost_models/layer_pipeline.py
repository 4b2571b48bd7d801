"""Layer streaming as a task graph: blocks whose weights are brought in a few blocks before they run.

One channel computes, the other brings weights into a ring of equal slots. A slot is free again when the
block in it has run, and is filled at once with the next block that has none; behind the last block comes
the first one of the next step, so that steps in a row keep the channel busy. (Superpipeline, arXiv
2410.08791, moves partitions likewise, with the number of slots given by hand.)
"""

from collections.abc import Sequence, Set
from dataclasses import dataclass

from graphopt.cost_models.overlap_run import Run, run_order
from graphopt.cost_models.task_graph import COMPUTE, HOST_TO_DEVICE, Task, TaskGraph

STEPS = 6  # that are simulated; the second half of them counts, when the ring has settled
_LATE_S = 1e-12


@dataclass(frozen=True)
class LayerCosts:
    """What a step takes, by block: seconds of computing and of loading, bytes of a block's weights.

    `rest_seconds` are computed besides the blocks. `fixed_bytes` are held all the time besides the
    weights of blocks (other parameters, buffers, inputs), `step_bytes` are what a step allocates.
    """

    compute_seconds: tuple[float, ...]
    rest_seconds: float
    load_seconds: tuple[float, ...]
    block_bytes: tuple[int, ...]
    fixed_bytes: int
    step_bytes: int

    @property
    def step_seconds(self) -> float:
        """All computing of a step."""
        return self.rest_seconds + sum(self.compute_seconds)

    def streamed(self, resident: Set[int]) -> tuple[int, ...]:
        """The blocks, in order, that are not in `resident`."""
        return tuple(i for i in range(len(self.block_bytes)) if i not in resident)

    def slot_bytes(self, resident: Set[int]) -> int:
        """What a slot has room for: the largest of the blocks that are loaded."""
        return max((self.block_bytes[i] for i in self.streamed(resident)), default=0)

    def peak_bytes(self, resident: Set[int], slots: int) -> int:
        """Bytes held at the peak with the blocks `resident` in memory and a ring of `slots`.

        >>> LayerCosts((1.0,) * 3, 0.0, (1.0,) * 3, (10, 20, 10), 5, 7).peak_bytes({1}, 2)
        52
        """
        kept = sum(self.block_bytes[i] for i in resident)
        return self.fixed_bytes + self.step_bytes + kept + slots * self.slot_bytes(resident)

    def bound_seconds(self, memory_bytes: int, slots: int | None = None) -> float:
        """What no choice (with so many `slots`) within `memory_bytes` is faster than, over many steps.

        The largest of: the computing of a step; the loading; and, as a slot is taken while its block is
        loaded and while it runs, the sum of both divided by the slots. inf where nothing fits.
        """
        if slots is None:
            count = len(self.block_bytes)
            return min(self.bound_seconds(memory_bytes, slots) for slots in range(count + 1))
        room = memory_bytes - self.fixed_bytes - self.step_bytes - slots * min(self.block_bytes)
        if room < (0 if slots else sum(self.block_bytes)):
            return float("inf")
        if not slots:
            return self.step_seconds
        taken = [a + b for a, b in zip(self.load_seconds, self.compute_seconds, strict=True)]
        loading = _least_left(self.load_seconds, self.block_bytes, room)
        return max(self.step_seconds, loading, _least_left(taken, self.block_bytes, room) / slots)


def _least_left(values: Sequence[float], sizes: Sequence[int], room: int) -> float:
    """At most as much of the sum of `values` as is left when items of total size `room` are taken away.

    The knapsack's bounds: taken in parts by value per size (Dantzig, Operations Research 5, 1957), and
    the largest values, as many as of the smallest size would fit.
    """
    total, most, left = sum(values), 0.0, room
    for value, size in sorted(zip(values, sizes, strict=True), key=lambda item: -item[0] / item[1]):
        share = min(1.0, left / size)
        most += share * value
        left -= size if share == 1.0 else left
    largest = sorted(values, reverse=True)[: room // min(sizes)]
    return total - min(most, sum(largest))


@dataclass(frozen=True, eq=False)
class Pipeline:
    """Steps in a row with a ring of `slots`, as simulated: `run`, of which the second half counts."""

    costs: LayerCosts
    resident: frozenset[int]
    slots: int
    run: Run

    @property
    def seconds(self) -> float:
        """A step, in the mean over the second half."""
        ends = [end for task, end in zip(self.run.graph.tasks, self.run.end, strict=True) if _ends(task)]
        half = len(ends) // 2
        return float(ends[-1] - ends[half - 1]) / (len(ends) - half)

    def exposed(self) -> tuple[tuple[float, str], ...]:
        """For each loaded block, the seconds that computing waits for it in a step, and why.

        "channel busy": its load was behind others. "memory": it began when a slot became free.
        """
        tasks, half, steps = self.run.graph.tasks, STEPS // 2, STEPS - STEPS // 2
        streamed = self.costs.streamed(self.resident)
        waited, busy = dict.fromkeys(streamed, 0.0), dict.fromkeys(streamed, 0.0)
        seen = 0  # loads that were waited for
        for index, task in enumerate(tasks):
            if not task.reads:
                continue
            block, load = streamed[seen % len(streamed)], task.after[-1]
            if seen >= half * len(streamed):
                waited[block] += float(self.run.idle[index]) / steps
                busy[block] += float(self.run.begin[load] - self.run.issued[load])
            seen += 1
        return tuple((waited[b], _reason(waited[b], busy[b])) for b in streamed)


def simulated(costs: LayerCosts, resident: frozenset[int], slots: int) -> Pipeline:
    """`STEPS` steps in a row, from an empty ring.

    >>> costs = LayerCosts((2.0, 2.0), 1.0, (3.0, 3.0), (8, 8), 0, 0)
    >>> simulated(costs, frozenset(), 1).seconds, simulated(costs, frozenset(), 2).seconds
    (10.0, 6.0)
    """
    graph = pipeline_graph(costs, resident, slots)
    return Pipeline(costs, resident, slots, run_order(graph, range(len(graph.tasks))))


def pipeline_graph(
    costs: LayerCosts, resident: frozenset[int], slots: int, steps: int = STEPS
) -> TaskGraph:
    """The tasks of `steps` steps in the order in which the host comes to them.

    A load has no task to wait for: it stands behind the block whose slot it takes.
    """
    streamed, tasks, loads = costs.streamed(resident), list[Task](), list[int]()
    total = steps * len(streamed)

    def load() -> None:
        number = len(loads)
        if number < total:
            block = streamed[number % len(streamed)]
            loads.append(len(tasks))
            tasks.append(
                Task(f"load {block}", HOST_TO_DEVICE, costs.load_seconds[block], writes=(number,))
            )

    for _ in range(slots):
        load()
    used, before = 0, tuple[int, ...]()
    for _ in range(steps):
        for block, seconds in enumerate(costs.compute_seconds):
            is_loaded = block not in resident
            after, reads = ((*before, loads[used]), (used,)) if is_loaded else (before, ())
            before = (len(tasks),)
            tasks.append(
                Task(f"block {block}", COMPUTE, seconds, after, reads, scratch_bytes=costs.step_bytes)
            )
            if is_loaded:
                used += 1
                load()
        tasks.append(Task(_REST, COMPUTE, costs.rest_seconds, before, scratch_bytes=costs.step_bytes))
        before = (len(tasks) - 1,)
    base = costs.fixed_bytes + sum(costs.block_bytes[i] for i in resident)
    return TaskGraph(tuple(tasks), (costs.slot_bytes(resident),) * total, base_bytes=base)


_REST = "rest of the step"


def _ends(task: Task) -> bool:
    return task.name == _REST


def _reason(waited: float, busy: float) -> str:
    if waited <= _LATE_S:
        return ""
    return "channel busy" if busy > _LATE_S else "memory"
