"""bfloat16 and float16 as 16-bit integers: conversions from and to floats that vectorise.

Each takes an IR builder and a number. Rounding is to nearest, ties to even; numbers that are too small
for a normal half keep what bits are left, those that are too large become infinite, and NaN stays NaN.
"""

from typing import Any

from llvmlite import ir

F32, F64 = ir.FloatType(), ir.DoubleType()
I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _narrow(b: Any, x: Any) -> Any:
    """A double as the float that rounds to the same half: the lost bits remain as a last, odd one."""
    if x.type == F32:
        return x
    near = b.fptrunc(x, F32)
    back = b.fpext(near, F64)
    exact = b.fcmp_unordered("==", back, x)
    magnitude = b.bitcast(near, I32)
    size = b.module.declare_intrinsic("llvm.fabs", [F64])
    too_far = b.fcmp_ordered(">", b.call(size, [back]), b.call(size, [x]))
    down = b.sub(magnitude, b.zext(too_far, I32))  # towards zero
    return b.bitcast(b.select(exact, magnitude, b.or_(down, I32(1))), F32)


def from_bfloat16(b: Any, bits: Any) -> Any:
    """The upper half of a float."""
    return b.bitcast(b.shl(b.zext(bits, I32), I32(16)), F32)


def to_bfloat16(b: Any, x: Any) -> Any:
    """Bits of the nearest bfloat16."""
    x = _narrow(b, x)
    bits = b.bitcast(x, I32)
    odd = b.and_(b.lshr(bits, I32(16)), I32(1))
    near = b.lshr(b.add(bits, b.add(odd, I32(0x7FFF))), I32(16))
    nan = b.fcmp_unordered("uno", x, x)
    return b.trunc(b.select(nan, I32(0x7FC0), near), I16)


def from_float16(b: Any, bits: Any) -> Any:
    """Exponent and mantissa moved into place; a product by a power of two puts the exponent right."""
    wide = b.zext(bits, I32)
    sign = b.shl(b.and_(wide, I32(0x8000)), I32(16))
    body = b.shl(b.and_(wide, I32(0x7FFF)), I32(13))
    number = b.bitcast(b.fmul(b.bitcast(body, F32), F32(2.0**112)), I32)
    special = b.icmp_unsigned(">=", body, I32(0x0F800000))  # infinities and NaN
    number = b.select(special, b.or_(body, I32(0x7F800000)), number)
    return b.bitcast(b.or_(sign, number), F32)


def to_float16(b: Any, x: Any) -> Any:
    """Bits of the nearest float16; a sum with 0.5 rounds what is too small for a normal number."""
    x = _narrow(b, x)
    bits = b.bitcast(x, I32)
    sign = b.and_(bits, I32(0x80000000))
    size = b.xor(bits, sign)
    small = b.sub(b.bitcast(b.fadd(b.bitcast(size, F32), F32(0.5)), I32), I32(0x3F000000))
    odd = b.and_(b.lshr(size, I32(13)), I32(1))
    normal = b.lshr(b.add(size, b.add(odd, I32(-(112 << 23) + 0xFFF))), I32(13))
    found = b.select(b.icmp_unsigned("<", size, I32(113 << 23)), small, normal)
    large = b.icmp_unsigned(">=", size, I32(143 << 23))
    nan = b.icmp_unsigned(">", size, I32(0x7F800000))
    found = b.select(large, b.select(nan, I32(0x7E00), I32(0x7C00)), found)
    return b.trunc(b.or_(found, b.lshr(sign, I32(16))), I16)


UNPACK = {"bfloat16": from_bfloat16, "float16": from_float16}
PACK = {"bfloat16": to_bfloat16, "float16": to_float16}
