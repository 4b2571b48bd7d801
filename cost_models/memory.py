"""Memory as a pure function of a program and an order: which storages live when, to the byte.

A `Dataflow` is the program reduced to what memory depends on: operators that allocate, and the
storages (`values`) they read and write. Views vanish into the storage they look at.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.arena_facts import Block, spot_of
from graphopt.cost_models.nodes import FREE, NodeCost
from graphopt.fused_ops import fused_at, is_fused, overwritable
from graphopt.program import Program, Role, leaves, tensors_of

NO_PRODUCER = -1  # exists before the step and stays: a parameter, a batch
EXTERNAL = -2  # in a part of a dataflow: made by another part
BLOCK = "graphopt_block"  # in the facts of a node: the name of the block that it belongs to
CUDA_STATE_BYTES = 16  # seed and offset of the Philox generator


@dataclass(frozen=True)
class Value:
    """One storage. `producer` is the index of its operator, or -1 where it exists before the step."""

    nbytes: int
    producer: int
    label: str


@dataclass(frozen=True)
class Operator:
    """An operator that allocates: which values it reads and writes, and what running it costs.

    `reusable` are the values that the operator may write its (single) result over where it is the
    last to read them. An `anchored` operator of the backward runs once, in its place; the others run
    when what they make is asked for. `state` is the value that holds the generator's state before a
    random operator; it exists only where the operator is replayed. The operators of a `block` work on
    one part of a thing behind the other: no place between them is a border, and those of the backward
    run once.
    """

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    reusable: tuple[int, ...]
    seconds: float
    flops: int
    workspace_bytes: int
    backward: bool
    anchored: bool
    recomputable: bool
    state: int | None
    block: str | None = None


@dataclass(frozen=True)
class Dataflow:
    """Operators in program order, and their values.

    `value_of` gives the values behind each node (one per tensor of its value); `late` names the nodes
    of the backward. `outputs` and `gradients` are the values that forward and backward return.
    """

    operators: tuple[Operator, ...]
    values: tuple[Value, ...]
    value_of: Mapping[str, tuple[int, ...]]
    late: frozenset[str]
    outputs: tuple[int, ...]
    gradients: tuple[int, ...]
    static_bytes: int

    @cached_property
    def own_reads(self) -> tuple[tuple[int, ...], ...]:
        """For each operator, what it reads of what the step makes."""
        own = [v.producer != NO_PRODUCER for v in self.values]
        return tuple(tuple(v for v in o.reads if own[v]) for o in self.operators)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The bytes of each value."""
        return tuple(v.nbytes for v in self.values)

    @cached_property
    def states(self) -> frozenset[int]:
        """The values that hold states of a generator."""
        return frozenset(o.state for o in self.operators if o.state is not None)

    @property
    def forward(self) -> range:
        """Indices of the forward's operators."""
        return range(next((i for i, o in enumerate(self.operators) if o.backward), len(self.operators)))


def dataflow(
    program: Program,
    costs: Mapping[str, NodeCost] | None = None,
    workspace: Mapping[str, int] | None = None,
) -> Dataflow:
    """The storages and operators of `program`, with `costs` and kernel scratch `workspace` (bytes)."""
    return _Builder(program, costs or {}, workspace or {}).build()


def in_arena(flow: Dataflow, block: Block | None, placed: Set[int]) -> Dataflow:
    """`flow` with the values `placed` in a block: they take no memory of their own, and the block does.

    A block that is kept is static. Another is a value that the first operator with something in it makes;
    where the backward reads nothing of the forward's in it, each half of the step has one.
    """
    if block is None:
        return flow
    values = [replace(v, nbytes=0) if i in placed else v for i, v in enumerate(flow.values)]
    if block.keep:
        static = flow.static_bytes + block.nbytes
        return replace(flow, values=tuple(values), static_bytes=static)
    operators = list(flow.operators)
    users = [i for i, o in enumerate(operators) if not placed.isdisjoint((*o.reads, *o.writes))]
    halves = [[i for i in users if operators[i].backward is late] for late in (False, True)]
    own = {v for i in halves[0] for v in operators[i].writes}
    is_one = any(v in own and v in placed for i in halves[1] for v in operators[i].reads)
    for group in [users] if is_one else halves:
        for i in group:
            o, arena = operators[i], (len(values),)
            is_first = i == group[0]
            writes, reads = (o.writes + arena, o.reads) if is_first else (o.writes, o.reads + arena)
            operators[i] = replace(o, writes=writes, reads=reads)
        if group:
            values.append(Value(block.nbytes, group[0], "arena"))
    return replace(flow, operators=tuple(operators), values=tuple(values))


class _Builder:
    def __init__(
        self, program: Program, costs: Mapping[str, NodeCost], workspace: Mapping[str, int]
    ) -> None:
        self.program = program
        self.costs = costs
        self.workspace = workspace
        self.values: list[Value] = []
        self.operators: list[Operator] = []
        self.value_of: dict[str, tuple[int, ...]] = {}
        self.gradient_nodes = {g for g in program.gradients if isinstance(g, fx.Node)}
        self.tainted: set[fx.Node] = set()
        self.mutated: set[int] = set()
        self.mutated_names = {i.name for i in program.inputs if i.mutated}
        self.block: Block | None = None
        self.placed: set[int] = set()

    def build(self) -> Dataflow:
        nodes = [n for n in self.program.graph.nodes if n.op != "output"]
        backward = _backward_nodes(self.program)
        for late in (False, True):
            for node in nodes:
                if (node in backward) is late:
                    self._visit(node, late)
        flow = Dataflow(
            tuple(self.operators),
            tuple(self.values),
            self.value_of,
            frozenset(n.name for n in backward),
            self._values_behind(self.program.forward_outputs),
            self._values_behind(self.program.gradients),
            sum(v.nbytes for v in self.values if v.producer == NO_PRODUCER),
        )
        return in_arena(flow, self.block, self.placed)

    def _values_behind(self, outputs: tuple[object, ...]) -> tuple[int, ...]:
        found = [v for o in outputs if isinstance(o, fx.Node) for v in self.value_of[o.name]]
        return tuple(dict.fromkeys(found))

    def _new(self, nbytes: int, producer: int, label: str) -> int:
        self.values.append(Value(nbytes, producer, label))
        return len(self.values) - 1

    def _visit(self, node: fx.Node, backward: bool) -> None:
        inputs = node.all_input_nodes
        if any(n in self.tainted for n in inputs) or self.program.roles.get(node.name) is Role.TANGENT:
            self.tainted.add(node)
        mine: list[int] = []
        written: list[int] = []
        for number, leaf in enumerate(leaves(node)):
            if leaf.alias is None:
                producer = NO_PRODUCER if node.op in ("placeholder", "get_attr") else len(self.operators)
                nbytes = 0 if self.program.roles.get(node.name) is Role.TANGENT else leaf.nbytes
                label = node.name if len(leaves(node)) == 1 else f"{node.name}[{len(mine)}]"
                mine.append(self._new(nbytes, producer, label))
                written.append(mine[-1])
                if (spot := spot_of(node, number)) is not None:
                    self.block = spot.block
                    self.placed.add(mine[-1])
            else:
                position, index = leaf.alias
                mine.append(self.value_of[inputs[position].name][index])
        self.value_of[node.name] = tuple(mine)
        if node.name in self.mutated_names:
            self.mutated.update(mine)
        is_operator = node.op not in ("placeholder", "get_attr")
        if is_operator and (written or ops.mutates(node.target)):
            self.operators.append(self._operator(node, tuple(written), backward))

    def _operator(self, node: fx.Node, written: tuple[int, ...], backward: bool) -> Operator:
        reads = dict.fromkeys(v for n in node.all_input_nodes for v in self.value_of[n.name])
        cost = self.costs.get(node.name, FREE)
        recomputable = ops.may_recompute(node) and (
            self.mutated.isdisjoint(reads) or ops.replay_form(node) is not None
        )
        returns = not self.gradient_nodes.isdisjoint({node, *_views(node)})
        return Operator(
            node.name,
            tuple(reads),
            written,
            tuple(self._reusable(node)),
            cost.seconds,
            cost.flops,
            self.workspace.get(node.name, 0),
            backward,
            backward and (node in self.tainted or returns or not recomputable or BLOCK in node.meta),
            recomputable,
            self._state(node),
            node.meta.get(BLOCK),
        )

    def _state(self, node: fx.Node) -> int | None:
        if not ops.is_random(node):
            return None
        return self._new(rng_state_nbytes(node), len(self.operators), f"{node.name}:generator")

    def _reusable(self, node: fx.Node) -> Iterator[int]:
        for operand in reusable_operands(node):
            value = self.value_of[operand.name][0]
            others = (n for n in node.all_input_nodes if n is not operand)
            if all(value not in self.value_of[n.name] for n in others):
                yield value


def reusable_operands(node: fx.Node) -> Iterator[fx.Node]:
    """The operands that `node` may write its result over where nobody reads them later.

    In the order in which they are tried; another operand of it may be a view of one of them.
    """
    if is_fused(node):
        given: Any = node.args[0]
        for source, target in overwritable(fused_at(node)):
            if may_lie_over(node, given[source], target):
                yield given[source]
        return
    for position in ops.overwrite_positions(node):
        operand = node.args[position]
        if isinstance(operand, fx.Node) and may_overwrite(node, operand):
            yield operand


def rng_state_nbytes(node: fx.Node) -> int:
    """Bytes of the saved state of the generator that `node` draws from."""
    tensor = next((t for t in tensors_of(node) if t is not None), None)
    cuda = tensor is not None and tensor.device.type == "cuda"
    return CUDA_STATE_BYTES if cuda else torch.get_rng_state().nbytes


def may_overwrite(node: fx.Node, operand: fx.Node) -> bool:
    """True where the result of `node` has exactly the layout of `operand`, which fills its storage."""
    result, source = tensors_of(node)[0], tensors_of(operand)[0]
    if result is None or source is None:
        return False
    return (
        result.dtype == source.dtype
        and result.shape == source.shape
        and result.stride() == source.stride()
        and source.numel() * source.element_size() == leaves(operand)[0].nbytes
        and is_dense(source)
    )


def may_lie_over(node: fx.Node, operand: fx.Node, number: int) -> bool:
    """True where result `number` of `node` has the dtype of `operand` and just fills its storage."""
    result, source = tensors_of(node)[number], tensors_of(operand)[0]
    if result is None or source is None or leaves(operand)[0].nbytes != leaves(node)[number].nbytes:
        return False
    whole = source.numel() * source.element_size() == leaves(operand)[0].nbytes
    return result.dtype == source.dtype and whole and is_dense(source)


def is_dense(tensor: torch.Tensor) -> bool:
    """True where every element has a place of its own and there are no gaps between them."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _views(node: fx.Node) -> set[fx.Node]:
    """Nodes that look at the storages of `node`, directly or through other views."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        for user in current.users:
            if user not in found and any(
                leaf.alias is not None and user.all_input_nodes[leaf.alias[0]] is current
                for leaf in leaves(user)
            ):
                found.add(user)
                stack.append(user)
    return found


def _backward_nodes(program: Program) -> set[fx.Node]:
    """Nodes that belong to the backward: made by it or after a tangent, and not needed before it."""
    needed: set[fx.Node] = set()
    stack = [o for o in program.forward_outputs if isinstance(o, fx.Node)]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    late: set[fx.Node] = set()
    for node in program.operators():
        made_by_backward = node.meta.get("partitioner_tag") == "is_backward"
        after_tangent = any(
            n in late or program.roles.get(n.name) is Role.TANGENT for n in node.all_input_nodes
        )
        if node not in needed and (made_by_backward or after_tangent):
            late.add(node)
    return late
