"""Generated CUDA C run on the CPU, by a C++ compiler and `emulation.h`: for tests without a GPU.

It is the very text that a GPU gets. Blocks run one after the other, and the threads of a block in turns.
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from graphopt.codegen.backends import MAKERS
from graphopt.codegen.cuda_form import Size
from graphopt.codegen.cuda_launch import CudaKernel
from graphopt.codegen.cuda_runner import Arguments, Runner, Start
from graphopt.codegen.cuda_source import NAME, Source
from graphopt.errors import CodegenError

_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-w")
HEADER = Path(__file__).parent / "emulation.h"


class Emulator:
    """Runs kernels where a device would; `falling` lets the threads of a block take turns backwards.

    `sanitizers` are names for `-fsanitize=`, with which the process has to be started so that their
    libraries come first.
    """

    processors = 2  # the number of multiprocessors that it pretends to have

    def __init__(self, falling: bool = False, sanitizers: tuple[str, ...] = ()) -> None:
        self.falling, self.sanitizers = falling, sanitizers

    def prepare(self, source: Source, size: Size, fixed: Sequence[int | None]) -> Start:
        """As `Runner`: each launch runs a kernel to its end."""
        run, arguments = _compiled(source, self.sanitizers), Arguments(source.parameters, fixed)
        sizes = (ctypes.c_uint * 4)(*size.blocks, *size.threads)

        def start(given: Sequence[int | float]) -> None:
            arguments.set(given)
            run(sizes, int(self.falling), ctypes.c_void_p(arguments.address))

        return start


@contextmanager
def emulated(runner: Runner | None = None) -> Iterator[None]:
    """Where tensors on the CPU take the kernels of a GPU, which `runner` emulates."""
    used = runner or Emulator()
    before = MAKERS["cpu"]
    MAKERS["cpu"] = lru_cache(lambda region: CudaKernel(region, used))
    try:
        yield
    finally:
        MAKERS["cpu"] = before


def compiler() -> str | None:
    """The C++ compiler of this machine."""
    return shutil.which("g++") or shutil.which("c++")


@lru_cache(maxsize=256)
def _compiled(source: Source, sanitizers: tuple[str, ...]) -> Any:
    found = compiler()
    if found is None:
        raise CodegenError("no C++ compiler is here to emulate a kernel with")
    with tempfile.TemporaryDirectory() as folder:
        text, library = Path(folder, "kernel.cpp"), Path(folder, "kernel.so")
        text.write_text(emulated_text(source), encoding="utf-8")
        flags = [*_FLAGS, *(f"-fsanitize={name}" for name in sanitizers)]
        if sanitizers:
            flags += ["-fno-sanitize-recover=all", "-g"]
        command = [found, *flags, "-o", str(library), str(text)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CodegenError(f"a kernel could not be compiled:\n{done.stderr[:2000]}")
        return ctypes.CDLL(str(library)).emulate


def emulated_text(source: Source) -> str:
    """A C++ file with the kernel, and the function `emulate` (counts, order, arguments)."""
    casts = []
    declared = source.text.split(f"{NAME}(\n", 1)[1].split(")", 1)[0].split(",\n")
    for n, declaration in enumerate(declared):
        kind = declaration.strip().rsplit(" ", 1)[0]
        casts.append(f"*({kind}*)given[{n}]")
    return "\n".join(
        [
            f'#include "{HEADER}"',
            source.text,
            f"static void once(void** given) {{ {NAME}({', '.join(casts)}); }}",
            'extern "C" void emulate(const unsigned* sizes, int falling, void** given) {',
            "  emulated::run(sizes, falling, once, given);",
            "}",
            "",
        ]
    )
