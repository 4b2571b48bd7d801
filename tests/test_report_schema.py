"""The JSON of reports follows the schema that is packaged, and the schema what is documented."""

import copy
import dataclasses
import json
import re
from importlib import resources
from typing import Any

import pytest
import torch
from torch import nn

from graphopt import Checkpoint, optimize
from graphopt.analysis import analyse
from graphopt.cost_models.devices import get_device
from graphopt.graph_report import GraphReport
from graphopt.mesh import Mesh
from graphopt.mesh_facts import MeshFacts
from graphopt.mesh_report import MeshModel, report_on
from graphopt.models import LoadedModel
from graphopt.report import SCHEMA, Report
from graphopt.tracing import trace

jsonschema: Any = pytest.importorskip("jsonschema")
KNOWN = json.loads(resources.files("graphopt").joinpath("report.schema.json").read_text())
H100 = get_device("h100")


class Net(nn.Module):
    """Dropout, so that there is a generator; a print on demand, which breaks the graph."""

    def __init__(self, prints: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.prints = nn.Linear(8, 32), nn.Linear(32, 1), prints

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(torch.tanh(self.first(x)).exp(), 0.1)
        if self.prints:
            print("half way")
        return self.second(x).mean()


def planned(memory: float | str | None, training: bool = True) -> Report:
    program = trace(Net(), torch.zeros(64, 8), training=training)
    passes = [Checkpoint(memory=memory)] if training else []
    return analyse(program, "Net", passes, H100)


def measured() -> Report:
    model = optimize(Net(prints=True), memory=1.0, device="cpu-generic")
    x = torch.ones(64, 8)
    model(x).backward()
    model.measure(x)
    report: Report = model.report
    return report


def on_a_mesh() -> Report:
    model = MeshModel("Net", lambda _: LoadedModel("Net", Net(), (torch.zeros(64, 8),)))
    return report_on(model, Mesh(dp=2), H100)


REPORTS = {
    "plain": lambda: planned(None),
    "least": lambda: planned("min"),
    "inference": lambda: planned(None, training=False),
    "before the first call": lambda: optimize(Net(), memory=1.0, device="cpu-generic").report,
    "measured": measured,
    "mesh": on_a_mesh,
}


def closed(schema: Any) -> Any:
    """`schema` with no other keys allowed anywhere."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    return {**found, "additionalProperties": False} if "required" in schema else found


@pytest.mark.parametrize("make", REPORTS.values(), ids=REPORTS)
def test_reports_follow_the_schema(make: Any) -> None:
    validator = jsonschema.Draft202012Validator(closed(KNOWN))
    data = json.loads(make().to_json())
    errors = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(data)]
    assert errors == []


def test_the_schema_is_one_and_finds_faults() -> None:
    jsonschema.Draft202012Validator.check_schema(KNOWN)
    validator = jsonschema.Draft202012Validator(closed(KNOWN))
    data = json.loads(planned(None).to_json())
    for key in data:
        wrong = copy.deepcopy(data)
        del wrong[key]
        assert not validator.is_valid(wrong), key
    assert not validator.is_valid({**data, "graphs": [{**data["graphs"][0], "peak_bytes": "many"}]})
    assert not validator.is_valid({**data, "schema": SCHEMA + 1})
    assert not validator.is_valid({**data, "more": 1})


def test_the_docstring_names_the_same_keys() -> None:
    text = Report.to_json.__doc__ or ""
    heads = re.findall(r"^ +- ((?:`\w+`(?:,\s+)?)+(?:[:; ].*)?)", text, re.MULTILINE)
    named = {key for head in heads for key in re.findall(r"`(\w+)`", head.partition(":")[0])}
    spread = re.findall(r"`(\w+)`", " ".join(text.split()))
    assert named <= set(KNOWN["properties"])
    assert set(KNOWN["properties"]) <= set(spread), "every key is explained"


def test_the_schema_has_the_fields_of_the_facts() -> None:
    graph, mesh = (set(KNOWN["$defs"][name]["properties"]) for name in ("graph", "mesh"))
    assert graph == {field.name for field in dataclasses.fields(GraphReport)}
    known = {field.name for field in dataclasses.fields(MeshFacts)}
    assert mesh == known - {"runs"} | {"hidden_seconds"}
