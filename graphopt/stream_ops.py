"""The streamed losses as operators of a graph: `torch.ops.graphopt.streamed_*`.

The common arguments are `x` (N, D), `weight` (V, D), `bias` (V,), `targets` (N,), `mix` (1 or N, V), the
numbers of `Head`, whether sums of logits are `summed`, the `ignore` index, whether rows with that
target are left out first (`drop`): their numbers and gradients are then zero, and whether the logits'
`expected` values under the softmax are asked for. `rows` and `columns`
are the sizes of blocks. As in eager mode, other targets outside of [0, V) raise IndexError on a CPU, and
fail an assertion on another device.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from graphopt import stream_plans
from graphopt.absent_logits import absent_logits
from graphopt.custom_ops import register
from graphopt.streamed import Coefficients, Head, Operands

_COMMON = (
    "Tensor x, Tensor weight, Tensor? bias, Tensor? targets, Tensor? mix, float inner, float cap, "
    "bool summed, int ignore, bool drop, bool expected"
)
_BY = "Tensor? p, Tensor? hot, Tensor? one, Tensor? mixed"
_NUMBERS = "Tensor lse, Tensor picked, Tensor total, Tensor dot, Tensor expected"
_SCHEMAS = {
    "streamed_statistics": f"({_COMMON}, int columns) -> ({_NUMBERS})",
    "streamed_gradients": f"({_COMMON}, Tensor lse, {_BY}, Tensor? pz, int columns, bool[3] wanted) "
    "-> (Tensor dx, Tensor dweight, Tensor dbias)",
    "streamed_sweep": f"({_COMMON}, {_BY}, Tensor? p_per_lse, int rows, bool[3] wanted) "
    f"-> ({_NUMBERS}, Tensor dx, Tensor dweight, Tensor dbias)",
    "streamed_attention": f"({_COMMON}, int columns) -> ({_NUMBERS}, Tensor mean)",
    "streamed_attention_gradient": f"({_COMMON}, Tensor mean, {_BY}) -> Tensor",
}
COMMON = 11  # arguments that all but the last of the operators have
DROP, EXPECTED = 9, 10  # positions among them
NUMBERS = len(stream_plans.RowNumbers._fields)  # the first results of most

Result = tuple[Tensor, ...]


class _Kept:
    """The rows that a streamed operator works on: all of them, or those whose target counts."""

    def __init__(self, operands: Operands, rows: Tensor | None) -> None:
        self.count = operands.x.shape[0]
        self.index = rows
        self.operands = operands if rows is None else self._picked(operands, rows)

    def _picked(self, operands: Operands, rows: Tensor) -> Operands:
        mix = operands.mix
        if mix is not None and mix.shape[0] > 1:
            mix = mix.index_select(0, rows)
        targets = None if operands.targets is None else operands.targets.index_select(0, rows)
        return operands._replace(x=operands.x.index_select(0, rows), targets=targets, mix=mix)

    def taken(self, tensor: Tensor | None) -> Tensor | None:
        """The rows of a tensor (N, ..) that are worked on."""
        return tensor if tensor is None or self.index is None else tensor.index_select(0, self.index)

    def put_back(self, tensor: Tensor) -> Tensor:
        """A tensor (kept, ..) among rows of zeros (N, ..)."""
        if self.index is None:
            return tensor
        return tensor.new_zeros((self.count, *tensor.shape[1:])).index_copy_(0, self.index, tensor)


def _operands(common: Sequence[Any]) -> Operands:
    x, weight, bias, targets, mix, inner, cap, summed, _ignore, _drop, expected = common
    return Operands(x, weight, bias, targets, mix, Head(inner, cap), summed, expected)


def kept_rows(common: Sequence[Any]) -> Tensor | None:
    """The rows that `drop` leaves (an index), None for all; IndexError for a target that is none."""
    targets: Tensor | None = common[3]
    ignore, drop = common[DROP - 1 : DROP + 1]
    if targets is None:
        return None
    counts: Tensor = targets != ignore
    _check_targets(targets, counts & ((targets < 0) | (targets >= common[1].shape[0])))
    if not drop or bool(counts.all()):
        return None
    return torch.nonzero(counts)[:, 0]


def _check_targets(targets: Tensor, wrong: Tensor) -> None:
    if targets.device.type != "cpu":
        torch._assert_async(~wrong.any(), "a target is out of bounds")
    elif bool(wrong.any()):
        raise IndexError(f"Target {int(targets[wrong][0])} is out of bounds.")


def statistics(kept: Tensor | None, *args: Any) -> Result:
    """`streamed_statistics` on the rows `kept`."""
    rows = _Kept(_operands(args[:COMMON]), kept)
    return tuple(map(rows.put_back, stream_plans.statistics(rows.operands, args[COMMON])))


def gradients(kept: Tensor | None, *args: Any) -> Result:
    """`streamed_gradients` on the rows `kept`."""
    lse, *by, columns, wanted = args[COMMON:]
    rows = _Kept(_operands(args[:COMMON]), kept)
    taken = Coefficients(*map(rows.taken, by))
    found = stream_plans.gradients(rows.operands, rows.taken(lse), taken, columns, wanted)  # type: ignore[arg-type]
    return (rows.put_back(found.x) if wanted[0] else found.x, *found[1:])


def sweep(kept: Tensor | None, *args: Any) -> Result:
    """`streamed_sweep` on the rows `kept`."""
    *by, per_lse, size, wanted = args[COMMON:]
    rows = _Kept(_operands(args[:COMMON]), kept)
    taken = Coefficients(*map(rows.taken, by))
    numbers, found = stream_plans.sweep(rows.operands, taken, rows.taken(per_lse), size, wanted)
    back = map(rows.put_back, numbers)
    return (*back, rows.put_back(found.x) if wanted[0] else found.x, *found[1:])


def attention(kept: Tensor | None, *args: Any) -> Result:
    """`streamed_attention` on the rows `kept`."""
    rows = _Kept(_operands(args[:COMMON]), kept)
    numbers, mean = stream_plans.attention(rows.operands, args[COMMON])
    return tuple(map(rows.put_back, (*numbers, mean)))


def attention_gradient(kept: Tensor | None, *args: Any) -> Tensor:
    """`streamed_attention_gradient` on the rows `kept`."""
    mean, *by = args[COMMON:]
    rows = _Kept(_operands(args[:COMMON]), kept)
    taken = Coefficients(*map(rows.taken, by))
    found = stream_plans.attention_gradient(rows.operands, rows.taken(mean), taken)  # type: ignore[arg-type]
    return rows.put_back(found)


def _scaled_gradient(gradient: Tensor, factor: Tensor) -> Tensor:
    """`gradient * factor`, written over it where autograd frees what the forward saved.

    With `retain_graph=True`, and outside of a backward, the result is a new tensor.
    """
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * factor
    if factor.device.type == "cpu" and bool(factor == 1):
        return gradient
    return gradient.mul_(factor)


def _absent_logits(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    inner: float,
    cap: float,
    shape: Sequence[int],
    dtype: torch.dtype,
    lazy: bool,
) -> Tensor:
    """Logits of this shape that make themselves when they are used; never, unless `lazy`."""

    def make() -> Tensor:
        raw = torch.nn.functional.linear(x, weight, bias)
        z = raw if inner == 1 else raw * inner
        return (z.tanh() * cap if cap else z).view(shape).to(dtype)

    sources = (x, weight) if bias is None else (x, weight, bias)
    return absent_logits(shape, sources if lazy else (), make if lazy else None, dtype, x.device)


def _absent_like(
    x: Tensor, _w: Any, _b: Any, _i: Any, _c: Any, shape: Any, dtype: Any, _l: Any
) -> Tensor:
    return x.new_empty((), dtype=dtype).expand(*shape)  # one number in memory


def _numbers_like(*args: Any) -> Result:
    x = args[0]
    return stream_plans.RowNumbers.empty(x)


def _gradients_like(*args: Any) -> Result:
    x, weight, wanted = args[0], args[1], args[-1]
    shapes = (x.shape, weight.shape, weight.shape[:1])
    return tuple(x.new_empty(s if w else (0,)) for s, w in zip(shapes, wanted, strict=True))


def _mean_like(*args: Any) -> Tensor:
    x: Tensor = args[0]
    return x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


_BODIES: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "streamed_statistics": (statistics, _numbers_like),
    "streamed_gradients": (gradients, _gradients_like),
    "streamed_sweep": (sweep, lambda *a: (*_numbers_like(*a), *_gradients_like(*a))),
    "streamed_attention": (attention, lambda *a: (*_numbers_like(*a), _mean_like(*a))),
    "streamed_attention_gradient": (attention_gradient, lambda *a: torch.empty_like(a[0])),
}


def _on_kept_rows(body: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: body(kept_rows(args[:COMMON]), *args)


for _name, (_body, _like) in _BODIES.items():
    register(_name, _SCHEMAS[_name], _on_kept_rows(_body), _like)
register(
    "scaled_gradient_",
    "(Tensor(a!) gradient, Tensor factor) -> Tensor(a!)",
    _scaled_gradient,
    lambda gradient, _: gradient,
)
register(
    "absent_logits",
    "(Tensor x, Tensor weight, Tensor? bias, float inner, float cap, SymInt[] shape, "
    "ScalarType dtype, bool lazy) -> Tensor",
    _absent_logits,
    _absent_like,
)

ops = torch.ops.graphopt
# operator -> the function that runs it on some of the rows; the cost model asks what it allocates.
BODY_OF: dict[Any, Callable[..., Any]] = {
    ops.streamed_statistics.default: statistics,
    ops.streamed_gradients.default: gradients,
    ops.streamed_sweep.default: sweep,
    ops.streamed_attention.default: attention,
    ops.streamed_attention_gradient.default: attention_gradient,
}


def _products(packet: Any, wanted: Sequence[bool]) -> int:
    """Products of size N D V that an operator takes."""
    fixed = {
        ops.streamed_statistics: 1,
        ops.streamed_attention: 2,
        ops.streamed_attention_gradient: 0,
    }
    return fixed[packet] if packet in fixed else 1 + bool(wanted[0]) + bool(wanted[1])


def _register_flops(packet: Any) -> None:
    def formula(x_shape: Any, weight_shape: Any, *args: Any, out_shape: Any = None, **_: Any) -> int:
        wanted = args[-1] if packet in (ops.streamed_gradients, ops.streamed_sweep) else ()
        count = _products(packet, wanted)
        return 2 * int(x_shape[0] * x_shape[1] * weight_shape[0]) * count

    register_flop_formula(packet)(formula)


for _target in BODY_OF:
    _register_flops(_target.overloadpacket)
