"""Nested schedules of whole graphs: against brute force, their memory as simulated, and as measured."""

import copy
import itertools
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from drawn_plans import forward_values
from eager_steps import assert_same, records, step
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arguments, run_joint, run_split, traced
from random_flows import FlowBuilder, blocks, brute_force, naive_step, training_flows
from texts import program_text
from torch import nn

import graphopt
from graphopt import Checkpoint, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.schedule import anchors
from graphopt.passes.chain_solver import Chain, Choice
from graphopt.passes.checkpoint import CheckpointPlan
from graphopt.passes.checkpoint_choice import check_choice, choose, everything, step_of
from graphopt.passes.nested_chain import NestedChain
from graphopt.passes.nested_choice import choose_best, choose_nested
from graphopt.passes.relaxation import relaxed
from graphopt.passes.replay import RECOMPUTE_OF
from graphopt.passes.rotor import least_budget
from graphopt.split import saved_nodes
from graphopt.verify import verify

CPU = get_device("cpu-generic")
WIDTH, ROWS = 16, 2048


class Deep(nn.Module):
    """Residual blocks that are wider inside than where they meet."""

    def __init__(self, depth: int, dropout: float = 0.0, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(depth))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(depth))
        self.dropout = dropout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            inner = F.dropout(F.gelu(up(x)), self.dropout, self.training and self.dropout > 0)
            x = x + torch.tanh(down(inner))
        return x.square().mean()


def naive(flow: Dataflow, choice: Choice) -> tuple[int, float]:
    return naive_step(flow, choice.keep, choice.ephemeral, choice.order, choice.forget)


# --- against brute force -----------------------------------------------------------------------


def every_way_to_forget(flow: Dataflow, count: int) -> Iterator[tuple[int, float]]:
    """Peak and seconds of `blocks(count)` for any borders kept, and any forgotten after any block."""
    borders = [3 * k + 3 for k in range(count - 1)]  # the value that a block leaves to the next
    inside = set(forward_values(flow)) - set(borders)
    order = anchors(flow)
    last = [order[3 * k + 2] for k in range(count)]  # of each block, from the last one on

    def subsets(values: list[int]) -> list[tuple[int, ...]]:
        return [s for n in range(len(values) + 1) for s in itertools.combinations(values, n)]

    phases = [subsets(borders[: count - 1 - k]) for k in range(count - 1)]
    for keep, *given_up in itertools.product(subsets(borders), *phases):
        if all(set(keep).isdisjoint(g) for g in given_up):
            within = [v for v in inside if v < borders[-1]]
            forget = [(a, (*g, *within)) for a, g in zip(last, given_up, strict=False)]
            yield naive_step(flow, keep, (), order, forget)


def test_no_schedule_of_a_uniform_chain_is_lower_or_faster() -> None:
    flow = blocks(4)
    found = list(every_way_to_forget(flow, 4))
    least = choose_nested(flow, True, None)
    assert naive(flow, least)[0] <= min(peak for peak, _ in found)
    for limit in sorted({peak for peak, _ in found}):
        choice = choose_nested(flow, False, limit + flow.static_bytes)
        peak, seconds = naive(flow, choice)
        assert peak <= limit
        assert seconds <= min(s for p, s in found if p <= limit) + 1e-9


def test_few_blocks_lose_little_to_all_labels() -> None:
    """A stage's input stays while its backward runs; labels may recompute it for each use instead."""
    flow = blocks(3)
    front = list(brute_force(flow, labels=2))
    least = min(peak for peak, _ in front)
    assert naive(flow, choose_nested(flow, True, None))[0] <= least
    for limit in sorted({peak for peak, _ in front})[::3]:
        choice = choose_nested(flow, False, limit + flow.static_bytes)
        best = min(s for p, s in front if p <= limit)
        assert naive(flow, choice)[1] <= best + 0.1 * sum(o.seconds for o in flow.operators)


SMALL = st.one_of(training_flows(operators=8), training_flows(operators=9, chain=True))


@settings(max_examples=50)
@given(SMALL, st.floats(0, 1))
def test_any_graph_is_planned_as_it_is_simulated(flow: Dataflow, share: float) -> None:
    least = choose_nested(flow, True, None)
    plain = step_of(flow, everything(flow)).peak_bytes
    check_choice(flow, least.keep)
    peak, seconds = naive(flow, least)
    assert step_of(flow, least).peak_bytes == peak
    assert step_of(flow, least).recompute_seconds == pytest.approx(seconds)
    limit = int(peak + share * (plain - peak))
    choice = choose_nested(flow, False, limit + flow.static_bytes)
    assert naive(flow, choice)[0] <= limit
    with pytest.raises(PlanError, match="no plan keeps the step within") as caught:
        choose_nested(flow, False, peak + flow.static_bytes - 1)
    assert caught.value.reachable_bytes == peak + flow.static_bytes


def test_the_chain_of_equal_blocks_knows_its_peak() -> None:
    flow = blocks(24)
    chain = NestedChain.of(flow, Chain.of(flow))
    assert len(chain) == 24 and not chain.always
    least = choose_nested(flow, True, None)
    peak, _ = naive(flow, least)
    assert peak == pytest.approx(least_budget(chain.chain), rel=0.05)
    labels = choose(flow, True, None)
    assert peak < 0.7 * naive(flow, labels)[0]


def test_what_is_returned_beside_the_loss_stays_until_the_forward_ends() -> None:
    build = FlowBuilder()
    made, outputs = [build.static(100)], []
    for _ in range(10):
        (wide,) = build.operator([made[-1]], [500])
        outputs += build.operator([wide], [90])
        made += [wide, *build.operator([wide], [100])]
    gradient: tuple[int, ...] = ()
    for value in reversed(made[:-1]):
        gradient = build.operator([*gradient, value], [build.values[value].nbytes], backward=True)
    flow = build.flow([*outputs, made[-1]], gradient)
    chain = NestedChain.of(flow, Chain.of(flow))
    least = choose_nested(flow, True, None)
    assert naive(flow, least)[0] == pytest.approx(least_budget(chain.chain), rel=0.1)
    assert naive(flow, least)[0] > sum(flow.values[v].nbytes for v in outputs)


def test_what_crosses_two_narrow_places_makes_one_stage() -> None:
    """A value read far away stays; one read a little later joins the stages that it crosses."""
    build = FlowBuilder()
    made = [build.static(100)]
    far, near = None, None
    for number in range(20):
        (wide,) = build.operator([made[-1]], [900])
        reads = {18: [far], 11: [near]}.get(number, [])
        made += [wide, *build.operator([wide, *(v for v in reads if v)], [100])]
        if number in (0, 9):
            (extra,) = build.operator([wide], [110])
            far, near = (extra, near) if number == 0 else (far, extra)
    gradient: tuple[int, ...] = ()
    for value in reversed(made[:-1]):
        gradient = build.operator([*gradient, value], [build.values[value].nbytes], backward=True)
    flow = build.flow([made[-1]], gradient)
    chain = NestedChain.of(flow, Chain.of(flow))
    assert far in chain.always and near not in chain.always
    assert 10 <= len(chain) < 20
    least = choose_nested(flow, True, None)
    assert naive(flow, least)[0] == step_of(flow, least).peak_bytes
    assert naive(flow, least)[0] < naive(flow, choose(flow, True, None))[0]


# --- programs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["residual", "u-net", "cross attention", "dense", "dropouts", "views"])
def test_programs_without_a_deep_chain_keep_every_bit(name: str) -> None:
    program, model, inputs = traced(name)
    costs = Costs.of(program, CPU)
    pass_ = Checkpoint(memory="min", solver="chain")
    plan = pass_.plan(program, costs)
    assert plan.peak_bytes <= plan.baseline_bytes
    planned = pass_.apply(program, CheckpointPlan.from_json(plan.to_json()))
    verify(planned, before=program)
    given_ = arguments(program, model, inputs)
    for a, b in zip(run_split(planned, given_), run_joint(program, given_), strict=True):
        assert a is b is None or torch.equal(a, b)


@settings(max_examples=15, deadline=None)
@given(st.integers(4, 14), st.sampled_from([0.0, 0.3]), st.floats(0, 1))
def test_gradients_are_eagers_and_the_peak_that_of_the_rewritten_program(
    depth: int, dropout: float, share: float
) -> None:
    torch.manual_seed(depth)
    model, x = Deep(depth, dropout).double(), torch.randn(8, WIDTH, dtype=torch.float64)
    program = graphopt.trace(model, x)
    costs = Costs.of(program, CPU)
    least = Checkpoint(memory="min", solver="chain").plan(program, costs)
    budget = int(least.peak_bytes + share * (least.baseline_bytes - least.peak_bytes))
    pass_ = Checkpoint(memory=budget, solver="chain")
    plan = pass_.plan(program, costs)
    planned = pass_.apply(program, plan)
    want = step(model, x, loss=lambda value: value, seed=3)
    got = run_split(planned, arguments(program, model, {"x": x}), seed=3)
    assert torch.equal(got[0], want.loss)
    labels = [i.label for i in program.inputs if i.label in want.gradients]
    returned = [g for g in got[program.num_forward_outputs :] if g is not None]
    for label, mine in zip(labels, returned, strict=True):
        assert torch.equal(mine, want.gradients[label])
    after = Costs.of(planned, CPU).dataflow(planned)
    kept = {
        v for n in saved_nodes(planned) for v in after.value_of[n.name] if after.values[v].producer >= 0
    }
    again = step_of(after, Choice(frozenset(kept), frozenset(), tuple(anchors(after)), 0.0, 0))
    assert plan.peak_bytes <= budget
    if not dropout:  # the rewritten program holds states of generators as what it saves
        assert after.static_bytes + again.peak_bytes == plan.peak_bytes


@pytest.mark.parametrize(("depth", "share"), [(24, 0.75), (64, 0.5)])
def test_deep_models_need_less_than_labels_reach_and_measure_as_predicted(
    depth: int, share: float
) -> None:
    torch.manual_seed(0)
    model, x = Deep(depth), torch.randn(ROWS, WIDTH)
    program = graphopt.trace(model, x)
    flow = Costs.of(program, CPU).dataflow(program)
    labels = flow.static_bytes + step_of(flow, choose(flow, True, None)).peak_bytes
    small = graphopt.optimize(
        copy.deepcopy(model), device="cpu-generic", passes=[Checkpoint(memory="min", solver="chain")]
    )
    for seed in range(2):
        assert_same(step(small, x, seed=seed), step(model, x, seed=seed))
    plan = records(small)[0].steps[0].plan
    assert plan.peak_bytes - flow.static_bytes < share * (labels - flow.static_bytes)
    after = records(small)[0].after.operators()
    runs = Counter(n.meta[RECOMPUTE_OF] for n in after if RECOMPUTE_OF in n.meta)
    assert max(runs.values()) >= 3
    report = small.measure(x)
    assert report.measured_peak_bytes == report.predicted_peak_bytes


def test_dropout_is_drawn_again_as_it_was() -> None:
    model, x = Deep(16, dropout=0.4).train(), torch.randn(ROWS, WIDTH)
    pass_ = Checkpoint(memory="min", solver="chain")
    small = graphopt.optimize(copy.deepcopy(model), device="cpu-generic", passes=[pass_])
    for seed in range(3):
        assert_same(step(small, x, seed=seed), step(model, x, seed=seed))
    again = [n for n in records(small)[0].after.operators() if "run_with_rng_state" in str(n.target)]
    assert max(Counter(n.meta[RECOMPUTE_OF] for n in again).values()) >= 2


# --- the default solver ------------------------------------------------------------------------


def test_the_default_solver_nests_where_labels_miss_the_budget_or_are_slower() -> None:
    flow = blocks(32)
    labels = choose(flow, True, None)
    nested = choose_nested(flow, True, None)
    static = flow.static_bytes
    below = (naive(flow, nested)[0] + naive(flow, labels)[0]) // 2
    with pytest.raises(PlanError):
        choose(flow, False, static + below)
    found = choose_best(flow, False, static + below)
    assert naive(flow, found)[0] <= below and found.forget
    at_labels = choose_best(flow, False, static + naive(flow, labels)[0])
    assert naive(flow, at_labels)[1] <= naive(flow, labels)[1]
    plain = step_of(flow, everything(flow)).peak_bytes
    assert not choose_best(flow, False, static + int(0.6 * plain)).forget
    assert not choose_best(flow, False, None).forget
    with pytest.raises(PlanError) as caught:
        choose_best(flow, False, static + 100)
    assert caught.value.reachable_bytes == static + naive(flow, nested)[0]


def test_the_least_peak_is_worth_its_time() -> None:
    flow = blocks(32)
    labels, best = choose(flow, True, None), choose_best(flow, True, None)
    (high, fast), (low, slow) = naive(flow, labels), naive(flow, best)
    assert low < high
    assert slow - fast <= 5.0 * (high - low) / high * sum(o.seconds for o in flow.operators)


def test_few_stages_are_left_to_labels() -> None:
    flow = blocks(6)
    labels = choose(flow, True, None)
    assert choose_best(flow, True, None).keep == relaxed(flow, labels, labels.peak_bytes).keep


# --- golden text -------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent.parent / "golden" / "checkpoint_chain.txt"


class Chained(nn.Module):
    """Five layers, narrow where they meet."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.ones(4)) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = torch.tanh(x[:, None] * weight).exp().sum(1)
        return x.sum()


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    program = graphopt.trace(Chained(), torch.ones(1000))
    pass_ = Checkpoint(memory="min", solver="chain")
    plan = pass_.plan(program, Costs.of(program, CPU))
    assert plan.forget
    parts = {
        "before": program_text(program),
        "plan": "\n".join(
            [
                f"keep {', '.join(plan.keep)}",
                f"ephemeral {', '.join(plan.ephemeral)}",
                f"order {', '.join(plan.order)}",
                *(f"after {operator} forget {', '.join(values)}" for operator, values in plan.forget),
                f"peak {plan.peak_bytes} of {plan.baseline_bytes} bytes",
            ]
        ),
        "after": program_text(pass_.apply(program, plan)),
    }
    text = "".join(f"# {title}\n{part}\n\n" for title, part in parts.items())
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
