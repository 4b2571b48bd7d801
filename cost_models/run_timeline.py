"""Runs of task graphs as pictures: a Chrome trace, an SVG, and lines of text."""

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from graphopt.cost_models.overlap_run import Run
from graphopt.cost_models.task_graph import COMPUTE

if TYPE_CHECKING:
    from rich.text import Text

_MICRO = 1e6  # a trace counts in microseconds
_GLYPHS = " ░▒▓█"
_GAP_S = 1e-12
_COLOURS = ("bright_blue", "yellow", "green", "magenta", "cyan")  # computing first

Span = tuple[str, str, float, float]  # name, channel, when it begins and ends in seconds
Reading = tuple[float, Mapping[str, int]]  # seconds, and bytes by what they are


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


def chrome_trace(
    timelines: Mapping[str, Sequence[Span]], counters: Mapping[str, Sequence[Reading]] | None = None
) -> str:
    """JSON for `chrome://tracing` or Perfetto: a process for each timeline, a thread for each channel.

    Complete events ("X") of the Trace Event Format, and, for a timeline with `counters`, stacked bytes
    ("C") from each moment on.

    >>> trace = chrome_trace({"plan": [("a", "compute", 0.0, 2.0)]})
    >>> json.loads(trace)["traceEvents"][-1]["dur"]
    2000000.0
    """
    events: list[dict[str, object]] = []
    for process, (title, spans) in enumerate(timelines.items()):
        events.append(_named("process_name", process, 0, title))
        used = dict.fromkeys(span[1] for span in spans)
        first = [COMPUTE] if COMPUTE in used or not used else []
        channels = dict.fromkeys([*first, *used])
        lanes = {channel: lane for lane, channel in enumerate(channels)}
        events += [_named("thread_name", process, lane, channel) for channel, lane in lanes.items()]
        for name, channel, begin, end in spans:
            place = {"pid": process, "tid": lanes[channel], "ts": begin * _MICRO}
            events.append({"ph": "X", "name": name, **place, "dur": (end - begin) * _MICRO})
        for seconds, nbytes in (counters or {}).get(title, ()):
            moment = {"ph": "C", "name": "bytes", "pid": process, "ts": seconds * _MICRO}
            events.append({**moment, "args": dict(nbytes)})
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
        cells, busy = _cells(spans_of(run), channel, total, width)
        lines.append(f"{channel:<{label}} │{cells}│ {100 * busy:.0f} % busy")
    return "\n".join(lines)


def svg_timelines(timelines: Mapping[str, Sequence[Span]], title: str = "", width: int = 100) -> str:
    """An SVG: below the name of each timeline a line for each channel, on one scale of time.

    A cell is the fuller, the longer its channel is busy in that stretch of the time. Drawn by rich.

    >>> svg_timelines({"plan": [("a", "compute", 0.0, 2.0)]}).splitlines()[0][:4]
    '<svg'
    """
    from rich.text import Text

    spans = [span for found in timelines.values() for span in found]
    total = max((end for _, _, _, end in spans), default=0.0)
    channels = tuple(dict.fromkeys((COMPUTE, *(channel for _, channel, _, _ in spans))))
    label = max(map(len, channels))
    lines = []
    for name, found in timelines.items():
        seconds = max((end for _, _, _, end in found), default=0.0)
        lines.append(Text(f"{name}: {seconds * 1e3:.3f} ms", "bold"))
        for place, channel in enumerate(channels):
            cells, busy = _cells(found, channel, total, width)
            line = Text(f"{channel:<{label}} │").append(cells, _COLOURS[place % len(_COLOURS)])
            share = 100 * busy * total / seconds if seconds else 0.0
            lines.append(line.append(f"│ {share:.0f} % busy"))
    return svg_of(lines, title, label + width + 14)


def svg_of(lines: "Sequence[Text]", title: str, width: int) -> str:
    """An SVG of lines of styled text, `width` characters wide; the same one for the same lines."""
    from rich.console import Console

    console = Console(
        record=True,
        file=io.StringIO(),
        width=width,
        color_system="truecolor",
        force_jupyter=False,  # in a notebook it would show the lines as well
    )
    for line in lines:
        console.print(line, overflow="crop", no_wrap=True)
    identity = hashlib.sha256(repr((title, [(x.plain, x.spans) for x in lines])).encode()).hexdigest()[
        :12
    ]
    return console.export_svg(title=title, unique_id=f"timeline-{identity}")


def _cells(spans: Sequence[Span], channel: str, total: float, width: int) -> tuple[str, float]:
    """How busy `channel` is in each of `width` stretches of `total` seconds, and its share of it all."""
    busy = [0.0] * width
    for _, where, begin, end in spans:
        if where == channel and total:
            _add(busy, begin / total * width, end / total * width)
    return "".join(_GLYPHS[min(4, int(share * 4 + 0.5))] for share in busy), sum(busy) / width


def _add(busy: list[float], begin: float, end: float) -> None:
    """Add a span, in cells, to the share that each cell is busy."""
    for cell in range(int(begin), min(len(busy), int(end) + 1)):
        busy[cell] += max(0.0, min(end, cell + 1) - max(begin, cell))


def _named(what: str, process: int, thread: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": what, "pid": process, "tid": thread, "args": {"name": name}}
