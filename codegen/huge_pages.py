"""Large outputs in large pages: the system provides fresh memory page by page, when it is first written.

A page of 4 KiB takes longer to provide than a kernel takes to fill it, and torch's CPU allocator gives
large blocks back to the system as soon as they are free. On Linux a block may be advised to use pages of
2 MiB instead (`madvise(MADV_HUGEPAGE)`); it holds no more memory for that, since only whole large pages
inside of it are meant.
"""

import ctypes
import functools
import mmap
from typing import Any

from torch import Tensor

from graphopt.codegen.process import library

PAGE_BYTES = 2 << 20
# Smaller blocks mostly come from memory that the process had before.
LEAST_BYTES = 4 << 20
_MADV_HUGEPAGE = 14


def advise(address: int, nbytes: int) -> bool:
    """Ask for large pages for fresh memory; whether the system will try, False where it cannot.

    Memory that is there already is left alone.
    """
    begin = -(-address // PAGE_BYTES) * PAGE_BYTES
    end = (address + nbytes) // PAGE_BYTES * PAGE_BYTES
    calls = _library()
    if nbytes < LEAST_BYTES or end <= begin or calls is None or resident(address, nbytes):
        return False
    wanted = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE
    return bool(calls.madvise(*wanted) == 0)


def advised(x: Tensor) -> Tensor:
    """`x`, a new contiguous CPU tensor, its memory advised to use large pages."""
    if x.nbytes >= LEAST_BYTES and x.device.type == "cpu":
        advise(x.data_ptr(), x.nbytes)
    return x


def resident(address: int, nbytes: int) -> bool:
    """Whether the page in the middle of a block is in memory already; False where nobody can tell."""
    page = (address + nbytes // 2) // mmap.PAGESIZE * mmap.PAGESIZE
    found = ctypes.c_ubyte(0)
    calls = _library()
    if calls is None:
        return False
    asked = calls.mincore(ctypes.c_void_p(page), ctypes.c_size_t(1), ctypes.byref(found))
    return asked == 0 and bool(found.value & 1)


@functools.cache
def _library() -> Any:
    """The C library, where it has what is needed."""
    known = library()
    return known if hasattr(known, "mincore") and hasattr(known, "madvise") else None
