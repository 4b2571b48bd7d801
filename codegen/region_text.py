"""Regions as JSON text, so that they travel with a graph, a file, or a message.

>>> import json
>>> from graphopt.codegen.regions import swiglu
>>> text = json.dumps(to_data(swiglu("float32")))
>>> from_data(json.loads(text)) == swiglu("float32")
True
"""

from typing import Any

from graphopt.codegen.region import (
    Apply,
    Constant,
    Extent,
    Gather,
    Input,
    Output,
    Reduce,
    Region,
    Round,
    Uniform,
    Value,
)
from graphopt.errors import CodegenError

_KINDS: dict[str, Any] = {
    kind.__name__.lower(): kind for kind in (Input, Constant, Apply, Round, Reduce, Gather, Uniform)
}


def to_data(region: Region) -> dict[str, Any]:
    """A region as lists, texts and numbers that JSON knows."""
    return {
        "math": region.math,
        "values": [_row(value) for value in region.values],
        "outputs": [[out.name, out.value, out.dtype] for out in region.outputs],
    }


def from_data(data: dict[str, Any]) -> Region:
    """The region that `to_data` wrote; CodegenError where it is none."""
    try:
        values = tuple(_value(kind, fields) for kind, *fields in data["values"])
        outputs = tuple(Output(*fields) for fields in data["outputs"])
        return Region(values, outputs, data["math"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CodegenError(f"not a region: {error}") from error


def _row(value: Value) -> list[Any]:
    fields = [v.value if isinstance(v, Extent) else v for v in vars(value).values()]
    return [type(value).__name__.lower(), *fields]


def _value(kind: str, fields: list[Any]) -> Value:
    if kind == "input":
        name, dtype, extent = fields
        return Input(name, dtype, Extent(extent))
    if kind == "apply":
        op, args = fields
        return Apply(op, tuple(args))
    found: Value = _KINDS[kind](*fields)
    return found
