"""The backward of a dataflow in machine code: its steps, and the bytes alive while each runs.

The same as `backward_steps` and `simulate` of `graphopt.cost_models.schedule`, for a dataflow without
states of generators; a search over labels and orders runs it thousands of times.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.compiled import compiled, flat_rows
from graphopt.cost_models.memory import Dataflow


@dataclass(frozen=True)
class Profile:
    """One backward: the operator of each step (an index), and the bytes alive while it runs.

    `kept` are the held values that the backward reads or must keep, `kept_bytes` their sum. `start_bytes`
    are alive before the first step. `seconds` and `flops` are of what runs beside the anchored
    operators, less the first run of each operator of the backward.
    """

    operators: np.ndarray
    during: np.ndarray
    kept: frozenset[int]
    kept_bytes: int
    start_bytes: int
    seconds: float
    flops: int

    @property
    def peak_bytes(self) -> int:
        """The most bytes alive at once."""
        return int(self.during.max(initial=0))


class FastBackward:
    """Runs the backward of `flow` with different labels and orders.

    `fixed` values are alive before it, `end` after it; `must_keep` are kept whether or not it reads
    them; operators may write over values of `owned`.
    """

    def __init__(
        self,
        flow: Dataflow,
        fixed: Collection[int],
        must_keep: Collection[int],
        end: Collection[int],
        owned: Collection[int],
    ) -> None:
        self.arrays = _Arrays(flow)
        self.fixed, self.must_keep = self._mask(fixed), self._mask(must_keep)
        self.end, self.owned = self._mask(end), self._mask(owned)

    def run(self, held: Collection[int], ephemeral: Collection[int], order: Sequence[int]) -> Profile:
        """The backward in `order` with the values `held` alive before it."""
        a = self.arrays
        start = self._mask(held)
        steps = compiled(_steps, on_disk=True)(
            *(a.reads_at, a.reads, a.writes_at, a.writes, a.producer),
            *(start | self.fixed, self._mask(ephemeral), np.array(order, np.int64)),
        )
        kept = compiled(_kept, on_disk=True)(a.reads_at, a.reads, steps[0], start, self.must_keep)
        during = compiled(_during, on_disk=True)(
            *(a.reads_at, a.reads, a.writes_at, a.writes, a.reusable_at, a.reusable),
            *(a.nbytes, a.workspace, *steps, kept | self.fixed, self.end, self.owned),
        )
        again = compiled(_again, on_disk=True)(steps[0], a.anchored, a.backward, a.seconds, a.flops)
        return Profile(
            steps[0],
            during,
            frozenset(np.flatnonzero(kept).tolist()),
            int(a.nbytes[kept].sum()),
            int(a.nbytes[kept | self.fixed].sum()),
            *again,
        )

    def _mask(self, values: Collection[int]) -> np.ndarray:
        found = np.zeros(len(self.arrays.nbytes), np.bool_)
        found[list(values)] = True
        return found


class _Arrays:
    """A dataflow in arrays; those of operator i in `reads` begin at `reads_at[i]`, and so on."""

    def __init__(self, flow: Dataflow) -> None:
        operators = flow.operators
        self.reads_at, self.reads = flat_rows(flow.own_reads)
        self.writes_at, self.writes = flat_rows([o.writes for o in operators])
        self.reusable_at, self.reusable = flat_rows(
            [o.reusable if len(o.writes) == 1 else () for o in operators]
        )
        self.nbytes = np.array(flow.sizes, np.int64)
        self.producer = np.array([v.producer for v in flow.values], np.int64)
        self.workspace = np.array([o.workspace_bytes for o in operators], np.int64)
        self.seconds = np.array([o.seconds for o in operators], np.float64)
        self.flops = np.array([o.flops for o in operators], np.int64)
        self.backward = np.array([o.backward for o in operators], np.bool_)
        self.anchored = np.array([o.backward and o.anchored for o in operators], np.bool_)


# --- compiled ----------------------------------------------------------------------------------


def _steps(
    reads_at: Any,
    reads: Any,
    writes_at: Any,
    writes: Any,
    producer: Any,
    start: Any,
    ephemeral: Any,
    order: Any,
) -> Any:
    """The operators of the steps, where what each makes begins, and the values made."""
    live = start.copy()
    operators = np.empty(2 * len(order) + 8, np.int64)
    makes_at = np.zeros(2 * len(order) + 9, np.int64)
    makes = np.empty(2 * len(writes) + 8, np.int64)
    stack = np.empty((len(reads_at) + 1, 2), np.int64)
    dropped = np.empty(len(live), np.int64)
    count = made = 0
    for anchor in order:
        gone = 0
        for read in range(reads_at[anchor], reads_at[anchor + 1] + 1):
            depth = 0
            if read == reads_at[anchor + 1]:  # after all that it reads, the anchor itself
                stack[0, 0], stack[0, 1], depth = anchor, reads_at[anchor + 1], 1
            elif not live[reads[read]]:
                below = producer[reads[read]]
                stack[0, 0], stack[0, 1], depth = below, reads_at[below], 1
            while depth:
                index, place = stack[depth - 1]
                while place < reads_at[index + 1] and live[reads[place]]:
                    place += 1
                if place < reads_at[index + 1]:
                    stack[depth - 1, 1] = place + 1
                    below = producer[reads[place]]
                    stack[depth, 0], stack[depth, 1] = below, reads_at[below]
                    depth += 1
                    continue
                depth -= 1
                if made + len(live) > len(makes):
                    makes = np.concatenate((makes, np.empty(len(makes) + len(live), np.int64)))
                if count + 1 >= len(operators):
                    operators = np.concatenate((operators, np.empty_like(operators)))
                    makes_at = np.concatenate((makes_at, np.empty_like(makes_at)))
                before = made
                for value in writes[writes_at[index] : writes_at[index + 1]]:
                    if index == anchor or not live[value]:
                        makes[made] = value
                        made += 1
                        if index != anchor and ephemeral[value]:
                            dropped[gone] = value
                            gone += 1
                live[makes[before:made]] = True
                if made > before or index == anchor:
                    operators[count], makes_at[count + 1] = index, made
                    count += 1
        live[dropped[:gone]] = False
    return operators[:count], makes_at[: count + 1], makes[:made]


def _kept(reads_at: Any, reads: Any, operators: Any, start: Any, must_keep: Any) -> Any:
    """The values of `start` that a step reads, or that must be kept."""
    wanted = must_keep.copy()
    for index in operators:
        wanted[reads[reads_at[index] : reads_at[index + 1]]] = True
    return wanted & start


def _during(
    reads_at: Any,
    reads: Any,
    writes_at: Any,
    writes: Any,
    reusable_at: Any,
    reusable: Any,
    nbytes: Any,
    workspace: Any,
    operators: Any,
    makes_at: Any,
    makes: Any,
    start: Any,
    end: Any,
    owned: Any,
) -> Any:
    """Bytes alive while each step runs."""
    count = len(operators)
    read_at = np.zeros(count + 1, np.int64)
    for step in range(count):
        index = operators[step]
        read_at[step + 1] = read_at[step] + reads_at[index + 1] - reads_at[index]
    dies = np.zeros(read_at[count], np.bool_)  # for each read of each step: it is the last
    unread = np.zeros(count, np.int64)
    needed = end.copy()
    for step in range(count - 1, -1, -1):
        index = operators[step]
        for value in makes[makes_at[step] : makes_at[step + 1]]:
            unread[step] += 0 if needed[value] else nbytes[value]
        needed[makes[makes_at[step] : makes_at[step + 1]]] = False
        for k in range(reads_at[index + 1] - reads_at[index]):
            dies[read_at[step] + k] = not needed[reads[reads_at[index] + k]]
        needed[reads[reads_at[index] : reads_at[index + 1]]] = True
    mine, during = owned.copy(), np.zeros(count, np.int64)
    live = nbytes[start].sum()
    for step in range(count):
        index = operators[step]
        new = makes[makes_at[step] : makes_at[step + 1]]
        over, freed = False, unread[step]
        for k in range(reads_at[index + 1] - reads_at[index]):
            value = reads[reads_at[index] + k]
            if dies[read_at[step] + k]:
                freed += nbytes[value]
                if mine[value] and len(new):
                    over = over or value in reusable[reusable_at[index] : reusable_at[index + 1]]
                mine[value] = False
        during[step] = live + workspace[index]
        if not over:
            during[step] += nbytes[writes[writes_at[index] : writes_at[index + 1]]].sum()
        live += nbytes[new].sum() - freed
        mine[new] = True
    return during


def _again(operators: Any, anchored: Any, backward: Any, seconds: Any, flops: Any) -> Any:
    """Seconds and FLOPs of what runs again."""
    seen = np.zeros(len(seconds), np.bool_)
    every, first, work = 0.0, 0.0, 0
    for index in operators:
        if anchored[index]:
            continue
        every += seconds[index]
        if not backward[index]:
            work += flops[index]
        elif not seen[index]:
            seen[index] = True
            first += seconds[index]
    return every - first, work
