"""The attention and MLP sublayers of blocks: residual branches, found in what a block runs."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from graphopt.errors import PlanError
from graphopt.passes.block_graph import BlockGraph, block_graphs
from graphopt.passes.blocks import Batch, Stack

aten = torch.ops.aten

_SUMS = frozenset({aten.add.Tensor})
# What brings together several tensors of hidden states: tokens look at one another.
_MIXES = frozenset(
    {
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_fused_attention_overrideable.default,
        aten._native_multi_head_attention.default,
    }
)


@dataclass(frozen=True)
class Branch:
    """A residual branch: paths of the modules in its block that make it, as they run.

    `kind` is "attention" where tokens look at one another, or else "mlp". The last module's output
    goes to the residual sum with nothing but parameterless operators between. `others` is how many
    values each module returns beside its first, None where that is no tuple.
    """

    block: int
    kind: str
    modules: tuple[str, ...]
    others: tuple[int | None, ...]

    @property
    def name(self) -> str:
        """As it is written in plans: `3.attention`."""
        return f"{self.block}.{self.kind}"


def find_branches(model: nn.Module, stack: Stack, batch: Batch) -> tuple[Branch, ...]:
    """The residual branches of every block, in order.

    A block's output is followed back to its hidden states: through sums, whose terms are a stream and
    branches that depend on it, and through what stands between sums on the stream, as norms do. What
    several branches share, as one norm before both, belongs to none and stays.
    PlanError where a block has fewer than two branches, or one that no modules of its own make.
    """
    found: list[Branch] = []
    graphs = block_graphs(model, stack, batch)
    for number, (block, graph) in enumerate(zip(stack.blocks, graphs, strict=True)):
        terms = _branch_terms(graph)
        if len(terms) < 2:
            raise PlanError(
                f"granularity='sublayers': {type(block).__name__} adds {len(terms)} branches to its "
                "hidden states; sublayers are two or more"
            )
        names = {module: name for name, module in block.named_modules() if name}
        ways = [_private(graph, term, stops) for term, stops in terms]
        shared = Counter(at for way in ways for at in way)
        for operators in sorted(ways):
            modules = _modules(graph, block, {at for at in operators if shared[at] == 1})
            if not modules:
                raise PlanError(
                    f"granularity='sublayers': no modules of {type(block).__name__} make its branch alone"
                )
            paths = tuple(names[module] for module in modules)
            others = tuple(graph.others.get(module) for module in modules)
            found.append(Branch(number, _kind(graph, operators), paths, others))
    return _numbered(found)


def _numbered(branches: Sequence[Branch]) -> tuple[Branch, ...]:
    """Kinds that a block has twice get a number: `mlp`, `mlp2`."""
    seen: dict[tuple[int, str], int] = {}
    named = []
    for branch in branches:
        seen[branch.block, branch.kind] = number = seen.get((branch.block, branch.kind), 0) + 1
        kind = branch.kind if number == 1 else f"{branch.kind}{number}"
        named.append(replace(branch, kind=kind))
    return tuple(named)


def _branch_terms(graph: BlockGraph) -> list[tuple[int, frozenset[int]]]:
    """Each branch's last tensor, and the tensors of the stream where its way back ends."""
    producers, derived = graph.producers(), graph.derived()
    found: list[tuple[int, frozenset[int]]] = []
    at = graph.sink
    while at != graph.source and at in producers:
        sums, terms = _summed(graph, at, producers, derived)
        if len(terms) == 1:
            at = _waist(graph, at, producers, derived)
            continue
        ancestors = {term: _ancestors(graph, term, producers) for term in terms}
        stream = [t for t in terms if all(t in ancestors[o] for o in terms if o != t)]
        if len(stream) != 1:
            return []
        stops = sums | {stream[0]}
        found += [(term, stops) for term in terms if term != stream[0]]
        at = stream[0]
    return found


def _summed(
    graph: BlockGraph, at: int, producers: dict[int, int], derived: frozenset[int]
) -> tuple[frozenset[int], list[int]]:
    """The tensors that are sums on the way back from `at`, and the terms that are not sums."""
    op = graph.ops[producers[at]] if at in producers else None
    inputs = [t for t in op.inputs if t in derived] if op is not None else []
    if op is None or op.target not in _SUMS or len(inputs) < 2:
        return frozenset(), [at]
    sums, terms = frozenset({at}), list[int]()
    for tensor in inputs:
        inner, found = _summed(graph, tensor, producers, derived)
        sums, terms = sums | inner, [*terms, *found]
    return sums, list(dict.fromkeys(terms))


def _ancestors(
    graph: BlockGraph, tensor: int, producers: dict[int, int], stops: frozenset[int] = frozenset()
) -> frozenset[int]:
    """All tensors that `tensor` is made of, itself among them, on ways back that end at `stops`."""
    found: set[int] = set()
    left = [tensor]
    while left:
        if (one := left.pop()) not in found and one not in stops:
            found.add(one)
            left += graph.ops[producers[one]].inputs if one in producers else ()
    return frozenset(found)


def _waist(graph: BlockGraph, at: int, producers: dict[int, int], derived: frozenset[int]) -> int:
    """The nearest tensor before `at` that every way from the source to `at` passes."""
    before = (_ancestors(graph, at, producers) & derived) - {at}
    for tensor in sorted(before, key=lambda t: producers.get(t, -1), reverse=True):
        if at not in graph.derived(frozenset({tensor})):
            return tensor
    return graph.source


def _private(graph: BlockGraph, term: int, stops: frozenset[int]) -> tuple[int, ...]:
    """The positions of the operators between the stream and the branch's last tensor."""
    producers, derived = graph.producers(), graph.derived()
    tensors = _ancestors(graph, term, producers, stops) & derived
    return tuple(at for at, op in enumerate(graph.ops) if tensors.intersection(op.outputs))


def _modules(graph: BlockGraph, block: nn.Module, own: set[int]) -> list[nn.Module]:
    """The outermost modules whose operators on hidden states are all among `own`."""
    used = _ancestors(graph, graph.sink, graph.producers()) & graph.derived()
    runs: dict[nn.Module, set[int]] = {}
    for at, op in enumerate(graph.ops):
        if used & set(op.outputs):
            for module in op.modules:
                runs.setdefault(module, set()).add(at)
    inside = {module for module, at in runs.items() if at <= own and module is not block}
    nested = {child for module in inside for child in module.modules() if child is not module}
    outer = [m for m in inside if m not in nested and any(True for _ in m.parameters())]
    return sorted(outer, key=lambda module: min(runs[module]))


def _kind(graph: BlockGraph, operators: Sequence[int]) -> str:
    derived = graph.derived()
    mixed = any(
        graph.ops[at].target in _MIXES and sum(t in derived for t in graph.ops[at].inputs) > 1
        for at in operators
    )
    return "attention" if mixed else "mlp"


class Passed(nn.Module):
    """Stands where a module was: returns the first tensor it is given, or a zero (`nothing`).

    The zero has no dimensions, so that nothing of a token's size is made; `others` is how many values
    that are None follow in a tuple, None where no tuple is returned.
    """

    def __init__(self, others: int | None, nothing: bool) -> None:
        super().__init__()
        self.others, self.nothing = others, nothing

    def forward(self, *args: object, **kwargs: object) -> object:
        """The value in the place of the module's output."""
        given = next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))
        value = given.new_zeros(()) if self.nothing else given
        return value if self.others is None else (value, *[None] * self.others)


def stand_ins(branch: Branch) -> dict[str, Passed]:
    """For each of a branch's modules what stands in its place where the branch is removed."""
    last = branch.modules[-1]
    return {
        path: Passed(others, nothing=path == last)
        for path, others in zip(branch.modules, branch.others, strict=True)
    }
