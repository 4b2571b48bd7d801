"""The path over the cuts is the best that the options allow, and its peak is the simulated one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_flows import FlowBuilder, blocks, brute_force, naive_step, training_flows

from graphopt.cost_models.memory import Dataflow
from graphopt.passes.chain_solver import Chain, problem_size
from graphopt.passes.checkpoint_choice import everything, step_of


def paths(chain: Chain, cut: int = 0) -> list[list]:
    """Every sequence of (run, option) from `cut` to the end."""
    if cut == len(chain.spans):
        return [[]]
    return [
        [(run, option), *rest]
        for run in chain.runs[cut]
        for rest in paths(chain, run.stop)
        for option in run.options
    ]


def figures(path: list) -> tuple[float, float]:
    """Peak and seconds of a path, added up from its options."""
    kept = peak = seconds = 0.0
    for run, option in path:
        local = max(option.backward_bytes + run.placed.passing_bytes, option.forward_bytes)
        peak = max(peak, kept + local)
        kept += option.kept_bytes
        seconds += option.seconds
    return peak, seconds


SMALL = st.one_of(training_flows(operators=6), training_flows(operators=7, chain=True))


def test_a_run_may_pass_over_a_cut_that_nothing_else_reaches() -> None:
    build = FlowBuilder()
    made = [build.static(100)]
    for size in (100, 200, 100, 200, 100):
        made += build.operator([made[-1]], [size])
    gradient: tuple[int, ...] = ()
    for size in (200, 100, 200, 100):
        gradient = build.operator(gradient, [size], backward=True)
    last = build.operator([*gradient, made[1]], [0], backward=True)
    flow = build.flow([made[-1]], last)
    choice = Chain.of(flow).least_peak()
    best = min(peak for peak, _ in brute_force(flow))
    assert naive_step(flow, choice.keep, choice.ephemeral, choice.order)[0] == best


@settings(max_examples=50)
@given(SMALL)
def test_the_least_peak_is_that_of_the_best_path(flow: Dataflow) -> None:
    chain = Chain.of(flow)
    best = min(figures(p) for p in paths(chain))
    choice = chain.least_peak()
    assert choice.peak_bytes == best[0]
    assert choice.seconds == pytest.approx(best[1])


@settings(max_examples=50)
@given(SMALL, st.floats(0, 1))
def test_within_a_limit_the_fastest_path_is_found(flow: Dataflow, share: float) -> None:
    chain = Chain.of(flow)
    found = [figures(p) for p in paths(chain)]
    low, high = min(found)[0], max(found)[0]
    limit = int(low + share * (high - low))
    choice = chain.within(limit)
    assert choice is not None and choice.peak_bytes <= limit
    assert choice.seconds == pytest.approx(min(s for p, s in found if p <= limit))
    assert chain.within(int(low) - 1) is None


@settings(max_examples=50)
@given(SMALL)
def test_the_peak_of_a_choice_is_the_simulated_one(flow: Dataflow) -> None:
    chain = Chain.of(flow)
    choice = chain.least_peak()
    peak, seconds = naive_step(flow, choice.keep, choice.ephemeral, choice.order)
    # A sum over spans: nearly always exact; the choice under a budget is simulated as a whole.
    assert 0.8 * peak <= choice.peak_bytes <= 1.5 * peak
    assert choice.seconds == pytest.approx(seconds)
    assert step_of(flow, choice).peak_bytes == peak


def test_equal_blocks_are_solved_once() -> None:
    assert problem_size(Chain.of(blocks(12))) == problem_size(Chain.of(blocks(24))) <= 8


def test_long_chains_stay_within_every_limit() -> None:
    flow = blocks(24)
    chain = Chain.of(flow)
    least = chain.least_peak()
    plain = step_of(flow, everything(flow)).peak_bytes
    seconds = []
    for share in (0.0, 0.1, 0.3, 0.6, 1.0):
        limit = int(least.peak_bytes + share * (plain - least.peak_bytes))
        choice = chain.within(limit)
        assert choice is not None
        peak, spent = naive_step(flow, choice.keep, choice.ephemeral, choice.order)
        assert peak <= choice.peak_bytes <= limit
        seconds.append(spent)
    assert seconds == sorted(seconds, reverse=True)
    assert seconds[0] > 0 and seconds[-1] == 0
    assert least.peak_bytes < plain / 4


def test_the_light_chain_repeats_no_product() -> None:
    build = FlowBuilder()
    made = [build.static(100)]
    for index in range(6):
        made += build.operator([made[-1]], [500 if index % 2 else 100], flops=100 * (index % 2))
    gradient: tuple[int, ...] = ()
    for value in reversed(made[1:]):
        gradient = build.operator([*gradient, value], [build.values[value].nbytes], backward=True)
    flow = build.flow([made[-1]], gradient)
    light = Chain.of(flow).light().least_peak()
    assert step_of(flow, light).recompute_flops == 0
    heavy = Chain.of(flow).least_peak()
    assert step_of(flow, heavy).recompute_flops > 0
    assert step_of(flow, heavy).peak_bytes < step_of(flow, light).peak_bytes
