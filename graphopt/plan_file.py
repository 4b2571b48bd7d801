"""Plan files: what passes decided for each graph of a model, to be carried out later without planning."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from graphopt import __version__
from graphopt.cost_models.costs import Costs
from graphopt.errors import GraphoptError, PlanError
from graphopt.fingerprint import fingerprint
from graphopt.origin import operator_name
from graphopt.pass_syntax import parse_passes, pass_syntax, plan_class
from graphopt.passes.base import Pass
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.passes.pipeline import PassStep, run_passes
from graphopt.plan import Plan
from graphopt.program import Program, Role, tensors_of
from graphopt.ranks import check_same, groups_of

if TYPE_CHECKING:
    from graphopt.report import Report

SCHEMA = 1
_KIND = "graphopt plan"  # what the file says that it is


@dataclass(frozen=True)
class GraphPlan:
    """The passes of one graph, in order, each with its plan; and what graph that is.

    `inputs` are the inputs without parameters, as text (`input_ids int64[2, 32]`), and `operators` how
    often each operator is called: they say in what a graph of another `fingerprint` differs.
    """

    fingerprint: str
    is_training: bool
    inputs: tuple[str, ...]
    operators: tuple[tuple[str, int], ...]
    steps: tuple[tuple[Pass, Plan], ...]

    @staticmethod
    def of(program: Program, steps: Sequence[tuple[Pass, Plan]] = ()) -> "GraphPlan":
        """What `program` is, and what is planned for it."""
        counts = Counter(operator_name(node) for node in program.operators())
        return GraphPlan(
            fingerprint(program),
            program.is_joint,
            tuple(_inputs(program)),
            tuple(sorted(counts.items())),
            tuple(steps),
        )

    def difference(self, found: "GraphPlan") -> str:
        """In what the graph `found` differs from this one, with both values."""
        if self.is_training is not found.is_training:
            kinds = {True: "a training step", False: "a forward only"}
            return f"it is for {kinds[self.is_training]}, and this is {kinds[found.is_training]}"
        for mine, other in zip(self.inputs, found.inputs, strict=False):
            if mine != other:
                return f"its input is {mine}, and here it is {other}"
        if len(self.inputs) != len(found.inputs):
            return f"it has {len(self.inputs)} inputs, and here are {len(found.inputs)}"
        mine_of, other_of = dict(self.operators), dict(found.operators)
        for name in sorted({*mine_of, *other_of}):
            counts = mine_of.get(name, 0), other_of.get(name, 0)
            if counts[0] != counts[1]:
                return f"its graph calls {name} {counts[0]} times, and this one {counts[1]} times"
        prints = self.fingerprint[:12], found.fingerprint[:12]
        return f"its graph has the fingerprint {prints[0]}, and this one, of other sizes, {prints[1]}"


@dataclass(frozen=True)
class PlanFile:
    """The plans of a model, as they stand in a file; carried out by `optimize(model, plan=...)`.

    `model` and `options` say on the command line which model it is (`options` is None for plans made in
    Python). `compiler` and `device` are those of `optimize`.

    >>> from graphopt import Checkpoint, optimize
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> small = optimize(net, passes=[Checkpoint(memory="min")], device="h100")
    >>> small(torch.ones(3, 4)).sum().backward()
    >>> plan = PlanFile.from_json(PlanFile.of(small.report).to_json())
    >>> optimize(net, plan=plan, device="h100")(torch.ones(3, 4)).shape
    torch.Size([3, 1])
    >>> optimize(net, plan=plan, device="h100")(torch.ones(5, 4))
    Traceback (most recent call last):
    graphopt.errors.PlanError: Sequential: the plan is for another graph: its input is args[0]
    float32[3, 4], and here it is args[0] float32[5, 4]
    """

    model: str
    compiler: str
    device: str
    graphs: tuple[GraphPlan, ...]
    options: Mapping[str, Any] | None = None
    torch_version: str = str(torch.__version__)
    graphopt_version: str = __version__
    source: str = field(default="the plan", compare=False)  # what messages call it

    @staticmethod
    def of(
        report: "Report", model: str | None = None, options: Mapping[str, Any] | None = None
    ) -> "PlanFile":
        """The plans behind `report`, of every graph that the last call ran."""
        if not report.records:
            raise GraphoptError(f"nothing is planned for {report.name} yet: call it once")
        graphs = (
            GraphPlan.of(record.before, [(step.pass_, step.plan) for step in record.steps])
            for record in report.records
        )
        settings = report.settings
        return PlanFile(
            model or report.name, settings.compiler, settings.device.name, tuple(graphs), options
        )

    @property
    def passes(self) -> tuple[Pass, ...]:
        """The passes, each once."""
        found: list[Pass] = []
        for graph in self.graphs:
            found += [pass_ for pass_, _ in graph.steps if pass_ not in found]
        return tuple(found)

    def knows(self, program: Program) -> bool:
        """True where there are plans for exactly this graph."""
        return fingerprint(program) in {graph.fingerprint for graph in self.graphs}

    def run(
        self,
        program: Program,
        passes: Sequence[Pass],
        costs_of: Callable[[Program], Costs],
        clock: Callable[[], float],
    ) -> tuple[Program, tuple[PassStep, ...]]:
        """`run_passes` with the passes and plans that are here for `program`, which `passes` lists."""
        steps = self.steps_for(program)
        plans = [plan for _, plan in steps]
        return run_passes(program, [pass_ for pass_, _ in steps], costs_of, clock, plans)

    def steps_for(self, program: Program) -> tuple[tuple[Pass, Plan], ...]:
        """The passes for `program`, and their plans; PlanError where they are for another graph.

        A forward alone runs as it is captured where the file has plans of training steps only.
        """
        if self.torch_version != torch.__version__:
            versions = f"torch {self.torch_version}, and this is torch {torch.__version__}"
            raise PlanError(f"{self.source} was made with {versions}")
        found = GraphPlan.of(program)
        for graph in self.graphs:
            if graph.fingerprint == found.fingerprint:
                orders = [repr(plan.order) for _, plan in graph.steps if isinstance(plan, OverlapPlan)]
                check_same(groups_of(program) if orders else (), orders, "the orders of the plan files")
                return graph.steps
        if not found.is_training and all(graph.is_training for graph in self.graphs):
            return ()
        alike = [graph for graph in self.graphs if graph.is_training is found.is_training]
        raise PlanError(
            f"{self.source} is for another graph: {(alike or self.graphs)[0].difference(found)}"
        )

    def to_json(self) -> str:
        """The file as text: `schema`, versions, model, options, and `graphs` with their passes and plans.

        Each of `steps` has `pass`, text for `parse_passes`, and `plan`, as `Plan.to_json` has it.
        """
        data = {
            "kind": _KIND,
            "schema": SCHEMA,
            **{name: getattr(self, name) for name in _TEXTS},
            "options": self.options,
            "graphs": [_graph_to_json(graph) for graph in self.graphs],
        }
        return json.dumps(data, indent=1)

    @staticmethod
    def from_json(text: str, source: str = "the plan") -> "PlanFile":
        """The file that `to_json` wrote; PlanError says what else `text` is."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"{source} is no plan file: {error}") from None
        if not isinstance(data, dict) or data.get("kind") != _KIND:
            raise PlanError(f'{source} is no plan file: it does not say "kind": "{_KIND}"')
        if data.get("schema") != SCHEMA:
            raise PlanError(f"{source} has schema {data.get('schema')}, and this version reads {SCHEMA}")
        try:
            texts = {name: str(data[name]) for name in _TEXTS}
            graphs = tuple(_graph_from_json(graph) for graph in data["graphs"])
            return PlanFile(**texts, graphs=graphs, options=data["options"], source=source)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PlanError(f"{source} is incomplete: {type(error).__name__} {error}") from None

    @staticmethod
    def load(path: str | Path) -> "PlanFile":
        """Read a file; GraphoptError where there is none, PlanError where it is no plan file."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise GraphoptError(f"cannot read {path}: {reason}") from None
        return PlanFile.from_json(text, str(path))

    def save(self, path: str | Path) -> None:
        """Write a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")


_TEXTS = ("graphopt_version", "torch_version", "model", "compiler", "device")


def held_or_given(
    plan: PlanFile | None, compiler: str, passes: Sequence[Any] | None, others: Sequence[object]
) -> Sequence[Any] | None:
    """The passes of `plan`, if there is one; GraphoptError where something else decides, too."""
    if plan is None:
        return passes
    if passes is not None or any(other is not None for other in others):
        raise GraphoptError("give either plan= or passes=, a budget or mesh=: a plan is made already")
    if plan.compiler != compiler:
        raise GraphoptError(
            f"{plan.source} is for compiler={plan.compiler!r}, and here it is {compiler!r}"
        )
    return plan.passes


def _inputs(program: Program) -> list[str]:
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    found = []
    for item in program.inputs:
        tensor = next(iter(tensors_of(nodes[item.name])), None)
        if item.role is Role.INPUT and tensor is not None:
            shape = ", ".join(str(size) for size in tensor.shape)
            name = f"args[{item.label}]" if item.label.isdigit() else item.label
            found.append(f"{name} {str(tensor.dtype).removeprefix('torch.')}[{shape}]")
    return found


def _graph_to_json(graph: GraphPlan) -> dict[str, Any]:
    steps = [{"pass": pass_syntax(p), "plan": json.loads(plan.to_json())} for p, plan in graph.steps]
    return {
        "fingerprint": graph.fingerprint,
        "is_training": graph.is_training,
        "inputs": graph.inputs,
        "operators": dict(graph.operators),
        "steps": steps,
    }


def _graph_from_json(data: Mapping[str, Any]) -> GraphPlan:
    steps = []
    for step in data["steps"]:
        (pass_,) = parse_passes(step["pass"])
        steps.append((pass_, plan_class(type(pass_)).from_json(json.dumps(step["plan"]))))
    return GraphPlan(
        str(data["fingerprint"]),
        bool(data["is_training"]),
        tuple(data["inputs"]),
        tuple(sorted(data["operators"].items())),
        tuple(steps),
    )
