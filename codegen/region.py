"""A region: what one generated kernel computes, as plain data that no backend and no framework owns.

The values of a region live on a grid of rows x columns. A **full** value has one number for each place, a
**row** value one for each row, a **column** value one for each column, a **scalar** one in all; an
operator on different extents broadcasts. The grid's columns are the last dimension of the tensors, its
rows all the others, and neither number is part of the region: one region serves every shape, and every
stride (a broadcast dimension is one of stride 0; see `graphopt.codegen.layout`).

`Region.values` is in order: each value names earlier ones by their position. A value is one of

- `Input`: read from memory;
- `Constant`: a number known when the kernel is written;
- `Apply`: an operator of the table `OPS` at each place;
- `Round`: a number rounded to a narrower dtype, as a store and a load of it would;
- `Reduce`: over the columns (a row value), or over the rows (a column value, which is an output only);
- `Gather`: of each row the number in one column, 0 where there is no such column;
- `Uniform`: a random number of each place, from a seed.

**Stages.** A reduction over columns is known only when its row was read. So each value has a stage
(`Facts.stage`): 0 for what depends on no reduction, one more than its operand's for a reduction.
Stage s of a row evaluates the full values of stage s; the reductions it ends belong to stage s + 1, and
so do all row values made of them. A full value that a later stage needs again may be computed again, kept
aside, or read back from an output: the backend decides. The full and row values of an output are stored
in its own stage.

**Numbers.** Floats are computed in `Region.math`, float32 or float64, whatever dtype they were loaded
from, and are rounded (to nearest, ties to even) when an output is stored. Sums add in any order.
NaN and infinities behave as in eager PyTorch: max, min, `maximum` and `minimum` keep NaN, the maximum of
no numbers is -inf, the sum 0. Integers are only compared, selected, made floats, or used to gather.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NamedTuple, TypeAlias

from graphopt.errors import CodegenError

Math = Literal["float32", "float64"]
Dtype = Literal["float64", "float32", "bfloat16", "float16", "int64", "int32", "bool"]
Kind = Literal["float", "int", "bool"]  # what a value is while it is computed with

KIND_OF_DTYPE: Mapping[Dtype, Kind] = {
    "float64": "float",
    "float32": "float",
    "bfloat16": "float",
    "float16": "float",
    "int64": "int",
    "int32": "int",
    "bool": "bool",
}


class Extent(Enum):
    """Along which dimensions of the grid a value varies."""

    FULL = "full"
    ROW = "row"
    COLUMN = "column"
    SCALAR = "scalar"

    @property
    def by_row(self) -> bool:
        """Whether there is one number for each row."""
        return self in (Extent.FULL, Extent.ROW)

    @property
    def by_column(self) -> bool:
        """Whether there is one number for each column."""
        return self in (Extent.FULL, Extent.COLUMN)

    @staticmethod
    def of(by_row: bool, by_column: bool) -> "Extent":
        """The extent that varies along these.

        >>> Extent.of(by_row=True, by_column=False)
        <Extent.ROW: 'row'>
        """
        if by_row:
            return Extent.FULL if by_column else Extent.ROW
        return Extent.COLUMN if by_column else Extent.SCALAR


class Op(NamedTuple):
    """A pointwise operator: what it takes and gives, and about how many instructions it costs.

    `rule` is "float" (floats to a float), "compare" (two floats or two integers to a bool), "logic"
    (bools to a bool), "where" (a bool, and two of one kind, to that kind), "convert" (an integer or a
    bool to a float), "count" or "index" (no operands).
    """

    arity: int
    rule: Literal["float", "compare", "logic", "where", "convert", "count", "index"]
    cost: int = 1


# Named after the ATen operators that they agree with, but for the last four.
OPS: Mapping[str, Op] = {
    **dict.fromkeys(["add", "sub", "mul", "maximum", "minimum"], Op(2, "float")),
    **dict.fromkeys(["neg", "abs"], Op(1, "float")),
    "div": Op(2, "float", 4),
    "reciprocal": Op(1, "float", 4),
    "sqrt": Op(1, "float", 4),
    "rsqrt": Op(1, "float", 6),
    **dict.fromkeys(["exp", "expm1"], Op(1, "float", 15)),
    **dict.fromkeys(["log", "log1p"], Op(1, "float", 20)),
    **dict.fromkeys(["sigmoid", "tanh"], Op(1, "float", 20)),
    "erf": Op(1, "float", 30),
    **dict.fromkeys(["sin", "cos"], Op(1, "float", 30)),
    "pow": Op(2, "float", 40),
    **dict.fromkeys(["eq", "ne", "lt", "le", "gt", "ge"], Op(2, "compare")),
    **dict.fromkeys(["logical_and", "logical_or"], Op(2, "logic")),
    "logical_not": Op(1, "logic"),
    "where": Op(3, "where"),
    "to_float": Op(1, "convert"),  # an integer or a bool as a float
    "columns": Op(0, "count"),  # how many columns the grid has, a float scalar
    "column_index": Op(0, "index"),  # 0, 1, 2, ..: an integer column value
}


# --- values ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Input:
    """Numbers from memory, by the name under which the kernel's caller gives them.

    A scalar input is a Python number, or a tensor of one element, and may differ from call to call.
    """

    name: str
    dtype: Dtype
    extent: Extent = Extent.FULL


@dataclass(frozen=True, eq=False)
class Constant:
    """A scalar known when the kernel is written; a bool, an int or a float, which says its kind.

    Equal are constants that look equal: 1 is not 1.0, nor 0.0 -0.0, but nan is nan.
    """

    number: bool | int | float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class Apply:
    """The pointwise operator `OPS[op]` of the values at `args`."""

    op: str
    args: tuple[int, ...] = ()


@dataclass(frozen=True)
class Round:
    """The float at `arg`, rounded to `dtype`."""

    arg: int
    dtype: Dtype


@dataclass(frozen=True)
class Reduce:
    """All numbers of a row as one; over "rows" (sums only), all numbers of a column."""

    op: Literal["sum", "max", "min"]
    arg: int
    over: Literal["columns", "rows"] = "columns"


@dataclass(frozen=True)
class Gather:
    """`source[row, index[row]]`: a full input, and an integer row value of stage 0.

    0 where the index is negative or not below the number of columns.
    """

    source: int
    index: int


@dataclass(frozen=True)
class Uniform:
    """A random float of each place, a multiple of 2**-24 in [0, 1), from the integer scalar at `seed`.

    With place = row * columns + column and all arithmetic modulo 2**32:
    `h = mix(mix(low(place) ^ low(seed)) + high(place) * 0x9E3779B9 + high(seed))`, the number is
    `(h >> 8) * 2**-24`, and `mix(x)` does `x ^= x >> 16; x *= 0x7FEB352D; x ^= x >> 15; x *= 0x846CA68B;
    x ^= x >> 16` (Wellons, "Prospecting for Hash Functions", 2018).
    """

    seed: int


Value: TypeAlias = Input | Constant | Apply | Round | Reduce | Gather | Uniform


@dataclass(frozen=True)
class Output:
    """A value that is stored, rounded to `dtype`.

    Full and row values of any kind, and sums over the rows.
    """

    name: str
    value: int
    dtype: Dtype


@dataclass(frozen=True)
class Region:
    """What one kernel computes. Raises CodegenError where it breaks a rule of this module.

    >>> x, y = Input("x", "float32"), Input("y", "bfloat16", Extent.COLUMN)
    >>> region = Region((x, y, Apply("mul", (0, 1)), Reduce("sum", 2)), (Output("dot", 3, "float32"),))
    >>> [(fact.extent.value, fact.stage) for fact in region.facts]
    [('full', 0), ('column', 0), ('full', 0), ('row', 1)]
    """

    values: tuple[Value, ...]
    outputs: tuple[Output, ...]
    math: Math = "float32"

    def __post_init__(self) -> None:
        facts = self.facts
        names = [v.name for v in self.inputs] + [o.name for o in self.outputs]
        if len({*names}) != len(names):
            raise CodegenError(f"inputs and outputs share a name: {names}")
        for output in self.outputs:
            fact, value = facts[output.value], self.values[output.value]
            if not fact.extent.by_row and not isinstance(value, Reduce):
                raise CodegenError(f"output {output.name} is the same for all rows")
            if KIND_OF_DTYPE[output.dtype] != fact.kind:
                raise CodegenError(f"output {output.name} stores a {fact.kind} as {output.dtype}")

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.values, self.outputs, self.math))

    def __hash__(self) -> int:
        return self._hash  # found once: kernels are looked up by their region

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What the kernel reads, in the order of its parameters."""
        return tuple(value for value in self.values if isinstance(value, Input))

    @property
    def facts(self) -> "tuple[Facts, ...]":
        """Extent, kind and stage of each value."""
        return _facts(self.values)


# --- facts -------------------------------------------------------------------------------------


class Facts(NamedTuple):
    """What follows for a value from those it is made of."""

    extent: Extent
    kind: Kind
    stage: int


def operands(value: Value) -> tuple[int, ...]:
    """Positions of the values that `value` is made of.

    >>> operands(Gather(source=3, index=4))
    (3, 4)
    """
    match value:
        case Apply():
            return value.args
        case Round() | Reduce():
            return (value.arg,)
        case Gather():
            return (value.source, value.index)
        case Uniform():
            return (value.seed,)
    return ()


def cost(value: Value) -> int:
    """About how many instructions one number of `value` takes."""
    match value:
        case Apply():
            return OPS[value.op].cost
        case Round() | Input():
            return 2
        case Uniform():
            return 12
    return 1


@functools.lru_cache(maxsize=4096)
def _facts(values: tuple[Value, ...]) -> tuple[Facts, ...]:
    found: list[Facts] = []
    for position, value in enumerate(values):
        args = operands(value)
        if any(not 0 <= a < position for a in args):
            raise CodegenError(f"value {position}, {value}, is not made of earlier ones")
        if any(isinstance(v := values[a], Reduce) and v.over == "rows" for a in args):
            raise CodegenError(f"value {position}, {value}, needs a sum over all rows")
        found.append(_fact(value, [values[a] for a in args], [found[a] for a in args]))
    return tuple(found)


def _fact(value: Value, made_of: list[Value], args: list[Facts]) -> Facts:
    stage = max((a.stage for a in args), default=0)
    match value:
        case Input():
            return Facts(value.extent, KIND_OF_DTYPE[value.dtype], 0)
        case Constant():
            kinds: dict[type, Kind] = {bool: "bool", int: "int", float: "float"}
            return Facts(Extent.SCALAR, kinds[type(value.number)], 0)
        case Apply():
            return _applied(value.op, args, stage)
        case Round():
            _need(args[0].kind == "float" == KIND_OF_DTYPE[value.dtype], "round", "a float")
            return args[0]
        case Reduce(over="columns"):
            _need(args[0].kind == "float" and args[0].extent.by_column, value.op, "floats by column")
            return Facts(Extent.of(args[0].extent.by_row, False), "float", stage + 1)
        case Reduce():
            _need(args[0] == (Extent.FULL, "float", stage), value.op, "a full float")
            _need(value.op == "sum", value.op, "a reduction over columns")
            return Facts(Extent.COLUMN, "float", stage + 1)
        case Gather():
            _need(isinstance(made_of[0], Input) and args[0].extent is Extent.FULL, "gather", "an input")
            _need(args[1] == (Extent.ROW, "int", 0), "gather", "an integer for each row")
            return Facts(Extent.ROW, args[0].kind, 0)
    _need(args[0] == (Extent.SCALAR, "int", 0), "uniform", "an integer scalar as its seed")
    return Facts(Extent.FULL, "float", 0)


def _applied(name: str, args: list[Facts], stage: int) -> Facts:
    op = OPS.get(name)
    if op is None:
        raise CodegenError(f"no operator is named {name}")
    kinds = [a.kind for a in args]
    _need(len(args) == op.arity, name, f"{op.arity} operands")
    extent = Extent.of(any(a.extent.by_row for a in args), any(a.extent.by_column for a in args))
    match op.rule:
        case "float":
            _need({*kinds} == {"float"}, name, "floats")
            return Facts(extent, "float", stage)
        case "compare":
            _need(kinds[0] == kinds[1] != "bool", name, "two floats or two integers")
            return Facts(extent, "bool", stage)
        case "logic":
            _need({*kinds} == {"bool"}, name, "bools")
            return Facts(extent, "bool", stage)
        case "where":
            _need(kinds[0] == "bool" and kinds[1] == kinds[2], name, "a bool and two of one kind")
            return Facts(extent, kinds[1], stage)
        case "convert":
            _need(kinds[0] != "float", name, "an integer or a bool")
            return Facts(extent, "float", stage)
        case "count":
            return Facts(Extent.SCALAR, "float", 0)
    return Facts(Extent.COLUMN, "int", 0)


def _need(holds: bool, op: str, what: str) -> None:
    if not holds:
        raise CodegenError(f"{op} takes {what}")
