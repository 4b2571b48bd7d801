"""What `optimize` did and what it is worth: one object that prints, and writes JSON and HTML."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from graphopt import __version__
from graphopt.graph_report import GraphReport
from graphopt.runtime import GraphRecord, Log, Settings
from graphopt.timeline import CATEGORIES, MemoryTimeline

if TYPE_CHECKING:
    from graphopt.comparison import StepComparison
    from graphopt.mesh_facts import MeshFacts
    from graphopt.passes.base import Pass

SCHEMA = 1
TIMELINE_POINTS = 500  # of a timeline in JSON: the fullest step of each stretch


@dataclass(frozen=True)
class GraphBreak:
    """A place where the model was cut into two graphs: `file:line`, the code there, the reason."""

    place: str
    code: str
    reason: str


@dataclass(frozen=True, eq=False)
class Report:
    """What was captured, planned, predicted and measured, at the time the report was made.

    `records` are the graphs that the last call ran (several only at graph breaks) and
    `other_graphs` counts those compiled for other calls. Peaks are bytes of the whole step:
    parameters, buffers, inputs, gradients and activations. A report on a rank of a `mesh` says what that
    rank communicates.
    """

    name: str
    settings: Settings
    records: tuple[GraphRecord, ...]
    other_graphs: int
    breaks: tuple[GraphBreak, ...]
    measured: "StepComparison | None" = None
    mesh: "MeshFacts | None" = None

    @staticmethod
    def of(name: str, settings: Settings, log: Log) -> "Report":
        """The report of what `log` holds now."""
        last = sorted(log.last_run) or range(len(log.records))
        records = tuple(log.records[i] for i in last)
        breaks = tuple(dict.fromkeys(log.breaks))
        return Report(
            name,
            settings,
            records,
            len(log.records) - len(records),
            tuple(_graph_break(text) for text in breaks),
            log.measured,
        )

    @cached_property
    def graphs(self) -> tuple[GraphReport, ...]:
        """The facts about each graph of the last call, in the order they ran."""
        return tuple(GraphReport.of(record) for record in self.records)

    @property
    def predicted_peak_bytes(self) -> int | None:
        """The predicted peak of the optimised step; None before the first call."""
        return max((g.peak_bytes for g in self.graphs), default=None)

    @property
    def baseline_peak_bytes(self) -> int | None:
        """The predicted peak of the step with everything kept; None before the first call."""
        return max((g.baseline_peak_bytes for g in self.graphs), default=None)

    @property
    def measured_peak_bytes(self) -> int | None:
        """The measured peak of the optimised step; None until `measure` was called."""
        if self.measured is None:
            return None
        return self.measured.static_bytes + self.measured.optimized.peak_bytes

    @property
    def measured_baseline_bytes(self) -> int | None:
        """The measured peak of the plain step; None until `measure` was called."""
        if self.measured is None:
            return None
        return self.measured.static_bytes + self.measured.plain.peak_bytes

    def __str__(self) -> str:
        from graphopt.report_text import report_text

        return report_text(self)

    __repr__ = __str__

    @property
    def passes(self) -> "tuple[Pass, ...]":
        """What was asked for of training steps; of inference, where no graph has a backward."""
        forward = self.graphs and not any(graph.is_training for graph in self.graphs)
        return self.settings.inference_passes if forward else self.settings.passes

    def to_json(self) -> str:
        """The report as JSON text, with these keys; sizes are bytes, times are seconds.

        - `schema`: 1; a later schema that drops or changes a key has another number.
        - `graphopt`, `model`, `device`, `compiler`: texts; `passes`: each pass as text.
        - `predicted_peak_bytes`, `baseline_peak_bytes`, `measured_peak_bytes`,
          `measured_baseline_bytes`: as the attributes; null where not known.
        - `measured`: null, or `plain` and `optimized`, each with `peak_bytes`, `activation_bytes`
          (both above what was live before the step) and `seconds`; `static_bytes` were live.
        - `graphs`: a list of objects with the fields of `GraphReport`. Its `before` and `after` are
          timelines: `forward_steps` and `steps` (their number), and lists of equal length, `step`
          and one for each of static, kept, recomputed, gradients, transients: the fullest step of
          each stretch of the run, at most 500.
        - `other_graphs`: number of graphs of earlier calls with other shapes.
        - `breaks`: a list of objects with `place`, `code` and `reason`.
        - `mesh`: null, or the fields of `MeshFacts` but its runs, and `hidden_seconds`.

        `graphopt/report.schema.json` is a JSON Schema of it.
        """
        peaks = (
            "predicted_peak_bytes",
            "baseline_peak_bytes",
            "measured_peak_bytes",
            "measured_baseline_bytes",
        )
        data = {
            "schema": SCHEMA,
            "graphopt": __version__,
            "model": self.name,
            "device": self.settings.device.name,
            "compiler": self.settings.compiler,
            "passes": [repr(p) for p in self.passes],
            **{name: getattr(self, name) for name in peaks},
            "measured": None if self.measured is None else asdict(self.measured),
            "graphs": [_graph_json(g) for g in self.graphs],
            "other_graphs": self.other_graphs,
            "breaks": [asdict(b) for b in self.breaks],
            "mesh": None if self.mesh is None else self.mesh.to_dict(),
        }
        return json.dumps(data, indent=1)

    def chrome_trace(self) -> str:
        """The predicted step as JSON for `chrome://tracing` or Perfetto.

        Lanes are the forward, the backward, what is recomputed and the transfers; the bytes alive by
        category are counters. GraphoptError before the first call.
        """
        from graphopt.traces import trace_of

        return trace_of(self)

    def memory_snapshot(self) -> bytes:
        """The predicted allocations as a pickle like torch's, for https://pytorch.org/memory_viz.

        Sizes are those asked for; addresses are made up, and each event takes a microsecond.
        GraphoptError before the first call.
        """
        from graphopt.traces import snapshot_of

        return snapshot_of(self)

    def to_html(self, budgets: int | None = None) -> str:
        """The report as one HTML page, which needs nothing else, not even a network.

        It has the memory of the step before and after, tensors and their lifetimes, modules, a roofline,
        transfers where a pass planned them, and all passes, kept tensors and recomputations. Where one
        of the passes is a `Checkpoint`, `budgets` budgets are planned for a curve of memory against
        time: 8 by default, fewer or none where planning one took long; below 3 there is no curve.
        GraphoptError where plotly is not installed.
        """
        from graphopt.html_page import report_html

        return report_html(self, budgets)

    def _repr_html_(self) -> str:
        """Tables for a notebook."""
        from graphopt.report_tables import report_html

        return report_html(self)


def _graph_break(text: str) -> GraphBreak:
    """From `file:line: reason`, or a reason alone."""
    import linecache
    import re

    from graphopt.origin import short_path

    match = re.match(r"(?P<file>.+?):(?P<line>\d+): (?P<reason>.*)", text, re.DOTALL)
    if match is None:
        return GraphBreak("", "", text)
    code = linecache.getline(match["file"], int(match["line"])).strip()
    return GraphBreak(f"{short_path(match['file'])}:{match['line']}", code, match["reason"])


def _graph_json(graph: GraphReport) -> dict[str, Any]:
    """The fields of a graph, timelines thinned out."""
    plain = asdict(graph)
    plain["before"], plain["after"] = _timeline_json(graph.before), _timeline_json(graph.after)
    return plain


def _timeline_json(timeline: MemoryTimeline) -> dict[str, Any]:
    points = timeline.sampled(TIMELINE_POINTS)
    rows = zip(CATEGORIES, timeline.alive_bytes, strict=True)
    return {
        "forward_steps": timeline.forward_steps,
        "steps": len(timeline.operators),
        "step": points.tolist(),
        **{category: np.take(row, points).tolist() for category, row in rows},
    }
