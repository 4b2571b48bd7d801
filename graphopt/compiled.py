"""Numba, loaded where it is first needed, so that importing graphopt stays fast."""

import functools
from collections.abc import Callable
from typing import Any


@functools.cache
def compiled(function: Callable[..., Any], *, on_disk: bool = False) -> Callable[..., Any]:
    """`function` as machine code; it is compiled at its first call, once per process.

    With `on_disk` later processes load it, where Numba finds a folder that it can write to. A compiled
    function calls others that it is given as arguments; one that does is not kept on disk.
    """
    import numba

    fast: Callable[..., Any]
    if on_disk:
        try:
            fast = numba.njit(cache=True)(function)
        except RuntimeError:  # there is no such folder
            fast = numba.njit(function)
    else:
        fast = numba.njit(function)
    return fast
