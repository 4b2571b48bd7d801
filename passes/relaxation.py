"""Recomputation that a choice does not need: values kept, or made once, where the peak allows it.

A search for the least peak, or one that ends a little below its budget, recomputes values that could stay
without anything rising above the limit. Here each is tried, the most expensive first.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from graphopt.cost_models.fast_schedule import FastBackward, Profile
from graphopt.cost_models.memory import Dataflow
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint_choice import pruned, step_of

WORK = 500_000  # steps of backwards that are simulated, at most
ROUNDS = 3


def relaxed(flow: Dataflow, choice: Choice, limit_bytes: int) -> Choice:
    """`choice` with less recomputation, its peak still at most `limit_bytes`, static bytes left out.

    A nested choice stays as it is.
    """
    if choice.forget:
        return choice
    fast = FastBackward(flow, (), (), flow.gradients, ())
    best, now = choice, fast.run(choice.keep, choice.ephemeral, choice.order)
    trials = WORK // max(1, len(now.operators))
    for _ in range(ROUNDS):
        before = now.seconds
        for value in _recomputed(flow, best, now):
            for trial in _moves(best, value):
                if trials == 0:
                    return best
                trials -= 1
                found = fast.run(trial.keep, trial.ephemeral, trial.order)
                if found.seconds < now.seconds and found.peak_bytes <= limit_bytes:
                    trial = pruned(flow, trial)
                    if step_of(flow, trial).peak_bytes <= limit_bytes:  # of the forward, too
                        best, now = trial, found
                        break
        if now.seconds == before:
            break
    return best


def _recomputed(flow: Dataflow, choice: Choice, profile: Profile) -> list[int]:
    """The values of the forward that are made again, those first that take the most time."""
    runs = Counter(profile.operators.tolist())
    seconds = {
        value: count * flow.operators[index].seconds
        for index, count in runs.items()
        if not flow.operators[index].backward
        for value in flow.operators[index].writes
        if value not in choice.keep
    }
    return sorted(seconds, key=lambda v: (-seconds[v], v))


def _moves(choice: Choice, value: int) -> Iterator[Choice]:
    """`value` kept; or, where it is made for each use, made once."""
    held = choice.ephemeral - {value}
    yield replace(choice, keep=choice.keep | {value}, ephemeral=held)
    if value in choice.ephemeral:
        yield replace(choice, ephemeral=held)
