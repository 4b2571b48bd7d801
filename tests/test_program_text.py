"""A program as Python: the text runs, and computes what the graph does."""

from typing import Any

import pytest
import torch
from programs import arguments, ramp, run_joint, tangent_nodes, traced

import graphopt
from graphopt import Checkpoint, Program
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU
from graphopt.program_text import program_lines


def run_text(program: Program, given: dict[str, torch.Tensor]) -> list[Any]:
    names: dict[str, Any] = {}
    exec("\n".join(program_lines(program)), names)
    tangents = {n.name: ramp(n.meta["val"]) for n in tangent_nodes(program)}
    values = [tangents.get(i.name, given.get(i.name)) for i in program.inputs]
    torch.manual_seed(0)
    with torch.no_grad():
        return list(names["step"](*(v.clone() for v in values if v is not None)))


@pytest.mark.parametrize("name", ["residual", "views", "multi-output", "convolutions", "dropouts"])
def test_the_text_computes_what_the_graph_does(name: str) -> None:
    program, model, inputs = traced(name)
    pass_ = Checkpoint(memory="min")
    changed = pass_.apply(program, pass_.plan(program, Costs.of(program, GENERIC_CPU)))
    given = arguments(program, model, inputs)
    for text_of in (program, changed):
        for got, want in zip(run_text(text_of, given), run_joint(text_of, given), strict=True):
            assert got is want is None or torch.equal(got, want)


def test_constants_are_those_of_the_module() -> None:
    table = torch.arange(3.0)
    program = graphopt.trace(lambda x: x + torch.tensor([1.0, 2.0, 3.0]), table, training=False)
    lines = program_lines(program, origins=False)
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    given = (program.module, table) if "    self," in lines else (table,)
    assert torch.equal(names["step"](*given)[0], torch.tensor([1.0, 3.0, 5.0]))


def test_lines_name_the_model_and_the_shapes() -> None:
    text = "\n".join(program_lines(traced("perceptron")[0]))
    assert "  # parameter layers.0.weight float32[32, 32]" in text
    assert "tiny_models.py:" in text and "x = F.gelu(layer(x))" in text
    assert "float('inf')" in "\n".join(
        program_lines(graphopt.trace(lambda x: x.clamp(max=float("inf")), torch.ones(2), training=False))
    )
