"""Where a program can be cut along its batch, so that one part's transfers run while another computes.

The batch is what the first dimension of most inputs counts; of one text, its tokens can take that place
(`graphopt.passes.causal_parts`). From there each operator's rule
(`graphopt.passes.batch_rules`) says along which dimension its results are cut; what has no rule is
computed on the whole batch. Operators stay whole, too, that no transfer of a part is before or behind,
and those that round otherwise on a part (`graphopt.passes.batch_probe`).
"""

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from torch import fx

from graphopt import ops
from graphopt.errors import PlanError
from graphopt.passes.batch_rewrite import BatchParts, CannotCut
from graphopt.passes.batch_rules import Batch, NotByRows, RowRule, row_rule
from graphopt.passes.causal_parts import CAUSAL_RULES
from graphopt.program import Program, Role, storages_of, tensors_of


@dataclass(frozen=True)
class Rows:
    """The rules of the operators that can be cut, in program order, and why others cannot, by name."""

    batch: Batch
    rules: dict[fx.Node, RowRule]
    reasons: dict[str, str]

    @staticmethod
    def of(program: Program, batch: Batch) -> "Rows":
        """Follow the batch, or the tokens of one text, through `program`; NotCausal where it has none."""
        more = CAUSAL_RULES if batch.along == "sequence" else {}
        known: dict[fx.Node, RowRule] = {}
        rules: dict[fx.Node, RowRule] = {}
        reasons: dict[str, str] = {}
        written = _written(program)
        for node in program.graph.nodes:
            if _has_batch(program, node, batch):
                known[node] = RowRule((0 if batch.along == "batch" else 1,))
            elif node.op == "call_function" and any(n in known for n in node.all_input_nodes):
                try:
                    rule = row_rule(node, known, batch, more)
                    known[node] = rule
                    if node in written:
                        raise NotByRows("is written to")
                    rules[node] = rule
                except NotByRows as reason:
                    reasons[node.name] = str(reason)
        return Rows(batch, rules, reasons)

    def without(self, whole: Collection[str]) -> dict[fx.Node, RowRule]:
        """The rules of what is cut when the operators called `whole`, and all on integers, are not."""
        chosen: dict[fx.Node, RowRule] = {}
        for node, rule in self.rules.items():
            floats = all(t is None or t.is_floating_point() for t in tensors_of(node))
            loose = any(_tied(node, n) and n not in chosen for n in node.all_input_nodes)
            if floats and not loose and node.name not in whole:
                chosen[node] = rule
        return chosen

    def useful(self, whole: Collection[str]) -> dict[fx.Node, RowRule]:
        """As `without`, and only what is before or behind a transfer that is cut."""
        chosen = self.without(whole)
        starts = [n for n in chosen if ops.transfer_of(n) is not None]
        near = _reached(starts, lambda n: n.users) | _reached(starts, lambda n: n.all_input_nodes)
        return {node: rule for node, rule in chosen.items() if node in near}


def batch_of(program: Program, parts: int) -> Batch:
    """The batch of the program's inputs; PlanError where it is not known or too small for `parts`."""
    inputs = [n for n in program.graph.nodes if program.roles.get(n.name) is Role.INPUT]
    shapes = [t.shape for n in inputs for t in tensors_of(n) if t is not None and t.dim() > 0]
    if any(not isinstance(size, int) for shape in shapes for size in shape):
        raise PlanError("its inputs have sizes that are not fixed")
    sizes = Counter(int(shape[0]) for shape in shapes)
    if not sizes or max(sizes) < 2:
        raise PlanError("it has no input with a batch of more than one sample")
    size = sizes.most_common(1)[0][0]
    if size < parts:
        raise PlanError(f"its batch of {size} has less than {parts} samples")
    return Batch(size, parts)


def sequence_of(program: Program, parts: int) -> Batch:
    """The tokens of the one text that the program's inputs are of; PlanError where they are not."""
    inputs = [n for n in program.graph.nodes if program.roles.get(n.name) is Role.INPUT]
    shapes = [t.shape for n in inputs for t in tensors_of(n) if t is not None and t.dim() > 1]
    if any(not isinstance(size, int) for shape in shapes for size in shape):
        raise PlanError("its inputs have sizes that are not fixed")
    sizes = Counter(int(shape[1]) for shape in shapes if shape[0] == 1)
    if not sizes or max(sizes) < 2:
        raise PlanError("it has no input of one text")
    size = sizes.most_common(1)[0][0]
    if size < parts:
        raise PlanError(f"its text of {size} has less than {parts} tokens")
    return Batch(size, parts, "sequence")


def cut(program: Program, batch: Batch, names: Collection[str]) -> BatchParts:
    """`program` with the operators called `names` cut; PlanError where one of them cannot be."""
    rows = Rows.of(program, batch)
    rules = {n: rule for n, rule in rows.rules.items() if n.name in names}
    if missing := sorted(set(names) - {n.name for n in rules}):
        reason = rows.reasons.get(missing[0], "has no batch")
        raise PlanError(f"the plan cuts {missing[0]} along the batch, which {reason}")
    for node in rules:
        loose = [n for n in node.all_input_nodes if _tied(node, n) and n not in rules]
        if loose:
            raise PlanError(f"the plan cuts {node.name} along the batch, and not {loose[0].name}")
    return BatchParts(program, rules, batch)


def fitting(program: Program, rows: Rows, whole: Iterable[str]) -> tuple[BatchParts, tuple[str, ...]]:
    """`program` with all cut that is useful, but for `whole`, and the names of what is cut.

    PlanError where no transfer can be cut.
    """
    left = set(whole)
    while True:
        rules = rows.useful(left)
        if not any(ops.transfer_of(n) is not None for n in rules):
            raise PlanError(_why_none(program, rows, left))
        try:
            parts = BatchParts(program, rules, rows.batch)
        except CannotCut as reason:
            left.add(reason.name)
            continue
        return parts, tuple(n.name for n in rules)


def _tied(node: fx.Node, source: fx.Node) -> bool:
    """True where `node` is cut only if `source` is: a wait, or what is taken from several results."""
    return ops.is_wait(node) or node.target is operator.getitem


def _why_none(program: Program, rows: Rows, left: Collection[str]) -> str:
    starts = [n for n in program.operators() if ops.transfer_of(n) is not None]
    if not starts:
        return "it has no transfers"
    before = _reached(starts, lambda n: n.all_input_nodes)
    for node in program.operators():
        if node in before and (node.name in rows.reasons or node.name in left):
            return f"{node.name} ({node.target}) {rows.reasons.get(node.name, 'has to stay whole')}"
    return "no transfer depends on the batch"


def _has_batch(program: Program, node: fx.Node, batch: Batch) -> bool:
    if program.roles.get(node.name) not in (Role.INPUT, Role.TANGENT):
        return False
    tensor = tensors_of(node)[0]
    shape = () if tensor is None else tuple(tensor.shape)
    if batch.along == "sequence":
        return len(shape) > 1 and shape[:2] == (1, batch.size)
    return len(shape) > 0 and shape[0] == batch.size


def _written(program: Program) -> set[fx.Node]:
    """The nodes whose memory some operator writes to."""
    storages = storages_of(program.graph)
    writers = [n for n in program.operators() if ops.mutates(n.target)]
    changed = {s for n in writers for source in n.all_input_nodes for s in storages[source]}
    return {n for n, own in storages.items() if not changed.isdisjoint(own)}


def _reached(
    starts: Iterable[fx.Node], neighbours: Callable[[fx.Node], Iterable[fx.Node]]
) -> set[fx.Node]:
    found: set[fx.Node] = set(starts)
    stack = list(found)
    while stack:
        new = set(neighbours(stack.pop())) - found
        found |= new
        stack.extend(new)
    return found
