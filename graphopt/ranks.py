"""What the ranks of process groups have to agree on before they run a plan.

Every rank calls these functions at the same point, when it plans the same graph. Groups are asked one
after the other: what is passed on from group to group so reaches all ranks of a mesh. Where ranks
disagree, all of them raise the same error.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._dispatch.python import no_python_dispatcher
from torch.utils._python_dispatch import _disable_current_modes

from graphopt import ops
from graphopt.errors import PlanError
from graphopt.program import Program


@contextmanager
def outside_tracing() -> Iterator[None]:
    """Real tensors and collectives while a graph is being captured, which is when plans are made.

    The threads of a process group run operators, too. Under the dispatcher that tracing uses these would
    wait for the interpreter, which waits for them.
    """
    with _disable_current_modes(), no_python_dispatcher(), torch.no_grad():
        yield


def groups_of(program: Program) -> list[str]:
    """The names of the process groups that `program` uses, in the order it first does."""
    transfers = (ops.transfer_of(node) for node in program.operators())
    found = dict.fromkeys(t.group for t in transfers if t is not None and t.group is not None)
    for group in found:
        if not isinstance(group, str):
            raise PlanError(f"the process group {group} is not known by its name while planning")
    return list(found)


def is_real(group: str) -> bool:
    """True where the group has other ranks that can be asked; a group of the backend `fake` has none."""
    found = _resolved(group)
    return torch.distributed.get_backend(found) != "fake" and found.size() > 1


def size_of(group: str) -> int:
    """The number of ranks."""
    return int(_resolved(group).size())


def rank_of(group: str) -> int:
    """The place of this process among the ranks."""
    return int(_resolved(group).rank())


def check_same(groups: Sequence[str], rows: Sequence[str], what: str) -> None:
    """PlanError on every rank of each group where `rows` (lines of text) are not the same on all."""
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    for group in filter(is_real, groups):
        digests = _gathered(group, digest, what)
        if len(set(digests)) == 1:
            continue
        every = _gathered(group, list(rows), what)
        other = next(i for i, d in enumerate(digests) if d != digests[0])
        raise PlanError(f"{what} differ between ranks: {_difference(every[0], every[other], other)}")


def agree(groups: Sequence[str], rows: Sequence[str], what: str) -> bool:
    """True on every rank of the groups where `rows` (lines of text) are the same on all of them."""
    digest = hashlib.sha256("\n".join(rows).encode()).hexdigest()
    sets = [set(_gathered(group, digest, what)) for group in groups if is_real(group)]
    return not any(largest(groups, [any(len(digests) > 1 for digests in sets)], what))


def largest(groups: Sequence[str], numbers: Sequence[float], what: str) -> list[float]:
    """Of each number the largest on any rank of the groups; all ranks pass equally many."""
    found = list(numbers)
    for group in filter(is_real, groups):
        found = [max(column) for column in zip(*_gathered(group, found, what), strict=True)]
    return found


def _resolved(group: str) -> Any:
    c10d: Any = torch.distributed.distributed_c10d
    try:
        return c10d._resolve_process_group(group)
    except (RuntimeError, ValueError) as error:
        raise PlanError(f"there is no process group {group}: {error}") from error


def _gathered(group: str, value: Any, what: str) -> list[Any]:
    found = _resolved(group)
    every: list[Any] = [None] * found.size()
    try:
        with outside_tracing():
            torch.distributed.all_gather_object(every, value, group=found)
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PlanError(
            f"the ranks of group {group} could not compare {what}; one of them has stopped, or it runs "
            f"another graph: {reason}"
        ) from error
    return every


def _difference(first: Sequence[str], second: Sequence[str], rank: int) -> str:
    pairs = enumerate(zip(first, second, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
    here = first[place] if place < len(first) else "nothing"
    there = second[place] if place < len(second) else "nothing"
    return f"at place {place}, rank 0 of the group has {here}, rank {rank} has {there}"
