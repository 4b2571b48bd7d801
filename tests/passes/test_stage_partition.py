"""Cuts into stages are the best there are, also of a traced model."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import trace, zoo
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.errors import PlanError
from graphopt.passes.stage_partition import StagePlan, cut_stages, even_stages
from graphopt.passes.stage_schedule import plan_pipeline


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(2, 7), st.integers(1, 4))
def test_no_cut_is_better(data: st.DataObject, count: int, stages: int) -> None:
    stages = min(stages, count)
    several = st.lists(st.integers(1, 9), min_size=count, max_size=count)
    seconds = [s / 4 for s in data.draw(several)]
    nbytes, held = data.draw(several), data.draw(several)
    live = [float(stages - s) for s in range(stages)]
    rates = data.draw(st.lists(st.sampled_from((0.25, 0.5, 1.0)), min_size=stages, max_size=stages))
    memory = data.draw(st.one_of(st.none(), st.integers(1, 60)))
    every = []
    for places in itertools.combinations(range(1, count), stages - 1):
        ends = [0, *places, count]
        parts = [range(a, b) for a, b in itertools.pairwise(ends)]
        slowest = max(rates[s] * sum(seconds[u] for u in p) for s, p in enumerate(parts))
        fullest = max(sum(held[u] + live[s] * nbytes[u] for u in p) for s, p in enumerate(parts))
        every.append((slowest, fullest))
    options = {"nbytes": nbytes, "held_bytes": held, "live": live, "memory_bytes": memory, "rates": rates}
    fits = [slow for slow, full in every if memory is None or full <= memory]
    if not fits:
        with pytest.raises(PlanError) as error:
            even_stages(seconds, stages, **options)  # type: ignore[arg-type]
        assert error.value.reachable_bytes == min(full for _, full in every)
        return
    found = even_stages(seconds, stages, **options)  # type: ignore[arg-type]
    assert [u for part in found for u in part] == list(range(count))
    assert max(rates[s] * sum(seconds[u] for u in p) for s, p in enumerate(found)) == min(fits)


@pytest.fixture(scope="module")
def llama() -> tuple[object, Costs]:
    model = zoo.build("llama", overrides={"vocab_size": 50000, "num_hidden_layers": 6})
    program = trace(model, zoo.example_batch("llama", model, 1, 64))
    return program, Costs.of(program, get_device("a100"))


def test_a_traced_model(llama) -> None:
    program, costs = llama
    plan = cut_stages(program, costs, 3)
    assert StagePlan.from_json(plan.to_json()) == plan
    flow = costs.dataflow(program)
    forward = sum(o.seconds for o in flow.operators if not o.backward)
    assert sum(plan.forward_s) == pytest.approx(forward)
    backward = sum(o.seconds for o in flow.operators if o.backward)
    assert 0.9 * backward <= sum(plan.backward_s) <= backward * (1 + 1e-9)
    labels = [i.label for i in program.inputs if i.role.value == "parameter"]
    assert sorted({n for row in plan.parameters for n in row}) == sorted(set(labels))
    # The vocabulary counts: the last stage has the fewest layers, as it has the output layer.
    layers = [
        len({n.split(".layers.")[1].split(".")[0] for n in row if ".layers." in n})
        for row in plan.parameters
    ]
    assert layers[-1] < max(layers) and sum(layers) >= 6
    pipeline = plan_pipeline(plan.costs(4.0), 6, schedule="1f1b")
    assert pipeline.stages == 3 and pipeline.peak_bytes[0] > 4 * plan.weight_bytes[0]


def test_memory_moves_the_cut(llama) -> None:
    program, costs = llama
    free = cut_stages(program, costs, 3)

    def fullest(plan: StagePlan) -> float:
        return max((3 - s) * plan.nbytes[s] + 4 * plan.weight_bytes[s] for s in range(3))

    with pytest.raises(PlanError, match="no cut into 3 stages fits") as error:
        cut_stages(program, costs, 3, memory_bytes=1)
    least = error.value.reachable_bytes
    assert least is not None
    tight = cut_stages(program, costs, 3, memory_bytes=least)
    assert fullest(tight) <= least <= fullest(free)


def test_rejections(llama) -> None:
    program, costs = llama
    with pytest.raises(PlanError, match="too few for 500"):
        cut_stages(program, costs, 500)
    with pytest.raises(PlanError, match="2 units in 3 stages"):
        even_stages([1.0, 1.0], 3)
