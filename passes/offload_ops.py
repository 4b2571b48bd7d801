"""Offloading as operators of a graph, `torch.ops.graphopt.`: what goes to a file, and comes back.

    handle = offload(value, folder, bytes_per_s)     a write starts, which reads the value
    place  = offload_wait(handle, value)             the write is done; the value's memory may go
    buffer = fetch(place, size, stride, dtype)       memory is taken, and a read into it starts
    again  = fetch_wait(buffer, place)               the read is done; `again` is a view of the buffer

A handle is a tensor of one number that holds the place in the file. So a place lives as long as autograd
holds what the forward saved: each forward has places of its own, a backward can run twice, and a forward
whose backward never comes leaves nothing behind. The wait reads the value, which therefore stays in
memory until then in every account of it. None has a gradient: they stand in graphs of both directions.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.cost_models.link_costs import Timing, put_in_bytes
from graphopt.custom_ops import register
from graphopt.passes.offload_store import channel_of, lines_of, place_of


def offload(value: Tensor, folder: str | None, bytes_per_s: float | None) -> Tensor:
    """Starts to write the memory of `value`, on the CPU; its handle, int64[1]."""
    return channel_of(folder, bytes_per_s).write(value).handle()


def offload_wait(handle: Tensor, value: Tensor) -> Tensor:
    """Waits until the value is written; its place, int64[1]. GraphoptError where that failed."""
    place = place_of(handle)
    place.written.wait()
    return place.handle()


def fetch(place: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of this shape, into which the value is being read."""
    buffer = torch.empty_strided(size, stride, dtype=dtype)
    place_of(place).fetch(buffer)
    return buffer


def fetch_wait(buffer: Tensor, place: Tensor) -> Tensor:
    """`buffer` with the value in it. Raises GraphoptError where it could not be read."""
    place_of(place).wait(buffer)
    return buffer


def _like_handle(*_: Any) -> Tensor:
    return torch.empty(1, dtype=torch.int64)


def _like_buffer(_: Tensor, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(size, stride, dtype=dtype)


register("offload", "(Tensor value, str? folder, float? bytes_per_s) -> Tensor", offload, _like_handle)
register("offload_wait", "(Tensor handle, Tensor value) -> Tensor", offload_wait, _like_handle)
register(
    "fetch",
    "(Tensor place, SymInt[] size, SymInt[] stride, ScalarType dtype) -> Tensor",
    fetch,
    _like_buffer,
)
register(
    "fetch_wait",
    "(Tensor(a) buffer, Tensor place) -> Tensor(a)",
    fetch_wait,
    lambda buffer, _: buffer.view_as(buffer),
)

ops = torch.ops.graphopt


def timing_of(start: fx.Node) -> Timing | None:
    """What the write or read that `start` begins takes in its channel; None for other operators."""
    options: Any
    if start.target is ops.offload.default:
        number, (_, *options) = 0, start.args
    elif start.target is ops.fetch.default:
        number, place = 1, start.args[0]
        if not isinstance(place, fx.Node) or place.target is not ops.offload_wait.default:
            return None
        (_, *options) = place.all_input_nodes[0].args
    else:
        return None
    seconds = lines_of(*options)[number].seconds(put_in_bytes(start))
    return Timing(seconds, "fitted" if options[1] is None else "given")
