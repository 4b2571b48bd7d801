"""Plans drawn at random, carried out as any other plan is."""

import random
from dataclasses import dataclass
from typing import ClassVar

from graphopt.cost_models.costs import Costs
from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.schedule import anchors
from graphopt.passes.backward_order import Precedence
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint import Checkpoint, CheckpointPlan
from graphopt.passes.checkpoint_choice import everything, names_of, order_names, pruned, step_of
from graphopt.passes.forgetting import Forget, forget_names
from graphopt.program import Program


@dataclass(frozen=True)
class Drawn(Checkpoint):
    """Keeps each value with probability `keep`; of the rest `ephemeral` are made for each use.

    With `reorder` the backward runs in an order drawn at random. After each of its operators each value
    that can be made again is forgotten with probability `forget`.
    """

    name: ClassVar[str] = "drawn"

    seed: int = 0
    keep: float = 0.5
    ephemeral: float = 0.5
    reorder: bool = True
    forget: float = 0.0

    def plan(self, program: Program, costs: Costs) -> CheckpointPlan:
        flow = costs.dataflow(program)
        draw = random.Random(self.seed)
        values = forward_values(flow)
        keep = {v for v in values if draw.random() < self.keep} | stuck(flow)
        rest = [v for v in values if v not in keep]
        ephemeral = {v for v in rest if draw.random() < self.ephemeral}
        order = drawn_order(flow, draw) if self.reorder else tuple(anchors(flow))
        again = sorted(set(values) - stuck(flow))
        forget = tuple((a, tuple(v for v in again if draw.random() < self.forget)) for a in order)
        return plan_of(flow, keep, ephemeral, order, forget if self.forget else ())


def drawn_order(flow: Dataflow, draw: random.Random) -> tuple[int, ...]:
    """Any order of the backward in which every operator finds what it reads."""
    before = {a: set(sources) for a, sources in Precedence.of(flow).before.items()}
    order: list[int] = []
    while before:
        chosen = draw.choice([a for a, sources in before.items() if sources.isdisjoint(before)])
        del before[chosen]
        order.append(chosen)
    return tuple(order)


def forward_values(flow: Dataflow) -> list[int]:
    """Every value that the forward makes."""
    return [v for i in flow.forward for v in flow.operators[i].writes]


def stuck(flow: Dataflow) -> set[int]:
    """Values that no operator can make again."""
    return {
        v for i in flow.forward if not flow.operators[i].recomputable for v in flow.operators[i].writes
    }


def plan_of(
    flow: Dataflow,
    keep: set[int],
    ephemeral: set[int],
    order: tuple[int, ...] | None = None,
    forget: Forget = (),
) -> CheckpointPlan:
    """The plan with these labels (no value kept for nothing), its figures as simulated."""
    order = order or tuple(anchors(flow))
    choice = pruned(flow, Choice(frozenset(keep), frozenset(ephemeral), order, 0.0, 0, forget))
    memory = step_of(flow, choice)
    return CheckpointPlan(
        names_of(flow, choice.keep),
        names_of(flow, choice.ephemeral),
        order_names(flow, choice.order),
        None,
        flow.static_bytes + memory.peak_bytes,
        flow.static_bytes + step_of(flow, everything(flow)).peak_bytes,
        sum(o.seconds for o in flow.operators),
        memory.recompute_seconds,
        sum(o.flops for o in flow.operators),
        memory.recompute_flops,
        forget=forget_names(flow, choice.forget),
    )
