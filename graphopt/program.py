"""A Program: one traced step as an FX graph of ATen operators, with roles and storages recorded."""

import enum
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from graphopt import ops
from graphopt.errors import TraceError
from graphopt.html_table import cell_text, folded, heading, table
from graphopt.origin import operator_name

LEAVES = "graphopt_leaves"
Storage = tuple[fx.Node, int]  # the node that made it, and which of its tensors


class Role(enum.Enum):
    """What a graph input is for; recorded when the graph is traced."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    INPUT = "input"
    TANGENT = "tangent"


@dataclass(frozen=True)
class Leaf:
    """One tensor of a node's value: the bytes of its storage, and whose storage it is.

    `alias` is None where the node allocates the storage itself; otherwise it is the position of the
    aliased node in `node.all_input_nodes` and the leaf of that node's value.
    """

    nbytes: int
    alias: tuple[int, int] | None


@dataclass(frozen=True)
class Input:
    """A graph input: its node's name, its role, and what the user calls it (`encoder.weight`).

    A `mutated` input (the running statistics of a batch norm) gets a new value when the forward ends.
    """

    name: str
    role: Role
    label: str
    mutated: bool = False


@dataclass(frozen=True)
class Program:
    """A traced step: forward only, or forward and backward as one joint graph.

    `module` is the FX graph. Its outputs are the `num_forward_outputs` results of the forward,
    followed, in a joint graph, by one gradient (or None) per input that is not a tangent.
    Treat it as immutable: passes work on `copy()`.
    """

    module: fx.GraphModule
    num_forward_outputs: int
    inputs: tuple[Input, ...]
    breaks: tuple[str, ...] = ()
    roles: Mapping[str, Role] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        roles = {item.name: item.role for item in self.inputs}
        object.__setattr__(self, "roles", MappingProxyType(roles))

    @property
    def graph(self) -> fx.Graph:
        """The FX graph."""
        return self.module.graph

    @property
    def is_joint(self) -> bool:
        """True where the graph holds a backward."""
        return len(self.outputs) > self.num_forward_outputs

    @property
    def outputs(self) -> tuple[Any, ...]:
        """The graph's outputs: nodes, or constants such as None for a gradient nobody needs."""
        results: Any = self.graph.output_node().args[0]
        return tuple(results)

    @property
    def forward_outputs(self) -> tuple[Any, ...]:
        """The outputs of the forward."""
        return self.outputs[: self.num_forward_outputs]

    @property
    def gradients(self) -> tuple[Any, ...]:
        """The outputs of the backward: a node or None for each input."""
        return self.outputs[self.num_forward_outputs :]

    def copy(self) -> "Program":
        """A Program with a graph of its own; node names and facts are the same."""
        module = fx.GraphModule(self.module, copied(self.graph))
        module.meta = dict(self.module.meta)
        return Program(module, self.num_forward_outputs, self.inputs, self.breaks)

    def operators(self) -> Iterator[fx.Node]:
        """The nodes that compute something, in order."""
        return (n for n in self.graph.nodes if n.op not in ("placeholder", "output", "get_attr"))

    def __str__(self) -> str:
        kinds = {role: sum(i.role is role for i in self.inputs) for role in Role}
        inputs = ", ".join(f"{count} {role.value}s" for role, count in kinds.items() if count)
        kind = "joint forward and backward" if self.is_joint else "forward"
        return f"Program({kind}: {sum(1 for _ in self.operators())} operators; {inputs})"

    def _repr_html_(self) -> str:
        """The program for a notebook: its inputs by role, and its operators by the bytes they make."""
        nodes = {n.name: n for n in self.graph.nodes if n.op == "placeholder"}
        given: Counter[str] = Counter()
        for item in self.inputs:
            given[item.role.value] += bytes_behind(nodes[item.name])
        count = Counter(item.role.value for item in self.inputs)
        inputs = [(role, cell_text(count[role]), cell_text(given[role])) for role in given]
        calls, made = Counter(map(operator_name, self.operators())), Counter[str]()
        for node in self.operators():
            made[operator_name(node)] += sum(leaf.nbytes for leaf in leaves(node) if leaf.alias is None)
        ranked = sorted(calls, key=lambda name: (-made[name], name))
        rows = [(name, cell_text(calls[name]), cell_text(made[name])) for name in ranked]
        parts = [
            heading(str(self)),
            table(("inputs", "count", "bytes"), inputs),
            folded(f"{len(rows)} kinds of operators", table(("operator", "calls", "bytes made"), rows)),
        ]
        return "\n".join(parts)


def copied(graph: fx.Graph) -> fx.Graph:
    """A graph of the same nodes, with the same names and facts."""
    new = fx.Graph()
    result = new.graph_copy(graph, val_map={}, return_output_node=True)
    assert isinstance(result, tuple)
    value, output = result
    new.output(value).meta = dict(output.meta)
    return new


def tensors_of(node: fx.Node) -> tuple[torch.Tensor | None, ...]:
    """The tensors of a node's value, nested tuples flattened; None in place of a non-tensor."""
    flat = pytree.tree_leaves(node.meta.get("val"), is_leaf=lambda v: v is None)
    return tuple(v if isinstance(v, torch.Tensor) else None for v in flat)


def leaves(node: fx.Node) -> tuple[Leaf, ...]:
    """The recorded storages of a node's value; () for a node that holds no tensor."""
    return node.meta.get(LEAVES, ())  # type: ignore[no-any-return]


def storage_nbytes(tensor: torch.Tensor) -> int:
    """Bytes of the tensor's storage; symbolic sizes are taken at their hints."""
    return int(tensor.untyped_storage().nbytes())


def record_leaves(graph: fx.Graph) -> None:
    """Write into every node whose storage each of its tensors is, as tracing saw it."""
    for node in graph.nodes:
        if node.op != "output":
            node.meta[LEAVES] = _leaves_of(node)


def set_value(node: fx.Node, value: Any) -> None:
    """Give `node` the (fake) value that it holds now, and the storages of that."""
    node.meta["val"] = value
    node.meta[LEAVES] = _leaves_of(node)


def storages_of(graph: fx.Graph) -> dict[fx.Node, tuple[Storage, ...]]:
    """For each node, the storages behind its tensors, each named by the node and leaf that made it."""
    found: dict[fx.Node, tuple[Storage, ...]] = {}
    for node in graph.nodes:
        if node.op == "output":
            continue
        inputs = node.all_input_nodes
        own = []
        for index, leaf in enumerate(leaves(node)):
            if leaf.alias is None or node.op == "placeholder":
                own.append((node, index))
            else:
                own.append(found[inputs[leaf.alias[0]]][leaf.alias[1]])
        found[node] = tuple(own)
    return found


def insert_call(
    graph: fx.Graph,
    like: fx.Node,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> fx.Node:
    """A new call at the insertion point of `graph`, with its facts; its origin is that of `like`."""
    made = graph.create_node("call_function", target, args, dict(kwargs or {}), name or like.name)
    given = fx.node.map_arg((made.args, made.kwargs), lambda n: n.meta["val"])
    sources = (t for n in (like, *like.all_input_nodes) for t in tensors_of(n))
    tensor: Any = next(t for t in sources if t is not None)
    made.meta = {k: v for k, v in like.meta.items() if k not in ("val", "tensor_meta", LEAVES)}
    with tensor.fake_mode:
        set_value(made, target(*given[0], **given[1]))
    return made


def bytes_behind(node: fx.Node) -> int:
    """Bytes of the storages behind the tensors of `node`."""
    return sum(leaf.nbytes for leaf in leaves(node))


def _leaves_of(node: fx.Node) -> tuple[Leaf, ...]:
    return tuple(
        Leaf(0, None) if tensor is None else Leaf(storage_nbytes(tensor), _alias(node, tensor))
        for tensor in tensors_of(node)
    )


def _alias(node: fx.Node, tensor: torch.Tensor) -> tuple[int, int] | None:
    if not isinstance(tensor, FakeTensor) and tensor.device.type == "meta":
        raise TraceError(f"node {node.name} was traced without fake tensors; its storages are unknown")
    if ops.waits_for_operand(node):  # its fake result says nothing of that
        return 0, 0
    storage = tensor.untyped_storage()._cdata
    for position, source in enumerate(node.all_input_nodes):
        for index, other in enumerate(tensors_of(source)):
            if other is not None and other.untyped_storage()._cdata == storage:
                return position, index
    if ops.is_view(node.target) and node.target is not ops.aten.reshape.default:
        return 0, 0  # of a copy that was taken out since
    return None
