"""ATen operators as formulas of generated kernels: one row for each operator that can be fused.

A rule gives the value of a node from its operands, which `Emitter` finds: they are values of the same
region, or tensors that it reads. Rows with `arithmetic` work place by place; the others say how in words.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from graphopt.codegen.builder import Builder, Expression
from graphopt.passes.fuse_values import CannotFuse, Emitter, Value, args_of, needs

aten = torch.ops.aten
Formula = Callable[..., Expression]
Rule = Callable[[Emitter, fx.Node], Value | tuple[Value, ...]]
_SQRT_HALF = math.sqrt(0.5)
_MAX_LAYERS = 8  # of a sum over a dimension that is neither the last nor all others
_C1, _C3 = math.sqrt(2 / math.pi), 0.044715


# --- place by place ----------------------------------------------------------------------------


def arithmetic(formula: Formula, operands: int, masks: tuple[int, ...] = ()) -> Rule:
    """The rule of an operator whose first arguments are operands of `formula`, place for place.

    Other arguments are options of `formula`; those by position are called `a0`, `a1`, .. `masks` are the
    operands that say where.
    """

    def rule(e: Emitter, node: fx.Node) -> Value:
        options = {f"a{n}": a for n, a in enumerate(node.args[operands:])} | node.kwargs
        return e.pointwise(node, lambda *xs: formula(e.b, *xs, **options), node.args[:operands], masks)

    return rule


def _call(name: str) -> Formula:
    return lambda b, *xs: b.apply(name, *xs)


def _scaled(op: str) -> Formula:
    def formula(b: Builder, x: Expression, y: Expression, alpha: float = 1, a0: Any = None) -> Expression:
        factor = alpha if a0 is None else a0
        return b.apply(op, x, y if factor == 1 else y * float(factor))

    return formula


def _reversed_sub(
    b: Builder, x: Expression, y: Expression, alpha: float = 1, a0: Any = None
) -> Expression:
    return _scaled("sub")(b, y, x, alpha, a0)


def _power(b: Builder, x: Expression, a0: float) -> Expression:
    needs(
        not isinstance(a0, fx.Node) and float(a0) in _POWERS,
        "power",
        f"an exponent of {a0} has no formula",
    )
    return _POWERS[float(a0)](b, x)


_POWERS: dict[float, Formula] = {
    1.0: lambda b, x: x,
    2.0: lambda b, x: x * x,
    3.0: lambda b, x: x * x * x,
    4.0: lambda b, x: (x * x) * (x * x),
    0.5: lambda b, x: b.apply("sqrt", x),
    -0.5: lambda b, x: b.apply("rsqrt", x),
    -1.0: lambda b, x: b.apply("reciprocal", x),
}


def _clamp(b: Builder, x: Expression, a0: Any = None, a1: Any = None, **more: Any) -> Expression:
    low, high = more.get("min", a0), more.get("max", a1)
    x = x if low is None else b.apply("maximum", x, float(low))
    return x if high is None else b.apply("minimum", x, float(high))


def _silu(b: Builder, x: Expression) -> Expression:
    return x * b.apply("sigmoid", x)


def _silu_backward(b: Builder, g: Expression, x: Expression) -> Expression:
    s = b.apply("sigmoid", x)
    return g * (s * (x * (1.0 - s) + 1.0))


def _gelu(b: Builder, x: Expression, approximate: str = "none") -> Expression:
    if approximate == "none":
        return x * 0.5 * (b.apply("erf", x * _SQRT_HALF) + 1.0)
    return x * b.apply("sigmoid", x * (x * x * (2 * _C1 * _C3) + 2 * _C1))  # (1 + tanh(u)) / 2, of 2 u


def _gelu_backward(b: Builder, g: Expression, x: Expression, approximate: str = "none") -> Expression:
    if approximate == "none":
        density = b.apply("exp", x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
        return g * ((b.apply("erf", x * _SQRT_HALF) + 1.0) * 0.5 + x * density)
    square = x * x
    t = b.apply("tanh", (x + square * x * _C3) * _C1)
    slope = (t + 1.0) * 0.5 + x * 0.5 * (1.0 - t * t) * ((square * (3 * _C3) + 1.0) * _C1)
    return g * slope


def _threshold_backward(b: Builder, g: Expression, x: Expression, a0: float) -> Expression:
    return b.apply("where", b.apply("le", x, float(a0)), 0.0, g)


def _copied(e: Emitter, node: fx.Node) -> Value:
    """Of another dtype; rounded where that is narrower, as the cast does."""
    others = {k for k, v in node.kwargs.items() if v is not None} - {"dtype", "memory_format"}
    source, target = args_of(node)[0].meta["val"], node.meta["val"]
    same = source.device == target.device and not (others - {"device", "layout", "pin_memory"})
    needs(same, "copy", "it is a copy to another place")
    narrower = source.dtype.is_floating_point and source.dtype.itemsize > target.dtype.itemsize
    dtype: Any = str(target.dtype).removeprefix("torch.")
    return e.pointwise(node, lambda x: e.b.round(x, dtype) if narrower else x, node.args[:1])


# --- along the columns -------------------------------------------------------------------------


def _reduced(kind: str) -> Rule:
    """`sum`, `mean`, `amax`, `amin` over the last dimension; sums over all others, or a short one."""

    def rule(e: Emitter, node: fx.Node) -> Value:
        if (dim := layered_dim(node)) is not None:
            return _sum_of_layers(e, node, dim)
        x = e.whole(args_of(node)[0])
        dims = args_of(node)[1] if len(args_of(node)) > 1 else []
        last = len(x.shape) - 1
        over = sorted(d % len(x.shape) for d in dims) if dims else []
        if over == [last]:
            return Value(tuple(node.meta["val"].shape), (e.reduced(kind, x),), "row")
        rows = [d for d in range(last) if x.shape[d] > 1]
        sums = kind == "sum" and set(over) >= set(rows) and last not in over
        needs(
            sums,
            "reduction",
            f"{kind} over dimensions {over} of {len(x.shape)} is neither of a row nor of all",
        )
        return Value(tuple(node.meta["val"].shape), e.over_rows(x), "column")

    return rule


def layered_dim(node: fx.Node) -> int | None:
    """The dimension over which a node sums, where it is short, not the last, and not all of the rows."""
    if node.target is not aten.sum.dim_IntList or not args_of(node)[1]:
        return None
    shape = tuple(args_of(node)[0].meta["val"].shape)
    if not shape or any(type(size) is not int for size in shape):
        return None
    dim, *more = (d % len(shape) for d in args_of(node)[1])
    rows = {d for d in range(len(shape) - 1) if shape[d] != 1}
    if more or dim not in rows or rows == {dim}:
        return None
    return dim if shape[dim] <= _MAX_LAYERS else None


def _sum_of_layers(e: Emitter, node: fx.Node, dim: int) -> Value:
    """The sum over a short dimension, as the gradient of heads that share keys and values."""
    source, tensor = args_of(node)[0], node.meta["val"]
    own = tuple(source.meta["val"].shape)
    floats = source.meta["val"].dtype.is_floating_point and source.meta["val"].dtype == tensor.dtype
    needs(floats, "dtype", f"it makes {tensor.dtype}")
    needs(own[-1] > 1, "grid", "there are no columns")
    total, *more = e.layers(source, dim, own[:dim] + own[dim + 1 :])
    for layer in more:
        total = tuple(x + y for x, y in zip(total, layer, strict=True))
    return Value(tuple(tensor.shape), total)


def _cloned(e: Emitter, node: fx.Node) -> Value:
    """A copy; of a view with rows in another order, the value itself, stored in that order."""
    turned = e.turned(args_of(node)[0])
    if turned is None:
        return e.pointwise(node, lambda x: x, node.args[:1])
    value, order = turned
    return Value(value.shape, value.pieces, order=order)


def _softmax(log: bool) -> Rule:
    def rule(e: Emitter, node: fx.Node) -> Value:
        x = e.whole(args_of(node)[0])
        _needs_last(node, args_of(node)[1], x)
        peak = e.reduced("amax", x)
        shifted = [p - peak for p in x.pieces]
        powers = [e.b.apply("exp", p) for p in shifted]
        total = e.reduced("sum", Value(x.shape, tuple(powers)))
        if log:
            rest = e.b.apply("log", total)
            return Value(x.shape, tuple(p - rest for p in shifted))
        scale = e.b.apply("reciprocal", total)
        return Value(x.shape, tuple(p * scale for p in powers))

    return rule


def _softmax_backward(log: bool) -> Rule:
    def rule(e: Emitter, node: fx.Node) -> Value:
        grad, out = e.whole(args_of(node)[0]), e.whole(args_of(node)[1])
        _needs_last(node, args_of(node)[2], out)
        pairs = list(zip(grad.pieces, out.pieces, strict=True))
        if log:
            total = e.reduced("sum", grad)
            return Value(out.shape, tuple(g - e.b.apply("exp", o) * total for g, o in pairs))
        total = e.reduced("sum", Value(out.shape, tuple(g * o for g, o in pairs)))
        return Value(out.shape, tuple(o * (g - total) for g, o in pairs))

    return rule


def _needs_last(node: fx.Node, dim: Any, x: Value) -> None:
    needs(dim in (-1, len(x.shape) - 1), "reduction", f"{node.target} is not over the last dimension")


def _layer_norm(e: Emitter, node: fx.Node) -> tuple[Value, ...]:
    source, shape, weight, bias, eps = args_of(node)
    needs(len(shape) == 1, "reduction", "the norm is over several dimensions")
    x = e.whole(source)
    mean = e.reduced("mean", x)
    centred = Value(x.shape, tuple(p - mean for p in x.pieces))
    squares = Value(x.shape, tuple(p * p for p in centred.pieces))
    scale = e.b.apply("rsqrt", e.reduced("mean", squares) + float(eps))
    out = [p * scale for p in centred.pieces]
    if weight is not None:
        out = [p * w for p, w in zip(out, e.columns(weight, x), strict=True)]
    if bias is not None:
        out = [p + w for p, w in zip(out, e.columns(bias, x), strict=True)]
    rows = tuple(node.meta["val"][1].shape)
    return Value(x.shape, tuple(out)), Value(rows, (mean,), "row"), Value(rows, (scale,), "row")


def _layer_norm_backward(e: Emitter, node: fx.Node) -> tuple[Value, ...]:
    grad_of, source, shape, mean_of, scale_of, weight, _, mask = args_of(node)
    needs(len(shape) == 1, "reduction", "the norm is over several dimensions")
    grad, x = e.whole(grad_of), e.whole(source)
    mean, scale = e.row(mean_of), e.row(scale_of)
    normed = [(p - mean) * scale for p in x.pieces]
    inner = list(grad.pieces)
    if weight is not None:
        inner = [g * w for g, w in zip(inner, e.columns(weight, x), strict=True)]
    first = e.reduced("mean", Value(x.shape, tuple(inner)))
    second = e.reduced("mean", Value(x.shape, tuple(i * n for i, n in zip(inner, normed, strict=True))))
    dx = tuple((i - first - n * second) * scale for i, n in zip(inner, normed, strict=True))
    products = Value(x.shape, tuple(g * n for g, n in zip(grad.pieces, normed, strict=True)))
    empty = Value((), ())
    wide = x.shape[-1:]
    return (
        Value(x.shape, dx) if mask[0] else empty,
        Value(wide, e.over_rows(products), "column") if mask[1] else empty,
        Value(wide, e.over_rows(grad), "column") if mask[2] else empty,
    )


def _nll_backward(e: Emitter, node: fx.Node) -> Value:
    """The gradient of the mean or sum of the losses: minus the factor in the target's column."""
    grad, x, target, weight, reduction, ignore, total = args_of(node)
    needs(weight is None and reduction in (1, 2), "loss", "classes have weights, or rows have losses")
    shape = tuple(x.meta["val"].shape)
    needs(len(shape) == 2 and e.pieces(shape) == 1, "loss", "the logits are not rows x classes")
    index = e.row(target)
    factor = -e.scalar(grad)
    if reduction == 1:
        factor = factor / e.scalar(total)
    counts = e.b.apply("ne", index, int(ignore))
    own = e.b.apply("where", counts, factor, 0.0)
    return e.hot(shape, index, own)


# --- pieces ------------------------------------------------------------------------------------


def _joined(e: Emitter, node: fx.Node) -> Value:
    parts: Any = args_of(node)[0]
    shape = tuple(node.meta["val"].shape)
    dim = args_of(node)[1] if len(args_of(node)) > 1 else 0
    needs(dim in (-1, len(shape) - 1), "pieces", "it joins along rows")
    return Value(shape, tuple(p for part in parts for p in e.whole(part).pieces))


def _slice_backward(e: Emitter, node: fx.Node) -> Value:
    source, sizes, dim, begin, _, step = args_of(node)
    shape = tuple(sizes)
    needs(dim in (-1, len(shape) - 1) and step == 1, "pieces", "it is of a slice of rows")
    x, count = e.whole(source), e.pieces(shape)
    width = shape[-1] // count
    first = min(int(begin), shape[-1])
    needs(first % width == 0, "pieces", "the slice does not begin with a piece")
    zero = e.b.constant(0.0)
    before = first // width
    after = count - before - len(x.pieces)
    return Value(shape, ((zero,) * before + x.pieces + (zero,) * after))


# --- the table ---------------------------------------------------------------------------------


def _places(names: Mapping[Any, Formula], operands: int) -> dict[Any, Rule]:
    return {op: arithmetic(formula, operands) for op, formula in names.items()}


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
RULES: Mapping[Any, Rule] = {
    **_places(
        {
            getattr(aten, n).default: _call(n)
            for n in ("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal")
        },
        1,
    ),
    **_places({getattr(aten, n).default: _call(n) for n in ("tanh", "sigmoid", "erf")}, 1),
    aten.logical_not.default: arithmetic(_call("logical_not"), 1, masks=(0,)),
    **_places(
        {
            aten.pow.Tensor_Scalar: _power,
            aten.relu.default: lambda b, x: b.apply("maximum", x, 0.0),
            aten.silu.default: _silu,
            aten.gelu.default: _gelu,
            aten.clamp.default: _clamp,
            aten.square.default: lambda b, x: x * x,
        },
        1,
    ),
    **_places(
        {
            **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _scaled("add")),
            **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _scaled("sub")),
            **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _reversed_sub),
            **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _call("mul")),
            **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _call("div")),
            aten.maximum.default: _call("maximum"),
            aten.minimum.default: _call("minimum"),
            aten.silu_backward.default: _silu_backward,
            aten.gelu_backward.default: _gelu_backward,
            aten.tanh_backward.default: lambda b, g, t: g * (1.0 - t * t),
            aten.sigmoid_backward.default: lambda b, g, s: g * (s * (1.0 - s)),
            aten.threshold_backward.default: _threshold_backward,
        },
        2,
    ),
    aten.logical_and.default: arithmetic(_call("logical_and"), 2, masks=(0, 1)),
    aten.logical_or.default: arithmetic(_call("logical_or"), 2, masks=(0, 1)),
    **_places(
        {getattr(getattr(aten, n), k): _call(n) for n in _COMPARISONS for k in ("Tensor", "Scalar")}, 2
    ),
    aten.where.self: arithmetic(_call("where"), 3, masks=(0,)),
    aten.masked_fill.Scalar: arithmetic(
        lambda b, x, mask, y: b.apply("where", mask, y, x), 3, masks=(1,)
    ),
    aten._to_copy.default: _copied,
    aten.clone.default: _cloned,
    aten.sum.dim_IntList: _reduced("sum"),
    aten.mean.dim: _reduced("mean"),
    aten.amax.default: _reduced("amax"),
    aten.amin.default: _reduced("amin"),
    aten._softmax.default: _softmax(log=False),
    aten._log_softmax.default: _softmax(log=True),
    aten._softmax_backward_data.default: _softmax_backward(log=False),
    aten._log_softmax_backward_data.default: _softmax_backward(log=True),
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.nll_loss_backward.default: _nll_backward,
    aten.cat.default: _joined,
    aten.slice_backward.default: _slice_backward,
}


def emitted(e: Emitter, node: fx.Node) -> Value | tuple[Value, ...]:
    """The value of a node of the region that `e` writes; CannotFuse says what stands against it."""
    rule = RULES.get(node.target)
    if rule is None:
        raise CannotFuse("operator", f"{node.target} has no formula")
    return rule(e, node)
