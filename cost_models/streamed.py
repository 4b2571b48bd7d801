"""Costs of the streamed losses: what their kernels allocate, and the time of their blocks.

`scratch_bytes` runs the operator on fake tensors and counts the storages as they come and go, so that
it follows from the code itself. `streamed_cost` prices the products, the passes over each tile, and the
operands that every block reads again: with N tokens, D hidden, V vocabulary, b bytes, a block of B tokens
reads the weight and reads and writes the sum of its gradient; a block of C of the vocabulary reads x and
reads and writes the sum of its gradient.
"""

import functools
import math
import weakref
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from graphopt.cost_models import roofline
from graphopt.cost_models.calls import TensorSpec
from graphopt.cost_models.devices import Device
from graphopt.cost_models.flops import node_flops
from graphopt.cost_models.measured import probe, probe_key
from graphopt.cost_models.nodes import NodeCost, read_bytes, write_bytes
from graphopt.cost_models.values import hint, operands, shape_of
from graphopt.stream_ops import BODY_OF, COMMON, DROP, EXPECTED, ops
from graphopt.streamed import some_spans

aten = torch.ops.aten

# Elementwise passes over each tile, and of them the costly one: an exponential takes so many operations
# at the rate of float32 products, as functions do in `graphopt.cost_models.nodes`.
_PASSES = {
    ops.streamed_statistics.default: 4,
    ops.streamed_gradients.default: 4,
    ops.streamed_sweep.default: 5,
    ops.streamed_attention.default: 5,
    ops.streamed_attention_gradient.default: 0,
}
_EXPECTED_PASSES = 3  # a copy of the logits, and their products with the exponentials
_EXPONENTIAL_OPS = {"cpu": 40, "cuda": 20}
_KERNELS_PER_BLOCK = 15
# The part of the memory rate at which a block's products read its operands and sums again, which they do
# not hide behind arithmetic: 15 to 20 ms for 412 MB in float32, where a core reaches 63 GB/s otherwise
# (measured with N=2048, D=512, V=50257 and blocks of 256 to 16 tokens on an AVX-512 core).
_AGAIN_EFFICIENCY = 0.4
# A product of so few rows runs at half of the rate; 23 % more time with 32 rows instead of 128 there.
_HALF_RATE_ROWS = 3
# From this size on, glibc maps a tile afresh, and the system clears its pages as they are written:
# three times the logits of plain, 1.2 GB, take 0.6 s beyond what their arithmetic does there.
_FRESH_BYTES, _FRESH_BYTES_PER_S = 2**25, 2e9


def is_streamed(node: fx.Node) -> bool:
    """True for the operators of `graphopt.stream_ops` that work in blocks."""
    return node.target in BODY_OF


def scratch_bytes(node: fx.Node, probed: bool = False) -> int:
    """Bytes that a streamed operator holds besides its inputs and outputs, all rows counted as kept.

    With `probed` the scratch of its matrix products in low precision is measured here, and counts.
    """
    arguments, _ = operands(node)
    return _scratch(node.target, probed, *map(_spec, arguments))


def _spec(value: Any) -> Any:
    if isinstance(value, Tensor):
        strides = tuple(hint(s) for s in value.stride())
        return TensorSpec(value.dtype, shape_of(value), strides, value.device)
    return tuple(value) if isinstance(value, list) else value


@functools.lru_cache(maxsize=1024)
def _scratch(target: Any, probed: bool, *arguments: Any) -> int:
    with _disable_current_modes(), FakeTensorMode(), torch.no_grad():
        made = [_made(a) for a in arguments]
        kept = torch.arange(made[0].shape[0], device=made[0].device) if made[DROP] else None
        with some_spans(), _Counter(kept, probed) as counter:
            result = BODY_OF[target](kept, *made)
    outputs = sum(_nbytes(t) for t in pytree.tree_leaves(result))
    products = {key: _product_scratch(*key) for key in counter.products}
    peak = max((live + products.get(key, 0) for key, live in counter.moments.items()), default=0)
    return max(0, peak - outputs)


def _made(value: Any) -> Any:
    if not isinstance(value, TensorSpec):
        return value
    return torch.empty_strided(value.sizes, value.strides, dtype=value.dtype, device=value.device)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Counter(TorchDispatchMode):
    """Counts the bytes of the storages that operators make, as long as a tensor holds them."""

    def __init__(self, kept: Tensor | None, probed: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0 if kept is None else _nbytes(kept)
        self.probed = probed
        self.products: set[Any] = set()
        self.moments: dict[Any, int] = {}  # most bytes while a product ran, and else (None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in pytree.tree_leaves((args, kwargs)) if _is(t)}
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if _is(tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                self.live_bytes += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        key = _product_of(func, args) if self.probed else None
        if key is not None:
            self.products.add(key)
        self.moments[key] = max(self.moments.get(key, 0), self.live_bytes)
        return result

    def _freed(self, nbytes: int) -> None:
        self.live_bytes -= nbytes


def _product_of(func: Any, args: Any) -> tuple[TensorSpec, TensorSpec] | None:
    """The operands of a matrix product in low precision."""
    if func not in (aten.mm.default, aten.mm.out, aten.addmm.out):
        return None
    left, right = args[-2:]
    return None if left.dtype in (torch.float32, torch.float64) else (_spec(left), _spec(right))


@functools.lru_cache(maxsize=1024)
def _product_scratch(left: TensorSpec, right: TensorSpec) -> int:
    """What the kernel of a matrix product allocates for itself, measured."""
    graph = fx.Graph()
    sides = [graph.placeholder(name) for name in ("left", "right")]
    node = graph.call_function(aten.mm.default, tuple(sides))
    with FakeTensorMode():
        for side, spec in zip(sides, (left, right), strict=True):
            side.meta["val"] = _made(spec)
        node.meta["val"] = torch.mm(*(side.meta["val"] for side in sides))
    found = probe([node], repeats=0).get(probe_key(node) or "")
    return 0 if found is None else found.workspace_bytes


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def streamed_cost(node: fx.Node, device: Device) -> NodeCost:
    """The cost of one streamed operator on `device`."""
    arguments, _ = operands(node)
    x, weight = arguments[:2]
    (n, d), v = shape_of(x), shape_of(weight)[0]
    flops, read, written = node_flops(node), read_bytes(node), write_bytes(node)
    target: Any = node.target
    blocks, again = _again_bytes(target, arguments, n, d, v)
    passes = _PASSES[target]
    tile = n * v * (passes + _EXPECTED_PASSES if passes and arguments[EXPECTED] else passes)
    exponentials = n * v * _EXPONENTIAL_OPS[device.kind] if tile else 0
    moved = read + written + (tile * 4 if tile else n * d * 16)
    rows, tile_bytes = _tile(target, arguments, n, v)
    efficiency = rows / (rows + _HALF_RATE_ROWS) if rows else 1.0
    seconds = roofline.seconds(flops, moved, x.dtype, device, exponentials, efficiency=efficiency)
    if device.kind == "cpu" and tile_bytes >= _FRESH_BYTES:
        seconds += tile_bytes / _FRESH_BYTES_PER_S
    seconds += device.overhead_s * _KERNELS_PER_BLOCK * blocks
    seconds += again / (_AGAIN_EFFICIENCY * device.bytes_per_s)
    return NodeCost(flops, read + again, written, seconds)


def _tile(target: Any, arguments: Any, n: int, v: int) -> tuple[int, int]:
    """The rows of a tile, and its bytes."""
    if target is ops.streamed_attention_gradient.default:
        return 0, 0
    size = max(4, arguments[0].element_size())
    if target is ops.streamed_sweep.default:
        rows = min(n, arguments[-2])
        return rows, rows * v * size
    return n, n * min(v, _columns(target, arguments)) * size


def _columns(target: Any, arguments: Any) -> int:
    """The words of a block of the vocabulary."""
    return int(arguments[COMMON if target is not ops.streamed_gradients.default else -2])


def _again_bytes(target: Any, arguments: Any, n: int, d: int, v: int) -> tuple[int, int]:
    """The number of blocks, and the bytes that they move again of operands and sums."""
    size = arguments[0].element_size()
    if target is ops.streamed_sweep.default:
        rows, wanted = arguments[-2:]
        blocks = math.ceil(n / rows)
        # Thin products read the weight at half the rate: 16 to 36 ms for two of them without the sum.
        return blocks, blocks * v * d * max(4 * size, 2 * size + 8 if wanted[1] else 0)
    if target is ops.streamed_attention_gradient.default:
        return 1, 0
    blocks = math.ceil(v / _columns(target, arguments))
    sums = target is ops.streamed_attention.default or (
        target is ops.streamed_gradients.default and arguments[-1][0]
    )
    return blocks, blocks * n * d * (size + (8 if sums else 0))
