"""Which way to stream a loss: each is put into the program, and the whole step is simulated."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import fx

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.streamed import is_streamed
from graphopt.errors import PlanError
from graphopt.passes.budget import Budget
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.passes.loss_builder import rows_of
from graphopt.passes.loss_rewrite import Streamed
from graphopt.passes.loss_values import Head
from graphopt.passes.loss_variants import VARIANTS, NotPossible, put
from graphopt.program import Program, bytes_behind

CLOSE = 1.25  # of the least bytes that a way of streaming needs for itself: what counts as close to it
SHARE = 0.04  # and of what the best saves of the peak: what another may save less
SLACK = 0.01  # and of that: what it may need more for itself
_LEAST_ROWS, _LEAST_COLUMNS = 32, 256


@dataclass(frozen=True)
class Candidate:
    """One way for all heads. `own_bytes` is what the streamed operators hold when they run.

    `peak_bytes` is of the whole step with everything else kept, `seconds` of its operators.
    """

    heads: tuple[tuple[str, str, int], ...]
    peak_bytes: int
    own_bytes: int
    seconds: float


def plain_candidate(program: Program, costs: Costs) -> Candidate:
    """The program as it is."""
    peak, seconds = _step(program, costs)
    return Candidate((), peak, peak, seconds)


def candidates(
    base: Streamed,
    costs: Costs,
    variant: str | None,
    block: int | None,
    drop: bool,
    in_place: bool,
) -> list[Candidate]:
    """Every variant in blocks of several sizes, or those asked for, where all heads can run so."""
    known = costs.with_nodes([n for n in base.program.operators() if n.name not in costs.nodes])
    found = []
    for name in VARIANTS if variant is None else (variant,):
        for size in _sizes(base, name) if block is None else (block,):
            program, heads = _copied(base)
            try:
                for head in heads:
                    put(program, head, name, _limited(head, name, size), drop, in_place)
            except NotPossible:
                break
            found.append(_candidate(program, heads, known, name, size))
    return found


def _limited(head: Head, variant: str, size: int) -> int:
    return max(1, min(size, rows_of(head) if variant == "tokens" else head.vocabulary))


def _sizes(base: Streamed, variant: str) -> Iterator[int]:
    """Powers of two up to all rows or columns."""
    tokens = variant == "tokens"
    size = _LEAST_ROWS if tokens else _LEAST_COLUMNS
    top = max(rows_of(h) if tokens else h.vocabulary for h in base.heads)
    while size < top:
        yield size
        size *= 2
    yield size


def _copied(base: Streamed) -> tuple[Program, list[Head]]:
    """A copy of the program, and the heads with their operators in the copy."""
    program = base.program.copy()
    nodes = {n.name: n for n in program.graph.nodes}

    def of(node: fx.Node | None) -> fx.Node | None:
        return None if node is None else nodes[node.name]

    heads = [replace(h, statistics=of(h.statistics), gradients=of(h.gradients)) for h in base.heads]
    return program, heads


def _candidate(
    program: Program, heads: Sequence[Head], costs: Costs, variant: str, size: int
) -> Candidate:
    new = [n for n in program.operators() if is_streamed(n) or n.name not in costs.nodes]
    mine = costs.with_nodes(new)
    peak, seconds = _step(program, mine)
    own = max(bytes_behind(n) + mine.workspace_bytes.get(n.name, 0) for n in new if is_streamed(n))
    names = tuple((h.linear.name, variant, _limited(h, variant, size)) for h in heads)
    return Candidate(names, peak, own, seconds)


def _step(program: Program, costs: Costs) -> tuple[int, float]:
    flow = costs.dataflow(program)
    peak = flow.static_bytes + step_of(flow, everything(flow)).peak_bytes
    return peak, sum(o.seconds for o in flow.operators)


def eligible(tried: Sequence[Candidate], memory: Budget, budget_bytes: int | None) -> Sequence[Candidate]:
    """The candidates that `StreamLoss` takes the fastest of; the first of `tried` is the plain way."""
    least = min(tried, key=lambda c: (c.peak_bytes, c.own_bytes, c.seconds))
    if budget_bytes is not None:
        fitting = [c for c in tried if c.peak_bytes <= budget_bytes]
        if not fitting:
            raise PlanError(
                f"no way to stream the loss keeps the step within {format_bytes(budget_bytes)}; the "
                f"smallest reachable peak is {format_bytes(least.peak_bytes)} "
                f"({least.peak_bytes} bytes), with everything else kept",
                reachable_bytes=least.peak_bytes,
            )
        return fitting
    if memory == "min":
        return [least]
    saved = tried[0].peak_bytes - least.peak_bytes
    close = [c for c in tried if c.peak_bytes <= least.peak_bytes + SHARE * saved]
    own = CLOSE * min(c.own_bytes for c in close) + SLACK * saved
    return [c for c in close if c.own_bytes <= own]


def best(tried: Sequence[Candidate], memory: Budget, budget_bytes: int | None) -> Candidate:
    """The fastest of those that are eligible."""
    return min(eligible(tried, memory, budget_bytes), key=lambda c: c.seconds)
