"""The text of a Numba kernel for a region: one loop over rows, and in it one loop for each stage.

A stage runs over its columns in blocks. Within a block all is one loop that LLVM makes into vector code:
loads, the expressions, a partial result of each reduction, stores. Sums are therefore two-level, which
keeps their error low. Outputs that are larger than the caches are written to a tile and streamed past
them from there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from graphopt.codegen.numba_forms import BYTES, Form, Operand, Source, known_columns, tensors
from graphopt.codegen.region import (
    Apply,
    Constant,
    Extent,
    Gather,
    Input,
    Reduce,
    Region,
    Round,
    Uniform,
    Value,
)
from graphopt.codegen.stages import Online, Stage, stages
from graphopt.errors import CodegenError

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/"}
_INFIX |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_CALLS = {"exp", "expm1", "log", "log1p", "tanh", "sigmoid", "erf", "sqrt", "rsqrt"}
_CALLS |= {"maximum", "minimum", "where", "logical_and", "logical_or", "logical_not"}
_START = {"sum": "zero", "max": "-infinity", "min": "infinity"}
_COMBINE = {"sum": "add_any_order", "max": "maximum", "min": "minimum"}


def write(region: Region, form: Form) -> Source:
    """The kernel of a region for one form; CodegenError names an operator that it does not know."""
    return _Writer(region, form).source()


@dataclass
class _Writer:
    region: Region
    form: Form
    lines: list[str] = field(default_factory=list)
    depth: int = 0

    def __post_init__(self) -> None:
        self.facts = self.region.facts
        self.stages = stages(self.region, self.form.recompute_cost, self.form.online)
        self.tensors = tensors(self.region)
        self.of_name = {t.name: t for t in self.tensors}
        self.size = 8 if self.region.math == "float64" else 4
        kept = [i for stage in self.stages for i in stage.kept]
        sums = [i for stage in self.stages for i in stage.sums_of_rows]
        first = 1 + len(self.region.outputs)
        self.online = {s.online.exponential: s.online for s in self.stages if s.online}
        kept += [o.peak for i, o in self.online.items() if i in kept]  # the maximum of each block
        self.buffer_of = {i: n for n, i in enumerate(kept)}
        self.sum_of = {i: n for n, i in enumerate(sums)}
        self.buffer_place = {i: first + n for n, i in enumerate([*kept, *sums])}

    def source(self) -> Source:
        names, kinds = self._parameters()
        self._line(f"def rows({', '.join(names)}):")
        with _indented(self):
            self._once()
            for _ in self._each_row():
                for stage in self.stages:
                    self._stage(stage)
            if self.form.streamed:
                self._line("fence()")
        body = "\n".join(self.lines)
        return Source(
            "\n".join([*self._head(body), body]) + "\n",
            kinds,
            len(self.buffer_of),
            len(self.form.streamed),
            tuple(self.sum_of),
        )

    # --- parameters --------------------------------------------------------------------------

    def _parameters(self) -> tuple[list[str], str]:
        """Names, and "i" for each integer, "f" for each float."""
        names = ["begin", "end", "columns", "buffer", "pitch", "sums"]
        names += [f"size{d}" for d in range(1, self.form.row_dims)]
        for tensor in self.tensors:
            names += [tensor.variable, *self._steps(tensor)]
        kinds = "i" * len(names)
        for n, value in enumerate(self.region.inputs):
            if value.extent is Extent.SCALAR:
                names.append(f"x{n}")
                kinds += "f" if "float" in value.dtype else "i"
        return names, kinds

    def _steps(self, tensor: Operand) -> list[str]:
        """Parameters that say how to step through a tensor: rows in bytes, columns in elements."""
        if self.form.flat:
            return []
        rows = [f"{tensor.variable}_{d}" for d in range(self.form.row_dims)]
        strided = tensor.name in self.form.strided
        return (rows if tensor.extent.by_row else []) + ([f"{tensor.variable}_step"] if strided else [])

    def _head(self, body: str) -> Iterator[str]:
        yield "import math\n\nimport numpy as np\n"
        yield "from graphopt.codegen.primitives import NAMES\n"
        for tensor in self.tensors:
            yield f"# {tensor.variable}: {tensor.name!r}, {tensor.dtype}, {tensor.extent.value}"
        yield f"real = np.{self.region.math}\ninfinity = real(math.inf)"
        used = sorted({word.split("(")[0] for word in body.replace("(", "( ").split() if "(" in word})
        yield from (
            f'{name} = NAMES["{name}"]' for name in used if name.isidentifier() and name in _NAMES
        )
        yield ""

    # --- rows --------------------------------------------------------------------------------

    def _once(self) -> None:
        """Scalars that do not change from row to row."""
        self._line("one, zero = real(1), real(0)")
        numbers = {v.name: n for n, v in enumerate(self.region.inputs)}
        for i, value in enumerate(self.region.values):
            if self.facts[i].extent is not Extent.SCALAR or self.facts[i].stage:
                continue
            if isinstance(value, Input):
                self._line(f"v{i} = {_converted(value, f'x{numbers[value.name]}')}")
            else:
                self._line(f"v{i} = {self._expression(value)}")

    def _each_row(self) -> Iterator[None]:
        """The loops around what is done for a row, which is written at the `yield`."""
        if self.form.flat:
            yield
        elif self.form.row_dims == 1:
            self._line("for row in range(begin, end):")
            with _indented(self):
                self._row_addresses("", "row")
                yield
        else:
            yield from self._each_run()

    def _each_run(self) -> Iterator[None]:
        """Rows in runs along the last row dimension, in which addresses grow evenly.

        The other dimensions are counted on: divisions in each run would take as long as a short one.
        """
        inner, depth = self.form.row_dims - 1, self.depth
        self._line("done, rest = begin, begin")
        for d in range(inner, 0, -1):
            self._line(f"i{d} = rest % size{d}")
            self._line(f"rest = rest // size{d}")
        self._line("i0 = rest")
        self._line("while done < end:")
        self.depth += 1
        self._line(f"head, tail = i{inner}, min(size{inner}, i{inner} + end - done)")
        for tensor in self.tensors:
            if tensor.extent.by_row:
                x = tensor.variable
                self._line(f"{x}_run = {' + '.join([x, *(f'i{d} * {x}_{d}' for d in range(inner))])}")
        self._line("for i in range(head, tail):")
        with _indented(self):
            self._line("row = done + i - head")
            self._row_addresses("_run", "i")
            yield
        self._line("done += tail - head")
        self._line(f"i{inner} = 0")
        for d in range(inner - 1, 0, -1):
            self._line(f"i{d} += 1")
            self._line(f"if i{d} == size{d}:")
            self.depth += 1
            self._line(f"i{d} = 0")
        self._line("i0 += 1")
        self.depth = depth

    def _row_addresses(self, since: str, number: str) -> None:
        for tensor in self.tensors:
            if tensor.extent.by_row:
                x = tensor.variable
                self._line(f"{x}_row = {x}{since} + {number} * {x}_{self.form.row_dims - 1}")

    def _address(self, tensor: Operand) -> str:
        by_row = tensor.extent.by_row and not self.form.flat
        return f"{tensor.variable}_row" if by_row else tensor.variable

    def _index(self, tensor: Operand, index: str) -> str:
        return f"{index} * {tensor.variable}_step" if tensor.name in self.form.strided else index

    # --- stages ------------------------------------------------------------------------------

    def _stage(self, stage: Stage) -> None:
        for i in stage.rows:
            if self.facts[i].extent is Extent.ROW or self.facts[i].stage:
                self._line(f"v{i} = {self._expression(self.region.values[i])}")
        for k in stage.row_outputs:
            tensor = self.of_name[self.region.outputs[k].name]
            self._store(tensor, "0", f"v{self.region.outputs[k].value}", self._address(tensor))
        if not (stage.reductions or stage.sums_of_rows or stage.outputs):
            return
        if stage.online:
            self._online_stage(stage, stage.online)
            return
        for i in stage.reductions:
            self._line(f"v{i} = {_START[self._reduce(i).op]}")
        if self.form.columns:
            self._line(f"start, stop = 0, {known_columns(self.form.columns)}")
            self._block(stage)
            return
        first, last = ("begin", "end") if self.form.flat else ("0", "columns")
        streams = any(self.region.outputs[k].name in self.form.streamed for k in stage.outputs)
        step = self.form.tile if streams else self.form.block
        self._line(f"for start in range({first}, {last}, {step}):")
        with _indented(self):
            self._line(f"stop = min(start + {step}, {last})")
            self._block(stage)

    def _online_stage(self, stage: Stage, online: Online) -> None:
        """The maximum of a block, then its sum of exponentials while it is in the first-level cache."""
        peak, total, math = f"v{online.peak}", f"v{online.total}", self.region.math
        self._line(f"{peak}, {total} = -infinity, zero")
        self._line(f"for start in range(0, columns, {self.form.block}):")
        with _indented(self):
            self._line(f"stop = min(start + {self.form.block}, columns)")
            self._line("highest, part = -infinity, zero")
            self._line("for j in range(start, stop):")
            with _indented(self):
                self._places(replace(stage, kept=()))
                self._line(f"highest = maximum(highest, v{self._reduce(online.peak).arg})")
            self._line(f"highest = maximum({peak}, highest)")
            self._line("shift = where(highest == -infinity, zero, highest)")
            for i in stage.kept:
                self._line(f"b{i} = buffer + {self.buffer_of[i]} * pitch")
                self._line(f"b{online.peak} = buffer + {self.buffer_of[online.peak]} * pitch")
                place = self.buffer_place[online.peak]
                self._line(f"store_{math}(b{online.peak}, start // {self.form.block}, highest, {place})")
            self._line("for j in range(start, stop):")
            with _indented(self):
                self._places(replace(stage, kept=()))
                e = f"v{online.exponential}"
                self._line(f"{e} = exp(v{self._reduce(online.peak).arg} - shift)")
                for i in stage.kept:
                    self._line(f"store_{math}(b{i}, j, v{i}, {self.buffer_place[i]})")
                self._line(f"part = add_any_order(part, {e})")
            self._line(f"{total} = {total} * exp({peak} - shift) + part")
            self._line(f"{peak} = highest")
        self._line(f"if {peak} == -infinity and columns > 0:")
        self._line(f"    {total} = real(math.nan)  # of a row of nothing but -inf")

    def _block(self, stage: Stage) -> None:
        outputs = [self.of_name[self.region.outputs[k].name] for k in stage.outputs]
        streamed = [t for t in outputs if t.name in self.form.streamed]
        for tensor in streamed:
            self._line(f"{tensor.variable}_tile = {self._tile(tensor)} - start * {BYTES[tensor.dtype]}")
        for i in (*stage.fetched, *stage.kept):
            self._line(f"b{i} = buffer + {self.buffer_of[i]} * pitch")
            if i in self.online:
                self._scale_of_block(i, self.online[i].peak)
        for i in stage.sums_of_rows:
            self._line(f"b{i} = sums + {self.sum_of[i]} * pitch")
        for i in stage.reductions:
            self._line(f"p{i} = {_START[self._reduce(i).op]}")
        self._line("for j in range(start, stop):")
        with _indented(self):
            self._places(stage)
            for i in stage.reductions:
                value = self._reduce(i)
                self._line(f"p{i} = {_COMBINE[value.op]}(p{i}, v{value.arg})")
            for k, tensor in zip(stage.outputs, outputs, strict=True):
                base = f"{tensor.variable}_tile" if tensor in streamed else self._address(tensor)
                self._store(tensor, self._index(tensor, "j"), f"v{self.region.outputs[k].value}", base)
        for i in stage.reductions:
            self._line(f"v{i} = {_COMBINE[self._reduce(i).op]}(v{i}, p{i})")
        for tensor in streamed:
            size = BYTES[tensor.dtype]
            where = f"{self._address(tensor)} + start * {size}"
            self._line(f"stream({where}, {self._tile(tensor)}, (stop - start) * {size})")

    def _scale_of_block(self, i: int, peak: int) -> None:
        """What makes a block's kept exponentials relative to the maximum of the row."""
        math, place = self.region.math, self.buffer_place[peak]
        at = f"start // {self.form.block}"
        own = f"load_{math}(buffer + {self.buffer_of[peak]} * pitch, {at}, {place}, one)"
        self._line(f"s{i} = exp({own} - v{peak})")

    def _tile(self, tensor: Operand) -> str:
        at = self.form.streamed.index(tensor.name) * self.form.tile * 8
        return f"(buffer + {len(self.buffer_of)} * pitch + {at})"

    def _places(self, stage: Stage) -> None:
        """The loop's body but for what it leaves behind."""
        math = self.region.math
        for i in sorted((*stage.fetched, *stage.places)):
            value = self.region.values[i]
            if i in stage.fetched:
                scale = f" * s{i}" if i in self.online else ""
                self._line(f"v{i} = load_{math}(b{i}, j, {self.buffer_place[i]}, one){scale}")
            elif isinstance(value, Input):
                self._line(f"v{i} = {self._load(self.of_name[value.name], 'j')}")
            elif not isinstance(value, Reduce):
                self._line(f"v{i} = {self._expression(value)}")
        for i in stage.kept:
            self._line(f"store_{math}(b{i}, j, v{i}, {self.buffer_place[i]})")
        for i in stage.sums_of_rows:
            place = self.buffer_place[i]
            total = f"load_{math}(b{i}, j, {place}, one) + v{self._reduce(i).arg}"
            self._line(f"store_{math}(b{i}, j, {total}, {place})")

    # --- values ------------------------------------------------------------------------------

    def _expression(self, value: Value) -> str:
        """A value from the variables of its operands."""
        match value:
            case Input():
                return self._load(self.of_name[value.name], "0")
            case Constant():
                number = value.number
                return _float(number) if isinstance(number, float) else repr(number)
            case Apply():
                return _applied(value.op, [f"v{a}" for a in value.args])
            case Round():
                narrow = BYTES[value.dtype] < self.size
                return f"round_{value.dtype}(v{value.arg})" if narrow else f"v{value.arg}"
            case Gather():
                source, at = self.region.values[value.source], f"v{value.index}"
                assert isinstance(source, Input)
                other = "zero" if "float" in source.dtype else "False" if source.dtype == "bool" else "0"
                found = self._load(self.of_name[source.name], at)
                return f"{found} if 0 <= {at} < columns else {other}"
            case Uniform():
                return f"uniform(row * columns + j, v{value.seed}, one)"
        raise CodegenError(f"{value} is no expression")

    def _reduce(self, i: int) -> Reduce:
        value = self.region.values[i]
        assert isinstance(value, Reduce)
        return value

    def _load(self, tensor: Operand, index: str) -> str:
        at = self._index(tensor, index) if tensor.extent.by_column else index
        return f"load_{tensor.dtype}({self._address(tensor)}, {at}, {tensor.place}, one)"

    def _store(self, tensor: Operand, index: str, value: str, base: str) -> None:
        self._line(f"store_{tensor.dtype}({base}, {index}, {value}, {tensor.place})")

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)


class _indented:
    """Lines written meanwhile stand deeper."""

    def __init__(self, writer: _Writer) -> None:
        self.writer = writer

    def __enter__(self) -> None:
        self.writer.depth += 1

    def __exit__(self, *_: object) -> None:
        self.writer.depth -= 1


def _applied(op: str, args: list[str]) -> str:
    if op in _INFIX:
        return f"{args[0]} {_INFIX[op]} {args[1]}"
    if op in _CALLS:
        return f"{op}({', '.join(args)})"
    known = {"columns": "real(columns)", "column_index": "j"}
    if args:
        x = args[0]
        known |= {"neg": f"-{x}", "abs": f"absolute({x})"}
        known |= {"reciprocal": f"one / {x}", "to_float": f"to_float({x}, one)"}
    if op not in known:
        raise CodegenError(f"the Numba backend has no {op}")
    return known[op]


def _converted(value: Input, variable: str) -> str:
    kinds = {"int64": variable, "int32": variable, "bool": f"{variable} != 0"}
    return kinds.get(value.dtype, f"real({variable})")


def _float(number: float) -> str:
    special = {"inf": "infinity", "-inf": "-infinity", "nan": "real(math.nan)"}
    return special.get(repr(number), f"real({number!r})")


_NAMES = _CALLS | {"absolute", "to_float", "add_any_order", "uniform", "stream", "fence"}
_NAMES |= {f"{verb}_{dtype}" for verb in ("load", "store", "round") for dtype in BYTES}
