"""NVIDIA's run-time compiler, called directly: CUDA C for any architecture, without GPU or driver.

The library comes with the package nvidia-cuda-nvrtc, or with a CUDA toolkit. Kernels that run are
compiled by CuPy; this is for checking and for reading what they become.
"""

import ctypes
import ctypes.util
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from graphopt.errors import CodegenError

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")  # A100; H100 and H200; B200


@dataclass(frozen=True)
class Compiled:
    """A kernel for one architecture: PTX, machine code, and what the assembler said of it."""

    architecture: str
    ptx: str
    cubin: bytes
    log: str


@lru_cache(maxsize=256)
def compile_text(text: str, architecture: str = "sm_90") -> Compiled:
    """Compile a kernel; CodegenError with the compiler's messages, or where there is no NVRTC."""
    capability_of(architecture)
    library = _library()
    program = ctypes.c_void_p()
    _call(library, "CreateProgram", ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    options = [f"--gpu-architecture={architecture}", "-std=c++17", "--ptxas-options=-v"]
    given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    try:
        code = library.nvrtcCompileProgram(program, len(options), given)
        log = _bytes(library, program, "ProgramLog").decode(errors="replace").strip("\0\n")
        if code:
            raise CodegenError(f"NVRTC could not compile a kernel for {architecture}:\n{log[:2000]}")
        ptx = _bytes(library, program, "PTX").decode().strip("\0")
        return Compiled(architecture, ptx, _bytes(library, program, "CUBIN"), log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def capability_of(architecture: str) -> tuple[int, int]:
    """The compute capability; CodegenError where that is none.

    >>> capability_of("sm_90"), capability_of("sm_120a")
    ((9, 0), (12, 0))
    """
    found = re.fullmatch(r"sm_(\d+)(\d)[af]?", architecture)
    if found is None:
        raise CodegenError(f"{architecture} is no architecture: it is written as in sm_90")
    return int(found[1]), int(found[2])


def available() -> bool:
    """Whether the library is on this machine."""
    try:
        _library()
    except CodegenError:
        return False
    return True


def candidates(folders: Sequence[str]) -> list[Path]:
    """Files of the library among folders of packages, the newest version first."""
    found = [path for folder in folders for path in Path(folder).glob("nvidia/*/lib/libnvrtc.so.*")]
    return sorted(found, key=lambda path: int(path.suffix[1:]) if path.suffix[1:].isdigit() else 0)[::-1]


@lru_cache(maxsize=1)
def _library() -> Any:
    system = ctypes.util.find_library("nvrtc")
    for name in [*map(str, candidates(sys.path)), *([system] if system else [])]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise CodegenError("there is no NVRTC here: pip install nvidia-cuda-nvrtc")


def _call(library: Any, name: str, *arguments: Any) -> None:
    code = getattr(library, f"nvrtc{name}")(*arguments)
    if code:
        raise CodegenError(f"NVRTC failed in {name} with code {code}")


def _bytes(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _call(library, f"Get{what}Size", program, ctypes.byref(size))
    memory = ctypes.create_string_buffer(size.value)
    _call(library, f"Get{what}", program, memory)
    return memory.raw
