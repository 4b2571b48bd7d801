"""Operators of our own, `torch.ops.graphopt.*`, known to tracing, compiling and exporting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")


def register(name: str, schema: str, body: Callable[..., Any], like: Callable[..., Any]) -> None:
    """Define `torch.ops.graphopt.<name>` of this `schema`, for tensors on any device.

    `like` makes results of the same shapes, strides and dtypes from arguments without data. Where a
    gradient is needed, it is for the caller to add.
    """
    _LIBRARY.define(name + schema)
    torch.library.impl(_LIBRARY, name, "CompositeExplicitAutograd")(body)
    torch.library.register_fake(f"graphopt::{name}", like, lib=_LIBRARY)
