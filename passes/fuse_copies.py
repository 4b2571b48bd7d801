"""Cheap values that kernels make again, from what they read anyway, instead of reading them.

A norm's gradient needs the normalised row, which an earlier kernel made of the row and its scale; both
are read for the gradient, too. So a node may be in several regions: the first makes it for those who
read it outside of regions, in the others it is a copy, for the region alone. What nobody reads any more
is not written. After Ansel et al., "PyTorch 2", ASPLOS 2024, section 4.4, where pointwise operators are
inlined in what reads them.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence

from torch import fx

from graphopt import ops
from graphopt.codegen.stages import RECOMPUTE_COST
from graphopt.cost_models.memory import BLOCK
from graphopt.passes.fuse_kernel import Kernel, kernel_of, outputs_of, results_of
from graphopt.passes.fuse_regions import maker_of
from graphopt.passes.fuse_values import CannotFuse, root_of
from graphopt.program import Program
from graphopt.split import late_nodes

Nodes = tuple[fx.Node, ...]


def with_copies(program: Program, kernels: Sequence[tuple[Nodes, Kernel]]) -> list[tuple[Nodes, Kernel]]:
    """`kernels`, in the order in which they run, with cheap values made again instead of read.

    A kernel reads nothing that it did not read before, so that nothing lives longer. One whose results
    nobody reads any more is gone.
    """
    order = {n: i for i, n in enumerate(program.graph.nodes)}
    late = late_nodes(program)
    maker = {h: nodes for nodes, _ in kernels for n in nodes for h in results_of(n)}
    regions = []
    for nodes, kernel in kernels:
        own, now, phase = nodes, kernel, (nodes[0] in late, nodes[0].meta.get(BLOCK))
        for value in kernel.inputs:
            others = maker.get(value)
            if others is None or phase != (others[0] in late, others[0].meta.get(BLOCK)):
                continue
            cone = _made_of(value, {*others}, {*now.inputs} - {value})
            larger = tuple(sorted({*own, *cone}, key=order.__getitem__))
            copied = _with(larger, {*larger} - {*nodes}) if cone else None
            if copied is not None and _pays(now, copied, value):
                own, now = larger, copied
        regions.append(own)
    while not all(made := made_by(regions)):
        del regions[made.index([])]
    given = dict(kernels)
    return [
        (nodes, _same(given.get(nodes), outputs) or kernel_of(nodes, outputs))
        for nodes, outputs in zip(regions, made, strict=True)
    ]


def made_by(regions: Sequence[Nodes]) -> list[list[fx.Node]]:
    """What each region makes for others, where a node that is in an earlier region, too, is a copy."""
    first: dict[fx.Node, int] = {}
    inside: dict[fx.Node, set[fx.Node]] = defaultdict(set)
    for number, nodes in enumerate(regions):
        for node in nodes:
            first.setdefault(node, number)
            inside[node] |= {*nodes}
    return [
        [h for n in nodes if first[n] == number for h in outputs_of((n,), inside[n])]
        for number, nodes in enumerate(regions)
    ]


def _same(kernel: Kernel | None, outputs: Sequence[fx.Node]) -> Kernel | None:
    return kernel if kernel is not None and list(kernel.outputs) == outputs else None


def _made_of(value: fx.Node, inside: set[fx.Node], read: Collection[fx.Node]) -> set[fx.Node]:
    """The nodes of another region that make `value` from what is `read`, place by place; or none."""
    found: set[fx.Node] = set()
    ahead = [value]
    while ahead:
        node = ahead.pop()
        if node not in inside or not ops.is_elementwise(node):
            return set()
        found.add(node)
        ahead += [maker_of(s) for s in node.all_input_nodes if root_of(s) not in read]
    written = (user for node in found for s in node.all_input_nodes for user in root_of(s).users)
    return set() if any(ops.mutates(user.target) for user in written) else found


def _with(nodes: Nodes, copies: set[fx.Node]) -> Kernel | None:
    """The kernel of `nodes`, of which some are copies, if there is one."""
    try:
        return kernel_of(nodes, outputs_of([n for n in nodes if n not in copies], {*nodes}))
    except CannotFuse:
        return None


def _pays(before: Kernel, after: Kernel, value: fx.Node) -> bool:
    """Whether `after` reads less, and what it computes for that takes less time than the read."""
    more = after.fused.instructions - before.fused.instructions
    return {*after.inputs} < {*before.inputs} and more <= RECOMPUTE_COST * value.meta["val"].numel()
