"""Numba, loaded where it is first needed, so that importing graphopt stays fast."""

import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


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


def flat_rows(rows: Sequence[Sequence[int]]) -> tuple["np.ndarray", "np.ndarray"]:
    """Rows of integers as two arrays: where each row begins in the second, and all of them in turn.

    >>> [part.tolist() for part in flat_rows([(7, 8), (), (9,)])]
    [[0, 2, 2, 3], [7, 8, 9]]
    """
    import numpy as np

    begins = np.cumsum([0, *(len(row) for row in rows)])
    return begins.astype(np.int64), np.array([v for row in rows for v in row], np.int64)
