"""Programs of several ranks run in one process, node by node, with collectives done by hand.

The reference for rewrites that change what is sent: no process group, no kernel of a backend, and sums
in the order of the ranks.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.program import Program


def run_ranks(programs: Sequence[Program], given: Sequence[Sequence[Tensor]]) -> list[list[Any]]:
    """The outputs of each rank, for its program and the tensors given to it.

    All programs have the same nodes in the same order; numbers among their arguments may differ.
    """
    graphs = [list(program.graph.nodes) for program in programs]
    values: list[dict[fx.Node, Any]] = [{} for _ in programs]
    queues = [list(tensors) for tensors in given]
    for nodes in zip(*graphs, strict=True):
        arguments = [
            fx.node.map_arg((n.args, dict(n.kwargs)), v.__getitem__)
            for n, v in zip(nodes, values, strict=True)
        ]
        if nodes[0].op == "output":
            return [list(args[0]) for args, _ in arguments]
        if nodes[0].op == "placeholder":
            results = [queue.pop(0) for queue in queues]
        elif str(nodes[0].target).startswith("_c10d_functional."):
            results = _exchanged(str(nodes[0].target), [args[0] for args, _ in arguments])
        else:
            pairs = zip(nodes, arguments, strict=True)
            results = [node.target(*args, **kwargs) for node, (args, kwargs) in pairs]
        for node, found, result in zip(nodes, values, results, strict=True):
            found[node] = result
    raise AssertionError("a graph without an output")


def _exchanged(target: str, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What a collective leaves on each rank."""
    ranks = len(tensors)
    name = target.split(".")[1]
    if name == "wait_tensor":
        return list(tensors)
    if name == "all_gather_into_tensor":
        return [torch.cat(list(tensors)) for _ in tensors]
    if name == "all_to_all_single":
        pieces = [t.chunk(ranks) for t in tensors]
        return [torch.cat([mine[rank] for mine in pieces]) for rank in range(ranks)]
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + tensor
    if name == "all_reduce":
        return [total.clone() for _ in tensors]
    assert name == "reduce_scatter_tensor", target
    return [part.clone() for part in total.chunk(ranks)]
