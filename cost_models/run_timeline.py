"""Runs of task graphs as pictures: a Chrome trace, and lines of text."""

import json
from collections.abc import Mapping, Sequence

from graphopt.cost_models.overlap_run import Run
from graphopt.cost_models.task_graph import COMPUTE

_MICRO = 1e6  # a trace counts in microseconds
_GLYPHS = " ░▒▓█"
_GAP_S = 1e-12

Span = tuple[str, str, float, float]  # name, channel, when it begins and ends in seconds


def spans_of(run: Run, begin_s: float = 0.0) -> tuple[Span, ...]:
    """When each task of `run` was on its channel, in their order, from `begin_s` on."""
    tasks = run.graph.tasks
    return tuple(
        (
            tasks[i].name,
            tasks[i].channel,
            begin_s + float(run.begin[i]),
            begin_s + float(run.end[i]),
        )
        for i in run.order
    )


def joined(spans: Sequence[Span]) -> tuple[Span, ...]:
    """`spans` with neighbours of the compute channel that no wait parts as one, named by first and last.

    >>> joined((("a", "compute", 0.0, 1.0), ("b", "compute", 1.0, 3.0), ("c", "compute", 4.0, 5.0)))
    (('a to b', 'compute', 0.0, 3.0), ('c', 'compute', 4.0, 5.0))
    """
    found: list[Span] = []
    last = -1  # of `found`, the span that is computed last
    for name, channel, begin, end in spans:
        if channel == COMPUTE and last >= 0 and begin - found[last][3] <= _GAP_S:
            first = found[last][0].split(" to ")[0]
            found[last] = (f"{first} to {name}", channel, found[last][2], end)
            continue
        if channel == COMPUTE:
            last = len(found)
        found.append((name, channel, begin, end))
    return tuple(found)


def chrome_trace(timelines: Mapping[str, Sequence[Span]]) -> str:
    """JSON for `chrome://tracing` or Perfetto: a process for each timeline, a thread for each channel.

    Complete events ("X") of the Trace Event Format.

    >>> trace = chrome_trace({"plan": [("a", "compute", 0.0, 2.0)]})
    >>> json.loads(trace)["traceEvents"][-1]["dur"]
    2000000.0
    """
    events: list[dict[str, object]] = []
    for process, (title, spans) in enumerate(timelines.items()):
        events.append(_named("process_name", process, 0, title))
        channels = dict.fromkeys((COMPUTE, *(span[1] for span in spans)))
        lanes = {channel: lane for lane, channel in enumerate(channels)}
        events += [_named("thread_name", process, lane, channel) for channel, lane in lanes.items()]
        for name, channel, begin, end in spans:
            place = {"pid": process, "tid": lanes[channel], "ts": begin * _MICRO}
            events.append({"ph": "X", "name": name, **place, "dur": (end - begin) * _MICRO})
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, indent=1)


def text_timeline(run: Run, width: int = 70) -> str:
    """One line for each channel: how busy it is in each of `width` stretches of the time.

    >>> from graphopt.cost_models.overlap_run import run_order
    >>> from graphopt.cost_models.task_graph import Task, TaskGraph
    >>> tasks = Task("load", "link", 1.0), Task("use", "compute", 1.0, (0,))
    >>> print(text_timeline(run_order(TaskGraph(tasks), (0, 1)), 8))
    compute │    ████│ 50 % busy
    link    │████    │ 50 % busy
    """
    total = run.seconds
    if not total:
        return ""
    label = max(map(len, run.graph.channels))
    lines = []
    for channel in run.graph.channels:
        busy = [0.0] * width
        for index, task in enumerate(run.graph.tasks):
            if task.channel == channel:
                _add(busy, run.begin[index] / total * width, run.end[index] / total * width)
        cells = "".join(_GLYPHS[min(4, int(share * 4 + 0.5))] for share in busy)
        lines.append(f"{channel:<{label}} │{cells}│ {100 * sum(busy) / width:.0f} % busy")
    return "\n".join(lines)


def _add(busy: list[float], begin: float, end: float) -> None:
    """Add a span, in cells, to the share that each cell is busy."""
    for cell in range(int(begin), min(len(busy), int(end) + 1)):
        busy[cell] += max(0.0, min(end, cell + 1) - max(begin, cell))


def _named(what: str, process: int, thread: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
