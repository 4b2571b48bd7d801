"""`graphopt kernels`: a generated kernel's text, what it moves, its machine code, its best launch."""

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from graphopt.codegen.cuda_form import Traits
    from graphopt.codegen.cuda_lint import Facts
    from graphopt.codegen.cuda_source import Source
    from graphopt.codegen.region import Region

BACKENDS = ("cuda", "numba-cuda", "numba")
DTYPES = ("float32", "bfloat16", "float16", "float64")


def kernels() -> "dict[str, Callable[[Any], Region]]":
    """The named kernels: from a dtype to the region."""
    from graphopt.codegen import regions

    return {
        "rms_norm": lambda dtype: regions.rms_norm(dtype, True),
        "rms_norm_backward": lambda dtype: regions.rms_norm_backward(dtype, True),
        "layer_norm": regions.layer_norm,
        "layer_norm_backward": regions.layer_norm_backward,
        "softmax": regions.softmax,
        "cross_entropy": lambda dtype: regions.cross_entropy(dtype, True),
        "swiglu": regions.swiglu,
        "bias_gelu_residual": lambda dtype: regions.bias_gelu_residual(dtype, "tanh"),
        "rotary": regions.rotary,
        "adamw": regions.adamw,
    }


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt kernels`."""
    add = command.add_argument
    add("name", metavar="NAME", help="a kernel: rms_norm, softmax, cross_entropy, ..")
    add("--backend", choices=BACKENDS, default="cuda", help="whose text (default cuda)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="of tensors (default bfloat16)")
    add("--shape", default="4096x4096", metavar="ROWSxCOLUMNS", help="default 4096x4096")
    add("--device", default="h100", help="whose memory is counted with (default h100)")
    add("--arch", default="sm_90", metavar="sm_N", help="what --lint compiles for (default sm_90)")
    add("--lint", action="store_true", help="compile with NVRTC or NVVM, and judge the machine code")
    add("--tune", action="store_true", help="measure launches here, and keep the best for later ones")
    add("--threads", type=int, metavar="N", help="of the CPU, for --tune (default: all that torch has)")
    add("--quiet", action="store_true", help="without the text")
    add("--json", metavar="FILE", help="write text and facts as JSON too; - prints only JSON")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry the command out."""
    from graphopt.codegen.cuda_form import Traits
    from graphopt.terminal import print_table, write_text

    known = kernels()
    if options.name not in known:
        raise GraphoptError(f"no kernel is named {options.name}: there are {', '.join(known)}")
    if options.lint and options.backend == "numba":
        raise GraphoptError("--lint is for the CUDA backends")
    traits, shape = Traits(known[options.name](options.dtype)), _shape(options.shape)
    if options.tune:
        _tune(traits.region, shape, options)
        return
    rows = _costs(traits, shape, options.device)
    if options.backend == "numba":
        from graphopt.codegen.numba_cpu import compile_region

        text = compile_region(traits.region, None).source()
    else:
        source = _source(traits, shape, options.backend)
        text, form = source.text, source.form
        held = f"{form.held} packs of a thread in registers" if form.held else "in a loop"
        rows.append(("form", f"{form.team} threads for a row, {form.pack} columns in a pack, {held}"))
        if options.lint:
            lint = _lint if options.backend == "cuda" else _lint_ptx
            rows += lint(traits.region, source, options.arch)
    if options.json:
        facts = {"kernel": options.name, "dtype": options.dtype, "shape": shape, "facts": dict(rows)}
        write_text(options.json, json.dumps({**facts, "text": text}, indent=1))
    if options.json == "-":
        return
    if not options.quiet:
        print(text)
    print_table(f"{options.name}, {options.dtype}, {options.shape}", ("", ""), rows)


def _shape(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) < 2 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise GraphoptError(f"--shape {text}: rows and columns are written as in 4096x1024")
    return tuple(int(part) for part in parts)


def _costs(traits: "Traits", shape: tuple[int, ...], name: str) -> list[tuple[str, str]]:
    """What the kernel moves, and how long that takes at the rate of a device's memory."""
    from graphopt.codegen.cuda_form import moved_bytes
    from graphopt.cost_models.devices import format_bytes, get_device

    device, nbytes = get_device(name), moved_bytes(traits, shape)
    seconds = nbytes / device.bytes_per_s
    return [
        ("bytes", f"{format_bytes(nbytes)}, each tensor once"),
        ("time", f"{seconds * 1e6:.1f} us at {device.bytes_per_s / 1e9:.4g} GB/s of {device.name}"),
    ]


def _tune(region: "Region", shape: tuple[int, ...], options: argparse.Namespace) -> None:
    """Measure launches on made-up inputs, and say what was chosen."""
    import torch

    from graphopt.codegen.cuda_launch import cuda_kernel
    from graphopt.codegen.numba_cpu import compile_region
    from graphopt.terminal import print_table, write_text

    on_gpu = options.backend == "cuda"
    if options.backend == "numba-cuda":
        raise GraphoptError("--tune measures --backend cuda or numba: numba-cuda has one way to launch")
    if on_gpu and not torch.cuda.is_available():
        raise GraphoptError(
            "--tune measures on a GPU, and none is here: --backend numba measures this CPU"
        )
    if options.threads is not None and options.threads < 1:
        raise GraphoptError(f"--threads {options.threads}: at least 1")
    kernel = (cuda_kernel if on_gpu else compile_region)(region)
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads or before)
    try:
        found = kernel.tune(*_inputs(region, shape, "cuda" if on_gpu else "cpu"))
    finally:
        torch.set_num_threads(before)
    if options.json:
        named = {"kernel": options.name, "dtype": options.dtype, "shape": shape}
        write_text(options.json, json.dumps({**named, **found.to_data()}, indent=1))
    if options.json != "-":
        rows = found.rows()
        print_table(f"{options.name}, {options.dtype}, {options.shape}", rows[0], rows[1:])
        print(f"{found}\non {found.device}")


def _inputs(region: "Region", shape: tuple[int, ...], device: str) -> list[Any]:
    """Made-up inputs of a region on a grid."""
    import torch

    from graphopt.codegen.layout import output_shape
    from graphopt.codegen.region import Extent
    from graphopt.cost_models.calls import TensorSpec, make

    found: list[Any] = []
    for value in region.inputs:
        if value.extent is Extent.SCALAR:
            found.append(0.5 if "float" in value.dtype else 1)
            continue
        own = output_shape(value.extent, shape)
        strides = torch.empty(own, device="meta").stride()
        found.append(make(TensorSpec(getattr(torch, value.dtype), own, strides, torch.device(device))))
    return found


def _source(traits: "Traits", shape: tuple[int, ...], backend: str) -> "Source":
    from graphopt.codegen import cuda_source, numba_cuda, numba_cuda_source
    from graphopt.codegen.cuda_form import contiguous_grid, form_of

    grid, addresses = contiguous_grid(traits, shape), [0] * len(traits.tensors)
    if backend == "cuda":
        return cuda_source.write(traits.region, form_of(traits, grid, addresses))
    return numba_cuda_source.write(traits.region, numba_cuda.numba_cuda_form(traits, grid, addresses))


def _lint(region: "Region", source: "Source", architecture: str) -> list[tuple[str, str]]:
    """Facts of the machine code; GraphoptError names what is wrong with it."""
    from graphopt.codegen.cuda_lint import faults, inspect
    from graphopt.codegen.nvrtc import compile_text

    compiled = compile_text(source.text, architecture)
    facts = inspect(compiled)
    _refuse(faults(region, source, facts), architecture)
    code = f"{facts.registers} registers, no spills, {len(compiled.cubin)} bytes of code"
    return [(architecture, code), *_accesses(facts)]


def _lint_ptx(region: "Region", source: "Source", architecture: str) -> list[tuple[str, str]]:
    """Facts of the PTX that numba-cuda makes; GraphoptError names what is wrong with it."""
    from graphopt.codegen.cuda_lint import inspect, ptx_faults
    from graphopt.codegen.numba_cuda import compile_ptx

    compiled = compile_ptx(source, architecture)
    facts = inspect(compiled)
    _refuse(ptx_faults(region, source, facts), architecture)
    code = f"PTX of {len(compiled.ptx.splitlines())} lines; the driver gives out registers"
    return [(architecture, code), *_accesses(facts)]


def _refuse(wrong: list[str], architecture: str) -> None:
    if wrong:
        raise GraphoptError(f"the kernel for {architecture} breaks rules: {'; '.join(wrong)}")


def _accesses(facts: "Facts") -> list[tuple[str, str]]:
    return [
        ("loads", f"{facts.wide_loads} of 16 bytes, {facts.narrow_loads} below, in the text"),
        ("stores", f"{facts.wide_stores} of 16 bytes, {facts.narrow_stores} below"),
    ]
