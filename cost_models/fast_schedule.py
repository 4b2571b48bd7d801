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

NOTHING = np.empty((2, 0), np.int64)


@dataclass(frozen=True)
class Profile:
    """One backward: the operator of each step (an index), and the bytes alive while it runs.

    Step i makes the values `makes[makes_at[i] : makes_at[i + 1]]`. `kept` are the held values that the
    backward reads or must keep, `kept_bytes` their sum. `start_bytes` are alive before the first step.
    `seconds` and `flops` are of what runs beside the anchored operators, less the first run of each
    operator of the backward.
    """

    operators: np.ndarray
    makes_at: np.ndarray
    makes: np.ndarray
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
        self.outputs = self._mask(flow.outputs)
        # For so many steps, and values that they make.
        self._room = 2 * max(len(self.arrays.reads_at), len(self.arrays.writes)) + 8

    def run(
        self,
        held: Collection[int] | np.ndarray,
        ephemeral: Collection[int] | np.ndarray,
        order: Sequence[int] | np.ndarray,
        forget: np.ndarray = NOTHING,
    ) -> Profile:
        """The backward in `order` with the values `held` alive before it; labels may be masks.

        `forget`, int64[2, n], are places in `order`, rising, and values that count as not made after
        the operators there.
        """
        a = self.arrays
        start = self._mask(held)
        labels = start | self.fixed, self._mask(ephemeral), forget
        steps = self._steps(*labels, np.asarray(order, np.int64))
        kept = compiled(_kept, on_disk=True)(a.reads_at, a.reads, *steps, start, self.must_keep)
        during = compiled(_during, on_disk=True)(
            *(a.reads_at, a.reads, a.writes_at, a.writes, a.reusable_at, a.reusable),
            *(a.nbytes, a.workspace, *steps, kept | self.fixed, self.end, self.owned),
        )
        again = compiled(_again, on_disk=True)(steps[0], a.anchored, a.backward, a.seconds, a.flops)
        operators, makes_at, makes = steps
        return Profile(
            operators,
            makes_at,
            makes,
            during,
            frozenset(np.flatnonzero(kept).tolist()),
            int(a.nbytes[kept].sum()),
            int(a.nbytes[kept | self.fixed].sum()),
            *again,
        )

    def forward_peak(self, keep: Collection[int] | np.ndarray) -> int:
        """The most bytes alive at once in the forward, which ends with its outputs and `keep` alive."""
        a = self.arrays
        end = self._mask(keep) | self.outputs
        needed = compiled(_needed, on_disk=True)(
            *(a.reads_at, a.reads, a.writes_at, a.writes, a.forward, a.recomputable, end)
        )
        operators = a.forward[needed]
        makes_at = np.concatenate((np.zeros(1, np.int64), np.cumsum(a.made_forward[needed])))
        makes = a.writes_forward[np.repeat(needed, a.made_forward)]
        none = np.zeros_like(end)
        during = compiled(_during, on_disk=True)(
            *(a.reads_at, a.reads, a.writes_at, a.writes, a.reusable_at, a.reusable),
            *(a.nbytes, a.workspace, operators, makes_at, makes, none, end, none),
        )
        return int(during.max(initial=0))

    def idle(self, profile: Profile, step: int) -> np.ndarray:
        """Where each value was touched last that only waits while `step` runs, and is read later.

        int64[values]: the place of an anchored operator among these, which ran, or for which the
        operator ran that touched it; -1 for a value that was there from the begin, -2 for all others.
        """
        a = self.arrays
        start = self._mask(profile.kept) | self.fixed
        found: np.ndarray = compiled(_idle, on_disk=True)(
            *(a.reads_at, a.reads, profile.operators, profile.makes_at, profile.makes),
            *(start, a.anchored, step),
        )
        return found

    def _steps(
        self, start: np.ndarray, ephemeral: np.ndarray, forget: np.ndarray, order: np.ndarray
    ) -> Any:
        """The operators of the steps, where what each makes begins, and the values made."""
        a = self.arrays
        while True:
            found = (np.empty(self._room, np.int64), np.zeros(self._room, np.int64))
            makes, stack = np.empty(self._room, np.int64), np.empty((2, len(a.reads_at) + 1), np.int64)
            count, made = compiled(_steps, on_disk=True)(
                *(a.reads_at, a.reads, a.writes_at, a.writes, a.producer),
                *(start, ephemeral, *forget, order, *found, makes, *stack),
            )
            if count >= 0:
                return found[0][:count], found[1][: count + 1], makes[:made]
            self._room *= 2

    def _mask(self, values: Collection[int] | np.ndarray) -> np.ndarray:
        if isinstance(values, np.ndarray):
            return values
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
        self.recomputable = np.array([o.recomputable for o in operators], np.bool_)
        self.forward = np.array(sorted(flow.forward), np.int64)
        self.made_forward = np.diff(self.writes_at)[self.forward]
        self.writes_forward = np.array([v for i in self.forward for v in operators[i].writes], np.int64)
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
    places_of: Any,
    forgotten: Any,
    order: Any,
    operators: Any,
    makes_at: Any,
    makes: Any,
    above: Any,
    places: Any,
) -> Any:
    """How many steps there are, and values made; -1 where there is no room for them."""
    live = start.copy()
    count = made = next_ = 0
    for number, anchor in enumerate(order):
        first = made
        for read in range(reads_at[anchor], reads_at[anchor + 1] + 1):
            depth = 0
            if read == reads_at[anchor + 1]:  # after all that it reads, the anchor itself
                above[0], places[0], depth = anchor, reads_at[anchor + 1], 1
            elif not live[reads[read]]:
                above[0] = producer[reads[read]]
                places[0], depth = reads_at[above[0]], 1
            while depth:
                index, place = above[depth - 1], places[depth - 1]
                while place < reads_at[index + 1] and live[reads[place]]:
                    place += 1
                if place < reads_at[index + 1]:
                    places[depth - 1] = place + 1
                    above[depth] = producer[reads[place]]
                    places[depth] = reads_at[above[depth]]
                    depth += 1
                    continue
                depth -= 1
                if max(count + 1, made + writes_at[index + 1] - writes_at[index]) >= len(operators):
                    return -1, -1
                before = made
                for k in range(writes_at[index], writes_at[index + 1]):
                    if index == anchor or not live[writes[k]]:
                        makes[made] = writes[k]
                        made += 1
                for k in range(before, made):
                    live[makes[k]] = True
                if made > before or index == anchor:
                    operators[count], makes_at[count + 1] = index, made
                    count += 1
        for k in range(first, made - (writes_at[anchor + 1] - writes_at[anchor])):
            live[makes[k]] = not ephemeral[makes[k]]
        while next_ < len(forgotten) and places_of[next_] == number:
            live[forgotten[next_]] = False
            next_ += 1
    return count, made


def _idle(
    reads_at: Any,
    reads: Any,
    operators: Any,
    makes_at: Any,
    makes: Any,
    start: Any,
    anchored: Any,
    now: Any,
) -> Any:
    """As `FastBackward.idle`."""
    last = np.where(start, -1, -2)
    place = 0
    for step in range(now):
        index = operators[step]
        for k in range(makes_at[step], makes_at[step + 1]):
            last[makes[k]] = place
        for k in range(reads_at[index], reads_at[index + 1]):
            if last[reads[k]] > -2:
                last[reads[k]] = place
        place += anchored[index]
    index, found = operators[now], np.full(len(start), -2)
    for k in range(reads_at[index], reads_at[index + 1]):
        last[reads[k]] = -2
    for k in range(makes_at[now], makes_at[now + 1]):
        last[makes[k]] = -2
    for step in range(now + 1, len(operators)):
        index = operators[step]
        for k in range(reads_at[index], reads_at[index + 1]):
            if last[reads[k]] > -2:
                found[reads[k]], last[reads[k]] = last[reads[k]], -2
        for k in range(makes_at[step], makes_at[step + 1]):
            last[makes[k]] = -2
    return found


def _needed(
    reads_at: Any,
    reads: Any,
    writes_at: Any,
    writes: Any,
    forward: Any,
    recomputable: Any,
    end: Any,
) -> Any:
    """Which operators of the forward run so that the values of `end` are there."""
    wanted, found = end.copy(), np.zeros(len(forward), np.bool_)
    for place in range(len(forward) - 1, -1, -1):
        index = forward[place]
        found[place] = not recomputable[index]
        for k in range(writes_at[index], writes_at[index + 1]):
            found[place] = found[place] or wanted[writes[k]]
        if found[place]:
            for k in range(reads_at[index], reads_at[index + 1]):
                wanted[reads[k]] = True
    return found


def _kept(
    reads_at: Any, reads: Any, operators: Any, makes_at: Any, makes: Any, start: Any, must_keep: Any
) -> Any:
    """The values of `start` that a step reads before one makes them, or that must be kept."""
    wanted, made = must_keep.copy(), np.zeros(len(start), np.bool_)
    for step, index in enumerate(operators):
        for k in range(reads_at[index], reads_at[index + 1]):
            wanted[reads[k]] |= not made[reads[k]]
        for k in range(makes_at[step], makes_at[step + 1]):
            made[makes[k]] = True
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
    count, last = len(operators), np.full(len(nbytes), -1, np.int64)  # the step that reads it last
    freed, dying = np.zeros(count, np.int64), np.zeros(len(makes) + len(nbytes), np.int64)
    dying_at, found = np.zeros(count + 1, np.int64), 0
    for value in range(len(nbytes)):
        if end[value]:
            last[value] = count
    for step in range(count - 1, -1, -1):
        index = operators[step]
        for k in range(makes_at[step], makes_at[step + 1]):
            if last[makes[k]] < 0:  # nobody reads it
                freed[step] += nbytes[makes[k]]
            last[makes[k]] = -1
        for k in range(reads_at[index], reads_at[index + 1]):
            if last[reads[k]] < 0:
                last[reads[k]], dying[found] = step, reads[k]
                freed[step] += nbytes[reads[k]]
                found += 1
        dying_at[step] = found  # those of later steps come first
    mine, during = owned.copy(), np.zeros(count, np.int64)
    live = nbytes[start].sum()
    for step in range(count):
        index, over = operators[step], False
        for k in range(dying_at[step + 1], dying_at[step]):
            value = dying[k]
            if mine[value] and makes_at[step + 1] > makes_at[step]:
                for place in range(reusable_at[index], reusable_at[index + 1]):
                    over = over or reusable[place] == value
            mine[value] = False
        during[step] = live + workspace[index]
        if not over:
            for k in range(writes_at[index], writes_at[index + 1]):
                during[step] += nbytes[writes[k]]
        live -= freed[step]
        for k in range(makes_at[step], makes_at[step + 1]):
            live += nbytes[makes[k]]
            mine[makes[k]] = True
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
