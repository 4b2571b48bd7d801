"""Carrying out a choice of kept values: the backward rewritten to recompute what was not kept.

The result is again one joint graph. Its order is the order of execution, and every recomputation is a
node of its own, tagged as part of the backward, so that everything that reads a Program (costs,
memory, the split into two modules) sees exactly what will run.
"""

from collections.abc import Collection
from operator import getitem as _getitem
from typing import Any

import torch
from torch import fx
from torch._prims.rng_prims import run_and_save_rng_state, run_with_rng_state

from graphopt import ops
from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.schedule import Step
from graphopt.program import LEAVES, Leaf, Program, leaves

RECOMPUTE_OF = "graphopt_recompute_of"


def with_recomputation(
    program: Program, flow: Dataflow, keep: Collection[int], steps: list[Step]
) -> Program:
    """`program` with only the values `keep` carried from the forward into the backward.

    `steps` are what the backward runs, in order; what reads a value reads its newest copy.
    """
    return _Replay(program, flow, frozenset(keep)).build(steps)


class _Replay:
    def __init__(self, program: Program, flow: Dataflow, keep: frozenset[int]) -> None:
        self.program = program
        self.flow = flow
        self.keep = keep
        self.graph = fx.Graph()
        self.forward: dict[fx.Node, fx.Node] = {}
        self.current: dict[fx.Node, fx.Node] = {}
        self.views: dict[fx.Node, tuple[tuple[fx.Node, ...], fx.Node]] = {}
        self.states: dict[fx.Node, fx.Node] = {}
        nodes = list(program.graph.nodes)
        self.nodes = {n.name: n for n in nodes}
        self.operator_of = {self.nodes[o.name]: o for o in flow.operators}
        self.carriers = self._carriers()

    def build(self, steps: list[Step]) -> Program:
        for node in self.program.graph.nodes:
            if node.op != "output" and node.name not in self.flow.late:
                self._copy_forward(node)
        for step in steps:
            node = self.nodes[self.flow.operators[step.operator].name]
            self._run(node, frozenset(step.makes))
        old = self.program.graph.output_node()
        count = self.program.num_forward_outputs
        results = tuple(self._at_forward(o) for o in self.program.forward_outputs) + tuple(
            self._resolve(o) if isinstance(o, fx.Node) else o for o in self.program.outputs[count:]
        )
        output = self.graph.output(results)
        output.meta = dict(old.meta)
        self.graph.eliminate_dead_code()
        module = fx.GraphModule(self.program.module, self.graph)
        return Program(module, count, self.program.inputs, self.program.breaks)

    def _at_forward(self, output: Any) -> Any:
        return self.forward[output] if isinstance(output, fx.Node) else output

    def _carriers(self) -> dict[int, fx.Node]:
        """For each kept value, the node of the forward that is saved: its maker, or the getitem of it."""
        found: dict[int, fx.Node] = {}
        for node in self.program.graph.nodes:
            if node.op == "output" or node.name in self.flow.late:
                continue
            values = self.flow.value_of[node.name]
            is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
            if is_tensor and len(values) == 1 and values[0] in self.keep:
                found.setdefault(values[0], node)
        return found

    def _copy_forward(self, node: fx.Node) -> None:
        operator = self.operator_of.get(node)
        if operator is not None and operator.state is not None and operator.state in self.keep:
            self._copy_saving_state(node)
            return
        copy = self.graph.node_copy(node, lambda n: self.forward[n])
        copy.meta = dict(node.meta)
        self.forward[node] = copy

    def _copy_saving_state(self, node: fx.Node) -> None:
        """A random operator of the forward, together with the state of its generator before it."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: self.forward[n])
        saving: Any = (node.target, *args)
        both = self.graph.call_function(run_and_save_rng_state, saving, kwargs)
        name = f"{node.name}_generator"
        state = self.graph.create_node("call_function", _getitem, (both, 0), {}, name)
        result = self.graph.call_function(_getitem, (both, 1))
        value = self.flow.values[self.operator_of[node].state]  # type: ignore[index]
        own = leaves(node)
        fake = next(t for t in torch.utils._pytree.tree_leaves(node.meta["val"]))
        with fake.fake_mode:
            generator = torch.empty(value.nbytes, dtype=torch.uint8)
        base = {k: v for k, v in node.meta.items() if k not in ("val", "tensor_meta", LEAVES)}
        both.meta = {
            **base,
            "val": (generator, node.meta["val"]),
            LEAVES: (Leaf(value.nbytes, None), *own),
        }
        state.meta = {**base, "val": generator, LEAVES: (Leaf(value.nbytes, (0, 0)),)}
        shifted = tuple(Leaf(leaf.nbytes, (0, i + 1)) for i, leaf in enumerate(own))
        result.meta = {**base, "val": node.meta["val"], LEAVES: shifted}
        self.forward[node] = result
        self.states[node] = state

    def _run(self, node: fx.Node, makes: frozenset[int]) -> None:
        """Append one run of an operator to the backward, with the results taken from its tuple."""
        self.current[node] = copy = self._run_again(node)
        self._tag(copy, node)
        for user in node.users:
            if user.target is _getitem and user.op == "call_function":
                self._take(user, makes)

    def _run_again(self, node: fx.Node) -> fx.Node:
        anchored = self.operator_of[node].anchored
        form = None if anchored else ops.replay_form(node)
        target, args, kwargs = form or (node.target, node.args, node.kwargs)
        args, kwargs = fx.node.map_arg((args, kwargs), self._resolve)
        if node in self.states and not anchored:
            state = self.states[node]
            replayed: Any = (state, target, *args)
            return self.graph.call_function(run_with_rng_state, replayed, kwargs)
        name = node.name if anchored else f"{node.name}_again"
        return self.graph.create_node(node.op, target, args, kwargs, name)

    def _take(self, node: fx.Node, makes: frozenset[int]) -> None:
        """Append `node`, which takes a result of the operator that just ran, where it is new."""
        if not makes.isdisjoint(self.flow.value_of[node.name]):
            copy = self._append(node, (self.current[node.all_input_nodes[0]],))
            self.current[node] = copy

    def _tag(self, copy: fx.Node, node: fx.Node) -> None:
        copy.meta = {**node.meta, "partitioner_tag": "is_backward", "autograd_backward": True}
        if node.name not in self.flow.late:
            copy.meta[RECOMPUTE_OF] = node.name

    def _append(self, node: fx.Node, sources: tuple[fx.Node, ...]) -> fx.Node:
        mapped = dict(zip(node.all_input_nodes, sources, strict=True))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: mapped[n])
        copy = self.graph.create_node(node.op, node.target, args, kwargs, f"{node.name}_again")
        self._tag(copy, node)
        return copy

    def _resolve(self, node: fx.Node) -> fx.Node:
        """The node that stands for `node` at this point of the backward; views are made anew."""
        values = self.flow.value_of[node.name]
        if node.op in ("placeholder", "get_attr"):
            return self.forward[node]
        is_carrier = len(values) == 1 and self.carriers.get(values[0]) is node
        if is_carrier and node not in self.current:
            return self.forward[node]
        if node in self.operator_of or (node in self.current and node.target is _getitem):
            return self.current[node]
        sources = tuple(self._resolve(n) for n in node.all_input_nodes)
        cached = self.views.get(node)
        if cached is None or cached[0] != sources:
            cached = (sources, self._append(node, sources))
            self.views[node] = cached
        return cached[1]
