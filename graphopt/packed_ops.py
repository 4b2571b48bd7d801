"""Saved tensors in fewer bits, as operators of a graph: `torch.ops.graphopt.pack_*` and `unpack_*`.

All are exact inverses. Boolean tensors take one bit for each element; the indices of a maximum pooling,
which are eight bytes each, take one byte: the place within the window. Both encodings are of Jain et
al., "Gist: Efficient Data Encoding for Deep Neural Network Training", ISCA 2018, section 4.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from graphopt.compiled import compiled
from graphopt.custom_ops import register

_TO_BITS = np.uint64(0x0102040810204080)  # moves bit 0 of byte k to bit 56 + k
_TOP = np.uint64(56)
_REPEATED = np.uint64(0x0101010101010101)
_OWN_BIT = np.uint64(0x8040201008040201)  # of byte k, bit k
_CARRY = np.uint64(0x7F7F7F7F7F7F7F7F)  # carries a byte that is not zero into its bit 7
_SEVEN = np.uint64(7)

Pair = Sequence[int]


def pack_bits(mask: Tensor) -> Tensor:
    """A contiguous boolean tensor of n elements as bytes (⌈n/8⌉,), the first in the lowest bit."""
    if mask.device.type != "cpu":
        return bits_by_torch(mask)
    packed = mask.new_empty(-(-mask.numel() // 8), dtype=torch.uint8)
    compiled(_pack)(mask.view(torch.uint8).view(-1).numpy(), packed.numpy())
    return packed


def bits_by_torch(mask: Tensor) -> Tensor:
    """`pack_bits` by tensor operators, on any device."""
    padded = torch.nn.functional.pad(mask.view(torch.uint8).view(-1), (0, -mask.numel() % 8))
    return padded.view(-1, 8).mul_(_weights(mask)).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """The boolean tensor of this shape that was packed."""
    if packed.device.type != "cpu":
        return mask_by_torch(packed, shape)
    mask = packed.new_empty(shape, dtype=torch.bool)
    compiled(_unpack)(packed.numpy(), mask.view(torch.uint8).view(-1).numpy())
    return mask


def mask_by_torch(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """`unpack_bits` by tensor operators, on any device."""
    bits = packed[:, None].bitwise_and(_weights(packed)).ne(0)
    return bits.view(-1)[: torch.Size(shape).numel()].view(shape).clone()


def pack_window(
    indices: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, width: int
) -> Tensor:
    """Indices into planes of `width` columns, (.., height, width) int64, as places in their windows."""
    if indices.device.type != "cpu":
        return places_by_torch(indices, kernel, stride, padding, dilation, width)
    places = torch.empty(indices.shape, dtype=torch.uint8)
    window = _window(kernel, stride, padding, dilation, width)
    compiled(_to_places)(_planes(indices).numpy(), _planes(places).numpy(), window)
    return places


def places_by_torch(
    indices: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, width: int
) -> Tensor:
    """`pack_window` by tensor operators, on any device."""
    rows, columns = _starts(indices, stride, padding)
    row = (indices // width - rows) // dilation[0]
    return (row * kernel[1] + (indices % width - columns) // dilation[1]).to(torch.uint8)


def unpack_window(
    packed: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, width: int
) -> Tensor:
    """The indices that were packed."""
    if packed.device.type != "cpu":
        return indices_by_torch(packed, kernel, stride, padding, dilation, width)
    indices = torch.empty(packed.shape, dtype=torch.int64)
    window = _window(kernel, stride, padding, dilation, width)
    compiled(_to_indices)(_planes(packed).numpy(), _planes(indices).numpy(), window)
    return indices


def indices_by_torch(
    packed: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, width: int
) -> Tensor:
    """`unpack_window` by tensor operators, on any device."""
    rows, columns = _starts(packed, stride, padding)
    row = rows + packed.long() // kernel[1] * dilation[0]
    return row * width + columns + packed.long() % kernel[1] * dilation[1]


def _window(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, width: int) -> tuple[int, ...]:
    """What the compiled functions take of the pooling."""
    return (kernel[1], *stride, *padding, *dilation, width)


def _weights(like: Tensor) -> Tensor:
    return torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=like.device)


def _planes(tensor: Tensor) -> Tensor:
    return tensor.view(-1, *tensor.shape[-2:])


def _starts(tensor: Tensor, stride: Pair, padding: Pair) -> tuple[Tensor, Tensor]:
    """The first row, as a column, and the first column of each window."""
    rows, columns = (
        torch.arange(size, device=tensor.device) * step - edge
        for size, step, edge in zip(tensor.shape[-2:], stride, padding, strict=True)
    )
    return rows[:, None], columns


# --- compiled ----------------------------------------------------------------------------------


def _pack(mask: Any, packed: Any) -> None:
    whole = mask.size // 8
    words = mask[: 8 * whole].view(np.uint64)
    for i in range(whole):
        packed[i] = (words[i] * _TO_BITS) >> _TOP
    for i in range(8 * whole, mask.size):
        place = i - 8 * whole
        packed[whole] = mask[i] if place == 0 else packed[whole] | (mask[i] << place)


def _unpack(packed: Any, mask: Any) -> None:
    whole = mask.size // 8
    words = mask[: 8 * whole].view(np.uint64)
    for i in range(whole):
        spread = (np.uint64(packed[i]) * _REPEATED) & _OWN_BIT
        words[i] = ((spread + _CARRY) >> _SEVEN) & _REPEATED
    for i in range(8 * whole, mask.size):
        mask[i] = (packed[whole] >> (i - 8 * whole)) & 1


def _to_places(indices: Any, places: Any, window: Any) -> None:
    columns, down, right, top, left, row_step, column_step, width = window
    for plane in range(indices.shape[0]):
        for i in range(indices.shape[1]):
            for j in range(indices.shape[2]):
                row, column = divmod(indices[plane, i, j], width)
                row, column = row - (i * down - top), column - (j * right - left)
                places[plane, i, j] = row // row_step * columns + column // column_step


def _to_indices(places: Any, indices: Any, window: Any) -> None:
    columns, down, right, top, left, row_step, column_step, width = window
    for plane in range(indices.shape[0]):
        for i in range(indices.shape[1]):
            for j in range(indices.shape[2]):
                row, column = divmod(places[plane, i, j], columns)
                row = i * down - top + row * row_step
                indices[plane, i, j] = row * width + j * right - left + column * column_step


# --- registration ------------------------------------------------------------------------------


def _like_bits(mask: Tensor) -> Tensor:
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


_WINDOW = "int[2] kernel, int[2] stride, int[2] padding, int[2] dilation, SymInt width"
register("pack_bits", "(Tensor mask) -> Tensor", pack_bits, _like_bits)
register(
    "unpack_bits",
    "(Tensor packed, SymInt[] shape) -> Tensor",
    unpack_bits,
    lambda packed, shape: packed.new_empty(shape, dtype=torch.bool),
)
register(
    "pack_window",
    f"(Tensor indices, {_WINDOW}) -> Tensor",
    pack_window,
    lambda indices, *_: indices.new_empty(indices.shape, dtype=torch.uint8),
)
register(
    "unpack_window",
    f"(Tensor packed, {_WINDOW}) -> Tensor",
    unpack_window,
    lambda packed, *_: packed.new_empty(packed.shape, dtype=torch.int64),
)

ops = torch.ops.graphopt
