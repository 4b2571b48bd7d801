"""From a budget to a nested schedule of the chain, and where it is better than labels alone.

The chain's figures are sums over stages; the true peak is that of the simulated step. So the chain is
solved for a budget that is moved until the step just fits.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

from graphopt.cost_models.memory import Dataflow
from graphopt.errors import PlanError
from graphopt.passes.chain_solver import Chain, Choice
from graphopt.passes.checkpoint_choice import (
    ANYTHING,
    NARROW,
    PRICE,
    Search,
    choose,
    everything,
    fitting,
    pruned,
    step_of,
)
from graphopt.passes.nested_chain import NestedChain
from graphopt.passes.relaxation import relaxed
from graphopt.passes.rotor import Schedules, least_budget

TRIES = 8  # schedules that are simulated for one budget
AHEAD = 1.25  # the chain's budgets end at so much more than the step's: its sums may be too high
LEAST = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4)  # of the least budget: where the least true peak is looked for
BETWEEN = (0.0, 0.25, 0.5, 0.75)  # of the way from the chain's least peak to that of the labels
ENOUGH_STAGES = 8  # fewer gain too little from nesting for what the search takes


@dataclass(frozen=True)
class Nested:
    """The nested schedules of one dataflow. Peaks leave static bytes out, as those of a `Choice`."""

    flow: Dataflow
    chain: NestedChain

    @functools.cached_property
    def least(self) -> Choice:
        """The choice of the least true peak among schedules near the least budget of the chain."""
        low = least_budget(self.chain.chain)
        solved = Schedules.of(self.chain.chain, int(LEAST[-1] * low) + 1)
        found = [self.choice(solved, int(share * low)) for share in LEAST]
        return min((c for c in found if c is not None), key=lambda c: (c.peak_bytes, c.seconds))

    def within(self, limit_bytes: int) -> Choice | None:
        """The fastest choice found whose true peak is at most `limit_bytes`; None: there is none."""
        low, high = least_budget(self.chain.chain), int(AHEAD * limit_bytes)
        solved = Schedules.of(self.chain.chain, max(low, high))
        budget, fastest = max(low, min(limit_bytes, high)), None
        for number in range(TRIES):
            choice = self.choice(solved, budget)
            if choice is None:
                break
            if choice.peak_bytes <= limit_bytes:
                low = budget
                if fastest is None or choice.seconds < fastest.seconds:
                    fastest = choice
            else:
                high = budget
            if high - low <= NARROW * limit_bytes or (fastest is not None and fastest.seconds == 0):
                break
            budget += limit_bytes - choice.peak_bytes
            if number % 2 or not low < budget < high:
                budget = (low + high) // 2
        found = [c for c in (fastest, self.least) if c is not None and c.peak_bytes <= limit_bytes]
        return min(found, key=lambda c: c.seconds, default=None)

    def choice(self, solved: Schedules, budget_bytes: int) -> Choice | None:
        """What the fastest schedule within the chain's `budget_bytes` means, as simulated."""
        schedule = solved.within(budget_bytes)
        if schedule is None:
            return None
        choice = pruned(self.flow, self.chain.choice(schedule))
        step = step_of(self.flow, choice)
        return replace(choice, seconds=step.recompute_seconds, peak_bytes=step.peak_bytes)


def choose_nested(
    flow: Dataflow, least: bool, budget_bytes: int | None, search: Search = ANYTHING
) -> Choice:
    """The nested choice of least recomputation under the budget, or of least peak (`least`).

    Without either, what `choose` does: nothing heavy is repeated, so nothing can be nested.
    """
    if budget_bytes is None and not least:
        return choose(flow, least, budget_bytes, search)
    plain = everything(flow)
    if budget_bytes is not None and flow.static_bytes + step_of(flow, plain).peak_bytes <= budget_bytes:
        return plain
    nested = Nested(flow, NestedChain.of(flow, Chain.of(flow, search.freedom)))
    found = None if budget_bytes is None else nested.within(budget_bytes - flow.static_bytes)
    return found or fitting(flow, nested.least, budget_bytes)


def choose_best(
    flow: Dataflow,
    least: bool,
    budget_bytes: int | None,
    search: Search = ANYTHING,
    chain: Callable[[], Chain] | None = None,
) -> Choice:
    """What `choose` finds, or a nested choice where that misses the budget or is slower.

    For the least peak, a share of it must be worth its time, as for any value given up (`PRICE`).
    `chain`: what makes the chain of `flow` and the search's freedom.
    """
    spans = functools.cache(lambda: Chain.of(flow, search.freedom)) if chain is None else chain
    try:
        labels = choose(flow, least, budget_bytes, search, spans)
    except PlanError:
        if budget_bytes is None:
            raise
        return _at_most(flow, budget_bytes, search, spans)
    if budget_bytes is None and not least:
        return labels
    limit = step_of(flow, labels).peak_bytes
    if budget_bytes is not None and not search.leave_room:
        limit = budget_bytes - flow.static_bytes
    labels = relaxed(flow, labels, limit)
    step = step_of(flow, labels)
    labels = replace(labels, seconds=step.recompute_seconds, peak_bytes=step.peak_bytes)
    if not least and labels.seconds <= sum(flow.operators[i].seconds for i in flow.forward):
        return labels
    nested = _nested(flow, spans)
    if nested is None:
        return labels
    if least:
        return _lower(flow, nested, labels)
    found = nested.within(limit)
    return found if found is not None and found.seconds < labels.seconds else labels


def _at_most(flow: Dataflow, budget_bytes: int, search: Search, spans: Callable[[], Chain]) -> Choice:
    """A nested choice that fits, or the one of the least peak found; PlanError if that does not."""
    nested = _nested(flow, spans)
    found = None if nested is None else nested.within(budget_bytes - flow.static_bytes)
    if found is not None:
        return found
    least = choose_best(flow, True, None, search, spans)
    if nested is not None and nested.least.peak_bytes < least.peak_bytes:
        least = nested.least
    return fitting(flow, least, budget_bytes)


def _nested(flow: Dataflow, spans: Callable[[], Chain]) -> Nested | None:
    """The nested schedules of `flow`; None where it has too few stages for them to pay."""
    if len(spans().spans) < ENOUGH_STAGES:
        return None
    chain = NestedChain.of(flow, spans())
    return Nested(flow, chain) if len(chain) >= ENOUGH_STAGES else None


def _lower(flow: Dataflow, nested: Nested, labels: Choice) -> Choice:
    """The nested choice of the lowest peak below that of `labels` that is worth its time, or `labels`.

    What the chain's own figures say is not worth it is not simulated.
    """
    whole = sum(o.seconds for o in flow.operators)

    def is_worth(seconds: float, peak_bytes: int) -> bool:
        saved = (labels.peak_bytes - peak_bytes) / max(1, labels.peak_bytes)
        return saved >= 0 and seconds - labels.seconds <= PRICE * saved * whole

    chain = nested.chain.chain
    low = least_budget(chain)
    solved = Schedules.of(chain, max(low, labels.peak_bytes))
    once = sum(stage.forward_seconds for stage in chain.stages)
    for share in BETWEEN:
        limit = int((1 - share) * low + share * labels.peak_bytes)
        schedule = solved.within(limit)
        if schedule is None or not is_worth(schedule.seconds - once, limit):
            continue
        choice = nested.choice(solved, limit) if share else nested.least
        if choice is not None and is_worth(choice.seconds, choice.peak_bytes):
            return choice
    return labels
