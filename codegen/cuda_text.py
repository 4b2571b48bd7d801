"""Parts of the text of a CUDA C kernel: its head, its parameters, constants and operators."""

from functools import cache
from pathlib import Path

from graphopt.codegen.cuda_form import Form, Traits, scalars
from graphopt.errors import CodegenError

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "logical_and": "&&", "logical_or": "||"}
_INFIX |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_MATH = {name: name for name in ("exp", "expm1", "log", "log1p", "tanh", "erf", "sqrt", "rsqrt")}
_MATH |= {"sin": "sin", "cos": "cos", "pow": "pow", "abs": "fabs"}


@cache
def head() -> str:
    """What all kernels begin with."""
    return (Path(__file__).parent / "kernel.cuh").read_text(encoding="utf-8")


def parameters(traits: Traits, form: Form) -> tuple[list[str], str]:
    """Declarations, and the letter of the type of each (see `Source`)."""
    found = ["long long rows", "long long columns"]
    found += [f"long long size{d}" for d in range(1, form.row_dims)]
    for t in traits.tensors:
        found.append(f"{'char' if t.written else 'const char'}* {t.variable}")
        if t.extent.by_row and not form.flat:
            found += [f"long long {t.variable}_{d}" for d in range(form.row_dims)]
        if t.name in form.strided:
            found.append(f"long long {t.variable}_step")
    kinds = "i" * len(found)
    for n, value in scalars(traits.region):
        if value.name in form.pointers:
            found.append(f"const char* x{n}")
            kinds += "i"
        elif "float" in value.dtype:
            found.append(f"real x{n}")
            kinds += "d" if traits.region.math == "float64" else "f"
        else:
            found.append(f"long long x{n}")
            kinds += "i"
    if traits.sums:
        found.append("real* sums")
        kinds += "i"
    return found, kinds


def literal(number: bool | int | float) -> str:
    """A constant of CUDA C; floats are made `real` when the kernel is compiled.

    >>> literal(0.5), literal(float("-inf")), literal(3), literal(True)
    ('(real)0.5', '-(real)infinity()', '3LL', 'true')
    """
    if isinstance(number, bool):
        return "true" if number else "false"
    if isinstance(number, int):
        return f"{number}LL" if number > -(2**63) else "(-9223372036854775807LL - 1)"
    special = {"inf": "(real)infinity()", "-inf": "-(real)infinity()", "nan": "(real)not_a_number()"}
    return special.get(repr(number), f"(real){number!r}")


def applied(op: str, args: list[str], suffix: str) -> str:
    """An operator of `OPS` on variables; `suffix` is "f" in float32, where functions have that.

    >>> applied("exp", ["v3"], "f"), applied("where", ["v1", "v2", "v3"], "")
    ('expf(v3)', 'v1 ? v2 : v3')
    """
    if op in _INFIX:
        return f"{args[0]} {_INFIX[op]} {args[1]}"
    if op in _MATH:
        return f"{_MATH[op]}{suffix}({', '.join(args)})"
    if op in ("maximum", "minimum"):
        return f"{op}({args[0]}, {args[1]})"
    known = {"columns": "(real)columns", "column_index": "j + k"}
    if args:
        x = args[0]
        known |= {"neg": f"-{x}", "logical_not": f"!{x}", "to_float": f"(real){x}"}
        known |= {"reciprocal": f"(real)1 / {x}", "sigmoid": f"(real)1 / ((real)1 + exp{suffix}(-{x}))"}
    if op == "where":
        return f"{args[0]} ? {args[1]} : {args[2]}"
    if op not in known:
        raise CodegenError(f"the CUDA backend has no {op}")
    return known[op]
