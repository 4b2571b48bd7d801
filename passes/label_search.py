"""What searches over labels share: backwards simulated in machine code, a limit, and the work left."""

from dataclasses import dataclass, replace

import numpy as np

from graphopt.cost_models.fast_schedule import FastBackward, Profile
from graphopt.cost_models.memory import Dataflow
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint_choice import step_of

REFUSED = 20_000  # as many steps is taken to be the simulation of one that does not fit after all


@dataclass(frozen=True)
class Found:
    """A choice, and its backward as simulated."""

    choice: Choice
    profile: Profile

    @property
    def seconds(self) -> float:
        """Of recomputation."""
        return self.profile.seconds


class LabelSearch:
    """Labels of one dataflow, simulated until `left` steps are; peaks leave static bytes out."""

    def __init__(self, flow: Dataflow, limit_bytes: int, order: tuple[int, ...]) -> None:
        self.flow, self.limit, self.left = flow, limit_bytes, 0
        self.order = np.array(order, np.int64)
        self.place_of = {anchor: place for place, anchor in enumerate(order)}
        self.fast = FastBackward(flow, (), (), flow.gradients, ())
        self._has_states = any(o.state is not None for o in flow.operators)

    def run(self, choice: Choice) -> Found:
        """The backward of `choice`."""
        pairs = [(self.place_of[a], v) for a, values in choice.forget for v in values]
        forget = np.array(sorted(pairs), np.int64).reshape(-1, 2).T
        profile = self.fast.run(choice.keep, choice.ephemeral, self.order, forget)
        self.left -= len(profile.operators)
        return Found(choice, profile)

    def fits(self, found: Found) -> bool:
        """Whether its backward does."""
        return found.profile.peak_bytes <= self.limit

    def accepted(self, found: Found) -> Found | None:
        """`found` without what is kept for nothing, if the whole step fits, too."""
        choice = replace(found.choice, keep=found.profile.kept)
        peak = self.fast.forward_peak(choice.keep)
        if peak <= self.limit and self._has_states:  # of generators, which take memory, too
            peak = step_of(self.flow, choice).peak_bytes
        if peak > self.limit:
            self.left -= REFUSED
            return None
        return replace(found, choice=choice)
