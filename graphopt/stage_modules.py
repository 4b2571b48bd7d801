"""The stages of a traced model as modules, for `graphopt.distributed`.

A stage takes what the one before it puts out, and the model's own inputs by name. What depends on no
parameter (masks, positions, tables of a rotary embedding) is not sent along: each stage that needs it
makes it from the inputs. The last stage puts out what the model returns.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from graphopt.errors import PlanError
from graphopt.passes.stage_partition import StagePlan
from graphopt.program import Program, Role
from graphopt.split import late_nodes


class StageModule(nn.Module):
    """One stage of a traced model; its parameters are the model's own.

    `inputs` are the names of the model's inputs that it reads; others that are given are ignored.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[str]) -> None:
        super().__init__()
        self.graph, self.inputs = graph, tuple(inputs)

    def forward(self, *received: Tensor, **inputs: Any) -> Any:
        """What the next stage takes: a tensor, or several."""
        made = self.graph(*received, *(inputs[name] for name in self.inputs))
        return made[0] if len(made) == 1 else made


def stage_modules(
    program: Program,
    plan: StagePlan,
    model: nn.Module,
    *,
    stage_devices: Sequence[Sequence[int]] = (),
) -> tuple[StageModule, ...]:
    """`model`, traced as `program`, in the stages of `plan`, which share its parameters.

    A microbatch has the shapes that were traced. Every rank gives `step` the model's inputs by name, and
    a `target`, which `own_loss` ignores where the model returns its loss:

        stages = stage_modules(program, cut_stages(program, costs, 4), model)
        schedule = pipeline_schedule(plan, {rank: stages[rank]}, own_loss, (), example_kwargs=microbatch)
        schedule.step(target=batch["labels"], return_outputs=False, **batch)

    Raises PlanError for a plan of another program, for a buffer that the model writes to, and for a
    parameter of several stages, unless `stage_devices` (of a `PipelinePlan`) puts them on one device.
    """
    written = [item.label for item in program.inputs if item.mutated]
    if written:
        raise PlanError(f"the model writes to {written[0]}, which a stage of a pipeline cannot")
    cut = _Cut(program, plan)
    cut.check_shared(stage_devices)
    return tuple(cut.module(stage, model) for stage in range(len(plan.last)))


def own_loss(output: Any, target: Any) -> Tensor:
    """The loss of stages that put out their loss, first of all."""
    loss: Tensor = output[0] if isinstance(output, tuple) else output
    return loss


class _Cut:
    """Which nodes of the forward belong to which stage."""

    def __init__(self, program: Program, plan: StagePlan) -> None:
        self.program = program
        late = late_nodes(program)
        self.items = {item.name: item for item in program.inputs}
        self.nodes = [n for n in program.operators() if n not in late]
        names = [n.name for n in self.nodes]
        if absent := [name for name in plan.last if name not in names]:
            raise PlanError(f"the plan was made for another program: it cuts after {absent[0]!r}")
        ends = [names.index(name) for name in plan.last]
        self.learned = self._learned()
        self.stage = {n: bisect_left(ends[:-1], place) for place, n in enumerate(self.nodes)}
        self.final = len(ends) - 1
        self.last = self._last_reads()

    def _learned(self) -> set[fx.Node]:
        """The nodes that depend on a parameter."""
        found: set[fx.Node] = set()
        for node in self.program.graph.nodes:
            item = self.items.get(node.name)
            is_parameter = item is not None and item.role is Role.PARAMETER
            if is_parameter or any(source in found for source in node.all_input_nodes):
                found.add(node)
        return found

    def _last_reads(self) -> dict[fx.Node, int]:
        """For each node, the last stage that reads it."""
        found: dict[fx.Node, int] = {}
        for node in self.nodes:
            if node in self.learned:
                for source in node.all_input_nodes:
                    found[source] = max(found.get(source, 0), self.stage[node])
        found.update({n: self.final for n in self.program.forward_outputs if isinstance(n, fx.Node)})
        return found

    def crossing(self, stage: int) -> list[fx.Node]:
        """What is sent to `stage`: values of earlier ones that it, or a later one, reads."""
        return [
            n for n in self.nodes if n in self.learned and self.stage[n] < stage <= self.last.get(n, -1)
        ]

    def check_shared(self, stage_devices: Sequence[Sequence[int]]) -> None:
        """PlanError for a parameter of several stages on different devices."""
        readers: dict[str, set[int]] = {}
        for node in self.nodes:
            for source in node.all_input_nodes:
                readers.setdefault(source.name, set()).add(self.stage[node])
        for name, item in self.items.items():
            users = readers.get(name, set())
            places = {tuple(stage_devices[s]) if stage_devices else (s,) for s in users}
            if item.role is Role.PARAMETER and len(places) > 1:
                raise PlanError(
                    f"stages {sorted(users)} read {item.label}: put them on one device, or split it with "
                    "PipelineVocabulary"
                )

    def module(self, stage: int, model: nn.Module) -> StageModule:
        """The stage as a module."""
        is_final = stage == self.final
        outputs = list(self.program.forward_outputs) if is_final else self.crossing(stage + 1)
        wanted = [n for n in self.nodes if self.stage[n] == stage and n in self.learned]
        needed = self._needed([*wanted, *(n for n in outputs if isinstance(n, fx.Node))], stage)
        graph, env, holder = fx.Graph(), dict[fx.Node, fx.Node](), nn.Module()
        for node in self.crossing(stage):
            env[node] = graph.placeholder(node.name)
        inputs = []
        for node in needed:
            item = self.items.get(node.name) if node.op == "placeholder" else None
            if node in env:
                continue
            if item is None:
                env[node] = graph.node_copy(node, lambda n: env[n])
                if node.op == "get_attr":
                    setattr(holder, str(node.target), getattr(self.program.module, str(node.target)))
            elif item.role is Role.INPUT:
                env[node] = graph.placeholder(node.name)
                inputs.append(item.label)
            else:
                env[node] = graph.get_attr(_registered(holder, model, item.label))
        graph.output(tuple(env[n] if isinstance(n, fx.Node) else n for n in outputs))
        _placeholders_first(graph)
        return StageModule(fx.GraphModule(holder, graph), inputs)

    def _needed(self, wanted: Iterable[fx.Node], stage: int) -> list[fx.Node]:
        """`wanted` and all that they are made of in this stage, in the order of the program."""
        found: set[fx.Node] = set()
        outside = set(self.crossing(stage))
        stack = list(wanted)
        while stack:
            node = stack.pop()
            if node not in found:
                found.add(node)
                stack += () if node in outside else node.all_input_nodes
        return [n for n in self.program.graph.nodes if n in found]


def _registered(holder: nn.Module, model: nn.Module, label: str) -> str:
    """The name under which `holder` has the model's parameter or buffer `label`."""
    path, _, name = label.rpartition(".")
    found = getattr(model.get_submodule(path), name)
    flat = label.replace(".", "_")
    if isinstance(found, nn.Parameter):
        holder.register_parameter(flat, found)
    else:
        holder.register_buffer(flat, found)
    return flat


def _placeholders_first(graph: fx.Graph) -> None:
    """Inputs before everything else, in their order."""
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    first = next(iter(graph.nodes))
    for node in inputs:
        if node is not first:
            first.prepend(node) if first.op != "placeholder" else first.append(node)
            first = node
    graph.lint()
