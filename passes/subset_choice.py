"""The published chain solvers on a real graph: which of its states the forward keeps.

The graph is cut at its narrow places (`graphopt.passes.segments`). The chain has two states for each
span between them: what its backward reads of what it makes inside, and what crosses the cut after it.
These plans are there to be compared with; the search over the whole graph finds better ones.
"""

from collections.abc import Callable, Mapping

import numpy as np

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.cost_models.schedule import anchors
from graphopt.passes import published_solvers
from graphopt.passes.chain_solver import Choice
from graphopt.passes.local_problem import Placed, Surroundings, place
from graphopt.passes.published_solvers import Selection, StateChain
from graphopt.passes.segments import Spans, spans
from graphopt.passes.span_options import everything_kept

SOLVERS: Mapping[str, Callable[[StateChain], Selection]] = {
    "dp": published_solvers.dp,
    "linear": published_solvers.linear,
    "sqrt": published_solvers.sqrt,
    "periodic": published_solvers.periodic,
}


def subset_choice(flow: Dataflow, solver: str, budget_bytes: int | None = None) -> Choice:
    """The labels that `solver` leads to. Under a budget "linear" holds least; the others know none."""
    cut = spans(flow)
    world = Surroundings.of(flow, cut)
    placed = [place(world, k, k + 1) for k in range(len(cut))]
    chain = state_chain(flow, cut, placed)
    found = None
    if solver == "linear" and budget_bytes is not None:
        found = published_solvers.linear_within(chain, budget_bytes - flow.static_bytes)
    found = found or SOLVERS[solver](chain)
    last = max(found.checkpoints, default=0)
    kept = {*found.checkpoints, *range(last + 1, len(chain) + 1)}  # the last segment's states just stay
    keep = set(cut.pinned | _stuck(flow))
    for state in kept:
        span = state // 2
        keep |= cut.crossing[span] if state % 2 == 0 else _inside(placed[span])
    order = tuple(anchors(flow))
    return Choice(frozenset(keep), frozenset(), order, found.recompute_seconds, found.peak_bytes)


def state_chain(flow: Dataflow, cut: Spans, placed: list[Placed]) -> StateChain:
    """`flow` as a chain of the states 1 .. 2 k - 1 of its k spans.

    State 2 i + 1 is the inside of span i, state 2 i what crosses into span i.
    """
    plain = [everything_kept(p.problem) for p in placed]
    sizes, workspace, seconds = [], [], []
    for k, (option, where) in enumerate(zip(plain, placed, strict=True)):
        inside = sum(flow.values[v].nbytes for v in _inside(where))
        sizes += [sum(flow.values[v].nbytes for v in cut.crossing[k]), inside]
        workspace += [0, option.backward_bytes - option.kept_bytes + where.passing_bytes]
        forward = range(cut.cuts[k], cut.cuts[k + 1])
        seconds += [0.0, sum(flow.operators[i].seconds for i in forward)]
    return StateChain(
        np.array(sizes[1:], np.int64),
        workspace=np.array([*workspace[1:], 0], np.int64),
        seconds=np.array(seconds[1:]),
    )


def _inside(placed: Placed) -> frozenset[int]:
    """What the backward of the span reads of what the span makes, but for what crosses its end."""
    option = everything_kept(placed.problem)
    return frozenset(placed.values[v] for v in option.keep - placed.problem.must_keep)


def _stuck(flow: Dataflow) -> frozenset[int]:
    """What the forward makes and nothing can make again."""
    return frozenset(
        i
        for i, v in enumerate(flow.values)
        if v.producer != NO_PRODUCER
        and not flow.operators[v.producer].backward
        and not flow.operators[v.producer].recomputable
        and i in flow.operators[v.producer].writes
    )
