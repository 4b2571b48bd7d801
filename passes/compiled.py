"""Numba, loaded where a solver first needs it, so that importing graphopt stays fast."""

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as machine code; it is compiled at its first call, once per process.

    A compiled function calls others that it is given as arguments.
    """
    import numba

    fast: Callable[..., Any] = numba.njit(function)
    return fast
