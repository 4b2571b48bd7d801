"""Generated kernels on disk, by their content: the text, and the machine code that Numba made of it.

A folder holds for each kernel `<key>.py`, where the key is a hash of the text, of the primitives it is
made with and of the compiler's version, and for each kind of processor one `.bin`: a checksum and an
object file; and for each launch that was tuned a `.tuned` (`graphopt.codegen.tuned_choices`). Files
appear in one step, so that any number of processes
may share a folder; an entry that is cut short or altered is made anew; the least recently used go first
when the folder grows beyond its bound.
"""

import functools
import hashlib
import os
import sys
import tempfile
import types
from importlib.metadata import version
from pathlib import Path

DEFAULT_CACHE = Path.home() / ".cache" / "graphopt" / "kernels"
MAX_BYTES = 256 * 2**20
_DIGEST_BYTES = 32


@functools.cache
def toolchain() -> str:
    """A text that changes when the same kernel text would become other machine code."""
    here = Path(__file__).parent
    files = [here / name for name in ("formulas.py", "halves.py", "native.py", "primitives.py")]
    known = "\n".join(file.read_text(encoding="utf-8") for file in files)
    versions = [version(name) for name in ("numba", "llvmlite")]  # to import Numba takes long
    return f"{versions} {sys.version_info[:2]}\n{known}"


def key_of(text: str) -> str:
    """The name of a kernel: the same for the same text and toolchain."""
    return hashlib.sha256(f"{toolchain()}\n{text}".encode()).hexdigest()[:32]


def load(text: str, folder: Path | None = DEFAULT_CACHE) -> types.ModuleType:
    """The module of a kernel's text; in `folder` the text is kept, for debuggers and readers."""
    key = key_of(text)
    name = f"graphopt.codegen.kernel_{key}"
    known = sys.modules.get(name)
    if known is not None:
        return known
    path = None if folder is None else folder / f"{key}.py"
    if path is not None and read(path) != text.encode():
        write(path, text.encode())
    module = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(text, str(path or name), "exec"), module.__dict__)
    sys.modules[name] = module  # where Numba looks for the functions of code that it loads
    return module


def kept_code(folder: Path, name: str) -> bytes | None:
    """Machine code that `keep_code` kept; None where there is none, or it is damaged."""
    path = folder / f"{name}.bin"
    content = read(path)
    if content is None:
        return None
    digest, code = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if hashlib.sha256(code).digest() != digest:
        return None
    touch(path)
    return code


def keep_code(folder: Path, name: str, code: bytes, max_bytes: int = MAX_BYTES) -> None:
    """Keep machine code; where the folder cannot be written, nothing is kept."""
    write(folder / f"{name}.bin", hashlib.sha256(code).digest() + code)
    trim(folder, max_bytes)


def trim(folder: Path, max_bytes: int) -> None:
    """Remove the least recently used files until three quarters of `max_bytes` are left, if beyond it."""
    files = []
    for path in folder.glob("*.*"):
        try:
            status = path.stat()
        except OSError:  # another process was faster
            continue
        files.append((status.st_mtime, status.st_size, path))
    total = sum(size for _, size, _ in files)
    if total <= max_bytes:
        return
    for _, size, path in sorted(files):
        if total <= max_bytes * 3 // 4:
            return
        path.unlink(missing_ok=True)
        total -= size


def read(path: Path) -> bytes | None:
    """The content of a file; None where there is none."""
    try:
        return path.read_bytes()
    except OSError:
        return None


def touch(path: Path) -> None:
    """Say that a file was used now."""
    try:
        os.utime(path)
    except OSError:
        return


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step; where that cannot be done, leave it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return
