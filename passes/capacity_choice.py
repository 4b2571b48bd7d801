"""Into how many chunks all ranks cut the capacity of experts."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import fx

from graphopt import ops
from graphopt.cost_models.calls import TensorSpec, call_of, make
from graphopt.errors import PlanError
from graphopt.passes.capacity_split import CannotChunk, CapacityChunks, Region, runs
from graphopt.program import Program
from graphopt.ranks import agree, is_real, largest, outside_tracing

MOST_CHUNKS = 16


def degree(compute_s: float, transfer_s: float, overhead_s: float) -> int:
    """The number of chunks d of least time max(C, N) + min(C, N) / d + o (d - 1).

    C seconds of computing, N of transfers, and o more for every chunk. The derivative is zero where d is
    the square root of min(C, N) / o.

    >>> degree(9e-3, 4e-3, 1e-3)
    2
    """
    least = min(compute_s, transfer_s)
    if overhead_s * MOST_CHUNKS**2 <= least:
        return MOST_CHUNKS if least > 0 else 1
    return max(1, round(math.sqrt(least / overhead_s)))


def best_degree(program: Program, whole: Mapping[str, float], halves: Mapping[str, float]) -> int:
    """The degree by the seconds of all operators of `program`, and of it in two chunks."""
    cuts = CapacityChunks(program, 2).region.cuts
    computed = sum(whole.get(n.name, 0.0) for n in cuts if runs(n))
    sent = sum(whole.get(n.name, 0.0) for n in cuts if ops.transfer_of(n) is not None)
    capacity = min(cut.capacity for cut in cuts.values())
    return min(capacity, degree(computed, sent, sum(halves.values()) - sum(whole.values())))


def agreed_chunks(program: Program, chunks: int, groups: Sequence[str], *, exact: bool) -> CapacityChunks:
    """Cut `program` on all ranks of `groups` in the same way; raises CannotChunk on all of them.

    With `exact`, that is refused where an operator gives other bits on a chunk, on any rank; tried where
    the groups are real ones.
    """
    found, reason, names = None, "", list[str]()
    try:
        found = CapacityChunks(program, chunks)
        names = list(found.parts)
    except PlanError as error:
        reason = str(error)
    if not agree(groups, [reason, *names], "where to cut the capacity"):
        raise CannotChunk(reason or "other ranks cannot cut the capacity in the same way")
    if found is None:
        raise CannotChunk(reason)
    tried = exact and any(map(is_real, groups))
    other = _rounded_otherwise(found, chunks) if tried else None
    if any(largest(groups, [other is not None], "the bits of chunks")):
        raise CannotChunk(f"{other or 'an operator'} rounds otherwise on a chunk of the capacity")
    return found


def _rounded_otherwise(found: CapacityChunks, chunks: int) -> str | None:
    """The first operator whose chunks give other bits than the whole, tried on made-up numbers."""
    tried: set[str] = set()
    with outside_tracing():
        for node in found.region.cuts:
            call = call_of(node) if runs(node) else None
            if call is None or call.key in tried:
                continue
            tried.add(call.key)
            if not _same_bits(node, found.region, chunks):
                return node.name
    return None


def _same_bits(node: fx.Node, region: Region, chunks: int) -> bool:
    cut = region.cuts[node]
    values = {n: make(_spec(n.meta["val"])) for n in node.all_input_nodes}
    whole = _result(node, values)
    for chunk in range(chunks):
        mine = {
            n: region.cuts[n].select(v, chunk, chunks).contiguous() if n in region.cuts else v
            for n, v in values.items()
        }
        if not torch.equal(cut.select(whole, chunk, chunks), _result(node, mine)):
            return False
    return True


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)


def _result(node: fx.Node, values: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
    result: torch.Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result
