"""The regions of common layers. `dtype` is that of activations and weights in memory.

Shapes: x is (.., D); weights and biases are (D,); row values are (..). Numbers that may change from call
to call (epsilon, learning rates) are scalar inputs.
"""

import functools
import math
from typing import Literal

from graphopt.codegen.builder import Builder, Expression
from graphopt.codegen.region import Dtype, Extent, Math, Region

ROW, COLUMN, SCALAR = Extent.ROW, Extent.COLUMN, Extent.SCALAR


def math_of(dtype: Dtype) -> Math:
    """What numbers of `dtype` are computed in."""
    return "float64" if dtype == "float64" else "float32"


def _builder(dtype: Dtype) -> tuple[Builder, Math]:
    kind = math_of(dtype)
    return Builder(kind), kind


@functools.cache
def rms_norm(dtype: Dtype, residual: bool, weighted: bool = True, saved: bool = False) -> Region:
    """`h = x + residual; h * rsqrt(mean(h**2) + eps) * weight`: outputs `out`, and `sum` if `residual`.

    With `saved`, also the row values `scale`, for the backward. Zhang and Sennrich, "Root Mean Square
    Layer Normalization", 2019.
    """
    b, kind = _builder(dtype)
    h = b.input("x", dtype)
    if residual:
        h = h + b.input("residual", dtype)
    scale = b.apply("rsqrt", b.mean(h * h) + b.input("eps", "float64", SCALAR))
    normed = h * scale
    if weighted:
        normed = normed * b.input("weight", dtype, COLUMN)
    outputs = [b.output("out", normed, dtype)]
    if residual:
        outputs.append(b.output("sum", h, dtype))
    if saved:
        outputs.append(b.output("scale", scale, kind))
    return b.region(*outputs)


@functools.cache
def rms_norm_backward(dtype: Dtype, residual: bool, weighted: bool = True) -> Region:
    """Gradients of `rms_norm` of `h`: outputs `dh`, and `dweight` (D,) in the dtype of the computation.

    With `residual`, `dsum` is the gradient of the sum, which is added.
    """
    b, kind = _builder(dtype)
    grad, h = b.input("grad", dtype), b.input("h", dtype)
    scale = b.input("scale", kind, ROW)
    normed = h * scale
    inner = grad * b.input("weight", dtype, COLUMN) if weighted else grad
    dh = (inner - normed * b.mean(inner * normed)) * scale
    if residual:
        dh = dh + b.input("dsum", dtype)
    outputs = [b.output("dh", dh, dtype)]
    if weighted:
        outputs.append(b.output("dweight", b.sum(grad * normed, over="rows"), kind))
    return b.region(*outputs)


@functools.cache
def layer_norm(dtype: Dtype, weighted: bool = True, biased: bool = True) -> Region:
    """`(x - mean) * rsqrt(var + eps) * weight + bias`; outputs `out` and the row values `mean`, `scale`.

    Ba, Kiros and Hinton, "Layer Normalization", 2016. The variance is of the differences from the mean.
    """
    b, kind = _builder(dtype)
    x = b.input("x", dtype)
    mean = b.mean(x)
    centred = x - mean
    scale = b.apply("rsqrt", b.mean(centred * centred) + b.input("eps", "float64", SCALAR))
    out = centred * scale
    if weighted:
        out = out * b.input("weight", dtype, COLUMN)
    if biased:
        out = out + b.input("bias", dtype, COLUMN)
    return b.region(
        b.output("out", out, dtype), b.output("mean", mean, kind), b.output("scale", scale, kind)
    )


@functools.cache
def layer_norm_backward(dtype: Dtype, weighted: bool = True) -> Region:
    """Gradients of `layer_norm`: `dx`, and `dweight` and `dbias` (D,) in the dtype of the computation."""
    b, kind = _builder(dtype)
    grad, x = b.input("grad", dtype), b.input("x", dtype)
    mean, scale = b.input("mean", kind, ROW), b.input("scale", kind, ROW)
    normed = (x - mean) * scale
    inner = grad * b.input("weight", dtype, COLUMN) if weighted else grad
    dx = (inner - b.mean(inner) - normed * b.mean(inner * normed)) * scale
    return b.region(
        b.output("dx", dx, dtype),
        b.output("dweight", b.sum(grad * normed, over="rows"), kind),
        b.output("dbias", b.sum(grad, over="rows"), kind),
    )


@functools.cache
def softmax(dtype: Dtype, log: bool = False) -> Region:
    """The softmax of each row, or its logarithm."""
    b, _ = _builder(dtype)
    x = b.input("x", dtype)
    shifted = x - b.max(x)
    e = b.apply("exp", shifted)
    total = b.sum(e)
    out = shifted - b.apply("log", total) if log else e * b.apply("reciprocal", total)
    return b.region(b.output("out", out, dtype))


@functools.cache
def softmax_backward(dtype: Dtype) -> Region:
    """The gradient of `softmax`, from its result `out`: `out * (grad - sum(grad * out))`."""
    b, _ = _builder(dtype)
    grad, out = b.input("grad", dtype), b.input("out", dtype)
    return b.region(b.output("dx", out * (grad - b.sum(grad * out)), dtype))


@functools.cache
def cross_entropy(dtype: Dtype, gradient: bool) -> Region:
    """Of each row `loss = logsumexp(x) - x[target]`, 0 where the target is `ignore`.

    With `gradient`, also `dx`, that of the losses' sum times the scalar `factor`.
    """
    b, kind = _builder(dtype)
    x = b.input("x", dtype)
    target, ignore = b.input("target", "int64", ROW), b.input("ignore", "int64", SCALAR)
    peak = b.max(x)
    e = b.apply("exp", x - peak)
    total = b.sum(e)
    counts = b.apply("ne", target, ignore)
    loss = b.apply("log", total) + (peak - b.gather(x, target))
    outputs = [b.output("loss", b.apply("where", counts, loss, 0.0), kind)]
    if gradient:
        factor = b.apply("where", counts, b.input("factor", "float64", SCALAR), 0.0)
        hot = b.apply("where", b.apply("eq", b.apply("column_index"), target), factor, 0.0)
        scale = b.apply("where", counts, factor / total, 0.0)
        grad = b.apply("where", counts, e * scale - hot, 0.0)
        outputs.append(b.output("dx", grad, dtype))
    return b.region(*outputs)


@functools.cache
def swiglu(dtype: Dtype) -> Region:
    """`silu(gate) * up` (Shazeer, "GLU Variants Improve Transformer", 2020)."""
    b, _ = _builder(dtype)
    gate, up = b.input("gate", dtype), b.input("up", dtype)
    return b.region(b.output("out", gate * b.apply("sigmoid", gate) * up, dtype))


@functools.cache
def swiglu_backward(dtype: Dtype) -> Region:
    """Gradients `dgate` and `dup` of `swiglu`."""
    b, _ = _builder(dtype)
    grad, gate, up = b.input("grad", dtype), b.input("gate", dtype), b.input("up", dtype)
    s = b.apply("sigmoid", gate)
    silu = gate * s
    dgate = grad * up * (s + silu * (1.0 - s))
    return b.region(b.output("dgate", dgate, dtype), b.output("dup", grad * silu, dtype))


Gelu = Literal["none", "tanh"]
_C1, _C3 = math.sqrt(2 / math.pi), 0.044715


def _gelu(b: Builder, h: Expression, approximate: Gelu) -> Expression:
    if approximate == "none":
        return h * 0.5 * (b.apply("erf", h * math.sqrt(0.5)) + 1.0)
    # (1 + tanh(u)) / 2 is the sigmoid of 2 u, and loses nothing where the tangent is near -1.
    return h * b.apply("sigmoid", h * (h * h * (2 * _C1 * _C3) + 2 * _C1))


def _gelu_slope(b: Builder, h: Expression, approximate: Gelu) -> Expression:
    if approximate == "none":
        density = b.apply("exp", h * h * -0.5) * (1 / math.sqrt(2 * math.pi))
        return (b.apply("erf", h * math.sqrt(0.5)) + 1.0) * 0.5 + h * density
    square = h * h
    t = b.apply("tanh", (h + square * h * _C3) * _C1)
    return (t + 1.0) * 0.5 + h * 0.5 * (1.0 - t * t) * ((square * (3 * _C3) + 1.0) * _C1)


@functools.cache
def bias_gelu_residual(dtype: Dtype, approximate: Gelu) -> Region:
    """`gelu(x + bias) + residual` (Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016)."""
    b, _ = _builder(dtype)
    h = b.input("x", dtype) + b.input("bias", dtype, COLUMN)
    out = _gelu(b, h, approximate) + b.input("residual", dtype)
    return b.region(b.output("out", out, dtype))


@functools.cache
def bias_gelu_residual_backward(dtype: Dtype, approximate: Gelu) -> Region:
    """`dx`, and `dbias` (D,) in the dtype of the computation; the residual's gradient is `grad`."""
    b, kind = _builder(dtype)
    grad = b.input("grad", dtype)
    h = b.input("x", dtype) + b.input("bias", dtype, COLUMN)
    dx = grad * _gelu_slope(b, h, approximate)
    return b.region(b.output("dx", dx, dtype), b.output("dbias", b.sum(dx, over="rows"), kind))


@functools.cache
def rotary(dtype: Dtype) -> Region:
    """Both halves of the columns turned: `first cos - second sin` and `second cos + first sin`.

    The halves are inputs and outputs of their own: views of one tensor each. Su et al., "RoFormer:
    Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    b, _ = _builder(dtype)
    x, y, cos, sin = (b.input(name, dtype) for name in ("first", "second", "cos", "sin"))
    return b.region(
        b.output("out_first", x * cos - y * sin, dtype), b.output("out_second", y * cos + x * sin, dtype)
    )


@functools.cache
def dropout(dtype: Dtype) -> Region:
    """`x / (1 - p)` where a random number of the `seed` is at least `p`, else 0; its own backward."""
    b, _ = _builder(dtype)
    x, seed, p = b.input("x", dtype), b.input("seed", "int64", SCALAR), b.input("p", "float64", SCALAR)
    keeps = b.apply("ge", b.uniform(seed), p)
    out = b.apply("where", keeps, x * b.apply("reciprocal", 1.0 - p), 0.0)
    return b.region(b.output("out", out, dtype))


@functools.cache
def adamw(dtype: Dtype, moments: Dtype | None = None) -> Region:
    """One step of AdamW: new parameter, and first and second moment (Loshchilov and Hutter, 2019).

    `moments` are by default kept in the dtype of the computation. Scalars, exact as float64 before they
    are rounded: `keep` is `1 - lr * decay`, `rest1` and `rest2` are `1 - beta1` and `1 - beta2`,
    `correction` is the square root of `1 - beta2**t`, and `step` is `lr / (1 - beta1**t)`.
    """
    b, kind = _builder(dtype)
    p, g = b.input("parameter", dtype), b.input("gradient", dtype)
    m, v = b.input("first", moments or kind), b.input("second", moments or kind)
    names = ("keep", "beta2", "rest1", "rest2", "eps", "correction", "step")
    keep, beta2, rest1, rest2, eps, correction, step = (
        b.input(name, "float64", SCALAR) for name in names
    )
    m = m + (g - m) * rest1
    v = v * beta2 + g * g * rest2
    p = p * keep - m / (b.apply("sqrt", v) / correction + eps) * step
    return b.region(
        b.output("new_parameter", p, dtype),
        b.output("new_first", m, moments or kind),
        b.output("new_second", v, moments or kind),
    )
