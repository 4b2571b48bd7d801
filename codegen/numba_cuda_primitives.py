"""What generated Numba CUDA kernels are written with: loads, stores, conversions and functions.

Memory is addressed by integers in bytes, as tensors give them. `load_<dtype>(address, like)` gives floats
in the type of `like`; `load_<dtype>_4(address, like)` loads four neighbours, in accesses of 16 bytes, and
`store_<dtype>_4(address, (a, b, c, d))` stores them. `round_<dtype>(x)` is what a store and a load leave.

In Numba's simulator (`NUMBA_ENABLE_CUDASIM=1`) kernels are Python. There the same definitions of loads,
stores and conversions are compiled for the CPU, and NumPy has the elementary functions, which on a
device are those of NVIDIA's libdevice.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils

from graphopt.codegen import formulas
from graphopt.codegen.cuda_form import ACCESS_BYTES, BYTES
from graphopt.codegen.numba_cuda_source import suffix
from graphopt.codegen.primitives import STORED, narrowed, widened

SIMULATED: bool = numba.config.ENABLE_CUDASIM == 1  # type: ignore[attr-defined]
PACKS = (1, 2, 4, 8)
_GLOBAL = 1  # the address space of device memory; a CPU has but one
_I1, _I8, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 32, 64))


def _intrinsic(template: Callable[..., Any]) -> Any:
    """A function of `template`, which gives a signature and writes instructions, where kernels run."""
    if not SIMULATED:
        from numba.cuda.extending import intrinsic

        return intrinsic(template)
    made = numba.extending.intrinsic(template)
    compiled = numba.njit(error_model="numpy")(lambda *given: made(*given))
    return lambda *given: _as_numpy(compiled(*given), given[-1])


def _as_numpy(found: Any, like: Any) -> Any:
    """Floats in the type of `like`: compiled functions give Python's, which are float64."""
    if isinstance(found, tuple):
        return tuple(_as_numpy(x, like) for x in found)
    return type(like)(found) if isinstance(found, float) else found


# --- memory ------------------------------------------------------------------------------------


def _pieces(stored: Any, size: int, lanes: int) -> Iterator[tuple[int, int, Any]]:
    """Accesses for `lanes` neighbours: the first number and how many numbers of each, and its LLVM type.

    Numbers of less than four bytes lie in words of four: of vectors of them NVVM makes narrow accesses.
    """
    each = min(ACCESS_BYTES // size, lanes)
    item, count = stored, each
    if size < 4:
        item, count = ir.IntType(8 * min(size * each, 4)), max(size * each // 4, 1)
    for first in range(0, lanes, each):
        yield first, each, ir.VectorType(item, count) if count > 1 else item


def _at(b: Any, address: Any, start: int, kind: Any) -> Any:
    return b.inttoptr(b.add(address, _I64(start)), kind.as_pointer(_GLOBAL))


def _loaded(b: Any, address: Any, stored: Any, size: int, lanes: int) -> list[Any]:
    found = []
    for first, each, kind in _pieces(stored, size, lanes):
        piece = b.load(_at(b, address, first * size, kind), align=each * size)
        for k in range(each):
            found.append(_taken(b, piece, kind, stored, k))
    return found


def _taken(b: Any, piece: Any, kind: Any, stored: Any, k: int) -> Any:
    """Number `k` of what was loaded."""
    item = kind.element if isinstance(kind, ir.VectorType) else kind
    each = 1 if item == stored else item.width // stored.width
    if isinstance(kind, ir.VectorType):
        piece = b.extract_element(piece, _I32(k // each))
    if item == stored:
        return piece
    return b.trunc(b.lshr(piece, item(k % each * stored.width)), stored)


def _store(b: Any, address: Any, numbers: list[Any], stored: Any, size: int) -> None:
    for first, each, kind in _pieces(stored, size, len(numbers)):
        piece = _packed(b, numbers[first : first + each], kind, stored)
        b.store(piece, _at(b, address, first * size, kind), align=each * size)


def _packed(b: Any, numbers: list[Any], kind: Any, stored: Any) -> Any:
    """What is stored of these numbers."""
    item = kind.element if isinstance(kind, ir.VectorType) else kind
    each = 1 if item == stored else item.width // stored.width
    words = []
    for first in range(0, len(numbers), each):
        word = numbers[first]
        if item != stored:
            word = b.zext(word, item)
            for k in range(1, each):
                more = b.shl(b.zext(numbers[first + k], item), item(k * stored.width))
                word = b.or_(word, more)
        words.append(word)
    if not isinstance(kind, ir.VectorType):
        return words[0]
    piece = kind(ir.Undefined)
    for k, word in enumerate(words):
        piece = b.insert_element(piece, word, _I32(k))
    return piece


def _loader(dtype: str, size: int, lanes: int) -> Any:
    def load(_: Any, address: Any, like: Any) -> Any:
        kind = like if "float" in dtype else types.boolean if dtype == "bool" else types.int64

        def code(context: Any, b: Any, signature: Any, args: Any) -> Any:
            found = []
            for number in _loaded(b, args[0], STORED[dtype], size, lanes):
                if "float" in dtype:
                    found.append(widened(b, dtype, number, args[1].type))
                elif dtype == "bool":
                    found.append(b.icmp_unsigned("!=", number, _I8(0)))
                else:
                    found.append(number if number.type == _I64 else b.sext(number, _I64))
            if lanes == 1:
                return found[0]
            return context.make_tuple(b, signature.return_type, found)

        return (kind if lanes == 1 else types.UniTuple(kind, lanes))(address, like), code

    return _intrinsic(load)


def _storer(dtype: str, size: int, lanes: int) -> Any:
    def store(_: Any, address: Any, value: Any) -> Any:
        def code(context: Any, b: Any, _s: Any, args: Any) -> Any:
            given = [args[1]] if lanes == 1 else cgutils.unpack_tuple(b, args[1], lanes)
            _store(b, args[0], [_stored(b, dtype, x) for x in given], STORED[dtype], size)
            return context.get_dummy_value()

        return types.none(address, value), code

    return _intrinsic(store)


def _stored(b: Any, dtype: str, value: Any) -> Any:
    """A value as it lies in memory."""
    kind = STORED[dtype]
    if "float" in dtype:
        return narrowed(b, dtype, value)
    if dtype == "bool":
        return b.zext(value if value.type == _I1 else b.trunc(value, _I1), kind)
    return value if kind == value.type else b.trunc(value, kind)


# --- numbers -----------------------------------------------------------------------------------


def _rounder(dtype: str) -> Any:
    def rounded(_: Any, x: Any) -> Any:
        def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
            return widened(b, dtype, narrowed(b, dtype, args[0]), args[0].type)

        return x(x), code

    return _intrinsic(rounded)


def _uniform(_: Any, place: Any, seed: Any, like: Any) -> Any:
    def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
        return formulas.uniform(b, *args)

    return like(place, seed, like), code


def _function(name: str) -> Any:
    """An elementary function: that of libdevice, or in the simulator that of NumPy."""
    function = getattr(math, name)
    if not SIMULATED:
        return function
    silent = np.errstate(all="ignore")
    if name == "erf":
        return lambda x: type(x)(function(x))
    other = getattr(np, {"pow": "power", "fabs": "abs"}.get(name, name))
    return silent(lambda *given: other(*given))


def _pair(formula: Callable[..., Any]) -> Any:
    def call(_: Any, x: Any, y: Any) -> Any:
        def code(_c: Any, b: Any, _s: Any, args: Any) -> Any:
            return formula(b, *args)

        return x(x, y), code

    return _intrinsic(call)


def _farther(sign: str) -> Callable[..., Any]:
    """The larger (">") or smaller ("<") number, or NaN."""

    def formula(b: Any, x: Any, y: Any) -> Any:
        first = b.or_(b.fcmp_ordered(sign, x, y), b.fcmp_unordered("uno", x, x))
        return b.select(first, x, y)

    return formula


_FUNCTIONS = ("exp", "expm1", "log", "log1p", "tanh", "erf", "sqrt", "sin", "cos", "pow", "fabs")


def _accesses() -> Iterator[tuple[str, Any]]:
    for dtype, size in BYTES.items():
        for lanes in PACKS:
            yield f"load_{dtype}{suffix(lanes)}", _loader(dtype, size, lanes)
            yield f"store_{dtype}{suffix(lanes)}", _storer(dtype, size, lanes)


# Everything that kernels call, by the name they use.
NAMES: dict[str, Any] = {
    **{name: _function(name) for name in _FUNCTIONS},
    "maximum": _pair(_farther(">")),
    "minimum": _pair(_farther("<")),
    "uniform": _intrinsic(_uniform),
    **{f"round_{dtype}": _rounder(dtype) for dtype in ("float32", "bfloat16", "float16")},
    **dict(_accesses()),
}
