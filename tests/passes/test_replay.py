"""Whatever is kept and whatever is made again, a step computes the same bits."""

import pytest
import torch
from drawn_plans import Drawn, forward_values, plan_of, stuck
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arguments, run_joint, run_split, traced
from tiny_models import MODELS
from torch import fx

from graphopt import Checkpoint, PlanError, Program
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.memory import dataflow
from graphopt.cost_models.schedule import anchors
from graphopt.passes.chain_solver import Choice
from graphopt.passes.checkpoint_choice import step_of
from graphopt.passes.replay import RECOMPUTE_OF
from graphopt.split import is_backward, saved_nodes
from graphopt.verify import verify

CPU = get_device("cpu-generic")
# A batch norm that is run again leaves its new running statistics unmade.
REPLAYABLE = sorted(set(MODELS) - {"convolutions"})


def assert_equal(got: list, want: list) -> None:
    for a, b in zip(got, want, strict=True):
        assert a is b is None or torch.equal(a, b)


def recomputed(program: Program) -> list[fx.Node]:
    return [n for n in program.operators() if RECOMPUTE_OF in n.meta]


@settings(max_examples=60)
@given(
    st.sampled_from(REPLAYABLE),
    st.integers(0, 10**6),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.0, 0.1, 0.5]),
)
def test_random_plans_keep_every_bit(
    name: str, seed: int, keep: float, ephemeral: float, forget: float
) -> None:
    program, model, inputs = traced(name)
    values = arguments(program, model, inputs)
    pass_ = Drawn(seed=seed, keep=keep, ephemeral=ephemeral, forget=forget)
    plan = pass_.plan(program, Costs.of(program, CPU))
    planned = pass_.apply(program, plan)
    verify(planned, before=program)
    want = run_joint(program, values)
    assert_equal(run_joint(planned, values), want)
    assert_equal(run_split(planned, values), want)
    saved = [n for n in saved_nodes(planned) if n.op != "placeholder"]
    assert sum(not n.name.endswith("_generator") for n in saved) == len(plan.keep)


@pytest.mark.parametrize("ephemeral", [False, True])
@pytest.mark.parametrize("name", REPLAYABLE)
def test_keeping_nothing_makes_everything_again(name: str, ephemeral: bool) -> None:
    program, model, inputs = traced(name)
    values = arguments(program, model, inputs)
    flow = dataflow(program)
    rest = set(forward_values(flow)) - stuck(flow) if ephemeral else set()
    planned = Checkpoint().apply(program, plan_of(flow, stuck(flow), rest))
    assert recomputed(planned)
    assert_equal(run_split(planned, values), run_joint(program, values))


def test_a_batch_norm_is_made_again() -> None:
    program, model, inputs = traced("convolutions")
    values = arguments(program, model, inputs)
    flow = dataflow(program)
    planned = Checkpoint().apply(program, plan_of(flow, stuck(flow), set()))
    assert_equal(run_split(planned, values), run_joint(program, values))


@settings(max_examples=40)
@given(st.sampled_from(REPLAYABLE), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5]))
def test_the_rewritten_program_takes_the_memory_that_was_predicted(
    name: str, seed: int, forget: float
) -> None:
    program = traced(name)[0]
    costs = Costs.of(program, CPU)
    pass_ = Drawn(seed=seed, keep=0.4, ephemeral=0.4, forget=forget)
    plan = pass_.plan(program, costs)
    planned = pass_.apply(program, plan)
    after = Costs.of(planned, CPU).dataflow(planned)
    kept = {
        v for n in saved_nodes(planned) for v in after.value_of[n.name] if after.values[v].producer >= 0
    }
    again = step_of(after, Choice(frozenset(kept), frozenset(), tuple(anchors(after)), 0.0, 0))
    if not any(n.name.endswith("_generator") for n in planned.graph.nodes):
        assert after.static_bytes + again.peak_bytes == plan.peak_bytes


def test_the_order_is_the_order_of_execution_and_the_rest_is_untouched() -> None:
    program = traced("residual")[0]
    before = str(program.graph)
    planned = Drawn(seed=3, keep=0.3).apply(
        program, Drawn(seed=3, keep=0.3).plan(program, Costs.of(program, CPU))
    )
    assert str(program.graph) == before
    again = recomputed(planned)
    names = {n.name for n in program.graph.nodes}
    assert again and all(n.meta[RECOMPUTE_OF] in names and is_backward(n) for n in again)
    forward = [n.name for n in planned.operators() if not is_backward(n)]
    was = [n.name for n in program.operators() if not is_backward(n)]
    assert forward == [name for name in was if name in forward]  # what nobody reads is left out
    seen_backward = False
    for n in planned.operators():
        seen_backward |= is_backward(n)
        assert is_backward(n) == seen_backward


def test_each_recomputation_reads_what_is_at_hand() -> None:
    """A held value is made once; an ephemeral one for each of its uses."""
    program = traced("u-net")[0]
    flow = dataflow(program)
    values = set(forward_values(flow))
    once = Checkpoint().apply(program, plan_of(flow, set(), set()))
    often = Checkpoint().apply(program, plan_of(flow, set(), values))
    made_once = [n.meta[RECOMPUTE_OF] for n in recomputed(once)]
    operators = {o.name for o in flow.operators}
    counts = [made_once.count(name) for name in set(made_once) & operators]
    assert set(counts) == {1}
    assert len(recomputed(often)) > len(recomputed(once))


# --- randomness --------------------------------------------------------------------------------


def test_random_operators_draw_the_same_numbers_and_leave_the_generator_where_it_was() -> None:
    program, model, inputs = traced("dropouts")
    values = arguments(program, model, inputs)
    flow = dataflow(program)
    planned = Checkpoint().apply(program, plan_of(flow, set(), set()))
    random = [n for n in recomputed(planned) if "run_with_rng_state" in str(n.target)]
    assert len(random) == 4
    for seed in (1, 2):
        want = run_joint(program, values, seed)
        after_plain = torch.get_rng_state()
        assert_equal(run_split(planned, values, seed), want)
        assert torch.equal(torch.get_rng_state(), after_plain)
    assert not torch.equal(want[0], run_joint(program, values, 1)[0])


def test_states_are_saved_only_for_what_is_made_again() -> None:
    program = traced("dropouts")[0]
    flow = dataflow(program)
    everything = Checkpoint().apply(program, plan_of(flow, set(forward_values(flow)), set()))
    assert not any("rng_state" in str(n.target) for n in everything.operators())
    keep = {v for v in forward_values(flow) if not flow.values[v].label.startswith("bernoulli")}
    one = Checkpoint().apply(program, plan_of(flow, keep, set()))
    states = [n.name for n in saved_nodes(one) if n.name.endswith("_generator")]
    assert len(states) == 1 and states[0].startswith("bernoulli")


# --- what is refused ---------------------------------------------------------------------------


def test_a_plan_of_another_program_is_refused_by_name() -> None:
    program = traced("u-net")[0]
    plan = plan_of(dataflow(program), set(forward_values(dataflow(program))), set())
    other = traced("perceptron")[0]
    unknown = next(n for n in plan.keep if n not in {m.name for m in other.graph.nodes})
    with pytest.raises(PlanError, match=f"made for another program: it keeps '{unknown}'"):
        Checkpoint().apply(other, plan)


def test_what_cannot_be_made_again_must_be_kept() -> None:
    class Counter(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen.add_(1)
            return ((x * self.weight).exp() * self.seen).sum()

    import graphopt

    program = graphopt.trace(Counter(), torch.randn(3, 4))
    flow = dataflow(program)
    assert stuck(flow)
    Checkpoint().apply(program, plan_of(flow, stuck(flow), set()))
    with pytest.raises(PlanError, match="add cannot be recomputed and must be kept"):
        Checkpoint().apply(program, plan_of(flow, set(), set()))
