"""The predicted step for other viewers: spans and counters of the trace, allocations of the snapshot."""

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.cuda import _memory_viz

from graphopt import Checkpoint, optimize
from graphopt.analysis import analyse
from graphopt.cli import main
from graphopt.cost_models.devices import get_device
from graphopt.errors import GraphoptError
from graphopt.report import Report
from graphopt.tracing import trace

H100 = get_device("h100")


class Net(nn.Module):
    """Layers with dropout, whose replays need the state of the generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(torch.tanh(layer(x)).exp(), 0.1) + x
        return x.square().mean()


@pytest.fixture(params=[None, "min"], scope="module")
def report(request: pytest.FixtureRequest) -> Report:
    """Of a step with everything kept, and of one that recomputes."""
    program = trace(Net(), torch.zeros(256, 32))
    return analyse(program, "Net", [Checkpoint(memory=request.param)], H100)


def events_of(report: Report) -> list[dict[str, Any]]:
    return list(json.loads(report.chrome_trace())["traceEvents"])


def test_lanes_add_up_to_the_step(report: Report) -> None:
    events = events_of(report)
    (graph,) = report.graphs
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    spans = [e for e in events if e["ph"] == "X"]
    busy = {lane: sum(e["dur"] for e in spans if lanes[e["tid"]] == lane) for lane in lanes.values()}
    expected = {"forward", "backward"} | ({"recomputed"} if graph.recomputed else set())
    assert set(busy) == expected
    total = (graph.step_seconds + graph.recompute_seconds) * 1e6
    assert sum(busy.values()) == pytest.approx(total, rel=1e-4)  # saving a generator takes time, too
    assert busy.get("recomputed", 0) == pytest.approx(graph.recompute_seconds * 1e6)
    spans.sort(key=lambda e: e["ts"])
    ends = [e["ts"] + e["dur"] for e in spans]
    assert all(e["ts"] >= end - 1e-6 for e, end in zip(spans[1:], ends, strict=False))


def test_counters_reach_the_peak(report: Report) -> None:
    counters = [e for e in events_of(report) if e["ph"] == "C"]
    assert [e["ts"] for e in counters] == sorted(e["ts"] for e in counters)
    assert max(sum(e["args"].values()) for e in counters) == report.predicted_peak_bytes


def replayed(events: list[dict[str, Any]]) -> Iterator[int]:
    """Bytes alive after each event; a failed assertion where blocks overlap."""
    live: dict[int, int] = {}
    for event in events:
        address, size = event["addr"], event["size"]
        if event["action"] == "alloc":
            assert all(address + size <= a or a + s <= address for a, s in live.items())
            live[address] = size
        elif event["action"] == "free_completed":
            assert live.pop(address) == size
        yield sum(live.values())


def test_the_snapshot_replays_to_the_peak(report: Report) -> None:
    snapshot = pickle.loads(report.memory_snapshot())
    (events,) = snapshot["device_traces"]
    alive = list(replayed(events))
    assert max(alive) == report.predicted_peak_bytes
    (segment,) = snapshot["segments"]
    assert alive[-1] == segment["active_size"]
    parameters = sum(p.nbytes for p in Net().parameters())
    assert alive[-1] == report.graphs[0].static_bytes + parameters, "gradients are left"
    places = {f["filename"] for e in events for f in e["frames"]}
    assert any(place.endswith("test_traces.py") for place in places)


def test_torch_reads_the_snapshot(report: Report) -> None:
    snapshot = pickle.loads(report.memory_snapshot())
    summary, listing = _memory_viz.segsum(snapshot), _memory_viz.trace(snapshot)
    assert "segments: 1" in summary
    assert listing.startswith("Device 0") and listing.count("\ndel ") > 10
    assert "Active Memory Timeline" in _memory_viz.trace_plot(snapshot)
    assert "Allocator State History" in _memory_viz.segment_plot(snapshot)


def test_files_of_the_command(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Linear(4, 4), torch.ones(2, 4)\n"
    )
    files = [str(tmp_path / name) for name in ("trace.json", "snapshot.pickle", "report.json")]
    options = ["--device", "h100", "--chrome-trace", files[0], "--memory-snapshot", files[1]]
    assert main(["report", f"{tmp_path}/net.py:make", *options, "--json", files[2]]) == 0
    peak = json.loads(Path(files[2]).read_text())["predicted_peak_bytes"]
    assert json.loads(Path(files[0]).read_text())["traceEvents"]
    snapshot = pickle.loads(Path(files[1]).read_bytes())
    assert max(replayed(snapshot["device_traces"][0])) == peak


def test_a_file_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\ndef make():\n    return torch.nn.Tanh(), torch.ones(2)\n"
    )
    target = f"{tmp_path}/missing/s.pickle"
    command = ["report", f"{tmp_path}/net.py:make", "--inference", "--device", "h100"]
    assert main([*command, "--memory-snapshot", target]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_report_before_the_first_call() -> None:
    report = optimize(nn.Linear(2, 2), memory=1.0, device="cpu-generic").report
    for export in (report.chrome_trace, report.memory_snapshot):
        with pytest.raises(GraphoptError, match="no graph yet: the first call captures the model"):
            export()
