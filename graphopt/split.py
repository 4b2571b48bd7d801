"""From one joint graph to the two modules that run: the forward, which saves tensors, and the backward.

The calling convention is AOTAutograd's: the forward takes the inputs and returns its outputs followed
by the saved tensors; the backward takes the saved tensors and the tangents and returns the gradients.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch._functorch._aot_autograd.descriptors import SavedForBackwardsAOTOutput

from graphopt.errors import VerifyError
from graphopt.program import Program, Role


def is_backward(node: fx.Node) -> bool:
    """True for the nodes of a joint graph that run in the backward."""
    return node.meta.get("partitioner_tag") == "is_backward"


def saved_nodes(program: Program) -> list[fx.Node]:
    """What the backward of `program` takes from the forward, in order: inputs and computed tensors.

    Tensors that autograd must not check for later writes come after the others, and what is no tensor
    (the mesh of a DTensor) last, as AOTAutograd asks.
    """
    late = late_nodes(program)
    used = dict.fromkeys(
        source
        for node in program.graph.nodes
        if node in late
        for source in node.all_input_nodes
        if source not in late and program.roles.get(source.name) is not Role.TANGENT
    )
    for gradient in program.gradients:
        if isinstance(gradient, fx.Node) and gradient not in late:
            used[gradient] = None
    order = [n for n in program.graph.nodes if n in used and n.op != "get_attr"]
    return as_saved(order)


def as_saved(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """`nodes` in the order of `saved_nodes`."""

    def place(node: fx.Node) -> tuple[bool, bool]:
        unchecked = bool(node.meta.get("saved_tensor_with_no_vc_check", False))
        return not isinstance(node.meta.get("val"), torch.Tensor), unchecked

    return sorted(nodes, key=place)


def late_nodes(program: Program) -> set[fx.Node]:
    """The nodes of the backward: tagged so, or reading a tangent."""
    late: set[fx.Node] = set()
    for node in program.operators():
        sources = node.all_input_nodes
        if is_backward(node) or any(
            n in late or program.roles.get(n.name) is Role.TANGENT for n in sources
        ):
            late.add(node)
    return late


def forward_module(program: Program, saved: Sequence[fx.Node]) -> fx.GraphModule:
    """The forward of `program`, returning its outputs and then `saved`."""
    graph = fx.Graph()
    late = late_nodes(program)
    env: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        is_tangent = program.roles.get(node.name) is Role.TANGENT
        if node.op != "output" and not is_tangent and node not in late:
            env[node] = _copy(graph, node, env)
    results = [env[o] if isinstance(o, fx.Node) else o for o in program.forward_outputs]
    descriptions = list(program.graph.output_node().meta.get("desc", ()))[: len(results)]
    descriptions += [SavedForBackwardsAOTOutput(i) for i in range(len(saved))]
    return _finish(program, graph, [*results, *(env[n] for n in saved)], descriptions)


def backward_module(program: Program, saved: Sequence[str]) -> fx.GraphModule:
    """The backward of `program`, taking the tensors named by `saved` and then the tangents."""
    graph = fx.Graph()
    late = late_nodes(program)
    by_name = {n.name: n for n in program.graph.nodes}
    tangents = [i.name for i in program.inputs if i.role is Role.TANGENT]
    env: dict[fx.Node, fx.Node] = {}
    for name in (*saved, *tangents):
        placeholder = graph.placeholder(name)
        placeholder.meta = dict(by_name[name].meta)
        env[by_name[name]] = placeholder
    for node in program.graph.nodes:
        if node in late or (node.op == "get_attr" and node not in env):
            missing = [n.name for n in node.all_input_nodes if n not in env]
            if missing:
                raise VerifyError(f"backward node {node.name} reads {missing[0]}, which is not saved")
            env[node] = _copy(graph, node, env)
    results = [env[g] if isinstance(g, fx.Node) else g for g in program.gradients]
    descriptions = list(program.graph.output_node().meta.get("desc", ()))
    return _finish(program, graph, results, descriptions[program.num_forward_outputs :])


def _copy(graph: fx.Graph, node: fx.Node, env: dict[fx.Node, fx.Node]) -> fx.Node:
    copy = graph.node_copy(node, lambda n: env[n])
    copy.meta = dict(node.meta)
    return copy


def _finish(
    program: Program, graph: fx.Graph, results: Iterable[object], descriptions: list[object]
) -> fx.GraphModule:
    returned: Any = tuple(results)
    output = graph.output(returned)
    output.meta["desc"] = descriptions
    output.meta["output_stack_traces"] = [
        r.meta.get("stack_trace") if isinstance(r, fx.Node) else None for r in returned
    ]
    graph.eliminate_dead_code()
    graph.lint()
    return fx.GraphModule(program.module, graph)
