"""Elementary functions as LLVM instructions that vectorise: what Numba's own do not.

Each takes an IR builder and operands of LLVM type float or double, and gives the result. In float32 they
are made of arithmetic and selections only, so that the loop around them becomes vector code; in float64
those without a short formula call the C library. `TOLERANCE_ULP` states the error in float32, in units of
the last place of the exact result. Results below the smallest normal number have an absolute error of
`TINY`. NaN gives NaN, and infinities give the limits.

Method: exponent and mantissa apart, then a polynomial on a short interval (Cody and Waite, "Software
Manual for the Elementary Functions", 1980). The coefficients were fitted for this module: minimax in the
relative error, by iteratively reweighted least squares.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from llvmlite import ir

F32, F64 = ir.FloatType(), ir.DoubleType()
I32, I64 = ir.IntType(32), ir.IntType(64)

# Largest errors over all of float32, in units in the last place.
TOLERANCE_ULP: Mapping[str, float] = {
    "exp": 1.0,
    "expm1": 2.0,
    "log": 1.0,
    "log1p": 2.0,
    "tanh": 2.5,
    "sigmoid": 2.5,
    "erf": 1.5,
    "rsqrt": 1.5,
}
TINY = 1.2e-38

_LOG2E = 1.4426950408889634
_LN2_HIGH = 0.693145751953125  # 16 bits, so that its multiples are exact
_LN2_LOW = 1.4286068203094172e-06
_MAGIC = 12582912.0  # 1.5 * 2**23: a small float added to it is rounded to an integer
_EXP = (0.5, 0.166665181517601, 0.04166620597243309, 0.008368954062461853, 0.0013950599823147058)
_EXPM1 = (0.5, 0.16666541993618011, 0.04166628047823906, 0.008366644382476807, 0.0013946552062407136)
_LOG = (
    0.3333333134651184,
    -0.250008225440979,
    0.20001226663589478,
    -0.16623356938362122,
    0.14201761782169342,
    -0.131601944565773,
    0.12761549651622772,
    -0.07634429633617401,
)
_ERF = (  # erf(x) / x - 1 in x**2, below 0.95
    0.12837916612625122,
    -0.37612631916999817,
    0.11283663660287857,
    -0.026857705786824226,
    0.005196951795369387,
    -0.0008097702520899475,
    8.185090700862929e-05,
)
_ERFC = (  # log(erfc(x)) / x, from 0.95 to 4
    -1.1286656856536865,
    -0.6350820064544678,
    -0.10635057091712952,
    0.023859279230237007,
    -0.003688111202791333,
    0.0003339609829708934,
    -1.2339525710558519e-05,
)


def intrinsic(b: Any, name: str, *args: Any) -> Any:
    """A call of LLVM's `name` on floats, overloaded on their type."""
    kind = args[0].type
    declared = ir.FunctionType(kind, [kind] * len(args))
    return b.call(b.module.declare_intrinsic(name, [kind], declared), args)


def library(b: Any, name: str, x: Any) -> Any:
    """A call of the C library's function of one double."""
    known = b.module.globals.get(name)
    return b.call(known or ir.Function(b.module, ir.FunctionType(F64, [F64]), name), [x])


def fma(b: Any, x: Any, y: Any, z: Any) -> Any:
    """`x * y + z`, rounded once where the machine can."""
    return intrinsic(b, "llvm.fmuladd", x, y, z)


def _polynomial(b: Any, x: Any, coefficients: Sequence[float]) -> Any:
    found = x.type(coefficients[-1])
    for c in coefficients[-2::-1]:
        found = fma(b, found, x, x.type(c))
    return found


def _clamp(b: Any, x: Any, low: float, high: float) -> Any:
    """`x` within bounds; NaN stays."""
    x = b.select(b.fcmp_ordered("<", x, F32(low)), F32(low), x)
    return b.select(b.fcmp_ordered(">", x, F32(high)), F32(high), x)


def _reduced(b: Any, x: Any) -> tuple[Any, Any]:
    """`x = n ln 2 + r` with |r| at most half of ln 2: n, a whole float, and r."""
    n = b.fsub(fma(b, x, F32(_LOG2E), F32(_MAGIC)), F32(_MAGIC))
    r = fma(b, n, F32(-_LN2_HIGH), x)
    return n, fma(b, n, F32(-_LN2_LOW), r)


def _power_of_two(b: Any, n: Any) -> Any:
    """2**n of an integer from -126 to 127, as a float."""
    return b.bitcast(b.shl(b.add(n, I32(127)), I32(23)), F32)


def _integer(b: Any, n: Any) -> Any:
    """A whole float within +-2**22 as an integer."""
    return b.sub(b.bitcast(b.fadd(n, F32(_MAGIC)), I32), I32(0x4B400000))


def exp(b: Any, x: Any) -> Any:
    """e**x; results below the smallest normal number are 0."""
    if x.type == F64:
        return intrinsic(b, "llvm.exp", x)
    shifted = fma(b, x, F32(_LOG2E), F32(_MAGIC))  # its last bits are n
    n = b.fsub(shifted, F32(_MAGIC))
    r = fma(b, n, F32(-_LN2_LOW), fma(b, n, F32(-_LN2_HIGH), x))
    p = fma(b, fma(b, _polynomial(b, r, _EXP), r, F32(1)), r, F32(1))
    exponent = b.shl(b.bitcast(shifted, I32), I32(23))
    found = b.bitcast(b.add(b.bitcast(p, I32), exponent), F32)
    found = b.select(b.fcmp_ordered("<", x, F32(-87.33654)), F32(0), found)
    limit = b.fadd(x, F32(float("inf")))  # of what is too large, and of NaN
    return b.select(b.fcmp_unordered(">", x, F32(88.72284)), limit, found)


def expm1(b: Any, x: Any) -> Any:
    """e**x - 1."""
    if x.type == F64:
        return library(b, "expm1", x)
    x = _clamp(b, x, -25.0, 89.0)
    n, r = _reduced(b, x)
    p = fma(b, b.fmul(_polynomial(b, r, _EXPM1), r), r, r)  # e**r - 1
    n = _integer(b, n)
    half = b.ashr(n, I32(1))
    first, second = _power_of_two(b, half), _power_of_two(b, b.sub(n, half))
    small = b.fcmp_ordered("<", x, F32(60.0))
    scale = b.fmul(first, b.select(small, second, F32(1)))
    found = fma(b, p, scale, b.fsub(scale, F32(1)))
    found = b.fmul(found, b.select(small, F32(1), second))
    return b.select(b.fcmp_ordered("==", x, F32(0)), x, found)  # with its sign


def _log_of(b: Any, x: Any) -> tuple[Any, Any, Any]:
    """Of a positive normal `x = 2**n (1 + f)`: n, f, and log(1 + f) - f; f from -0.29 to 0.41."""
    bits = b.sub(b.bitcast(x, I32), I32(0x3F3504F3))
    n = b.ashr(bits, I32(23))
    mantissa = b.add(b.and_(bits, I32(0x007FFFFF)), I32(0x3F3504F3))
    f = b.fsub(b.bitcast(mantissa, F32), F32(1))
    square = b.fmul(f, f)
    rest = fma(b, b.fmul(_polynomial(b, f, _LOG), f), square, b.fmul(square, F32(-0.5)))
    return n, f, rest


def log(b: Any, x: Any) -> Any:
    """The natural logarithm; NaN below zero."""
    if x.type == F64:
        return intrinsic(b, "llvm.log", x)
    tiny = b.fcmp_ordered("<", x, F32(1.1754943508222875e-38))
    scaled = b.select(tiny, b.fmul(x, F32(8388608.0)), x)
    n, f, rest = _log_of(b, scaled)
    n = b.sitofp(b.sub(n, b.select(tiny, I32(23), I32(0))), F32)
    found = b.fadd(f, fma(b, n, F32(_LN2_LOW), rest))
    found = fma(b, n, F32(_LN2_HIGH), found)
    return _log_limits(b, x, found)


def _log_limits(b: Any, x: Any, found: Any) -> Any:
    infinity, nan = float("inf"), float("nan")
    found = b.select(b.fcmp_ordered("==", x, F32(infinity)), F32(infinity), found)
    found = b.select(b.fcmp_ordered("==", x, F32(0)), F32(-infinity), found)
    return b.select(b.fcmp_unordered("<", x, F32(0)), F32(nan), found)


def log1p(b: Any, x: Any) -> Any:
    """log(1 + x)."""
    if x.type == F64:
        return library(b, "log1p", x)
    u = b.fadd(x, F32(1))
    lost = b.fsub(x, b.fsub(u, F32(1)))  # what the addition rounded away, where x is not large
    lost = b.select(b.fcmp_ordered("<", x, F32(16777216.0)), lost, F32(0))
    n, f, _ = _log_of(b, u)
    n = b.sitofp(n, F32)
    mantissa = b.fadd(f, F32(1))
    f = fma(b, b.fdiv(lost, u), mantissa, f)
    square = b.fmul(f, f)
    rest = fma(b, b.fmul(_polynomial(b, f, _LOG), f), square, b.fmul(square, F32(-0.5)))
    found = b.fadd(f, fma(b, n, F32(_LN2_LOW), rest))
    found = fma(b, n, F32(_LN2_HIGH), found)
    same = b.fcmp_ordered("<", intrinsic(b, "llvm.fabs", x), F32(1e-8))
    return b.select(same, x, _log_limits(b, u, found))


def tanh(b: Any, x: Any) -> Any:
    """The hyperbolic tangent, by e**(2|x|) - 1, which loses nothing near zero."""
    if x.type == F64:
        return library(b, "tanh", x)
    size = intrinsic(b, "llvm.fabs", x)
    size = b.select(b.fcmp_ordered(">", size, F32(10.0)), F32(10.0), size)
    n, r = _reduced(b, b.fadd(size, size))
    p = fma(b, b.fmul(_polynomial(b, r, _EXPM1), r), r, r)
    scale = _power_of_two(b, _integer(b, n))
    e = fma(b, p, scale, b.fsub(scale, F32(1)))
    found = b.fdiv(e, b.fadd(e, F32(2)))
    return intrinsic(b, "llvm.copysign", found, x)


def sigmoid(b: Any, x: Any) -> Any:
    """1 / (1 + e**-x)."""
    one = x.type(1)
    return b.fdiv(one, b.fadd(one, exp(b, b.fneg(x))))


def erf(b: Any, x: Any) -> Any:
    """The error function: a polynomial near zero, and beyond 1 - e**(a polynomial)."""
    if x.type == F64:
        return library(b, "erf", x)
    size = intrinsic(b, "llvm.fabs", x)
    size = b.select(b.fcmp_ordered(">", size, F32(4.0)), F32(4.0), size)
    square = b.fmul(size, size)
    near = fma(b, _polynomial(b, square, _ERF), size, size)
    n, r = _reduced(b, b.fmul(_polynomial(b, size, _ERFC), size))
    p = fma(b, fma(b, _polynomial(b, r, _EXP), r, F32(1)), r, F32(1))
    far = b.fsub(F32(1), b.fmul(p, _power_of_two(b, _integer(b, n))))
    found = b.select(b.fcmp_ordered("<", size, F32(0.95)), near, far)
    return intrinsic(b, "llvm.copysign", found, x)


def sqrt(b: Any, x: Any) -> Any:
    """The square root, correctly rounded."""
    return intrinsic(b, "llvm.sqrt", x)


def rsqrt(b: Any, x: Any) -> Any:
    """One over the square root."""
    return b.fdiv(x.type(1), sqrt(b, x))


def _mix(b: Any, x: Any) -> Any:
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = b.mul(b.xor(x, b.lshr(x, I32(shift))), I32(factor))
    return b.xor(x, b.lshr(x, I32(16)))


def uniform(b: Any, place: Any, seed: Any, like: Any) -> Any:
    """The number of `graphopt.codegen.region.Uniform` at a place, both 64-bit integers."""
    low, seed_low = b.trunc(place, I32), b.trunc(seed, I32)
    high = b.trunc(b.lshr(place, I64(32)), I32)
    seed_high = b.trunc(b.lshr(seed, I64(32)), I32)
    h = b.add(_mix(b, b.xor(low, seed_low)), b.mul(high, I32(0x9E3779B9)))
    h = b.lshr(_mix(b, b.add(h, seed_high)), I32(8))
    return b.fmul(b.sitofp(h, like.type), like.type(2.0**-24))


UNARY = {f.__name__: f for f in (exp, expm1, log, log1p, tanh, sigmoid, erf, sqrt, rsqrt)}
