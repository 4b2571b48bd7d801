"""Six layers in Triton, of the kind that libraries of training kernels have, for kernels_gpu.py.

One program for each row, all of its columns at once with as many warps as such libraries take (4, from
2048 columns on 8, from 8192 on 16, from 32,768 on 32); the cross-entropy goes through its row in blocks
twice, with maximum and sum in one pass. Only kernels_gpu.py imports it, and only where Triton is.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MOST = 65536  # columns of one program
LOSS_BLOCK = 32768


def _sizes(columns: int, most: int = MOST) -> dict[str, int]:
    block = min(triton.next_power_of_2(columns), most)
    warps = 32 if block >= 32768 else 16 if block >= 8192 else 8 if block >= 2048 else 4
    return {"BLOCK": block, "num_warps": warps}


@triton.jit
def _norm(x, residual, weight, out, total, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    mask = at < columns
    added = tl.load(x + row + at, mask=mask, other=0) + tl.load(residual + row + at, mask=mask, other=0)
    tl.store(total + row + at, added, mask=mask)
    h = added.to(tl.float32)
    scale = 1 / tl.sqrt(tl.sum(h * h, axis=0) / columns + eps)
    w = tl.load(weight + at, mask=mask, other=0).to(tl.float32)
    tl.store(out + row + at, h * scale * w, mask=mask)


def norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Any:
    """RMSNorm of a sum, and the sum."""
    out, total = torch.empty_like(x), torch.empty_like(x)
    rows, columns = x.shape
    _norm[(rows,)](x, residual, weight, out, total, columns, eps, **_sizes(columns))
    return out, total


@triton.jit
def _layer_norm(x, weight, bias, out, means, scales, columns, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    mask = at < columns
    h = tl.load(x + row * columns + at, mask=mask, other=0).to(tl.float32)
    mean = tl.sum(h, axis=0) / columns
    centred = tl.where(mask, h - mean, 0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / columns + eps)
    tl.store(means + row, mean)
    tl.store(scales + row, scale)
    w = tl.load(weight + at, mask=mask, other=0).to(tl.float32)
    b = tl.load(bias + at, mask=mask, other=0).to(tl.float32)
    tl.store(out + row * columns + at, centred * scale * w + b, mask=mask)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
    """LayerNorm, and what its backward needs of each row."""
    rows, columns = x.shape
    out = torch.empty_like(x)
    means, scales = (torch.empty(rows, device=x.device) for _ in range(2))
    _layer_norm[(rows,)](x, weight, bias, out, means, scales, columns, eps, **_sizes(columns))
    return out, means, scales


@triton.jit
def _softmax(x, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    mask = at < columns
    h = tl.load(x + row + at, mask=mask, other=float("-inf")).to(tl.float32)
    e = tl.exp(h - tl.max(h, axis=0))
    tl.store(out + row + at, e / tl.sum(e, axis=0), mask=mask)


def softmax(x: Tensor) -> Any:
    """The softmax of each row."""
    out = torch.empty_like(x)
    _softmax[(x.shape[0],)](x, out, x.shape[1], **_sizes(x.shape[1]))
    return out


@triton.jit
def _loss(x, target, losses, gradient, columns, factor, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    row = number * columns
    aim = tl.load(target + number)
    peak = float("-inf")
    total = 0.0
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        h = tl.load(x + row + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(peak, tl.max(h, axis=0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(h - higher), axis=0)
        peak = higher
    for begin in range(0, columns, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        h = tl.load(x + row + at, mask=at < columns, other=float("-inf")).to(tl.float32)
        slope = tl.exp(h - peak) / total - tl.where(at == aim, 1.0, 0.0)
        tl.store(gradient + row + at, slope * factor, mask=at < columns)
    tl.store(losses + number, tl.log(total) + peak - tl.load(x + row + aim).to(tl.float32))


def loss(x: Tensor, target: Tensor, factor: float) -> Any:
    """Cross-entropies, and the gradient of their sum times `factor`."""
    rows, columns = x.shape
    losses, gradient = torch.empty(rows, device=x.device), torch.empty_like(x)
    _loss[(rows,)](x, target, losses, gradient, columns, factor, **_sizes(columns, LOSS_BLOCK))
    return losses, gradient


@triton.jit
def _swiglu(gate, up, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    mask = at < columns
    g = tl.load(gate + row + at, mask=mask, other=0).to(tl.float32)
    u = tl.load(up + row + at, mask=mask, other=0).to(tl.float32)
    tl.store(out + row + at, g * tl.sigmoid(g) * u, mask=mask)


def swiglu(gate: Tensor, up: Tensor) -> Any:
    """`silu(gate) * up`."""
    out = torch.empty_like(gate)
    _swiglu[(gate.shape[0],)](gate, up, out, gate.shape[1], **_sizes(gate.shape[1]))
    return out


@triton.jit
def _gelu(x, bias, residual, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * columns
    at = tl.arange(0, BLOCK)
    mask = at < columns
    h = tl.load(x + row + at, mask=mask, other=0).to(tl.float32)
    h += tl.load(bias + at, mask=mask, other=0).to(tl.float32)
    added = tl.load(residual + row + at, mask=mask, other=0).to(tl.float32)
    u = 1.5957691216057308 * (h + 0.044715 * h * h * h)  # (1 + tanh(u / 2)) / 2 is the sigmoid of u
    tl.store(out + row + at, h * tl.sigmoid(u) + added, mask=mask)


def gelu(x: Tensor, bias: Tensor, residual: Tensor) -> Any:
    """`gelu(x + bias) + residual`, by the tangent."""
    out = torch.empty_like(x)
    _gelu[(x.shape[0],)](x, bias, residual, out, x.shape[1], **_sizes(x.shape[1]))
    return out
