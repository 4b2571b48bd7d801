"""Which pass, and which node, a wrong result comes from: graphs before and after, run node by node."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.deviation import Deviation, largest_difference
from graphopt.models import LoadedModel
from graphopt.numerics import made_up
from graphopt.origin import origin_of
from graphopt.passes.pipeline import PassStep
from graphopt.passes.replay import RECOMPUTE_OF
from graphopt.program import Program, Role
from graphopt.report_text import pass_text
from graphopt.runtime import GraphRecord

EPSILONS = 100  # of its largest element, up to which two ways to compute a value may differ


@dataclass(frozen=True)
class Fault:
    """Where results go wrong: after `pass_` (its text), first at `node` (its line); both "" if not found.

    `difference` is that of the node, relative to its largest element. `made_anew` are the lines of nodes
    that the pass made, which nothing before it can be compared with, and which `node` reads. `origin` is
    the line of the model.
    """

    pass_: str
    node: str
    difference: float
    made_anew: tuple[str, ...]
    origin: str

    def __str__(self) -> str:
        if not self.pass_:
            return "no pass changes what its graph computes: capture or lowering does"
        if not self.node:
            return f"it goes wrong in {self.pass_}; no single node differs"
        text = f"it goes wrong in {self.pass_}, first at {self.node} (by {self.difference:.1e})"
        if self.made_anew:
            text += f", which reads what the pass made: {'; '.join(self.made_anew)}"
        return f"{text}; in the model {self.origin}" if self.origin else text


def find_fault(records: Sequence[GraphRecord], loaded: LoadedModel, wrong: Sequence[Deviation]) -> Fault:
    """The first pass after which a graph gives other results, and the first node that differs there.

    Judged by are the results that are `wrong`: what the forward returns, and gradients by name. Graphs
    run on the inputs and parameters of `loaded` where they are known by name, and else on made-up
    numbers; gradients that come back to the outputs are ones.
    """
    for record in records:
        values = _inputs(record.before, loaded)
        before, judged = record.before, _judged(record.before, wrong)
        for step in record.steps:
            after = step.pass_.apply(before, step.plan)
            fault = _compare(before, after, values, step, judged)
            if fault is not None:
                return fault
            before = after
    return Fault("", "", 0.0, (), "")


def _judged(program: Program, wrong: Sequence[Deviation]) -> frozenset[int]:
    """The outputs of `program` that belong to `wrong`; all where none is known by its name."""
    names = {d.name for d in wrong if d.kind == "gradient"}
    count = program.num_forward_outputs
    found = {count + i for i, item in enumerate(program.inputs) if item.label in names}
    if any(d.kind != "gradient" for d in wrong):
        found |= set(range(count))
    return frozenset(found or range(len(program.outputs)))


def _compare(
    before: Program,
    after: Program,
    values: Mapping[str, Any],
    step: PassStep,
    judged: frozenset[int],
) -> Fault | None:
    """What `after` does wrong; None where the outputs `judged` are those of `before`."""
    known, found = (dict(_run(program, values)) for program in (before, after))
    pairs = [(before.outputs[i], after.outputs[i]) for i in sorted(judged) if i < len(before.outputs)]
    both = [(o.name, n.name) for o, n in pairs if isinstance(o, fx.Node) and isinstance(n, fx.Node)]
    if not any(_differs(found[new], known[old]) for old, new in both):
        return None
    for node in after.operators():
        name = node.meta.get(RECOMPUTE_OF, node.name)
        if name in known and (difference := _differs(found[node.name], known[name])):
            anew = [n.format_node() or n.name for n in _made_anew(node, known)]
            place = origin_of(node)
            origin = f"{place.place}: {place.code}" if place.place else ""
            line = node.format_node() or node.name
            return Fault(pass_text(step.pass_), line, difference, tuple(anew), origin)
    return Fault(pass_text(step.pass_), "", 0.0, (), "")


def _made_anew(node: fx.Node, known: Mapping[str, Any]) -> list[fx.Node]:
    """The nodes without a counterpart that `node` reads, through one another, in the graph's order."""
    found: dict[fx.Node, None] = {}
    waiting = list(node.all_input_nodes)
    while waiting:
        source = waiting.pop()
        if source.meta.get(RECOMPUTE_OF, source.name) not in known and source not in found:
            found[source] = None
            waiting += source.all_input_nodes
    return sorted(found)


def _run(program: Program, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The value of each node, by name, from the same random numbers."""
    kept: dict[str, Any] = {}

    class _Keeping(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            kept[n.name] = super().run_node(n)
            return kept[n.name]

    copies = [_copy(values[n.name]) for n in program.graph.nodes if n.op == "placeholder"]
    with _disable_current_modes(), torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        interpreter = _Keeping(program.module, garbage_collect_values=False)
        interpreter.run(*copies, enable_io_processing=False)
    return iter(kept.items())


def _copy(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def _differs(new: Any, old: Any) -> float:
    """How far two values differ, relative to the largest element; 0 for what rounding explains.

    Values that cannot be compared, of different shapes for one, do not count.
    """
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)):
        return max((_differs(n, o) for n, o in zip(new, old, strict=False)), default=0.0)
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        return 0.0
    if old.shape != new.shape or old.dtype != new.dtype or not old.numel():
        return 0.0
    scale = float(old.double().abs().nan_to_num(0.0, 0.0, 0.0).max())
    bound = EPSILONS * torch.finfo(old.dtype).eps if old.is_floating_point() else 0.0
    difference = largest_difference(new, old) / max(scale, 1e-30)
    return difference if difference > bound else 0.0


def _inputs(program: Program, loaded: LoadedModel) -> dict[str, Any]:
    """A value for each input of `program`, by the name of its node."""
    known: dict[str, Any] = {
        **dict(loaded.model.named_parameters(remove_duplicate=False)),
        **dict(loaded.model.named_buffers(remove_duplicate=False)),
        **_by_name(loaded.model, loaded),
    }
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    found = {}
    for item in program.inputs:
        made = made_up(nodes[item.name])
        given = known.get(item.label)
        if item.role is Role.TANGENT and isinstance(made, torch.Tensor):
            made = torch.ones_like(made)
        shapes = [v.shape if isinstance(v, torch.Tensor) else None for v in (made, given)]
        found[item.name] = given if shapes[0] == shapes[1] and given is not None else made
    return found


def _by_name(model: nn.Module, loaded: LoadedModel) -> dict[str, Any]:
    """The example inputs by the names of the forward's arguments."""
    kwargs = dict(loaded.example_kwargs)
    names = [n for n in inspect.signature(model.forward).parameters if n not in kwargs]
    positional = dict(zip(names, loaded.example_args, strict=False))
    return {**kwargs, **positional, **{f"args[{i}]": a for i, a in enumerate(loaded.example_args)}}
