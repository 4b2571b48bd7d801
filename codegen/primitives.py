"""What generated Numba kernels are written with: loads, stores and functions that vectorise.

Memory is addressed by integers, as tensors give them; `index` counts elements. Each load and store says
which `place` it touches: 0 for inputs, one number each for outputs and buffers. Different places never
overlap, which spares the compiler the checks that otherwise keep a loop with many tensors from
vectorising.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from graphopt.codegen import formulas, halves

PLACES = 64  # how many different memories one kernel may touch
_FLOATS = {types.float32: formulas.F32, types.float64: formulas.F64}
_STREAM = ir.VectorType(ir.IntType(8), 64)
_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)

# Name of a dtype in memory -> how it lies there.
STORED: dict[str, Any] = {
    "float32": formulas.F32,
    "float64": formulas.F64,
    "bfloat16": ir.IntType(16),
    "float16": ir.IntType(16),
    "int64": _I64,
    "int32": _I32,
    "bool": _I8,
}


# --- memory ------------------------------------------------------------------------------------


def _placed(b: Any, instruction: Any, place: int) -> None:
    """Say that `instruction` touches nothing but `place` (scoped no-alias metadata)."""
    domain = b.module.add_metadata(["graphopt"])
    scopes = [b.module.add_metadata([f"place {i}", domain]) for i in range(PLACES)]
    own = b.module.add_metadata([scopes[place]])
    others = b.module.add_metadata([s for i, s in enumerate(scopes) if i != place])
    instruction.set_metadata("alias.scope", own)
    instruction.set_metadata("noalias", others)


def _pointer(b: Any, dtype: str, address: Any, index: Any) -> Any:
    base = b.inttoptr(address, STORED[dtype].as_pointer())
    return b.gep(base, [index], inbounds=True)


def _loader(dtype: str) -> Any:
    """`load_<dtype>(address, index, place, like)`: a number; floats come as the type of `like`."""

    @intrinsic(prefer_literal=True)
    def load(_: Any, address: Any, index: Any, place: Any, like: Any) -> Any:
        kind = like if "float" in dtype else types.boolean if dtype == "bool" else types.int64

        def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
            found = b.load(_pointer(b, dtype, args[0], args[1]))
            _placed(b, found, place.literal_value)
            if kind == types.int64:
                return found if found.type == _I64 else b.sext(found, _I64)
            if kind == types.boolean:
                return b.icmp_unsigned("!=", found, _I8(0))
            return widened(b, dtype, found, _FLOATS[kind])

        return kind(address, index, place, like), code

    return load


def widened(b: Any, dtype: str, found: Any, wanted: Any) -> Any:
    """A number as it lies in memory, as a float of the LLVM type `wanted`."""
    if dtype in halves.UNPACK:
        found = halves.UNPACK[dtype](b, found)
    if found.type == wanted:
        return found
    return b.fpext(found, wanted) if wanted == formulas.F64 else b.fptrunc(found, wanted)


def narrowed(b: Any, dtype: str, value: Any) -> Any:
    """A float as it is stored in `dtype`."""
    if dtype in halves.PACK:
        return halves.PACK[dtype](b, value)
    wanted = STORED[dtype]
    if value.type == wanted:
        return value
    return b.fpext(value, wanted) if wanted == formulas.F64 else b.fptrunc(value, wanted)


def _storer(dtype: str) -> Any:
    """`store_<dtype>(address, index, value, place)`."""

    @intrinsic(prefer_literal=True)
    def store(_: Any, address: Any, index: Any, value: Any, place: Any) -> Any:
        def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
            stored = STORED[dtype]
            if "float" in dtype:
                number = narrowed(b, dtype, args[2])
            elif dtype == "bool":
                number = b.zext(b.trunc(args[2], ir.IntType(1)), stored)
            else:
                number = args[2] if stored == _I64 else b.trunc(args[2], stored)
            done = b.store(number, _pointer(b, dtype, args[0], args[1]))
            _placed(b, done, place.literal_value)
            return _c.get_dummy_value()

        return types.none(address, index, value, place), code

    return store


def _rounder(dtype: str) -> Any:
    """`round_<dtype>(x)`: what a store and a load leave of `x`."""

    @intrinsic
    def rounded(_: Any, x: Any) -> Any:
        def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
            return widened(b, dtype, narrowed(b, dtype, args[0]), args[0].type)

        return x(x), code

    return rounded


@intrinsic
def stream(_: Any, target: Any, source: Any, nbytes: Any) -> Any:
    """Copy `nbytes` past the caches, for results that are larger than these."""

    def code(context: Any, b: Any, _s: Any, args: Any) -> Any:
        target, source, nbytes = args
        ahead = b.and_(b.neg(target), _I64(63))  # bytes up to the next line
        head = b.select(b.icmp_unsigned("<", ahead, nbytes), ahead, nbytes)
        _bytes(b, target, source, _I64(0), head)
        lines = b.lshr(b.sub(nbytes, head), _I64(6))
        with cgutils.for_range(b, lines) as loop:
            at = b.add(head, b.shl(loop.index, _I64(6)))
            line = b.load(b.inttoptr(b.add(source, at), _STREAM.as_pointer()), align=1)
            done = b.store(line, b.inttoptr(b.add(target, at), _STREAM.as_pointer()), align=64)
            done.set_metadata("nontemporal", b.module.add_metadata([_I32(1)]))
        _bytes(b, target, source, b.add(head, b.shl(lines, _I64(6))), nbytes)
        return context.get_dummy_value()

    return types.none(target, source, nbytes), code


def _bytes(b: Any, target: Any, source: Any, begin: Any, end: Any) -> None:
    with cgutils.for_range(b, b.sub(end, begin)) as loop:
        at = b.add(begin, loop.index)
        byte = b.load(b.inttoptr(b.add(source, at), _I8.as_pointer()))
        b.store(byte, b.inttoptr(b.add(target, at), _I8.as_pointer()))


@intrinsic
def fence(_: Any) -> Any:
    """Make what was streamed visible to other threads."""

    def code(context: Any, b: Any, _s: Any, _args: Any) -> Any:
        b.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), code


# --- numbers -----------------------------------------------------------------------------------


def _function(formula: Callable[..., Any]) -> Any:
    @intrinsic
    def call(_: Any, x: Any) -> Any:
        def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
            return formula(b, args[0])

        return x(x), code

    return call


def _pair(formula: Callable[..., Any]) -> Any:
    @intrinsic
    def call(_: Any, x: Any, y: Any) -> Any:
        def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
            return formula(b, args[0], args[1])

        return x(x, y), code

    return call


@intrinsic
def where(_: Any, condition: Any, x: Any, y: Any) -> Any:
    """`x` where the condition holds, or `y`; both are computed."""

    def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
        return b.select(b.trunc(args[0], ir.IntType(1)) if args[0].type.width > 1 else args[0], *args[1:])

    return x(condition, x, y), code


@intrinsic
def to_float(_: Any, x: Any, like: Any) -> Any:
    """An integer or a bool as a float of the type of `like`."""

    def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
        convert = b.uitofp if args[0].type.width == 1 else b.sitofp
        return convert(args[0], args[1].type)

    return like(x, like), code


@intrinsic
def uniform(_: Any, place: Any, seed: Any, like: Any) -> Any:
    """A random number of a place, in [0, 1), of the type of `like`."""

    def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
        return formulas.uniform(b, *args)

    return like(place, seed, like), code


add_any_order = _pair(lambda b, x, y: b.fadd(x, y, flags=["reassoc"]))
maximum = _pair(lambda b, x, y: formulas.intrinsic(b, "llvm.maximum", x, y))
minimum = _pair(lambda b, x, y: formulas.intrinsic(b, "llvm.minimum", x, y))
absolute = _function(lambda b, x: formulas.intrinsic(b, "llvm.fabs", x))

# Everything that kernels call, by the name they use.
NAMES: dict[str, Any] = {
    **{name: _function(formula) for name, formula in formulas.UNARY.items()},
    **{f"load_{dtype}": _loader(dtype) for dtype in STORED},
    **{f"store_{dtype}": _storer(dtype) for dtype in STORED},
    **{f"round_{dtype}": _rounder(dtype) for dtype in ("float32", "bfloat16", "float16")},
    "add_any_order": add_any_order,
    "maximum": maximum,
    "minimum": minimum,
    "absolute": absolute,
    "logical_and": _pair(lambda b, x, y: b.and_(x, y)),
    "logical_or": _pair(lambda b, x, y: b.or_(x, y)),
    "logical_not": _function(lambda b, x: b.not_(x)),
    "uniform": uniform,
    "where": where,
    "to_float": to_float,
    "stream": stream,
    "fence": fence,
}
