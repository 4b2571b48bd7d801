"""Kernels as machine code: made by Numba, kept on disk, and run without it.

A kernel is one C function, `void kernel(int64_t *arguments)`. It is made once: Numba types and optimises
the text, LLVM writes an object file. Later processes load that file through llvmlite, in milliseconds,
while Numba alone takes most of a second to begin. The arguments are numbers of 64 bits in a row:

    taken, begun, chunks, count, buffer_step, sums_step, then the parameters of `rows` after its first two

`count` rows are worked on in `chunks`. Threads share a kernel by taking chunks in turn, `taken` counts
them; `begun` counts threads, each of which works with bytes of its own. They are those of torch's OpenMP,
so that no second pool of threads exists.
"""

import ctypes
import functools
import struct
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from graphopt.codegen.kernel_cache import keep_code, kept_code, key_of, load
from graphopt.codegen.numba_forms import Source
from graphopt.codegen.process import library
from graphopt.errors import CodegenError

_SYMBOL = "graphopt_{}"
_FIRST = 2  # parameters of `rows` that a chunk decides
_Call = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


class Kernel:
    """The machine code of one text, made or loaded when first called; CodegenError where it cannot be."""

    def __init__(self, source: Source, cache: Path | None) -> None:
        self.source, self.cache = source, cache
        kinds = {"i": "q", "f": "d"}
        self._layout = struct.Struct("=6q" + "".join(kinds[k] for k in source.parameters[_FIRST:]))

    def __call__(
        self, threads: int, chunks: int, count: int, own: int, own_sums: int, arguments: Sequence[Any]
    ) -> None:
        """Run `count` rows in chunks: `own` bytes to work with for a thread, `own_sums` for a chunk."""
        address, call = self._function
        packed = self._layout.pack(0, 0, chunks, count, own, own_sums, *arguments)
        if chunks == 1:
            call(packed)
            return
        given = ctypes.create_string_buffer(packed, len(packed))
        if threads == 1:
            call(given)
            return
        start = _openmp()
        if start is not None:
            start(address, given, threads, 0)
        else:
            _by_threads(call, given, threads)

    @functools.cached_property
    def _function(self) -> tuple[int, Callable[..., None]]:
        key = key_of(self.source.text)
        try:
            name = f"{key}.{processor()}"
            code = None if self.cache is None else kept_code(self.cache, name)
            if code is None:
                code = object_code(optimized(self.source, self.cache))
                if self.cache is not None:
                    keep_code(self.cache, name, code)
            address = _loaded(code, _SYMBOL.format(key))
        except Exception as error:
            raise CodegenError(f"Numba could not compile a kernel: {error}") from error
        return address, _Call(address)


# --- threads -----------------------------------------------------------------------------------


@functools.cache
def _openmp() -> Any:
    """What starts a parallel region of the OpenMP that torch uses; None where it has another name."""
    start = getattr(library(), "GOMP_parallel", None)
    if start is not None:
        start.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint, ctypes.c_uint]
        start.restype = None
    return start


def _by_threads(call: Callable[..., None], given: Any, threads: int) -> None:
    helpers = [threading.Thread(target=call, args=(given,)) for _ in range(threads - 1)]
    for helper in helpers:
        helper.start()
    call(given)
    for helper in helpers:
        helper.join()


# --- making ------------------------------------------------------------------------------------


def optimized(source: Source, cache: Path | None = None) -> Any:
    """The LLVM module of a kernel after all optimisations, with nothing in it but the kernel."""
    import llvmlite.binding as llvm
    import numba

    kinds = {"i": numba.int64, "f": numba.float64}
    rows = numba.njit(error_model="numpy")(load(source.text, cache).rows)
    rows.compile(numba.void(*(kinds[k] for k in source.parameters)))
    compiled: Any = next(iter(rows.overloads.values()))
    found = compiled.library._final_module.clone()
    symbol = _SYMBOL.format(key_of(source.text))
    entry = _entry(symbol, compiled.fndesc.llvm_func_name, source.parameters)
    head = f'target triple = "{found.triple}"\ntarget datalayout = "{found.data_layout}"\n'
    found.link_in(llvm.parse_assembly(head + entry))
    for item in (*found.functions, *found.global_variables):
        if not item.is_declaration and item.name != symbol:
            item.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(found, llvm.create_pass_builder(_machine(), llvm.create_pipeline_tuning_options()))
    return found


def _entry(symbol: str, rows: str, parameters: str) -> str:
    """The C function, in LLVM's language: all rows at once, or chunk by chunk while there are any.

    Numba's functions take places for a result and an error before their arguments.
    """
    types = ["i64" if kind == "i" else "double" for kind in parameters]
    pairs = [
        f"%p{n} = getelementptr i64, ptr %given, i64 {n}\n  %v{n} = load {kind}, ptr %p{n}"
        for n, kind in enumerate(["i64"] * 5 + types[_FIRST:], start=1)
    ]
    loads = "\n  ".join(pairs)
    rest = [f"{kind} %v{n}" for n, kind in enumerate(types[_FIRST:], start=6)]
    own = [rest[0], "i64 %buffer", rest[2], "i64 %sums", *rest[4:]]
    call = f'call i32 @"{rows}"(ptr %result, ptr %error, i64 {{}}, i64 {{}}, {{}})'
    return f"""
declare i32 @"{rows}"(ptr, ptr, {", ".join(types)})
define void @"{symbol}"(ptr %given) {{
  %result = alloca ptr
  %error = alloca ptr
  {loads}
  %whole = icmp eq i64 %v2, 1
  br i1 %whole, label %all, label %share
all:
  {call.format("0", "%v3", ", ".join(rest))}
  ret void
share:
  %thread = atomicrmw add ptr %p1, i64 1 monotonic
  %buffers = mul i64 %thread, %v4
  %buffer = add i64 %v7, %buffers
  br label %next
next:
  %chunk = atomicrmw add ptr %given, i64 1 monotonic
  %more = icmp slt i64 %chunk, %v2
  br i1 %more, label %part, label %done
part:
  %after = add i64 %chunk, 1
  %begins = mul i64 %chunk, %v3
  %ends = mul i64 %after, %v3
  %begin = sdiv i64 %begins, %v2
  %end = sdiv i64 %ends, %v2
  %before = mul i64 %chunk, %v5
  %sums = add i64 %v9, %before
  {call.format("%begin", "%end", ", ".join(own))}
  br label %next
done:
  ret void
}}
"""


def object_code(module: Any) -> bytes:
    """A module as an object file for this processor."""
    return bytes(_machine().emit_object(module))


# --- loading -----------------------------------------------------------------------------------


@functools.cache
def processor() -> str:
    """A name for what machine code on this processor may use."""
    import hashlib

    import llvmlite.binding as llvm

    text = (
        f"{llvm.get_process_triple()} {llvm.get_host_cpu_name()} {llvm.get_host_cpu_features().flatten()}"
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def _target() -> Any:
    """What LLVM knows of this kind of processor."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_default_triple()


@functools.cache
def _machine() -> Any:
    import llvmlite.binding as llvm

    return _target().create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=llvm.get_host_cpu_features().flatten(),
        opt=3,
        reloc="default",
        codemodel="jitdefault",
        jit=True,
    )


_lock = threading.Lock()


@functools.cache
def _engine() -> Any:
    import llvmlite.binding as llvm

    machine = _target().create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _loaded(code: bytes, symbol: str) -> int:
    """The address of a function of an object file, which is loaded once."""
    import llvmlite.binding as llvm

    with _lock:
        engine = _engine()
        found = engine.get_function_address(symbol)
        if not found:
            engine.add_object_file(llvm.ObjectFileRef.from_data(code))
            engine.finalize_object()
            found = engine.get_function_address(symbol)
    if not found:
        raise CodegenError("an object file has no kernel in it")
    return int(found)
