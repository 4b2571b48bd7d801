"""The report: its text, its JSON, its timeline, and the measurement of a step."""

import json
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from graphopt import Checkpoint, optimize
from graphopt.analysis import analyse
from graphopt.cost_models.devices import format_bytes, get_device
from graphopt.errors import GraphoptError
from graphopt.graph_report import Side
from graphopt.passes.checkpoint import CheckpointPlan
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.report import Report
from graphopt.timeline import CATEGORIES, memory_timeline
from graphopt.tracing import trace

DEVICE = get_device("cpu-generic")


class Block(nn.Module):
    """Two products with functions whose results the backward reads, and a dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.tanh(self.up(x)).exp()
        return x + self.drop(self.down(wide))


class Net(nn.Module):
    """Blocks behind a batch norm, which is a buffer that every step changes."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def report_of(memory: float | str | None = None, **sizes: int) -> Report:
    program = trace(Net(**sizes), torch.zeros(256, sizes.get("width", 16)))
    return analyse(program, "Net", [Checkpoint(memory=memory)], DEVICE)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small gain nothing from threads, and lose much on a busy machine."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of("min")


GOLDEN_SUMMARY = """\
graphopt report: Net
  times are predicted for cpu-generic
  pass checkpoint(memory='min')

Graph: forward and backward, N operators
  inputs          x float32[256, 16]
  static          42.2 kB: parameters 25.7 kB, buffers 136 B, inputs 16.4 kB
  predicted peak  236 kB instead of 595 kB (-60.4%)
  measured peak   not measured; model.measure(...), called as the model is, runs both steps
"""


def test_the_text_begins_with_the_facts(report: Report) -> None:
    text = re.sub(r"\d+ operators", "N operators", str(report), count=1)
    assert text[: len(GOLDEN_SUMMARY)] == GOLDEN_SUMMARY


def test_the_text_tells_what_is_kept_recomputed_and_alive_and_from_which_line(
    report: Report,
) -> None:
    text = str(report)
    assert "Recomputed in the backward: " in text
    assert "wide = torch.tanh(self.up(x)).exp()" in text
    assert re.search(r"recomputed: \S+ us for \S+ kB freed at the peak", text)
    assert re.search(r"kept: making it again would take \S+ us; \d+ recomputations? start", text)
    assert "the state of the generator, to draw the same random numbers again" in text
    assert "Alive at the peak, in the " in text
    assert "test_report.py:" in text and "blocks.*" in text
    assert "measured peak   not measured; model.measure(...)" in text
    assert text.endswith("Graph breaks: none")
    assert "\x1b" not in text and max(map(len, text.splitlines())) < 130


def test_the_chart_shows_the_step_before_and_after(report: Report) -> None:
    lines = str(report).splitlines()
    bars = [line for line in lines if "┤" in line]
    assert len(bars) == 24
    assert all(len(line) <= 11 + 70 + len(" budget") for line in bars)
    before, after = bars[:12], bars[12:]
    assert "░" in before[0] or "█" in before[0], "the plain peak reaches the top"
    assert not set("·█▓▒░") & set(after[0]), "the planned peak does not"
    assert before[-1].count("·") == 70
    assert sum("forward" in line and "backward" in line and "└" in line for line in lines) == 2


def test_the_budget_is_marked_in_the_chart() -> None:
    marked = [line for line in str(report_of(0.8)).splitlines() if line.endswith(" budget")]
    assert len(marked) == 2


def test_predictions_are_those_of_the_plan(report: Report) -> None:
    plan = report.records[0].steps[0].plan
    assert isinstance(plan, CheckpointPlan)
    (graph,) = report.graphs
    assert report.predicted_peak_bytes == graph.after.peak_bytes == graph.peak_bytes
    states = sum(fact.nbytes for fact in graph.kept if "generator" in fact.why)
    assert graph.peak_bytes <= plan.peak_bytes <= graph.peak_bytes + states
    assert report.baseline_peak_bytes == plan.baseline_bytes
    assert graph.recompute_seconds == pytest.approx(plan.recompute_seconds)
    assert graph.step_seconds == pytest.approx(plan.step_seconds)
    assert (graph.step_flops, graph.recompute_flops) == (plan.step_flops, plan.recompute_flops)
    assert graph.static_bytes == graph.parameter_bytes + graph.buffer_bytes + graph.input_bytes


@pytest.mark.parametrize("memory", [None, "min", 0.8, 1.0])
def test_timelines_sum_to_the_simulated_bytes(memory: float | str | None) -> None:
    record = report_of(memory).records[0]
    flow = record.costs.dataflow(record.before)
    step, timeline = step_of(flow, everything(flow)), memory_timeline(flow, everything(flow))
    simulated = [*step.forward.during, *step.backward.during]
    assert (timeline.total_bytes - flow.static_bytes).tolist() == simulated
    assert timeline.peak_bytes == flow.static_bytes + step.peak_bytes
    assert timeline.forward_steps == len(step.forward.steps)
    assert (timeline.alive_bytes >= 0).all()


@pytest.mark.parametrize("memory", [None, "min", 0.8])
def test_lifetimes_sum_to_the_timeline(memory: float | str | None) -> None:
    record = report_of(memory).records[0]
    for side in (Side.before(record), Side.after(record)):
        timeline, values = side.timeline, side.flow.values
        sums = np.zeros_like(timeline.alive_bytes)
        for value, category, first, last in timeline.lifetimes:
            sums[CATEGORIES.index(category), first : last + 1] += values[value].nbytes
        whole = ("kept", "recomputed", "gradients")
        rows = [CATEGORIES.index(category) for category in whole]
        assert (sums[rows] == timeline.alive_bytes[rows]).all()
        scratch = timeline.alive_bytes[-1] - sums[-1]
        assert (scratch >= 0).all() and not scratch.all()
        assert len(set(timeline.lifetimes)) == len(timeline.lifetimes)
        assert {v for v, _ in timeline.alive_at_peak} == {
            v for v, _, first, last in timeline.lifetimes if first <= timeline.peak <= last
        }


def test_the_tensors_alive_at_the_peak_fill_it(report: Report) -> None:
    (graph,) = report.graphs
    assert graph.peak is not None
    column = dict(zip(CATEGORIES, graph.after.alive_bytes[:, graph.after.peak], strict=True))
    assert sum(column.values()) == graph.peak_bytes
    for category in ("kept", "recomputed", "gradients"):
        alive = sum(t.nbytes for t in graph.peak.tensors if t.category == category)
        assert alive == column[category]
    sizes = [t.nbytes for t in graph.peak.tensors]
    assert sizes == sorted(sizes, reverse=True)


def test_a_sampled_timeline_has_the_peak(report: Report) -> None:
    timeline = report.graphs[0].before
    for points in (1, 7, 10_000):
        chosen = timeline.sampled(points)
        assert len(chosen) == min(points, len(timeline.operators))
        assert timeline.peak_bytes == timeline.total_bytes[chosen].max()


PEAKS = ["predicted_peak_bytes", "baseline_peak_bytes", "measured_peak_bytes"]
REPORT_KEYS = [
    *("schema", "graphopt", "model", "device", "compiler", "passes", *PEAKS),
    *("measured_baseline_bytes", "measured", "graphs", "other_graphs", "breaks", "mesh"),
]
GRAPH_KEYS = [
    *("is_training", "operators", "inputs", "static_bytes", "reserved_bytes", "parameter_bytes"),
    *("buffer_bytes", "input_bytes", "baseline_peak_bytes", "peak_bytes", "budget_bytes"),
    *("step_seconds", "recompute_seconds", "step_flops", "recompute_flops", "trace_seconds"),
    *("passes", "kept", "recomputed", "peak", "before", "after"),
]
TENSOR_KEYS = ["name", "shape", "dtype", "nbytes", "origin", "category", "why"]
RECOMPUTE_KEYS = [
    *("name", "operator", "count", "seconds", "freed_bytes", "kept_bytes", "leads_to"),
    *("origin", "why"),
]


def test_json_has_its_schema(report: Report) -> None:
    data = json.loads(report.to_json())
    assert list(data) == REPORT_KEYS
    assert (data["schema"], data["model"], data["device"]) == (1, "Net", "cpu-generic")
    (graph,) = data["graphs"]
    assert list(graph) == GRAPH_KEYS
    assert list(graph["kept"][0]) == TENSOR_KEYS
    assert list(graph["recomputed"][0]) == RECOMPUTE_KEYS
    timeline = graph["after"]
    assert list(timeline) == ["forward_steps", "steps", "step", *CATEGORIES]
    totals = [sum(column) for column in zip(*(timeline[c] for c in CATEGORIES), strict=True)]
    assert max(totals) == data["predicted_peak_bytes"] == graph["peak_bytes"]


def test_html_escapes_what_comes_from_outside(report: Report) -> None:
    risky = Report("<script>", report.settings, report.records, 0, ())
    text = risky._repr_html_()
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert text.count("<table>") == text.count("</table>") == 5


def test_html_has_the_head_figures_and_each_table(report: Report) -> None:
    text = report._repr_html_()
    (graph,) = report.graphs
    for figure in (graph.peak_bytes, graph.baseline_peak_bytes, graph.kept[0].nbytes):
        assert f"<td>{format_bytes(figure)}</td>" in text
    change = graph.peak_bytes / graph.baseline_peak_bytes - 1
    assert f"<td>{change:+.1%}</td>" in text and "<td>measured peak</td><td>–</td>" in text
    for name in (graph.kept[0].name, graph.recomputed[0].name, graph.passes[0].plan):
        assert f"<td>{name}</td>" in text
    assert f"{len(graph.recomputed)} operators recomputed" in text and text.count("┤") == 24


def test_a_report_before_the_first_call_says_so() -> None:
    text = optimize(Net(), device="cpu-generic").report
    assert text.predicted_peak_bytes is None and text.graphs == ()
    assert "no graph yet" in str(text)
    assert json.loads(text.to_json())["graphs"] == []


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {f"{n}.grad": p.grad for n, p in model.named_parameters() if p.grad is not None}
    return found | {name: grad.clone() for name, grad in grads.items()}


def test_measure_compares_both_steps_and_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = optimize(Net(), memory="min", device="cpu-generic")
    x = torch.randn(128, 16)
    model(x).backward()
    before, generator = snapshot(model), torch.get_rng_state()
    report = model.measure(x)
    assert torch.equal(torch.get_rng_state(), generator)
    after = snapshot(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    measured = report.measured
    assert measured is not None
    assert report.graphs[0].static_bytes == measured.static_bytes + 8  # the loss and its gradient
    assert measured.optimized.peak_bytes < measured.plain.peak_bytes
    assert measured.optimized.activation_bytes <= measured.optimized.peak_bytes
    assert report.measured_peak_bytes == pytest.approx(report.predicted_peak_bytes, rel=0.02)
    # The plain step runs in eager, which writes over no operand.
    assert report.measured_baseline_bytes == pytest.approx(report.baseline_peak_bytes, rel=0.2)
    assert "measured time" in str(report) and "measured peak" in str(model.report)
    assert json.loads(report.to_json())["measured"]["optimized"]["seconds"] > 0


def test_measure_needs_a_loss() -> None:
    model = optimize(nn.Linear(3, 2), device="cpu-generic")
    with pytest.raises(GraphoptError, match="no scalar loss"):
        model.measure(torch.zeros(4, 3))


def test_measure_takes_the_target_of_a_loss_function() -> None:
    net = nn.Linear(3, 2)
    model = optimize(net, loss=nn.functional.mse_loss, device="cpu-generic")
    report = model.measure(torch.zeros(4, 3), target=torch.zeros(4, 2))
    assert report.measured is not None and net.weight.grad is None


class Broken(nn.Module):
    """A model in two graphs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x).tanh()
        torch._dynamo.graph_break()
        return self.second(x).sum()


def test_graphs_of_the_last_call_are_reported_and_breaks_have_their_line() -> None:
    model = optimize(Broken(), device="cpu-generic")
    model(torch.zeros(4, 8)).backward()
    report = model.report
    assert len(report.graphs) == 2 and report.other_graphs == 0
    (found,) = report.breaks
    assert found.code == "torch._dynamo.graph_break()"
    assert re.search(r"test_report\.py:\d+$", found.place)
    assert "Graph 1 of 2" in str(report) and f"  {found.place}: {found.code}" in str(report)


def test_a_report_is_of_the_shapes_of_the_last_call() -> None:
    model = optimize(Net(), device="cpu-generic")
    peaks = []
    for rows in (64, 128, 64):
        model(torch.zeros(rows, 16)).backward()
        (graph,) = model.report.graphs
        assert graph.inputs[0].shape == (rows, 16)
        peaks.append(model.report.predicted_peak_bytes)
    assert peaks[0] == peaks[2] < peaks[1]
    assert model.report.other_graphs == 1
    assert "1 more compiled for calls with other inputs." in str(model.report)
