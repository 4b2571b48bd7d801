"""The C functions that are in this process already."""

import ctypes
import functools
from typing import Any


@functools.cache
def library() -> Any:
    """The functions of the C library and of what else is loaded for all; None where none can be had."""
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):  # on Windows
        return None
