"""What is wrong with the machine code of a generated kernel, as far as that shows without a GPU.

Registers, spills and stack frame come from the assembler's report in the log of NVRTC; accesses and
float64 instructions are counted in the PTX, which is before the assembler's own optimisation.
"""

import re
from dataclasses import dataclass

from graphopt.codegen.cuda_form import ACCESS_BYTES, BYTES, Traits
from graphopt.codegen.cuda_source import Source
from graphopt.codegen.nvrtc import Compiled
from graphopt.codegen.region import Gather, Region

# Registers of a thread, by the threads of its block: a multiprocessor has 65,536. Two blocks fit side
# by side, or one of 1024.
MAX_REGISTERS = {256: 128, 512: 64, 1024: 64}
_ACCESS = re.compile(r"\b(ld|st)\.global[.\w]*?(?:\.v(\d))?\.[usbf](\d+)\b")
_FLOAT64 = re.compile(r"^\s*(?:@\S+\s+)?([a-z]\w*(?:\.\w+)*\.f64(?:\.\w+)*)", re.MULTILINE)
# Large arguments of sin, cos and pow are reduced with a table in local memory, by NVIDIA's own code.
_TABLES = {"sin", "cos", "pow"}


@dataclass(frozen=True)
class Facts:
    """Registers of a thread; bytes of its stack, and spilled; accesses of 16 bytes and below; float64."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    wide_loads: int
    narrow_loads: int
    wide_stores: int
    narrow_stores: int
    float64: tuple[str, ...]


def inspect(compiled: Compiled) -> Facts:
    """Read the log and the PTX of a kernel."""
    counts = {("ld", True): 0, ("ld", False): 0, ("st", True): 0, ("st", False): 0}
    for verb, lanes, width in _ACCESS.findall(compiled.ptx):
        counts[verb, int(lanes or 1) * int(width) == 8 * ACCESS_BYTES] += 1
    instructions = _FLOAT64.findall(compiled.ptx)
    return Facts(
        _number(r"Used (\d+) registers", compiled.log),
        _number(r"(\d+) bytes stack frame", compiled.log),
        _number(r"(\d+) bytes spill stores", compiled.log)
        + _number(r"(\d+) bytes spill loads", compiled.log),
        counts["ld", True],
        counts["ld", False],
        counts["st", True],
        counts["st", False],
        tuple(sorted({i for i in instructions if not i.startswith(("ld.", "st.", "mov."))})),
    )


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    return int(found.group(1)) if found else 0


def faults(region: Region, source: Source, facts: Facts) -> list[str]:
    """What breaks a rule, one line each; none for a kernel as it should be."""
    form = source.form
    found: list[str] = []
    threads = form.team * form.teams
    most = MAX_REGISTERS[max(256, threads)]
    if not 0 < facts.registers <= most:
        found.append(f"{facts.registers} registers: at most {most} in blocks of {threads} threads")
    if facts.spill_bytes:
        found.append(f"{facts.spill_bytes} bytes of registers are spilled")
    operators = {getattr(value, "op", "") for value in region.values}
    if facts.stack_bytes and not operators & _TABLES:
        found.append(f"{facts.stack_bytes} bytes of local memory")
    return found + ptx_faults(region, source, facts)


def ptx_faults(region: Region, source: Source, facts: Facts) -> list[str]:
    """What of that shows in the PTX alone.

    Accesses are judged only where the form allows wide ones: without strided tensors, cut packs and packs
    of one.
    """
    form = source.form
    found: list[str] = []
    if facts.float64 and not _may_use_float64(region, source):
        found.append(f"float64 in a float32 kernel: {', '.join(facts.float64)}")
    if form.pack > 1 and not (form.tail or form.strided):
        found += _narrow(region, source, facts)
    return found


def _may_use_float64(region: Region, source: Source) -> bool:
    """Whether the region asks for it: by its computation, or by what it loads and stores."""
    stored = [t.dtype for t in Traits(region).tensors]
    stored += [v.dtype for v in region.inputs if v.name in source.form.pointers]
    return region.math == "float64" or "float64" in stored


def _narrow(region: Region, source: Source, facts: Facts) -> list[str]:
    """Accesses below 16 bytes beyond those of numbers of one row, which may stand twice in the text."""
    traits, pack = Traits(region), source.form.pack
    slim = [t for t in traits.tensors if not t.extent.by_column or BYTES[t.dtype] * pack < ACCESS_BYTES]
    times = 2 * max(source.form.held, 1)
    gathers = sum(isinstance(value, Gather) for value in region.values)
    loads = times * (sum(not t.written for t in slim) + gathers + len(source.form.pointers))
    stores = times * sum(t.written for t in slim)
    rules = (("loads", facts.narrow_loads, loads), ("stores", facts.narrow_stores, stores))
    return [f"{n} {what} below 16 bytes" for what, n, allowed in rules if n > allowed]
