"""What differs between plans and between reports."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt import Checkpoint, Fuse, GraphoptError, PlanFile, optimize
from graphopt.cli import main
from graphopt.differences import compare_files, compare_plans, compare_reports
from graphopt.report import Report


def report(memory: float | str | None, rows: int = 64, fuse: bool = False) -> Report:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Linear(16, 16), nn.Tanh(), nn.Sigmoid())]
    net = nn.Sequential(*layers)
    passes = [Checkpoint(memory=memory), *([Fuse()] if fuse else [])]
    model = optimize(net, passes=passes, loss=nn.functional.mse_loss, device="cpu-generic")
    model(torch.ones(rows, 16), target=torch.zeros(rows, 16)).backward()
    return model.report  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def reports() -> dict[str, Report]:
    return {"least": report("min"), "plain": report(1.0), "rows": report("min", 32)}


@pytest.fixture
def files(reports: dict[str, Report], tmp_path: Path) -> dict[str, str]:
    found = {}
    for name, made in reports.items():
        PlanFile.of(made).save(tmp_path / f"{name}.plan")
        (tmp_path / f"{name}.report").write_text(made.to_json())
        found |= {f"{name}.{k}": str(tmp_path / f"{name}.{k}") for k in ("plan", "report")}
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "broken.json").write_text("{")
    return found | {"other": str(tmp_path / "other.json"), "broken": str(tmp_path / "broken.json")}


def test_the_same_is_equal(reports: dict[str, Report], files: dict[str, str]) -> None:
    for kind in ("plan", "report"):
        found = compare_files(files[f"least.{kind}"], files[f"least.{kind}"])
        assert found.kind == kind and found.rows == () and found.as_data()["equal"] is True
    again = json.loads(report("min").to_json())
    assert compare_reports(json.loads(reports["least"].to_json()), again).rows == ()


def test_what_is_kept_in_one_plan_only(reports: dict[str, Report]) -> None:
    plans = {name: PlanFile.of(made) for name, made in reports.items()}
    rows = {row.what: (row.a, row.b) for row in compare_plans(plans["plain"], plans["least"]).rows}
    kept = [set(plans[n].graphs[0].steps[0][1].keep) for n in ("plain", "least")]  # type: ignore[attr-defined]
    here, there = rows["checkpoint: kept, here only"]
    assert set(here) == kept[0] - kept[1] and set(there) == kept[1] - kept[0] and here
    assert rows["pass 1"] == ("Checkpoint(memory=1.0)", "Checkpoint(memory='min')")
    peaks = [plans[n].graphs[0].steps[0][1].peak_bytes for n in ("plain", "least")]  # type: ignore[attr-defined]
    assert rows["checkpoint: peak bytes"] == tuple(peaks)
    assert "checkpoint: recompute seconds" in rows and "graph" not in rows


def test_other_graphs_passes_and_versions(reports: dict[str, Report]) -> None:
    plan = PlanFile.of(reports["least"])
    other = {row.what: row for row in compare_plans(plan, PlanFile.of(reports["rows"])).rows}
    assert "float32[64, 16], and here it is" in other["is not the same"].a
    rows = {r.what: (r.a, r.b) for r in compare_plans(plan, replace(plan, torch_version="2.0")).rows}
    assert rows == {"torch version": (plan.torch_version, "2.0")}
    more = PlanFile.of(report("min", fuse=True))
    rows = {r.what: (r.a, r.b) for r in compare_plans(plan, more).rows}
    assert rows == {"pass 2": (None, "Fuse()")}


def test_what_is_recomputed_in_one_report_only(reports: dict[str, Report]) -> None:
    data = [json.loads(reports[n].to_json()) for n in ("plain", "least")]
    rows = {row.what: (row.a, row.b) for row in compare_reports(*data).rows}
    again = [{f.name: f.seconds for f in reports[n].graphs[0].recomputed} for n in ("plain", "least")]
    assert rows["recomputed, here only"] == ([], [n for n in again[1] if n not in again[0]])
    assert rows["recomputed, here only, seconds"][1] == pytest.approx(sum(again[1].values()))
    kept = [{f.name: f.nbytes for f in reports[n].graphs[0].kept} for n in ("plain", "least")]
    freed = sum(nbytes for name, nbytes in kept[0].items() if name not in kept[1])
    assert rows["kept, here only, bytes"][0] == freed > 0
    assert rows["predicted peak bytes"] == tuple(
        reports[n].predicted_peak_bytes for n in ("plain", "least")
    )


def test_measured_figures_are_shown_and_not_compared(reports: dict[str, Report]) -> None:
    data = json.loads(reports["least"].to_json())
    figures = {"peak_bytes": 10, "activation_bytes": 5, "seconds": 0.5}
    measured = {**data, "measured": {"plain": figures, "optimized": {**figures, "seconds": 0.6}}}
    found = compare_reports(data, measured)
    assert found.rows == () and ("optimized seconds", None, 0.6) in [
        (row.what, row.a, row.b) for row in found.measured
    ]


def test_the_command(files: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    same = ["diff", files["least.plan"], files["least.plan"]]
    assert main(same) == main([*same, "--exit-code"]) == 0
    assert capsys.readouterr().out == "equal\nequal\n"
    other = ["diff", files["plain.plan"], files["least.plan"]]
    assert main(other) == 0
    out = capsys.readouterr().out
    assert "checkpoint: kept, here only" in out and "Checkpoint(memory='min')" in out and "kB" in out
    assert main([*other, "--exit-code", "--json", "-"]) == 3
    data = json.loads(capsys.readouterr().out)
    assert data["kind"] == "plan" and data["equal"] is False and data["differences"]


def test_refused(files: dict[str, str]) -> None:
    plan, made = files["least.plan"], files["least.report"]
    with pytest.raises(GraphoptError, match=r"least.plan is a plan and .*least.report a report"):
        compare_files(plan, made)
    with pytest.raises(GraphoptError, match=r"other.json is neither a plan file nor a report"):
        compare_files(plan, files["other"])
    with pytest.raises(GraphoptError, match=r"broken.json is no JSON: Expecting"):
        compare_files(files["broken"], plan)
    with pytest.raises(GraphoptError, match="cannot read /nowhere: No such file"):
        compare_files("/nowhere", plan)
