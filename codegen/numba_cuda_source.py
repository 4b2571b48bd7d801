"""The text of a Numba CUDA kernel for a region: Python that runs on a GPU, or in Numba's simulator.

As in the CUDA C kernels, a row belongs to a team of threads of one block, and each thread takes packs of
neighbouring columns, in a loop that every pass over the row repeats. Reductions of a team go through
shared memory, as the simulator has no warp shuffles. Sums over the rows are left in parts, one for each
team. In float32 no float64 arithmetic takes place, but in NVIDIA's own sine and cosine of large numbers.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from graphopt.codegen.cuda_form import BYTES, Argument, Form, Traits, scalars
from graphopt.codegen.cuda_source import NAME, Source
from graphopt.codegen.cuda_text import parameters
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
from graphopt.codegen.stages import Stage
from graphopt.errors import CodegenError

_INFIX = {"add": "+", "sub": "-", "mul": "*", "div": "/", "logical_and": "and", "logical_or": "or"}
_INFIX |= {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_CALLS = {name: name for name in ("exp", "expm1", "log", "log1p", "tanh", "erf", "sqrt", "sin", "cos")}
_CALLS |= {"pow": "pow", "abs": "fabs", "maximum": "maximum", "minimum": "minimum"}
_START = {"sum": "zero", "max": "-infinity", "min": "infinity"}
_JOIN = {"sum": "{} + {}", "max": "maximum({}, {})", "min": "minimum({}, {})"}
_FROM_ELSEWHERE = re.compile(rf"{'|'.join(_CALLS.values())}|uniform|(?:load|store|round)_\w+")


def write(region: Region, form: Form) -> Source:
    """The kernel of a region for one form; CodegenError names an operator that it does not know.

    Of a form, `held` and `tail` are not for this backend. Parameters are those of the CUDA C kernel.
    """
    return _Writer(region, form).source()


class _Writer:
    def __init__(self, region: Region, form: Form) -> None:
        self.region, self.form, self.facts = region, form, region.facts
        self.traits = Traits(region)
        self.stages = self.traits.lean_stages
        self.of_name = {t.name: t for t in self.traits.tensors}
        self.lines: list[str] = []
        self.depth = 0

    def source(self) -> Source:
        declared, kinds = parameters(self.traits, self.form)
        names = [declaration.split()[-1] for declaration in declared]
        with self._block(f"def {NAME}({', '.join(names)}):"):
            self._once()
            if self.form.flat:
                self._passes()
            else:
                self._rows()
        body = "\n".join(self.lines)
        return Source("\n".join([*self._head(body), body, ""]), kinds, self.form)

    def _head(self, body: str) -> Iterator[str]:
        yield "import math\n\nimport numpy as np\nfrom numba import cuda\n"
        yield "from graphopt.codegen.numba_cuda_primitives import NAMES\n"
        for t in self.traits.tensors:
            yield f"# {t.variable}: {t.name!r}, {t.dtype}, {t.extent.value}"
        yield f"real = np.{self.region.math}"
        yield "one, zero, infinity = real(1), real(0), real(math.inf)"
        yield f"PACK, TEAM, TEAMS = {self.form.pack}, {self.form.team}, {self.form.teams}"
        called = sorted({*re.findall(r"\b(\w+)\(", body)})
        yield from (f'{name} = NAMES["{name}"]' for name in called if _FROM_ELSEWHERE.fullmatch(name))
        yield "\n"

    # --- rows --------------------------------------------------------------------------------

    def _once(self) -> None:
        """What does not change from row to row."""
        numbers = {v.name: n for n, v in scalars(self.region)}
        for i, value in enumerate(self.region.values):
            if self.facts[i].extent is not Extent.SCALAR or self.facts[i].stage:
                continue
            if isinstance(value, Input):
                x = f"x{numbers[value.name]}"
                if value.name in self.form.pointers:
                    self._line(f"v{i} = load_{value.dtype}({x}, one)")
                else:
                    made = {"float": f"real({x})", "int": x, "bool": f"{x} != 0"}
                    self._line(f"v{i} = {made[self.facts[i].kind]}")
            else:
                self._line(f"v{i} = {self._expression(value, '')}")
        across = "x" if self.form.flat else "y"
        self._line(f"first = (cuda.blockIdx.{across} * TEAM + cuda.threadIdx.x) * PACK")
        self._line(f"stride = cuda.gridDim.{across} * TEAM * PACK")
        for n in range(max(len(stage.reductions) for stage in self.stages)):
            self._line(f"slots{n} = cuda.shared.array({self.form.team * self.form.teams}, real)")
        if self.traits.reduces:
            self._line("lane = cuda.threadIdx.x")
            self._line("at = cuda.threadIdx.y * TEAM + lane")
        if self.traits.sums:
            self._line("part = cuda.blockIdx.x * TEAMS + cuda.threadIdx.y")
            self._line("parts = cuda.gridDim.x * TEAMS")

    def _rows(self) -> None:
        self._line("groups = (rows + TEAMS - 1) // TEAMS")
        with self._block("for group in range(cuda.blockIdx.x, groups, cuda.gridDim.x):"):
            if self.form.teams == 1:
                self._line("row = group")
            else:  # teams without a row do that of the last one again, for the sake of barriers
                self._line("row = group * TEAMS + cuda.threadIdx.y")
                self._line("live = row < rows")
                self._line("row = row if live else rows - 1")
            self._addresses()
            self._passes()

    def _addresses(self) -> None:
        dims = self.form.row_dims
        if dims > 1:
            self._line("i0 = row")
            for d in range(dims - 1, 0, -1):
                self._line(f"i{d} = i0 % size{d}")
                self._line(f"i0 = i0 // size{d}")
        for t in self.traits.tensors:
            if t.extent.by_row:
                x = t.variable
                steps = [f"{'row' if dims == 1 else f'i{d}'} * {x}_{d}" for d in range(dims)]
                self._line(f"{x}_row = {' + '.join([x, *steps])}")

    # --- passes ------------------------------------------------------------------------------

    def _passes(self) -> None:
        for stage in self.stages:
            for i in stage.rows:
                if self.facts[i].extent is Extent.ROW or self.facts[i].stage:
                    self._line(f"v{i} = {self._expression(self.region.values[i], '')}")
            for k in stage.row_outputs:
                self._row_output(k)
            if stage.reductions or stage.sums_of_rows or stage.outputs:
                self._pass(stage)

    def _row_output(self, k: int) -> None:
        out = self.region.outputs[k]
        t = self.of_name[out.name]
        if t.extent is not Extent.ROW:
            raise CodegenError(f"output {out.name} is the same for all rows")
        condition = "cuda.threadIdx.x == 0 and cuda.blockIdx.y == 0" + (
            " and live" if self._teams else ""
        )
        with self._block(f"if {condition}:"):
            self._line(f"store_{t.dtype}({t.variable}_row, v{out.value})")

    @property
    def _teams(self) -> bool:
        """Whether some teams may be without a row."""
        return self.form.teams > 1 and not self.form.flat

    def _pass(self, stage: Stage) -> None:
        for i in stage.reductions:
            self._line(f"p{i} = {_START[self._reduce(i).op]}")
        with self._block("for j in range(first, columns, stride):"):
            self._loads(stage)
            for k in range(self.form.pack):
                self._places(stage, k)
                for i in stage.reductions:
                    value = self._reduce(i)
                    joined = _JOIN[value.op].format(f"p{i}", self._name(value.arg, k))
                    self._line(f"p{i} = {joined}")
            self._stores(stage)
        if stage.reductions:
            self._reductions(stage.reductions)

    def _reductions(self, reductions: tuple[int, ...]) -> None:
        """One number of those of a team, the same in all of its threads, for each of these."""
        for n, i in enumerate(reductions):
            self._line(f"slots{n}[at] = p{i}")
        self._line("cuda.syncthreads()")
        self._line("step = TEAM // 2")
        with self._block("while step > 0:"):
            with self._block("if lane < step:"):
                for n, i in enumerate(reductions):
                    joined = _JOIN[self._reduce(i).op].format(f"slots{n}[at]", f"slots{n}[at + step]")
                    self._line(f"slots{n}[at] = {joined}")
            self._line("cuda.syncthreads()")
            self._line("step = step // 2")
        for n, i in enumerate(reductions):
            self._line(f"v{i} = slots{n}[at - lane]")
        self._line("cuda.syncthreads()")

    def _loads(self, stage: Stage) -> None:
        for i in stage.places:
            value = self.region.values[i]
            if isinstance(value, Input):
                self._access(self.of_name[value.name], "load", [self._name(i, k) for k in self._each()])

    def _stores(self, stage: Stage) -> None:
        if not (stage.outputs or stage.sums_of_rows):
            return
        for i in stage.sums_of_rows:
            self._add_to_sum(i)
        opening = self._block("if live:") if self._teams and stage.outputs else nullcontext()
        with opening:
            for k in stage.outputs:
                out = self.region.outputs[k]
                t = self.of_name[out.name]
                self._access(t, "store", [self._name(out.value, k) for k in self._each()])

    def _add_to_sum(self, i: int) -> None:
        """Add to the sums so far of this team, which lie in memory, by sum, part and column."""
        n, math = self.traits.sums.index(i), self.region.math
        given = [self._name(self._reduce(i).arg, k) for k in self._each()]
        if self._teams:
            given = [f"({value} if live else zero)" for value in given]
        sums = [f"s{i}_{k}" for k in self._each()]
        added = [f"{s} + {value}" for s, value in zip(sums, given, strict=True)]
        many = suffix(len(sums))
        self._line(f"total = sums + (({n} * parts + part) * columns + j) * {BYTES[math]}")
        self._line(f"{', '.join(sums)} = load_{math}{many}(total, one)")
        stored = f"({', '.join(added)})" if many else added[0]
        self._line(f"store_{math}{many}(total, {stored})")

    def _places(self, stage: Stage, k: int) -> None:
        """The values at column `j + k`."""
        for i in stage.places:
            value = self.region.values[i]
            if not isinstance(value, Input | Reduce):
                self._line(f"{self._name(i, k)} = {self._expression(value, k)}")

    # --- memory ------------------------------------------------------------------------------

    def _access(self, t: Argument, verb: str, names: list[str]) -> None:
        """Load to, or store from, the variables of a pack."""
        address, size = self._address(t), BYTES[t.dtype]
        if t.name in self.form.strided or len(names) == 1:
            for k, name in enumerate(names):
                column = f"(j + {k})" if k else "j"
                step = f"{t.variable}_step" if t.name in self.form.strided else size
                self._one_access(t, verb, f"{address} + {column} * {step}", name)
        elif verb == "load":
            loaded = f"load_{t.dtype}{suffix(len(names))}({address} + j * {size}, one)"
            self._line(f"{', '.join(names)} = {loaded}")
        else:
            stored = f"({', '.join(names)})"
            self._line(f"store_{t.dtype}{suffix(len(names))}({address} + j * {size}, {stored})")

    def _one_access(self, t: Argument, verb: str, address: str, name: str) -> None:
        if verb == "load":
            self._line(f"{name} = load_{t.dtype}({address}, one)")
        else:
            self._line(f"store_{t.dtype}({address}, {name})")

    def _address(self, t: Argument) -> str:
        return f"{t.variable}_row" if t.extent.by_row and not self.form.flat else t.variable

    # --- values ------------------------------------------------------------------------------

    def _each(self) -> range:
        return range(self.form.pack)

    def _name(self, i: int, k: int | str) -> str:
        """The variable of a value, of that at column `j + k` where it has columns."""
        by_place = self.facts[i].extent.by_column and self.form.pack > 1
        return f"v{i}_{k}" if by_place else f"v{i}"

    def _expression(self, value: Value, k: int | str) -> str:
        """A value from the variables of its operands, at column `j + k` where it has columns."""
        match value:
            case Input():
                t = self.of_name[value.name]
                return f"load_{value.dtype}({self._address(t)}, one)"
            case Constant():
                number = value.number
                return _float(number) if isinstance(number, float) else repr(number)
            case Apply():
                return _applied(value.op, [self._name(a, k) for a in value.args], _column(k))
            case Round():
                name, narrow = self._name(value.arg, k), BYTES[value.dtype] < BYTES[self.region.math]
                return f"round_{value.dtype}({name})" if narrow else name
            case Gather():
                return self._gathered(value)
            case Uniform():
                return f"uniform(row * columns + {_column(k)}, v{value.seed}, one)"
        raise CodegenError(f"{value} is no expression")

    def _gathered(self, value: Gather) -> str:
        source, at = self.region.values[value.source], f"v{value.index}"
        assert isinstance(source, Input)
        t = self.of_name[source.name]
        step = f"{t.variable}_step" if t.name in self.form.strided else BYTES[t.dtype]
        other = {"float": "zero", "int": "0", "bool": "False"}[self.facts[value.source].kind]
        found = f"load_{t.dtype}({self._address(t)} + {at} * {step}, one)"
        return f"{found} if 0 <= {at} < columns else {other}"

    def _reduce(self, i: int) -> Reduce:
        value = self.region.values[i]
        assert isinstance(value, Reduce)
        return value

    def _line(self, text: str) -> None:
        self.lines.append("    " * self.depth + text)

    @contextmanager
    def _block(self, opening: str) -> Iterator[None]:
        self._line(opening)
        self.depth += 1
        yield
        self.depth -= 1


def suffix(lanes: int) -> str:
    """What follows the names of loads and stores of so many numbers.

    >>> suffix(1), suffix(4)
    ('', '_4')
    """
    return f"_{lanes}" if lanes > 1 else ""


def _column(k: int | str) -> str:
    return f"(j + {k})" if k else "j"


def _applied(op: str, args: list[str], column: str) -> str:
    if op in _INFIX:
        return f"{args[0]} {_INFIX[op]} {args[1]}"
    if op in _CALLS:
        return f"{_CALLS[op]}({', '.join(args)})"
    if op == "where":
        return f"{args[1]} if {args[0]} else {args[2]}"
    known = {"columns": "real(columns)", "column_index": column}
    if args:
        x = args[0]
        known |= {"neg": f"-{x}", "logical_not": f"not {x}", "to_float": f"real({x})"}
        known |= {"reciprocal": f"one / {x}", "rsqrt": f"one / sqrt({x})"}
        known |= {"sigmoid": f"one / (one + exp(-{x}))"}
    if op not in known:
        raise CodegenError(f"the Numba CUDA backend has no {op}")
    return known[op]


def _float(number: float) -> str:
    special = {"inf": "infinity", "-inf": "-infinity", "nan": "real(math.nan)"}
    return special.get(repr(number), f"real({number!r})")
