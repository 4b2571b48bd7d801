"""Kernels compiled for three architectures without a GPU, and the rules that their machine code keeps."""

from dataclasses import replace

import pytest

from graphopt.codegen import nvrtc, regions
from graphopt.codegen.builder import Builder
from graphopt.codegen.cuda_form import BLOCK, Form, Traits, contiguous_grid, form_of
from graphopt.codegen.cuda_lint import Facts, faults, inspect
from graphopt.codegen.cuda_source import Source, write
from graphopt.codegen.nvrtc import ARCHITECTURES, Compiled, compile_text
from graphopt.codegen.region import Dtype, Region
from graphopt.errors import CodegenError
from graphopt.kernels_command import kernels

needs_nvrtc = pytest.mark.skipif(not nvrtc.available(), reason="no NVRTC: pip install nvidia-cuda-nvrtc")
HELD = Form(pack=8, team=128, held=4)
LOOPED = Form(pack=8, team=512)
SPREAD = Form(pack=8, team=BLOCK, held=1)
FLAT = Form(pack=8, flat=True)
CASES = {
    "rms_norm": (regions.rms_norm("bfloat16", True), HELD),
    "rms_norm, rows of 65536": (regions.rms_norm("bfloat16", True), LOOPED),
    "rms_norm backward": (regions.rms_norm_backward("float16", True), HELD),
    "rms_norm backward, long": (regions.rms_norm_backward("float16", True), LOOPED),
    "layer_norm": (regions.layer_norm("float32"), replace(HELD, pack=4)),
    "softmax": (regions.softmax("bfloat16"), replace(HELD, team=32, teams=8)),
    "cross_entropy": (
        regions.cross_entropy("bfloat16", True),
        replace(HELD, team=1024, lean=True, pointers=("factor",)),
    ),
    "cross_entropy, long": (regions.cross_entropy("float32", True), replace(LOOPED, pack=4)),
    "swiglu": (regions.swiglu("bfloat16"), FLAT),
    "bias_gelu_residual": (regions.bias_gelu_residual("bfloat16", "tanh"), SPREAD),
    "bias_gelu_residual backward": (regions.bias_gelu_residual_backward("bfloat16", "none"), SPREAD),
    "rotary": (regions.rotary("bfloat16"), Form(row_dims=2, pack=8, team=8, teams=32, held=1)),
    "dropout": (regions.dropout("bfloat16"), SPREAD),
    "adamw": (regions.adamw("bfloat16"), FLAT),
    "adamw in float64": (regions.adamw("float64"), replace(FLAT, pack=2)),
}


def linted(region: Region, form: Form, architecture: str) -> list[str]:
    source = write(region, form)
    return faults(region, source, inspect(compile_text(source.text, architecture)))


@needs_nvrtc
@pytest.mark.parametrize("name", CASES)
def test_kernels_keep_the_rules(name: str) -> None:
    region, form = CASES[name]
    assert linted(region, form, "sm_90") == []


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architectures(architecture: str) -> None:
    region, form = CASES["rms_norm"]
    source = write(region, form)
    compiled = compile_text(source.text, architecture)
    assert f".target {architecture}" in compiled.ptx and compiled.cubin[:4] == b"\x7fELF"
    facts = inspect(compiled)
    assert (facts.wide_loads, facts.narrow_loads) == (12, 0)  # x, residual, weight: 4 packs of each
    assert (facts.wide_stores, facts.narrow_stores) == (8, 0)
    assert faults(region, source, facts) == []


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CASES)
def test_all_on_all(name: str, architecture: str) -> None:
    assert linted(*CASES[name], architecture) == []


@needs_nvrtc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", kernels())
def test_forms_of_usual_sizes(name: str, architecture: str) -> None:
    """Rows from 64 to 131,072 columns: what is chosen for them keeps the rules."""
    dtypes: list[Dtype] = ["bfloat16", "float32"]
    for dtype in dtypes:
        traits = Traits(kernels()[name](dtype))
        for columns in (64, 256, 1024, 4096, 8192, 16384, 32768, 65536, 131072):
            grid = contiguous_grid(traits, (4096, columns))
            form = form_of(traits, grid, [0] * len(traits.tensors))
            assert linted(traits.region, form, architecture) == [], (dtype, columns)


@needs_nvrtc
def test_faults_of_real_kernels() -> None:
    softmax = regions.softmax("bfloat16")
    (spills,) = linted(softmax, Form(pack=8, team=1024, held=24), "sm_90")[:1]
    assert "spilled" in spills
    source = write(softmax, HELD)
    narrow = replace(source, text=write(softmax, replace(HELD, pack=2)).text)
    found = faults(softmax, narrow, inspect(compile_text(narrow.text, "sm_90")))
    assert any("stores below 16 bytes" in fault for fault in found)
    b = Builder()
    x = b.input("x", "float32")
    double = write(b.region(b.output("out", x * 2.0, "float32")), FLAT)
    text = double.text.replace("const real v2 = v0 * v1", "const real v2 = (double)v0 * 1.1")
    assert text != double.text
    facts = inspect(compile_text(text, "sm_90"))
    (fault,) = faults(b.region(b.output("out", x * 2.0, "float32")), double, facts)
    assert "mul.f64" in fault or "mul.rn.f64" in fault


@needs_nvrtc
def test_messages() -> None:
    with pytest.raises(CodegenError, match=r"kernel\.cu.*error"):
        compile_text("this is no kernel")
    with pytest.raises(CodegenError, match="sm_1"):
        compile_text("", "sm_1")
    with pytest.raises(CodegenError, match="is no architecture"):
        compile_text("", "90")


PTX = """
  ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%rd1];
  ld.global.nc.u16 %rs1, [%rd1];
  ld.global.f64 %fd1, [%rd2];
  cvt.rn.f32.f64 %f1, %fd1;
  @%p1 fma.rn.f64 %fd2, %fd1, %fd1, %fd1;
  st.global.wb.v2.f64 [%rd1], {%fd1, %fd2};
"""
LOG = (
    "8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\nUsed 40 registers, used 1 barriers"
)


def test_inspection_and_rules() -> None:
    facts = inspect(Compiled("sm_90", PTX, b"", LOG))
    assert facts == Facts(40, 8, 16, 1, 2, 1, 0, ("cvt.rn.f32.f64", "fma.rn.f64"))
    source = Source("", "", HELD)
    region = regions.softmax("bfloat16")
    found = faults(region, source, replace(facts, registers=129))
    assert [fault.split(":")[0] for fault in found] == [
        "129 registers",
        "16 bytes of registers are spilled",
        "8 bytes of local memory",
        "float64 in a float32 kernel",
        "2 loads below 16 bytes",
    ]
