"""A lower bound of the seconds that any plan under a memory budget spends on recomputation.

An integer programme in the manner of Jain et al., "Checkmate: Breaking the Memory Wall with Optimal
Tensor Rematerialization", 2020 (MLSys): what is held into each stage of the backward, and what is run
again in it. A stage is an anchored operator, or a few (`graphopt.passes.ilp_reduction`). Unlike there,
nothing is assumed about the order within a stage, so the rows on memory hold for every schedule that
runs the anchors in the given order: they count what is surely alive while an anchor, a repeated
operator or an operator of the forward runs. The price is that the optimum of the programme is a
bound, and a schedule that reaches it need not exist.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.schedule import forward_steps
from graphopt.passes.ilp_reduction import Reduced, on_demand, reduced

IGNORED_SHARE = 0.001  # of the budget above static bytes: what values without memory take together
MAX_VARIABLES = 20_000
SLACK = 1e-6  # of the bound: room for the solver's tolerances


@dataclass(frozen=True)
class Bound:
    """At least `seconds` of recomputation, infinite where no plan fits.

    `closed`: the programme was solved, so that more time would not raise the bound. `gap` is what the
    solver left open, relative to the best solution it found, 1 where it found none. `status` is
    "optimal", "infeasible" or "time limit"; `variables` the number of columns.

    `keep` and `repeated` describe that solution, for a search to start from: forward values held where
    the backward begins, and values made in several stages. As labels they may be over the budget.
    """

    seconds: float
    closed: bool
    gap: float
    status: str
    variables: int
    keep: frozenset[int] = frozenset()
    repeated: frozenset[int] = frozenset()


def gap(plan_seconds: float, bound: Bound) -> float:
    """How much of a plan's recomputed seconds a better plan could save at most, from 0 to 1.

    >>> gap(2.0, Bound(1.5, True, 0.0, "optimal", 10))
    0.25
    """
    return max(0.0, 1 - bound.seconds / plan_seconds) if plan_seconds > 0 else 0.0


def recompute_lower_bound(
    flow: Dataflow,
    order: Sequence[int],
    budget_bytes: int,
    time_limit_s: float,
    max_variables: int = MAX_VARIABLES,
) -> Bound:
    """A lower bound for every schedule whose peak, static bytes included, is at most `budget_bytes`.

    The anchors run in `order` (see `graphopt.cost_models.schedule.anchors`), and any other operator any
    number of times before each. Seconds are those of `step_of`: all repetitions of forward operators, and
    those of backward operators from the second run on. Solved by HiGHS in at most `time_limit_s` seconds;
    more than `max_variables` decisions are avoided at the price of a lower bound.
    """
    limit = budget_bytes - flow.static_bytes
    problem = reduced(flow, order, int(IGNORED_SHARE * max(limit, 0)), max_variables)
    rows = _Rows(problem, max(limit, 1))
    possible = limit >= 0 and all(
        add(flow, problem, rows) for add in (_forward_rows, _anchor_rows, _repeat_rows)
    )
    if not possible:
        return Bound(math.inf, True, 0.0, "infeasible", rows.count)
    _demand_rows(problem, rows)
    return _solved(flow, problem, rows, time_limit_s)


# --- the programme -----------------------------------------------------------------------------


@dataclass
class _Rows:
    """Rows `coefficients . x <= bound`; memory rows are in parts of the budget.

    Columns: `held[i, s]`, item i is alive where stage s begins; `run[k, s]`, task k runs in it;
    `through[i, s]`, item i is alive all through it, between 0 and 1.
    """

    problem: Reduced
    limit: int
    held: dict[tuple[int, int], int] = field(default_factory=dict)
    run: dict[tuple[int, int], int] = field(default_factory=dict)
    through: dict[tuple[int, int], int] = field(default_factory=dict)
    continuous: list[int] = field(default_factory=list)
    count: int = 0
    entries: list[tuple[int, int, float]] = field(default_factory=list)
    bounds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, item in enumerate(self.problem.items):
            for stage in range(int(item.late), item.last + 1):
                self.held[number, stage] = self._new()
        for number, task in enumerate(self.problem.tasks):
            if task.recomputable:
                for stage in range(1 + max(self.problem.items[w].last for w in task.writes)):
                    self.run[number, stage] = self._new()

    def _new(self) -> int:
        self.count += 1
        return self.count - 1

    def add(self, row: Sequence[tuple[int | None, float]], bound: float) -> None:
        """One row; a column that does not exist is zero."""
        self.entries += [(len(self.bounds), c, x) for c, x in row if c is not None]
        self.bounds.append(bound)

    def memory(self, row: Sequence[tuple[int | None, float]], nbytes: int) -> bool:
        """A row on bytes beside `nbytes` that are surely alive; False where those alone are too many."""
        most = nbytes + sum(x for c, x in row if c is not None and x > 0)
        if most > self.limit:
            self.add([(c, x / self.limit) for c, x in row], (self.limit - nbytes) / self.limit)
        return nbytes <= self.limit

    def sum_of(self, row: Sequence[tuple[int | None, float]]) -> int:
        """A new column, at least the sum of `row` in parts of the budget; it is at most 1."""
        column = self._new()
        self.continuous.append(column)
        self.add([*((c, x / self.limit) for c, x in row), (column, -1)], 0)
        return column

    def can_stay(self, item: int, stage: int) -> bool:
        """True where `item` may be alive all through `stage`."""
        is_needed = (item, stage + 1) in self.held or item in self.problem.stages[stage].reads[-1]
        return (item, stage) in self.held and is_needed

    def stays(self, item: int, stage: int) -> int | None:
        """The column of `item` alive all through `stage`: there before, needed at its end, not remade."""
        key = (item, stage)
        if not self.can_stay(item, stage):
            return None
        before, after = self.held[key], self.held.get((item, stage + 1))
        if key not in self.through:
            again = self.run.get((self.problem.items[item].task, stage))
            column = self.through[key] = self._new()
            self.continuous.append(column)
            if item in self.problem.stages[stage].reads[-1]:
                self.add([(before, 1), (again, -1), (column, -1)], 0)
            else:
                self.add([(before, 1), (after, 1), (again, -1), (column, -1)], 1)
        return self.through[key]


def _demand_rows(problem: Reduced, rows: _Rows) -> None:
    """What is read is held or made in the stage; what is held was held before or made."""
    for number, item in enumerate(problem.items):
        for stage in range(int(item.late), item.last + 1):
            if stage:
                before = rows.held.get((number, stage - 1))
                made = rows.run.get((item.task, stage - 1))
                rows.add([(rows.held[number, stage], 1), (before, -1), (made, -1)], 0)
    for stage, anchored in enumerate(problem.stages):
        for number in anchored.all_reads():
            made = rows.run.get((problem.items[number].task, stage))
            rows.add([(rows.held.get((number, stage)), -1), (made, -1)], -1)
    for (task, stage), column in rows.run.items():
        for number in problem.tasks[task].reads:
            made = rows.run.get((problem.items[number].task, stage))
            rows.add([(column, 1), (rows.held.get((number, stage)), -1), (made, -1)], 0)


def _anchor_rows(flow: Dataflow, problem: Reduced, rows: _Rows) -> bool:
    """While an anchor runs: its operands and results, other gradients, and what is held beyond it."""
    lives = _lives(flow, problem.order)
    gradients = _gradients(flow, lives, len(problem.order))
    for number, stage in enumerate(problem.stages):
        for place, reads in zip(stage.places, stage.reads, strict=True):
            operator = flow.operators[problem.order[place]]
            nbytes = gradients[place] + operator.workspace_bytes
            nbytes += sum(flow.values[v].nbytes for v in operator.reads if on_demand(flow, v))
            if not _writes_over(flow, lives, problem.order[place], place):
                nbytes += sum(flow.values[v].nbytes for v in operator.writes)
            row = []
            for i, item in enumerate(problem.items):
                if i not in reads and item.last >= number:
                    is_last = place == stage.places[-1]
                    column = rows.held.get((i, number + 1)) if is_last else None
                    row.append((column if is_last else rows.stays(i, number), item.nbytes))
            if not rows.memory(row, nbytes):
                return False
    return True


def _gradients(flow: Dataflow, lives: Mapping[int, tuple[int, int]], count: int) -> list[int]:
    """Bytes of anchors' results that are alive before each of the `count` anchors."""
    change = [0] * (count + 2)
    for value, (born, died) in lives.items():
        change[born + 1] += flow.values[value].nbytes
        change[died + 1] -= flow.values[value].nbytes
    return list(np.cumsum(change))[:count]


def _lives(flow: Dataflow, order: Sequence[int]) -> dict[int, tuple[int, int]]:
    """For what anchors make: the place of the one that makes it, and of the last that needs it."""
    found: dict[int, tuple[int, int]] = {}
    for place, anchor in enumerate(order):
        for value in flow.operators[anchor].reads:
            if value in found:
                found[value] = (found[value][0], place)
        found.update({v: (place, place) for v in flow.operators[anchor].writes})
    end = len(order)
    return {v: (b, end if v in flow.gradients else d) for v, (b, d) in found.items()}


def _writes_over(flow: Dataflow, lives: Mapping[int, tuple[int, int]], anchor: int, place: int) -> bool:
    """True where the anchor may write its result over an operand."""
    operator = flow.operators[anchor]
    dies = (on_demand(flow, v) or (v in lives and lives[v][1] == place) for v in operator.reusable)
    return len(operator.writes) == 1 and any(dies)


def _repeat_rows(flow: Dataflow, problem: Reduced, rows: _Rows) -> bool:
    """While a repeated operator runs: its operands and results, and what stays all through the stage."""
    lives = _lives(flow, problem.order)
    for number, stage in enumerate(problem.stages):
        first, end = stage.places[0], stage.places[-1]
        passing = sum(
            flow.values[v].nbytes for v, (born, died) in lives.items() if born < first and died >= end
        )
        sizes = {i: n.nbytes for i, n in enumerate(problem.items) if rows.can_stay(i, number)}
        together: int | None = None
        for k, task in enumerate(problem.tasks):
            column = rows.run.get((k, number))
            touched = {*task.reads, *task.writes} & sizes.keys()
            most = sum(sizes.values()) - sum(sizes[i] for i in touched)
            if column is None or passing + most + task.running_bytes <= rows.limit:
                continue
            if together is None:
                together = rows.sum_of([(rows.stays(i, number), x) for i, x in sizes.items()])
            row: list[tuple[int | None, float]] = [
                (together, 1),
                (column, task.running_bytes / rows.limit),
            ]
            row += [(rows.stays(i, number), -sizes[i] / rows.limit) for i in touched]
            rows.add(row, (rows.limit - passing) / rows.limit)
    return True


def _forward_rows(flow: Dataflow, problem: Reduced, rows: _Rows) -> bool:
    """While an operator of the forward runs that runs in every plan; and where the forward ends."""
    run = [s.operator for s in forward_steps(flow, ())]
    last = {v: i for i in run for v in flow.operators[i].reads}
    last.update(dict.fromkeys(flow.outputs, len(flow.operators)))
    made: list[int] = []
    for index in [*run, len(flow.forward)]:
        alive = {v for v in made if last.get(v, -1) > index}
        nbytes = 0
        if index < len(flow.forward):
            operator = flow.operators[index]
            reads = {v for v in operator.reads if on_demand(flow, v)}
            alive |= {*reads, *operator.writes}
            if len(operator.writes) == 1 and operator.reusable:
                nbytes -= sum(flow.values[v].nbytes for v in operator.writes)
            nbytes += operator.workspace_bytes
            made += operator.writes
        nbytes += sum(flow.values[v].nbytes for v in alive)
        kept = _kept_before(flow, problem, index, alive)
        if not rows.memory([(rows.held.get((i, 0)), problem.items[i].nbytes) for i in kept], nbytes):
            return False
    return True


def _kept_before(flow: Dataflow, problem: Reduced, index: int, alive: Collection[int]) -> list[int]:
    """The items made before operator `index`, without those that are alive anyway."""
    return [
        i
        for i, item in enumerate(problem.items)
        if flow.values[item.value].producer < index and item.value not in alive
    ]


# --- its solution ------------------------------------------------------------------------------


def _solved(flow: Dataflow, problem: Reduced, rows: _Rows, time_limit_s: float) -> Bound:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    if not rows.count:
        return Bound(0.0, True, 0.0, "optimal", 0)
    cost = np.zeros(rows.count)
    for (number, _), column in rows.run.items():
        cost[column] = problem.tasks[number].seconds
    first = sum(t.seconds for t in problem.tasks if t.once)
    scale = float(cost.max()) or 1.0
    integral = np.ones(rows.count)
    integral[rows.continuous] = 0
    constraints: list[Any] = []
    if rows.bounds:
        row, columns, values = zip(*rows.entries, strict=True)
        matrix = coo_array((values, (row, columns)), shape=(len(rows.bounds), rows.count)).tocsr()
        constraints = [LinearConstraint(matrix, -np.inf, np.array(rows.bounds))]
    limits = {"time_limit": time_limit_s, "mip_rel_gap": 1e-4}
    box = Bounds(0, 1)
    found = milp(cost / scale, constraints=constraints, integrality=integral, bounds=box, options=limits)
    if found.status == 2:
        return Bound(math.inf, True, 0.0, "infeasible", rows.count)
    dual = found.mip_dual_bound
    at_least = 0.0 if dual is None or not math.isfinite(dual) else scale * dual - first
    closed = found.status == 0
    best = math.inf if found.fun is None else scale * found.fun - first
    left = 0.0 if closed or best <= at_least else 1 - at_least / best
    seconds = max(0.0, at_least - SLACK * (abs(at_least) + first))
    labels = (frozenset[int](), frozenset[int]()) if found.x is None else _labels(flow, rows, found.x)
    status = "optimal" if closed else "time limit"
    return Bound(seconds, closed, left, status, rows.count, *labels)


def _labels(flow: Dataflow, rows: _Rows, x: np.ndarray) -> tuple[frozenset[int], frozenset[int]]:
    """`keep` and `repeated` of a solution."""
    items, tasks = rows.problem.items, rows.problem.tasks
    ignored = {v for v in rows.problem.ignored if not flow.operators[flow.values[v].producer].backward}
    keep = {items[i].value for (i, stage), column in rows.held.items() if not stage and x[column] > 0.5}
    runs = Counter(task for (task, _), column in rows.run.items() if x[column] > 0.5)
    again = {items[w].value for k, count in runs.items() if count > 1 for w in tasks[k].writes}
    return frozenset(keep | ignored), frozenset(again - keep)
