"""The text of a CUDA C kernel for a region and a form.

The kernel's head (`kernel.cuh`) holds what all share; the text is complete, includes nothing, and is
compiled at run time for the device at hand. In float32 no float64 arithmetic takes place, and bfloat16
and float16 are bits until they are computed with.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from graphopt.codegen.cuda_form import BYTES, MAX_AHEAD, Argument, Form, Traits, scalars
from graphopt.codegen.cuda_text import applied, head, literal, parameters
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
from graphopt.codegen.stages import Online, Stage
from graphopt.errors import CodegenError

NAME = "kernel"
_JOINS = {"sum": "Sum", "max": "Max", "min": "Min"}


@dataclass(frozen=True)
class Source:
    """A kernel's text, and the types of its parameters: "i", "f" or "d" (long long, float, double).

    Parameters: how many rows and columns; the sizes of the row dimensions but the first; for each tensor
    of `Traits.tensors` its address, its steps along the row dimensions in bytes where it has rows and
    these matter, and that along the columns in bytes if it is strided; scalars, or their addresses;
    where sums over rows go. These are by sum, part and column, in the dtype of the computation.
    """

    text: str
    parameters: str
    form: Form


def write(region: Region, form: Form) -> Source:
    """The kernel of a region for one form; CodegenError names an operator that it does not know."""
    return _Writer(region, form).source()


class _Writer:
    def __init__(self, region: Region, form: Form) -> None:
        self.region, self.form, self.facts = region, form, region.facts
        self.traits = Traits(region)
        self.stages = self.traits.stages_of(form)
        self.of_name = {t.name: t for t in self.traits.tensors}
        self.suffix = "" if region.math == "float64" else "f"
        self.slots = {i: n for n, i in enumerate(i for s in self.stages for i in _reductions(s))}
        self.lines: list[str] = []
        self.depth = 0
        self.loaded: set[int] = set()

    def source(self) -> Source:
        declared, kinds = parameters(self.traits, self.form)
        form, threads = self.form, self.form.team * self.form.teams
        opening = f'extern "C" __global__ void __launch_bounds__({threads}) {NAME}(\n    '
        with self._block(opening + ",\n    ".join(declared) + ")"):
            self._once()
            if form.flat:
                self._passes()
            else:
                self._rows()
        text = "\n".join(
            [
                *(f"// {t.variable}: {t.name}, {t.dtype}, {t.extent.value}" for t in self.traits.tensors),
                f"typedef {'double' if self.region.math == 'float64' else 'float'} real;",
                f"enum {{ TEAM = {form.team}, TEAMS = {form.teams} }};",
                f"enum {{ PACK = {form.pack}, HELD = {form.held} }};",
                "",
                head(),
                *self.lines,
                "",
            ]
        )
        return Source(text, kinds, form)

    # --- rows --------------------------------------------------------------------------------

    def _once(self) -> None:
        """What does not change from row to row."""
        numbers = {v.name: n for n, v in scalars(self.region)}
        for i, value in enumerate(self.region.values):
            if self.facts[i].extent is not Extent.SCALAR or self.facts[i].stage:
                continue
            if isinstance(value, Input):
                x = f"x{numbers[value.name]}"
                given = f"read<dtype_{value.dtype}>({x})" if value.name in self.form.pointers else x
                self._let(i, f"({self._type(i)}){given}" if value.dtype != "bool" else f"{given} != 0")
            else:
                self._let(i, self._expression(i, value))
        self._line(f"const long long first = {self._first()};")
        if self.form.team > 32 and self.slots:
            self._line(f"__shared__ real slots[2][{len(self.slots)}][32];")
            self._line("int turn = 0;")
        if self.form.held:
            for i in self.traits.sums:
                self._line(f"real s{i}[HELD * PACK];")
                self._line(f"EACH for (int k = 0; k < HELD * PACK; ++k) s{i}[k] = 0;")
        if self.traits.sums:
            self._line("const long long part = (long long)blockIdx.x * TEAMS + threadIdx.y;")
            self._line("const long long parts = (long long)gridDim.x * TEAMS;")

    def _first(self) -> str:
        if self.form.flat:
            return "((long long)blockIdx.x * TEAM + threadIdx.x) * PACK"
        if self.form.held and not self.traits.reduces:
            return "((long long)blockIdx.y * HELD * TEAM + threadIdx.x) * PACK"
        return "(long long)threadIdx.x * PACK"

    def _rows(self) -> None:
        with self._block("for (long long group = blockIdx.x; group * TEAMS < rows; group += gridDim.x)"):
            if self.form.teams == 1:
                self._line("const long long row = group;")
            else:  # teams without a row do that of the last one again, for the sake of barriers
                self._line("const bool live = group * TEAMS + threadIdx.y < rows;")
                self._line("const long long row = live ? group * TEAMS + threadIdx.y : rows - 1;")
            self._addresses()
            if self.form.held:
                self._load([i for s in self.stages for i in s.places if self._is_held_from_start(i)])
            self._passes()
            if self.form.team > 32 and self.slots:
                self._line("turn ^= 1;")
        if self.form.held and self.traits.sums:
            with self._columns():
                for i in self.traits.sums:
                    self._line(f"Pack<dtype_{self.region.math}, PACK> s{i}_pack;")
                    self._line(
                        f"EACH for (int k = 0; k < PACK; ++k) s{i}_pack.set(k, s{i}[e * PACK + k]);"
                    )
                    self._line(self._sum_access(i, "store"))

    def _is_held_from_start(self, i: int) -> bool:
        return isinstance(self.region.values[i], Input) and self.facts[i].extent is Extent.FULL

    def _addresses(self) -> None:
        dims = self.form.row_dims
        if dims > 1:
            self._line("unsigned rest = (unsigned)row;")
            for d in range(dims - 1, 0, -1):
                self._line(f"const unsigned i{d} = rest % (unsigned)size{d};")
                self._line(f"rest /= (unsigned)size{d};")
            self._line("const unsigned i0 = rest;")
        for t in self.traits.tensors:
            if t.extent.by_row:
                x, const = t.variable, "" if t.written else "const "
                steps = [f"{'row' if dims == 1 else f'i{d}'} * {x}_{d}" for d in range(dims)]
                self._line(f"{const}char* const {x}_row = {' + '.join([x, *steps])};")

    def _sum_access(self, i: int, verb: str) -> str:
        """Load or store the sums over rows so far of a pack; rows of these are aligned without a tail."""
        n, size = self.traits.sums.index(i), BYTES[self.region.math]
        at = f"(char*)(sums + ({n} * parts + part) * columns + j)"
        if self.form.tail:
            return f"s{i}_pack.{verb}_apart({at}, {size}, columns - j);"
        return f"s{i}_pack.{verb}<false>({at}, PACK);"

    # --- passes ------------------------------------------------------------------------------

    def _passes(self) -> None:
        for stage in self.stages:
            for i in stage.rows:
                if self.facts[i].extent is Extent.ROW or self.facts[i].stage:
                    self._let(i, self._expression(i, self.region.values[i]))
            for k in stage.row_outputs:
                out = self.region.outputs[k]
                t = self.of_name[out.name]
                if t.extent is not Extent.ROW:
                    raise CodegenError(f"output {out.name} is the same for all rows")
                condition = "threadIdx.x == 0 && blockIdx.y == 0" + self._and_live()
                self._line(f"if ({condition}) write<dtype_{t.dtype}>({t.variable}_row, v{out.value});")
            if stage.online:
                self._online_pass(stage, stage.online)
            elif stage.reductions or stage.sums_of_rows or stage.outputs:
                self._pass(stage)

    def _and_live(self) -> str:
        return " && live" if self.form.teams > 1 and not self.form.flat else ""

    def _pass(self, stage: Stage) -> None:
        for i in stage.reductions:
            self._line(f"real p{i} = {self._join(i)}::start();")
        for i in stage.kept:
            self._line(f"real b{i}[HELD * PACK];")
        outputs = [self.region.outputs[k] for k in stage.outputs]
        if 0 < self.form.held <= MAX_AHEAD:
            self._load(stage.places)
        with self._columns(bool(stage.sums_of_rows)):
            self._load_here(stage.places)
            if not self.form.held:
                for i in stage.sums_of_rows:
                    declared = f"Pack<dtype_{self.region.math}, PACK> s{i}_pack;"
                    self._line(f"{declared} {self._sum_access(i, 'load')}")
            for out in outputs:
                t = self.of_name[out.name]
                self._line(f"Pack<dtype_{t.dtype}, PACK> {t.variable}_pack; {t.variable}_pack.clear();")
            with self._each():
                self._places(stage)
                for i in stage.reductions:
                    self._line(f"p{i} = {self._join(i)}::join(p{i}, v{self._reduce(i).arg});")
                for out in outputs:
                    self._line(f"{self.of_name[out.name].variable}_pack.set(k, v{out.value});")
            for out in outputs:
                self._store(self.of_name[out.name])
            if not self.form.held:
                for i in stage.sums_of_rows:
                    self._line(self._sum_access(i, "store"))
        for i in stage.reductions:
            self._let(i, self._reduced(i, f"p{i}"))

    def _online_pass(self, stage: Stage, o: Online) -> None:
        """The maximum so far, and the sum of exponentials relative to it, of the packs of a thread."""
        exp = f"exp{self.suffix}"
        peak = f"v{self._reduce(o.peak).arg}"
        self._line("real highest = -infinity(), sum = 0;")
        with self._columns():
            self._load_here(stage.places)
            self._line("real top = highest;")
            with self._each():
                self._places(stage)
                self._line(f"top = maximum(top, {peak});")
            self._line("const real shift = top == -infinity() ? 0 : top;")
            self._line(f"sum *= {exp}(highest - shift);")
            with self._each():
                self._places(stage)
                self._line(f"sum += {exp}({peak} - shift);")
            self._line("highest = top;")
        self._let(o.peak, self._reduced(o.peak, "highest"))
        shift = f"(v{o.peak} == -infinity() ? 0 : v{o.peak})"
        self._line(f"sum *= {exp}(highest - {shift});")
        self._line(f"sum = {self._reduced(o.total, 'sum')};")
        # A row of nothing but -inf has no exponentials.
        self._let(o.total, f"v{o.peak} == -infinity() && columns > 0 ? not_a_number() : sum")

    def _places(self, stage: Stage) -> None:
        """The values at one place."""
        for i in sorted((*stage.fetched, *stage.places)):
            value = self.region.values[i]
            if i in stage.fetched:
                self._let(i, f"b{i}[e * PACK + k]")
            elif isinstance(value, Input):
                self._let(i, f"({self._type(i)}){self._pack(i)}.get(k)")
            elif not isinstance(value, Reduce):
                self._let(i, self._expression(i, value))
        for i in stage.kept:
            self._line(f"b{i}[e * PACK + k] = v{i};")
        for i in stage.sums_of_rows:
            v = f"v{self._reduce(i).arg}"
            if self.form.held:
                self._line(f"s{i}[e * PACK + k] += {f'live ? {v} : 0' if self._and_live() else v};")
            else:
                self._line(f"s{i}_pack.set(k, s{i}_pack.get(k) + {v});")

    # --- packs -------------------------------------------------------------------------------

    @contextmanager
    def _columns(self, summed: bool = False) -> Iterator[None]:
        """The packs of a thread; `j` is the first column of one.

        Where rows are `summed` in memory, one at a time: unrolled, these take too many registers.
        """
        if self.form.held:
            with self._block("EACH for (int e = 0; e < HELD; ++e)"):
                self._line("const long long j = first + e * (TEAM * PACK);")
                with self._block("if (j < columns)"):
                    yield
        else:
            step = "(long long)gridDim.x * TEAM * PACK" if self.form.flat else "TEAM * PACK"
            once = "ONE_BY_ONE " if summed else ""
            with self._block(f"{once}for (long long j = first; j < columns; j += {step})"):
                yield

    @contextmanager
    def _each(self) -> Iterator[None]:
        """The columns of a pack."""
        tail = "if (j + k < columns) " if self.form.tail else ""
        with self._block(f"EACH for (int k = 0; k < PACK; ++k) {tail}".rstrip()):
            yield

    def _load(self, places: tuple[int, ...] | list[int]) -> None:
        """Load to registers what is not there yet, all packs before the first is used."""
        new = [i for i in places if isinstance(self.region.values[i], Input) and i not in self.loaded]
        new = list(dict.fromkeys(new))
        if not new:
            return
        self.loaded.update(new)
        for i in new:
            t = self._argument(i)
            self._line(f"Pack<dtype_{t.dtype}, PACK> {t.variable}_pack[HELD];")
        with self._columns():
            for i in new:
                self._line(self._load_text(self._argument(i), f"{self._argument(i).variable}_pack[e]"))

    def _load_here(self, places: tuple[int, ...]) -> None:
        for i in places:
            if isinstance(self.region.values[i], Input) and i not in self.loaded:
                t = self._argument(i)
                pack = f"{t.variable}_pack"
                self._line(f"Pack<dtype_{t.dtype}, PACK> {pack}; {self._load_text(t, pack)}")

    def _load_text(self, t: Argument, pack: str) -> str:
        if t.name in self.form.strided:
            step = f"{t.variable}_step"
            return f"{pack}.load_apart({self._address(t)} + j * {step}, {step}, columns - j);"
        tail = "true" if self.form.tail else "false"
        return f"{pack}.load<{tail}>({self._address(t)} + j * {BYTES[t.dtype]}, columns - j);"

    def _store(self, t: Argument) -> None:
        pack, live = f"{t.variable}_pack", "if (live) " if self._and_live() else ""
        if t.name in self.form.strided:
            step = f"{t.variable}_step"
            self._line(f"{live}{pack}.store_apart({self._address(t)} + j * {step}, {step}, columns - j);")
            return
        tail = "true" if self.form.tail else "false"
        self._line(f"{live}{pack}.store<{tail}>({self._address(t)} + j * {BYTES[t.dtype]}, columns - j);")

    def _pack(self, i: int) -> str:
        return f"{self._argument(i).variable}_pack" + ("[e]" if i in self.loaded else "")

    def _argument(self, i: int) -> Argument:
        value = self.region.values[i]
        assert isinstance(value, Input)
        return self.of_name[value.name]

    def _address(self, t: Argument) -> str:
        return f"{t.variable}_row" if t.extent.by_row and not self.form.flat else t.variable

    # --- values ------------------------------------------------------------------------------

    def _expression(self, i: int, value: Value) -> str:
        """A value from the variables of its operands."""
        match value:
            case Input():
                return f"({self._type(i)})read<dtype_{value.dtype}>({self._address(self._argument(i))})"
            case Constant():
                return literal(value.number)
            case Apply():
                return applied(value.op, [f"v{a}" for a in value.args], self.suffix)
            case Round():
                return f"(real)dtype_{value.dtype}::decode(dtype_{value.dtype}::encode(v{value.arg}))"
            case Gather():
                t, at = self._argument(value.source), f"v{value.index}"
                step = f"{t.variable}_step" if t.name in self.form.strided else str(BYTES[t.dtype])
                found = f"({self._type(i)})read<dtype_{t.dtype}>({self._address(t)} + {at} * {step})"
                return f"{at} >= 0 && {at} < columns ? {found} : ({self._type(i)})0"
            case Uniform():
                return f"(real)uniform((bits)(row * columns + j + k), (bits)v{value.seed})"
        raise CodegenError(f"{value} is no expression")

    def _reduce(self, i: int) -> Reduce:
        value = self.region.values[i]
        assert isinstance(value, Reduce)
        return value

    def _join(self, i: int) -> str:
        return _JOINS[self._reduce(i).op]

    def _reduced(self, i: int, partial: str) -> str:
        slots = f"slots[turn][{self.slots[i]}]" if self.form.team > 32 else "(real*)0"
        return f"reduce<{self._join(i)}, TEAM>({partial}, {slots})"

    def _type(self, i: int) -> str:
        return {"float": "real", "int": "long long", "bool": "bool"}[self.facts[i].kind]

    def _let(self, i: int, text: str) -> None:
        self._line(f"const {self._type(i)} v{i} = {text};")

    def _line(self, text: str) -> None:
        self.lines.append("  " * self.depth + text)

    @contextmanager
    def _block(self, opening: str) -> Iterator[None]:
        self._line(f"{opening} {{".lstrip())
        self.depth += 1
        yield
        self.depth -= 1
        self._line("}")


def _reductions(stage: Stage) -> tuple[int, ...]:
    return (stage.online.peak, stage.online.total) if stage.online else stage.reductions
