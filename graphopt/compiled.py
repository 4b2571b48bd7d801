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

    if on_disk:
        try:
            return numba.njit(cache=True)(function)  # type: ignore[no-any-return]
        except RuntimeError:  # there is no such folder
            pass
    return numba.njit(function)  # type: ignore[no-any-return]
