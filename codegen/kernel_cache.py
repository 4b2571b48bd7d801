"""Generated kernels on disk, by their content: the text, and the machine code that Numba made of it.

A folder holds for each kernel `<key>.py`, where the key is a hash of the text, of the primitives it is
made with and of the compiler's version, and for each function and kind of processor one `.bin`: a
checksum, and what Numba needs to run it again. Files appear in one step, so that any number of processes
may share a folder; an entry that is cut short or altered is made anew; the least recently used go first
when the folder grows beyond its bound.
"""

import functools
import hashlib
import os
import pickle
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

DEFAULT_CACHE = Path.home() / ".cache" / "graphopt" / "kernels"
MAX_BYTES = 256 * 2**20
_DIGEST_BYTES = 32


@functools.cache
def _toolchain() -> str:
    """A text that changes when the same kernel text would become other machine code."""
    import llvmlite
    import numba

    here = Path(__file__).parent
    files = [here / name for name in ("formulas.py", "halves.py", "primitives.py")]
    known = "\n".join(file.read_text(encoding="utf-8") for file in files)
    return f"{numba.__version__} {llvmlite.__version__} {sys.version_info[:2]}\n{known}"


def key_of(text: str) -> str:
    """The name of a kernel: the same for the same text and toolchain."""
    return hashlib.sha256(f"{_toolchain()}\n{text}".encode()).hexdigest()[:32]


def load(text: str, folder: Path | None = DEFAULT_CACHE) -> types.ModuleType:
    """The module of a kernel's text; in `folder` the text is kept, for debuggers and readers."""
    key = key_of(text)
    name = f"graphopt.codegen.kernel_{key}"
    known = sys.modules.get(name)
    if known is not None:
        return known
    path = None if folder is None else folder / f"{key}.py"
    if path is not None and _read(path) != text.encode():
        _write(path, text.encode())
    module = types.ModuleType(name)
    module.__file__ = str(path)
    exec(compile(text, str(path or name), "exec"), module.__dict__)
    sys.modules[name] = module  # where Numba looks for the functions of code that it loads
    return module


class DiskCache:
    """What a Numba dispatcher asks for compiled code; `name` is that of the kernel and its function.

    Takes the place of the cache that `cache=True` gives: that one trusts what it finds.
    """

    def __init__(self, folder: Path, name: str, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self.name, self.max_bytes = folder, name, max_bytes
        self.cache_path = str(folder)

    def load_overload(self, signature: Any, target: Any) -> Any:
        """The compiled code of one signature; None where there is none, or it is damaged."""
        from numba.core.compiler import CompileResult

        path = self._path(signature, target.codegen())
        content = _read(path)
        if content is None:
            return None
        digest, payload = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() != digest:
            return None
        target.refresh()  # or symbols that the code needs are not there yet
        try:
            found = CompileResult._rebuild(target, *pickle.loads(payload))
        except Exception:  # whatever a reader of another version's data may raise
            return None
        _touch(path)
        return found

    def save_overload(self, signature: Any, result: Any) -> None:
        """Keep compiled code; where the folder cannot be written, nothing is kept."""
        from numba.core.serialize import dumps

        if result.library.has_dynamic_globals:
            return
        payload = dumps(result._reduce())
        _write(
            self._path(signature, result.target_context.codegen()),
            hashlib.sha256(payload).digest() + payload,
        )
        trim(self.folder, self.max_bytes)

    def flush(self) -> None:
        """Nothing waits to be written."""

    def _path(self, signature: Any, codegen: Any) -> Path:
        kind = hashlib.sha256(repr((str(signature), codegen.magic_tuple())).encode()).hexdigest()[:16]
        return self.folder / f"{self.name}.{kind}.bin"


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


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _touch(path: Path) -> None:
    try:
        os.utime(path)
    except OSError:
        return


def _write(path: Path, content: bytes) -> None:
    """Replace a file in one step; where that cannot be done, leave it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError:
        return
