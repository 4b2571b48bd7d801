"""Timelines of runs: every task once, where the run has it, and busy shares that add up."""

import itertools
import json
from xml.etree import ElementTree

import pytest
from hypothesis import given
from random_tasks import slow_run, task_graphs

from graphopt.cost_models.overlap_run import run_order
from graphopt.cost_models.run_timeline import chrome_trace, joined, spans_of, svg_timelines, text_timeline
from graphopt.cost_models.task_graph import COMPUTE, Task, TaskGraph


@given(task_graphs())
def test_a_trace_has_every_task(graph: TaskGraph) -> None:
    order = tuple(range(len(graph.tasks)))
    expected = slow_run(graph, order)
    run = run_order(graph, order)
    events = json.loads(chrome_trace({"before": spans_of(run), "after": spans_of(run)}))["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    for process in (0, 1):
        spans = [e for e in events if e["ph"] == "X" and e["pid"] == process]
        assert [e["name"] for e in spans] == [t.name for t in graph.tasks]
        for index, span in enumerate(spans):
            begin, end = expected[index]
            assert names[process, span["tid"]] == graph.tasks[index].channel
            assert span["ts"] == pytest.approx(float(begin) * 1e6, abs=1e-3)
            assert span["dur"] == pytest.approx(float(end - begin) * 1e6, abs=1e-3)


@given(task_graphs(contention=False))
def test_joined_spans_compute_as_long(graph: TaskGraph) -> None:
    spans = spans_of(run_order(graph, range(len(graph.tasks))), 1.0)
    short = joined(spans)
    for channel in graph.channels:
        times = [[s[3] - s[2] for s in found if s[1] == channel] for found in (spans, short)]
        assert sum(times[0]) == pytest.approx(sum(times[1]))
    computing = [s for s in short if s[1] == COMPUTE]
    assert all(after[2] > before[3] for before, after in itertools.pairwise(computing))
    assert [s for s in spans if s[1] != COMPUTE] == [s for s in short if s[1] != COMPUTE]


def test_text() -> None:
    tasks = (Task("load", "link", 1.0), Task("use", "compute", 2.0, (0,)), Task("next", "link", 1.5))
    text = text_timeline(run_order(TaskGraph(tasks), (0, 2, 1)), 12)
    assert text.splitlines() == ["compute │    ████████│ 67 % busy", "link    │██████████  │ 83 % busy"]
    assert text_timeline(run_order(TaskGraph(()), ())) == ""


def test_svg() -> None:
    """A well-formed picture whose lines are as full as the channels are busy, and the same each time."""
    before = (("load", "link <1>", 0.0, 2.0), ("use", COMPUTE, 2.0, 4.0))
    after = (("load", "link <1>", 0.0, 2.0), ("use", COMPUTE, 0.0, 1.0))
    picture = svg_timelines({"as captured": before, "as planned": after}, "a & b", 40)
    assert picture == svg_timelines({"as captured": before, "as planned": after}, "a & b", 40)
    root = ElementTree.fromstring(picture)
    texts = [(e.text or "").replace("\xa0", " ") for e in root.iter() if e.tag.endswith("}text")]
    assert "a & b" in texts and "as captured: 4000.000 ms" in texts and "as planned: 2000.000 ms" in texts
    assert [t.count("█") for t in texts if "█" in t] == [20, 20, 10, 20]
    assert sum("link <1>" in t for t in texts) == 2
    assert [t for t in texts if "busy" in t] == ["│ 50 % busy"] * 3 + ["│ 100 % busy"]
    assert ElementTree.fromstring(svg_timelines({})).tag.endswith("}svg")
