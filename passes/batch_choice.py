"""What all ranks cut along the batch: nothing that one of them cannot, or that rounds otherwise there."""

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.errors import PlanError
from graphopt.passes.batch_probe import rounded_otherwise
from graphopt.passes.batch_rules import Batch
from graphopt.passes.batch_split import Rows, batch_of, fitting, sequence_of
from graphopt.program import Program
from graphopt.ranks import agree, is_real, largest


class CannotSplit(PlanError):
    """Why the batch stays whole; the same on all ranks."""


@dataclass(frozen=True)
class Cut:
    """`program` with the operators `names` on parts of `batch`; those of `rounding` had to stay whole."""

    program: Program
    batch: Batch
    names: tuple[str, ...]
    rounding: tuple[str, ...]


def agreed_cut(program: Program, parts: int, groups: Sequence[str], along: str, *, exact: bool) -> Cut:
    """Cut `program` on all ranks of `groups` in the same way; raises CannotSplit on all of them.

    It is cut along the "batch" or the "sequence". With `exact`, operators that give other bits on a part,
    on any rank, stay whole. That is tried where the groups are real ones, whose ranks run what they
    capture.
    """
    find = batch_of if along == "batch" else sequence_of
    left: set[str] = set()
    while True:
        try:
            rows, reason = Rows.of(program, find(program, parts)), ""
            found, names = fitting(program, rows, left)
        except PlanError as error:
            reason, names = str(error), ()
        if not agree(groups, [reason, *names, "" if reason else repr(rows.batch)], "where to split"):
            raise CannotSplit(reason or "other ranks cannot split it in the same way")
        if reason:
            raise CannotSplit(reason)
        rules = {n: rule for n, rule in rows.rules.items() if n.name in names}
        tried = exact and any(map(is_real, groups))
        other = set(rounded_otherwise(rules, found.parts, rows.batch)) if tried else set()
        flags = largest(groups, [name in other for name in names], "the bits of parts")
        if not any(flags):
            return Cut(found.program, rows.batch, names, tuple(sorted(left)))
        left |= {name for name, flag in zip(names, flags, strict=True) if flag}
