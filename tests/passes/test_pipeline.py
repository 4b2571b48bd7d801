"""The loop runs passes in order, verifies each result, and says which pass failed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from programs import traced

from graphopt import PlanError, Program, VerifyError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.passes.base import Pass
from graphopt.passes.pipeline import run_passes
from graphopt.plan import Plan


@dataclass(frozen=True)
class CountPlan(Plan):
    """How many operators there were."""

    operators: int


@dataclass(frozen=True)
class Recorded(Pass):
    """Doubles an operator that nobody reads, or does what it is told."""

    name: ClassVar[str] = "recorded"

    seen: list[str]
    label: str
    then: Callable[[Program], Any] | None = None

    def plan(self, program: Program, costs: Costs) -> CountPlan:
        self.seen.append(f"plan {self.label}")
        return CountPlan(len(costs.nodes))

    def apply(self, program: Program, plan: CountPlan) -> Program:
        self.seen.append(f"apply {self.label}")
        copy = program.copy()
        if self.then is not None:
            return self.then(copy) or copy
        first = next(copy.operators())
        with copy.graph.inserting_after(first):
            copy.graph.node_copy(first)
        return copy


def costs_of(program: Program) -> Costs:
    return Costs.of(program, get_device("cpu-generic"))


def test_each_pass_sees_the_result_of_the_one_before() -> None:
    program = traced("perceptron")[0]
    before = str(program.graph)
    seen: list[str] = []
    ticks = iter([1.0, 3.0, 10.0, 15.0])
    passes = (Recorded(seen, "first"), Recorded(seen, "second"))
    result, steps = run_passes(program, passes, costs_of, lambda: next(ticks))
    assert seen == ["plan first", "apply first", "plan second", "apply second"]
    assert [s.pass_ for s in steps] == list(passes)
    assert [s.seconds for s in steps] == [2.0, 5.0]
    count = len(list(program.operators()))
    assert len(list(result.operators())) == count + 2
    assert steps[1].plan.operators - steps[0].plan.operators == 1  # type: ignore[attr-defined]
    assert str(program.graph) == before


def test_no_passes_give_the_program_itself() -> None:
    program = traced("perceptron")[0]
    assert run_passes(program, (), costs_of, lambda: 0.0) == (program, ())


def test_a_wrong_result_is_found_before_the_next_pass() -> None:
    def shuffle(program: Program) -> None:
        nodes = list(program.operators())
        nodes[-1].append(nodes[0])

    seen: list[str] = []
    passes = (Recorded(seen, "first", shuffle), Recorded(seen, "second"))
    with pytest.raises(VerifyError, match=r"after pass recorded: .* before it is made"):
        run_passes(traced("perceptron")[0], passes, costs_of, lambda: 0.0)
    assert seen == ["plan first", "apply first"]


def test_a_result_with_another_interface_is_refused() -> None:
    def fewer(program: Program) -> Program:
        return Program(program.module, program.num_forward_outputs, program.inputs[:-1])

    with pytest.raises(VerifyError, match="after pass recorded: the inputs"):
        run_passes(traced("perceptron")[0], (Recorded([], "only", fewer),), costs_of, lambda: 0.0)


def test_an_error_of_planning_comes_as_it_is() -> None:
    @dataclass(frozen=True)
    class Never(Recorded):
        def plan(self, program: Program, costs: Costs) -> CountPlan:
            raise PlanError("too small", reachable_bytes=7)

    with pytest.raises(PlanError, match=r"^too small$") as caught:
        run_passes(traced("perceptron")[0], (Never([], "only"),), costs_of, lambda: 0.0)
    assert caught.value.reachable_bytes == 7
