"""Buffer planning: the tensors of a step at fixed places in one block of memory, which is there already.

A tensor that a step makes and frees costs more than its allocation. The C library maps every block above
32 MiB afresh (mallopt(3), M_MMAP_THRESHOLD), so that the kernel clears its pages, one fault for each,
when they are first written: that takes as long as several passes over the data. Here the lifetimes of all
tensors of a step are known, those that the forward saves for the backward among them, and they are packed
into one block that is kept between steps. After Pisarchyk and Lee, "Efficient Memory Management for Deep
Neural Net Inference", 2020; the packing is in `arena_packing`, what is left out of it in `arena_choice`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from graphopt.arena_facts import ALIGNMENT, SPOTS, Block, Spot
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.memory import Dataflow, in_arena
from graphopt.errors import PlanError, VerifyError
from graphopt.lower_arena import Placement, check_apart
from graphopt.passes.arena_choice import Candidates, choose
from graphopt.passes.arena_lifetimes import Named, Temporary, device_of, temporaries_of
from graphopt.passes.arena_packing import Interval, Packing, alive_bytes
from graphopt.passes.base import Pass
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.plan import Plan
from graphopt.program import Program, leaves, storages_of

LEAST_BYTES = 256 * 1024  # a smaller block comes from memory that the C library has, and costs no faults
SLACK = 1000  # where there is no budget, the peak may rise by its share of one in so many
_SHOWN = 5  # reasons in a report


@dataclass(frozen=True)
class ArenaPlan(Plan):
    """Where tensors lie in a block of `nbytes`: for each its node, its number there, its size and offset.

    An operator that writes over its operand needs no row: its result lies where the operand does.
    `least_bytes` are the most bytes of the placed tensors that are needed at once. `left_out` has the
    other tensors of `min_bytes` or more, with their sizes and the reason. Peaks are bytes of the whole
    step, parameters and inputs included, and the block all the time where it is kept.
    """

    placed: tuple[tuple[str, int, int, int], ...]
    nbytes: int
    least_bytes: int
    keep: bool
    left_out: tuple[tuple[str, int, str], ...]
    peak_bytes: int
    baseline_bytes: int
    budget_bytes: int | None = None

    @property
    def placed_bytes(self) -> int:
        """The bytes that a step would allocate for the tensors in the arena, one behind the other."""
        return sum(nbytes for _, _, nbytes, _ in self.placed)

    def __str__(self) -> str:
        if not self.placed:
            return "nothing lies in an arena"
        kept = "kept between steps" if self.keep else "freed after its last use"
        return (
            f"{len(self.placed)} tensors of {format_bytes(self.placed_bytes)} in an arena of "
            f"{format_bytes(self.nbytes)}, {kept}: peak {format_bytes(self.peak_bytes)} instead of "
            f"{format_bytes(self.baseline_bytes)}"
        )

    def table(self) -> str:
        """For which reasons how much is left out."""
        reasons: dict[str, list[int]] = {}
        for _, nbytes, why in self.left_out:
            reasons.setdefault(why, []).append(nbytes)
        order = sorted(reasons.items(), key=lambda item: -sum(item[1]))[:_SHOWN]
        return "\n".join(
            f"left out: {len(sizes)} tensors of {format_bytes(sum(sizes))}: {why}" for why, sizes in order
        )


@dataclass(frozen=True)
class Arena(Pass):
    """Let tensors of a step lie at planned places of one block, instead of allocating each.

    Put it last. The results have the same bits. With `keep` the block stays between steps, which is what
    saves page faults. The peak of the step, with the block, stays within the budget of a pass before it,
    such as `Checkpoint(memory=...)`; without one it rises by a thousandth at most. `memory` (in the forms
    of `Checkpoint`'s) allows more than that. Tensors of less than `min_bytes` are allocated as before,
    and so is what the step returns. A second call while the first one's tensors are needed takes a block
    of its own.
    """

    name: ClassVar[str] = "arena"

    keep: bool = True
    memory: Budget = None
    min_bytes: int = LEAST_BYTES

    def __post_init__(self) -> None:
        check_budget(self.memory)
        if not isinstance(self.keep, bool):
            raise PlanError(f"keep={self.keep!r} is neither True nor False")
        if not isinstance(self.min_bytes, int) or self.min_bytes < 1:
            raise PlanError(f"min_bytes={self.min_bytes!r} is not a number of bytes")

    def plan(self, program: Program, costs: Costs) -> ArenaPlan:
        """Which tensors lie where; PlanError where Inductor runs the program."""
        if costs.fused:
            raise PlanError('arena plans the buffers of eager order; compiler="inductor" plans its own')
        flow, every = costs.dataflow(program), temporaries_of(program)
        device = device_of(every)
        able = [t for t in every if _reason(t, device) is None and t.nbytes >= self.min_bytes]
        others = [t for t in every if t not in able]
        candidates = Candidates(_intervals(able), _intervals(others))
        choice = everything(flow) if self.keep else None  # else the block is a value that may be saved

        def peak_of(packing: Packing | None) -> int:
            now = flow if packing is None else _flow_in_arena(flow, able, packing, self.keep)
            return now.static_bytes + step_of(now, choice or everything(now)).peak_bytes

        before = peak_of(None)
        budget = resolve_budget(self.memory, before)
        usual = before + before // SLACK if costs.limit_bytes is None else costs.limit_bytes
        packing, peak = choose(candidates, peak_of, before, max(before, usual, budget or 0))
        pairs = [*zip(able, packing.offsets, strict=True)]
        inside = [(t, offset) for t, offset in pairs if offset is not None]
        left = [(t.name[0], t.nbytes, "the peak would rise") for t, offset in pairs if offset is None]
        left += [
            (t.name[0], t.nbytes, why)
            for t in others
            if t.nbytes >= self.min_bytes and (why := _reason(t, device))
        ]
        return ArenaPlan(
            tuple((*t.name, t.nbytes, offset) for t, offset in inside),
            packing.nbytes,
            alive_bytes(_intervals([t for t, _ in inside])),
            self.keep,
            tuple(left),
            peak,
            before,
            budget,
        )

    def apply(self, program: Program, plan: ArenaPlan) -> Program:
        """The program with a spot for each tensor of the plan; PlanError for one that cannot have it."""
        result = program.copy()
        found = list(_placed(temporaries_of(program), plan))
        rows = (Placement(t.name[0], offset, t.nbytes, t.first, t.last) for t, offset in found)
        try:
            check_apart(rows, plan.nbytes)
        except VerifyError as error:
            raise PlanError(f"not an arena of this program: {error}") from None
        block = Block(plan.nbytes, plan.keep)
        spots = {member: Spot(block, offset) for t, offset in found for member in t.members}
        _write_spots(result, spots)
        return result


def _reason(t: Temporary, device: object) -> str | None:
    return "it is on another device" if t.reason is None and t.device != device else t.reason


def _intervals(temporaries: list[Temporary]) -> tuple[Interval, ...]:
    return tuple(Interval(t.nbytes, t.first, t.last) for t in temporaries)


def _flow_in_arena(flow: Dataflow, able: list[Temporary], packing: Packing, keep: bool) -> Dataflow:
    """`flow` with what has an offset in `packing` in a block."""
    members = {
        member
        for t, offset in zip(able, packing.offsets, strict=True)
        if offset is not None
        for member in t.members
    }
    values = {flow.value_of[name][number] for name, number in members}
    return in_arena(flow, Block(packing.nbytes, keep) if values else None, values)


def _placed(temporaries: list[Temporary], plan: ArenaPlan) -> Iterator[tuple[Temporary, int]]:
    """What `plan` places, and where; PlanError names a tensor that cannot lie there."""
    known, device = {t.name: t for t in temporaries}, device_of(temporaries)
    for node, number, nbytes, offset in plan.placed:
        found = known.get((node, number))
        if found is None:
            raise PlanError(f"{node!r} allocates no tensor {number} in this program")
        if (why := _reason(found, device)) is not None:
            raise PlanError(f"{node!r} cannot lie in an arena: {why}")
        if nbytes != found.nbytes or offset < 0 or offset % ALIGNMENT:
            raise PlanError(
                f"{node!r} has {found.nbytes} bytes, and its place is {nbytes} bytes at {offset}; places "
                f"begin at multiples of {ALIGNMENT}"
            )
        yield found, offset


def _write_spots(program: Program, spots: dict[Named, Spot]) -> None:
    """Note in every node whose tensors lie in the arena where, views included."""
    storages = storages_of(program.graph)
    for node, behind in storages.items():
        own = tuple(spots.get((maker.name, number)) for maker, number in behind)
        if any(own):
            assert len(own) == len(leaves(node))
            node.meta[SPOTS] = own
