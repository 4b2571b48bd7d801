"""What each node of a graph costs on a device: operations, bytes, seconds.

Views, `getitem` and arithmetic on sizes run no kernel and cost nothing; collectives and other transfers
cost nothing here either, they are priced by the link they use. Symbolic sizes count as their hints.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.cost_models import roofline
from graphopt.cost_models.devices import Device
from graphopt.cost_models.flops import node_flops, pointwise_bounds
from graphopt.cost_models.values import (
    element_bounds,
    elements_read,
    hint,
    is_view,
    operands,
    output_tensors,
    shape_of,
    touched_bytes,
)
from graphopt.fused_ops import fused_at, is_fused
from graphopt.ops import is_random, is_transfer
from graphopt.stream_ops import BODY_OF

aten = torch.ops.aten

_UNINITIALIZED = frozenset(
    {
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.empty_like.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
    }
)
# Functions that take many operations per element, and how many at the rate of float32 products:
# some 2.5e9 elements/s of gelu, softmax or tanh where a CPU does 200e9 operations/s (measured on
# two AVX-512 cores); GPUs have units for them.
_FUNCTIONS = frozenset(
    {
        aten.exp.default,
        aten.log.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.erf.default,
        aten.sin.default,
        aten.cos.default,
        aten.gelu.default,
        aten.gelu_backward.default,
        aten.silu.default,
        aten.silu_backward.default,
        aten._softmax.default,
        aten._log_softmax.default,
        aten._log_softmax_backward_data.default,
        aten.logsumexp.default,
        aten.native_layer_norm.default,
        aten.native_layer_norm_backward.default,
        aten.native_group_norm.default,
        aten.native_group_norm_backward.default,
        aten.native_batch_norm_backward.default,
        aten._native_batch_norm_legit_functional.default,
    }
)
_FUNCTION_OPS = {"cpu": 80, "cuda": 20}
# A random number per element; on a CPU one thread draws them all.
_RANDOM_OPS = {"cpu": 1000, "cuda": 20}

# An instruction of a generated kernel does one operation in place of the two of a fused multiply-add, and
# on a CPU half as many start at a time: an exponential of 15 takes 0.2 ns on a core with AVX-512.
_INSTRUCTION_OPS = {"cpu": 2, "cuda": 2}

# The part of the matrix rate that convolutions with few channels per group reach: they vectorise
# over those channels (measured with 1 and 4 on a CPU: 0.2 to 0.5 forward, 0.04 to 0.1 backward).
_FEW_CHANNELS = 8
# Per op: where its weight and its groups stand among the arguments, and that part.
_GROUPED_CONVOLUTIONS: dict[Any, tuple[int, int, float]] = {
    aten.convolution.default: (1, 8, 0.3),
    aten.convolution_backward.default: (2, 9, 0.06),
}


@dataclass(frozen=True, slots=True)
class NodeCost:
    """One run of a node: `flops` of its matrix products, memory traffic, and predicted time."""

    flops: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    seconds: float = 0.0


FREE = NodeCost()
Bounds = tuple[int, ...]  # of one number: the least of them counts


@dataclass(frozen=True, slots=True)
class Load:
    """What a node asks of a device, in numbers that are products of sizes.

    `flops` are in `dtype`, at a part (`efficiency`) of the matrix rate. `reads` bound the bytes of each
    tensor that is read; `elements` those of each tensor that it works on elementwise, of which the
    largest counts, with `element_ops` operations at the rate of float32 per element.
    """

    flops: int
    write_bytes: int
    reads: tuple[Bounds, ...]
    elements: tuple[Bounds, ...]
    element_ops: int
    dtype: torch.dtype
    efficiency: float = 1.0

    @property
    def read_bytes(self) -> int:
        """Bytes of the distinct tensors that are read."""
        return sum(map(min, self.reads))

    @property
    def elementwise_ops(self) -> int:
        """Operations at the rate of float32."""
        return self.element_ops * max(map(min, self.elements), default=0)

    def seconds(self, device: Device) -> float:
        """The time on `device` by the roofline."""
        moved = self.read_bytes + self.write_bytes
        return roofline.seconds(
            self.flops, moved, self.dtype, device, self.elementwise_ops, efficiency=self.efficiency
        )


def cost_table(nodes: fx.Graph | Iterable[fx.Node], device: Device) -> dict[str, NodeCost]:
    """The cost of every node on `device`, by the node's name, in the order of `nodes`."""
    every = nodes.nodes if isinstance(nodes, fx.Graph) else nodes
    return {node.name: node_cost(node, device) for node in every}


def node_cost(node: fx.Node, device: Device) -> NodeCost:
    """The cost of one node on `device`."""
    if not runs_kernel(node):
        return FREE
    if node.target in BODY_OF:
        from graphopt.cost_models.streamed import streamed_cost  # which needs this module

        return streamed_cost(node, device)
    load = node_load(node, device)
    return NodeCost(load.flops, load.read_bytes, load.write_bytes, load.seconds(device))


def node_load(node: fx.Node, device: Device) -> Load:
    """What `node`, which runs a kernel, asks of `device`; without what blocks of streamed losses add."""
    return Load(
        node_flops(node),
        write_bytes(node),
        tuple(_reads(node)),
        ((fused_at(node).instructions,),) if is_fused(node) else tuple(pointwise_bounds(node)),
        _element_ops(node, device),
        _dtype(node),
        _efficiency(node),
    )


def runs_kernel(node: fx.Node) -> bool:
    """True where running `node` computes something on tensors of this device."""
    if node.op != "call_function" or is_transfer(node.target):
        return False
    if not isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator)):
        return False
    return bool(output_tensors(node)) and not is_view(node)


def read_bytes(node: fx.Node) -> int:
    """Bytes of the distinct tensors that `node` reads; an expanded dimension counts once.

    An embedding reads no more of its table than it returns.
    """
    return sum(map(min, _reads(node)))


def _reads(node: fx.Node) -> Iterator[Bounds]:
    """For each tensor that `node` reads, bounds of the bytes."""
    for tensor, bounds in element_bounds(node):
        yield touched_bytes(tensor), *(elements * tensor.element_size() for elements in bounds)


def write_bytes(node: fx.Node) -> int:
    """Bytes of the tensors that `node` returns, new ones or those it wrote to."""
    if node.target in _UNINITIALIZED:
        return 0
    return sum(touched_bytes(tensor) for tensor in output_tensors(node))


def _dtype(node: fx.Node) -> torch.dtype:
    """The dtype of the first floating tensor read, which is a matrix product's."""
    for tensor, _ in elements_read(node):
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def _element_ops(node: fx.Node, device: Device) -> int:
    """Operations per element (of a generated kernel: per instruction), many for a costly function."""
    if is_fused(node):
        return _INSTRUCTION_OPS[device.kind]
    if is_random(node):
        return _RANDOM_OPS[device.kind]
    return _FUNCTION_OPS[device.kind] if node.target in _FUNCTIONS else 1


def _efficiency(node: fx.Node) -> float:
    """The part of the matrix rate that `node` can reach: less for a convolution of small groups."""
    if node.target not in _GROUPED_CONVOLUTIONS:
        return 1.0
    weight, groups, reached = _GROUPED_CONVOLUTIONS[node.target]
    arguments, _ = operands(node)
    few = shape_of(arguments[weight])[1] < _FEW_CHANNELS
    return reached if few and hint(arguments[groups]) > 1 else 1.0
