"""Optimal persistent schedules of a chain of stages under a memory budget, with nested recomputation.

Beaumont, Eyraud-Dubois, Herrmann, Joly and Shilova, "Optimal checkpointing for heterogeneous chains",
2019 (arXiv 1911.13214): forwards that store nothing, that store their input, or that save all their
backward needs. A schedule is persistent where what was stored or saved stays until the backward that
reads it. Here a stage may save in several ways, as in Rockmate (Zhao et al., ICML 2023); each is an
`Option`. The recurrences below are those of the first paper, section 4, written for several options.

A stage reads the output of the one before it; what comes before the first is always there and takes
no memory here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graphopt.compiled import compiled
from graphopt.errors import PlanError


@dataclass(frozen=True)
class Option:
    """One way to run a stage's forward for its backward, and that backward.

    `kept_bytes` stay from the one to the other, the stage's input and output not counted. While it runs,
    the forward needs `forward_bytes` besides its input, its output and `kept_bytes`; the backward needs
    `backward_bytes` besides its input, `kept_bytes` and the gradients of input and output (a backward
    that reads the stage's output counts that there). What the backward itself makes again is part of
    `backward_seconds`.

    With `at_once` there is no forward before: the backward itself runs what it needs of it, and so it has
    to follow at once. Then nothing is kept, no output is made, and the figures of the forward are
    those of what runs in any case (for the last stage of a chain, the forward that gives its result).
    """

    kept_bytes: int
    forward_seconds: float
    backward_seconds: float
    forward_bytes: int = 0
    backward_bytes: int = 0
    at_once: bool = False


@dataclass(frozen=True)
class Stage:
    """`forward_seconds` and `forward_bytes` are of the forward that saves nothing inside the stage.

    `gradient_bytes` is the size of the gradient of the output.
    """

    output_bytes: int
    gradient_bytes: int
    forward_seconds: float
    options: tuple[Option, ...]
    forward_bytes: int = 0


@dataclass(frozen=True)
class StageChain:
    """Stages 1 .. n, the loss included; `input_gradient_bytes` of the gradient of the first input."""

    stages: tuple[Stage, ...]
    input_gradient_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.stages or not all(s.options for s in self.stages):
            raise PlanError("a chain has at least one stage, and each stage at least one option")
        if any(o.at_once and o.kept_bytes for s in self.stages for o in s.options):
            raise PlanError("an option without a forward before its backward keeps nothing")

    def __len__(self) -> int:
        return len(self.stages)


@dataclass(frozen=True)
class Operation:
    """One step. `stage` counts from 1; `option` is the number of the one that is saved, else -1.

    "forward" drops the stage's input unless it is stored; "store" stores it; "save" stores it and
    saves `option`; "backward" turns the gradient of the output into that of the input, and frees what
    was stored and saved for it.
    """

    kind: Literal["forward", "store", "save", "backward"]
    stage: int
    option: int = -1


@dataclass(frozen=True)
class Schedule:
    """The operations, their seconds, and the bytes alive at the worst moment."""

    operations: tuple[Operation, ...]
    seconds: float
    peak_bytes: int


def simulate(chain: StageChain, operations: Sequence[Operation]) -> Schedule:
    """Seconds and peak of `operations`; PlanError where one cannot run, or a backward is missing."""
    stages = chain.stages
    gradients = (chain.input_gradient_bytes, *(s.gradient_bytes for s in stages))
    outputs = (0, *(s.output_bytes for s in stages))
    stored, saved = {0}, dict[int, Option]()
    moving, pending = 0, len(stages)  # the newest output; the next backward
    peak, seconds = 0, 0.0
    for operation in operations:
        stage, number = stages[operation.stage - 1], operation.stage
        source, running = number - 1, 0
        alive = gradients[pending] + sum(o.kept_bytes for o in saved.values())
        alive += sum(outputs[i] for i in stored | {moving})
        if operation.kind == "backward":
            if pending != number or number not in saved or source not in stored:
                raise PlanError(f"{operation} cannot run: the next backward is of stage {pending}")
            option = saved.pop(number)
            running, time = gradients[source] + option.backward_bytes, option.backward_seconds
            pending = source
            if source:
                stored.discard(source)
            moving = 0
        else:
            if source not in stored and source != moving:
                raise PlanError(f"{operation} cannot run: its input is not there")
            running, time = stage.output_bytes + stage.forward_bytes, stage.forward_seconds
            if operation.kind != "forward":
                stored.add(source)
            moving = number
            if operation.kind == "save":
                option = stage.options[operation.option]
                if option.at_once and pending != number:
                    raise PlanError(f"{operation} cannot run: its backward does not follow at once")
                running = option.kept_bytes + option.forward_bytes
                running += 0 if option.at_once else stage.output_bytes
                time, saved[number] = option.forward_seconds, option
                stored.update({number} if pending > number else ())
                moving = 0
        peak, seconds = max(peak, alive + running), seconds + time
    if pending:
        raise PlanError(f"the backward of stage {pending} is missing")
    return Schedule(tuple(operations), seconds, peak)


def least_budget(chain: StageChain) -> int:
    """The least peak of any persistent schedule, in bytes; O(n^3)."""
    sizes = _sizes(chain, 1)
    return int(compiled(_least_memory, on_disk=True)(*sizes.arrays)[0, len(chain) - 1])


def within(chain: StageChain, budget_bytes: int, slots: int = 500) -> Schedule | None:
    """The fastest persistent schedule found whose peak is at most `budget_bytes`; None: there is none.

    See `Schedules`. With slots of one byte (a budget of at most `slots`) no schedule is faster.
    """
    return Schedules.of(chain, budget_bytes, slots).within(budget_bytes)


@dataclass(frozen=True)
class Schedules:
    """The schedules of `chain` for all budgets up to one, solved together.

    Memory is counted in slots of `ceil(most_bytes / slots)` bytes. What is held while others run
    takes its size rounded up, each on its own; what one step needs on top is added up, then rounded up.
    So the seconds found for a segment can be reached. Schedules are put together from them with memory
    counted in bytes and the least memory of each segment known, so that none is over the budget, and one
    is found where there is any. As rounding takes about half a slot for each stage, the seconds are
    read for some more slots, too; the fastest of the schedules is returned.

    Time O(n^2 (n + options) slots), memory O(n^2 slots).
    """

    chain: StageChain
    exact: "_Sizes"
    tables: tuple["_Table", ...]

    @staticmethod
    def of(chain: StageChain, most_bytes: int, slots: int = 500) -> "Schedules":
        """Solve `chain` for budgets up to `most_bytes`."""
        exact = _sizes(chain, 1)
        memory = compiled(_least_memory, on_disk=True)(*exact.arrays)
        if memory[0, len(chain) - 1] > most_bytes:
            return Schedules(chain, exact, ())
        slot = max(1, -(-most_bytes // slots))
        sizes = _sizes(chain, slot)
        more = READINGS if slot > 1 else (0.0,)
        limit = most_bytes // slot + math.ceil(more[-1] * len(chain))
        seconds = compiled(_least_seconds, on_disk=True)(*sizes.arrays, *sizes.times, limit)
        return Schedules(chain, exact, tuple(_Table(seconds, memory, slot, m) for m in more))

    def within(self, budget_bytes: int) -> Schedule | None:
        """The fastest schedule found whose peak is at most `budget_bytes`, one of those solved for."""
        if not self.tables or self.tables[0].memory[0, len(self.chain) - 1] > budget_bytes:
            return None
        walks = [_operations(self.exact, table, budget_bytes) for table in self.tables]
        return min((simulate(self.chain, w) for w in walks), key=lambda s: s.seconds)


UNKNOWN_SECONDS = 1e30  # of a segment that fits, but not with its sizes rounded up
READINGS = (0.0, 0.25, 0.5, 0.75, 1.0)  # slots for each stage by which the seconds are read elsewhere


@dataclass(frozen=True)
class _Table:
    """`seconds` by `_row` and slots, `memory` (n, n) the least bytes of each segment.

    `more`: slots for each stage that are added before the seconds are read.
    """

    seconds: np.ndarray
    memory: np.ndarray
    slot: int
    more: float

    def __call__(self, s: int, t: int, nbytes: int) -> float:
        """Seconds of the segment from stage `s` to `t` with `nbytes`; infinite where it does not fit."""
        if nbytes < self.memory[s, t]:
            return np.inf
        slots = nbytes // self.slot + int(self.more * (t - s + 1))
        return min(float(self.seconds[_row(len(self.memory), s, t), slots]), UNKNOWN_SECONDS)


@dataclass(frozen=True)
class _Sizes:
    """The chain as arrays, in slots; stages count from 0 here, and options through all stages.

    `arrays`: `first` (n+1,), the first option of each stage; `at_once` (options,); `output` (n,); `hold`
    (options,), what is held with a saved option, the stage's output included; `sweep` (2, n, n), what
    a forward needs by whether it is not the segment's first, its stage, and the segment's last stage;
    `save` (options, n), what a saving forward needs by the segment's last stage; `back` (options,), what
    a backward needs. `times`: seconds of the forwards (n,), of saving and backward together (options,).
    """

    arrays: tuple[np.ndarray, ...]
    times: tuple[np.ndarray, ...]


def _sizes(chain: StageChain, slot: int) -> _Sizes:
    stages = chain.stages
    options = [(s, o) for s, stage in enumerate(stages) for o in stage.options]
    first = np.concatenate(([0], np.cumsum([len(s.options) for s in stages])))
    output = np.array([s.output_bytes for s in stages])
    gradient = np.array([s.gradient_bytes for s in stages])
    before = np.concatenate(([chain.input_gradient_bytes], gradient[:-1]))
    forward = output + np.array([s.forward_bytes for s in stages])
    source = np.concatenate(([0], output[:-1]))
    sweep = np.stack([forward, forward + source])[:, :, None] + gradient
    made = np.array([0 if o.at_once else output[s] for s, o in options])
    saving = made + np.array([o.kept_bytes + o.forward_bytes for _, o in options])
    back = np.array([o.kept_bytes + o.backward_bytes + gradient[s] + before[s] for s, o in options])
    hold = np.array([o.kept_bytes + output[s] for s, o in options])
    at_once = np.array([o.at_once for _, o in options])
    found = (output, hold, sweep, saving[:, None] + gradient, back)
    times = (
        np.array([s.forward_seconds for s in stages], float),
        np.array([o.forward_seconds + o.backward_seconds for _, o in options], float),
    )
    return _Sizes((first, at_once, *(-(-a.astype(np.int64) // slot) for a in found)), times)


def _operations(sizes: _Sizes, table: _Table, limit: int) -> list[Operation]:
    """Walk the table from the whole chain down; what is on top of the stack is done first."""
    first, _, output, hold = sizes.arrays[:4]
    found: list[Operation] = []
    stack: list[tuple[int, int, int] | Operation] = [(0, len(output) - 1, limit)]
    while stack:
        top = stack.pop()
        if isinstance(top, Operation):
            found.append(top)
            continue
        s, t, memory = top
        _, option, cut = min(_ways(sizes, table, s, t, memory))
        if option < 0:
            found += [Operation("forward" if j > s else "store", j + 1) for j in range(s, cut)]
            stack += [(s, cut - 1, memory), (cut, t, memory - int(output[cut - 1]))]
            continue
        found.append(Operation("save", s + 1, option - int(first[s])))
        stack.append(Operation("backward", s + 1))
        if s < t:
            stack.append((s + 1, t, memory - int(hold[option])))
    return found


def _ways(sizes: _Sizes, table: _Table, s: int, t: int, memory: int) -> Iterator[tuple[float, int, int]]:
    """How a segment may begin: seconds of all of it, and the option saved or the stage to sweep to."""
    first, at_once, output, hold, sweep, save, back = sizes.arrays
    forward, option_seconds = sizes.times
    for k in range(first[s], first[s + 1]):
        if (s == t or not at_once[k]) and max(save[k, t], back[k]) <= memory:
            rest = 0.0 if s == t else table(s + 1, t, memory - int(hold[k]))
            yield option_seconds[k] + rest, k, -1
    seconds = 0.0
    for cut in range(s + 1, t + 1):
        if sweep[int(cut - 1 > s), cut - 1, t] > memory:
            return
        seconds += forward[cut - 1]
        right = table(cut, t, memory - int(output[cut - 1]))
        yield seconds + right + table(s, cut - 1, memory), -1, cut


def _row(count: int, s: int, t: int) -> int:
    """The place of the segment from stage `s` to `t` among those sorted by their lengths."""
    length = t - s
    return length * count - length * (length - 1) // 2 + s


# --- compiled ----------------------------------------------------------------------------------


def _least_seconds(
    first: Any,
    at_once: Any,
    output: Any,
    hold: Any,
    sweep: Any,
    save: Any,
    back: Any,
    forward: Any,
    option_seconds: Any,
    limit: Any,
) -> Any:
    """Least seconds of each segment (a row, see `_row`) with each number of slots (a column)."""
    count = len(output)
    table = np.full((count * (count + 1) // 2, limit + 1), np.inf)
    for length in range(count):
        for s in range(count - length):
            t = s + length
            mine = table[length * count - length * (length - 1) // 2 + s]
            for k in range(first[s], first[s + 1]):
                need = max(save[k, t], back[k])
                if length == 0:
                    for m in range(need, limit + 1):
                        mine[m] = min(mine[m], option_seconds[k])
                if length == 0 or at_once[k]:
                    continue
                below = length - 1
                rest = table[below * count - below * (below - 1) // 2 + s + 1]
                for m in range(max(need, hold[k]), limit + 1):
                    mine[m] = min(mine[m], option_seconds[k] + rest[m - hold[k]])
            need, seconds = np.int64(0), 0.0
            for cut in range(s + 1, t + 1):
                need = max(need, sweep[0 if cut - 1 == s else 1, cut - 1, t])
                seconds += forward[cut - 1]
                size, long, short = output[cut - 1], t - cut, cut - 1 - s
                right = table[long * count - long * (long - 1) // 2 + cut]
                left = table[short * count - short * (short - 1) // 2 + s]
                for m in range(max(need, size), limit + 1):
                    mine[m] = min(mine[m], seconds + right[m - size] + left[m])
    return table


def _least_memory(
    first: Any, at_once: Any, output: Any, hold: Any, sweep: Any, save: Any, back: Any
) -> Any:
    """Least memory of each segment, shape (n, n)."""
    count = len(output)
    table = np.zeros((count, count), np.int64)
    for length in range(count):
        for s in range(count - length):
            t = s + length
            best = np.int64(2**62)
            for k in range(first[s], first[s + 1]):
                if length and at_once[k]:
                    continue
                need = max(save[k, t], back[k])
                if length:
                    need = max(need, hold[k] + table[s + 1, t])
                best = min(best, need)
            sweeping = np.int64(0)
            for cut in range(s + 1, t + 1):
                sweeping = max(sweeping, sweep[0 if cut - 1 == s else 1, cut - 1, t])
                rest = max(output[cut - 1] + table[cut, t], table[s, cut - 1])
                best = min(best, max(sweeping, rest))
            table[s, t] = best
    return table
