"""Tuned launches of CUDA kernels: choices are right where emulated, and chosen on made-up times."""

import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_regions import assert_no_worse, drawn_region

from graphopt.codegen import cuda_emulation, regions
from graphopt.codegen.cuda_choice import CudaChoice, candidates, choice_of, fits, form_with
from graphopt.codegen.cuda_emulation import Emulator
from graphopt.codegen.cuda_form import Form, Size, Traits, contiguous_grid, form_of
from graphopt.codegen.cuda_launch import CudaKernel
from graphopt.codegen.cuda_runner import Runner, Start, Timer
from graphopt.codegen.cuda_source import Source
from graphopt.codegen.layout import Grid
from graphopt.codegen.region import Region
from graphopt.errors import CodegenError

needs_compiler = pytest.mark.skipif(cuda_emulation.compiler() is None, reason="no C++ compiler")
UNARY = ("neg", "abs", "tanh", "exp", "sqrt")


class Forced(CudaKernel):
    """A kernel whose launches change what `changed` says."""

    def __init__(self, region: Region, changed: Callable[[Traits, Grid, Form], CudaChoice]) -> None:
        super().__init__(region, Emulator(), None)
        self.changed = changed

    def _tuned(self, grid: Grid, usual: Form, runner: Runner) -> Form:
        choice = self.changed(self.traits, grid, usual)
        assert fits(self.traits, grid, usual, choice)
        return form_with(usual, grid, choice)


class MadeUp:
    """A device that runs nothing, and whose times follow from the form of what was launched last."""

    processors, device = 132, "a made-up GPU"

    def __init__(self, seconds: Callable[[Form], float]) -> None:
        self.made = seconds
        self.forms: list[Form] = []

    def prepare(self, source: Source, size: Size, fixed: Sequence[int | None]) -> Start:
        if source.form.team == 4 * 256:
            raise CodegenError("too many threads for it")
        return lambda given: self.forms.append(source.form)

    def seconds(self, run: Callable[[], None], count: int) -> float:
        run()
        return self.made(self.forms[-1])


# --- every choice that fits is right -----------------------------------------------------------


@needs_compiler
@settings(max_examples=5, phases=[Phase.explicit, Phase.generate])  # each is compiled
@given(st.data())
def test_drawn_choices(data: st.DataObject) -> None:
    region, inputs = drawn_region(data, [64, 130], UNARY)

    def changed(traits: Traits, grid: Grid, usual: Form) -> CudaChoice:
        return data.draw(st.sampled_from([choice_of(usual), *candidates(traits, grid, usual)]))

    assert_no_worse(region, inputs, Forced(region, changed)(*inputs))


@needs_compiler
@pytest.mark.parametrize(
    ("region", "held"),
    [(regions.softmax("float32"), 1), (regions.rms_norm_backward("float32", True), 0)],
    ids=["softmax", "rms_norm_backward"],
)
def test_held_and_in_a_loop(region: Region, held: int) -> None:
    """Rows in registers and in a loop, with sums over rows in registers and in memory."""
    x, w = torch.randn(5, 96), torch.randn(96)
    inputs = (x,) if held else (x, x.flip(0), torch.rand(5) + 0.5, w, x.flip(1))

    def changed(traits: Traits, grid: Grid, usual: Form) -> CudaChoice:
        return CudaChoice(usual.pack // 2, 64, 1, held, False)

    assert_no_worse(region, inputs, Forced(region, changed)(*inputs))


def grids() -> list[tuple[Region, Grid, Form]]:
    found = []
    for region in (regions.softmax("bfloat16"), regions.swiglu("float32"), regions.layer_norm("float32")):
        for shape in ((4096, 4096), (64, 50), (3, 100_000), (8, 7)):
            traits = Traits(region)
            grid = contiguous_grid(traits, shape)
            found.append((region, grid, form_of(traits, grid, [0] * len(traits.tensors))))
    region = regions.bias_gelu_residual("bfloat16", "tanh")
    grid = contiguous_grid(Traits(region), (1000, 1000))
    return [*found, (region, grid, form_of(Traits(region), grid, [0] * 4))]


@pytest.mark.parametrize(("region", "grid", "usual"), grids())
def test_candidates(region: Region, grid: Grid, usual: Form) -> None:
    """They hold their rows, in blocks that a GPU has; the default fits, and is none of them."""
    traits, default = Traits(region), choice_of(usual)
    found = candidates(traits, grid, usual)
    assert fits(traits, grid, usual, default) and form_with(usual, grid, default) == usual
    assert 0 < len(found) <= 16 and default not in found and len({*found}) == len(found)
    for choice in found:
        form = form_with(usual, grid, choice)
        assert 32 <= form.team * form.teams <= 1024 and form.pack <= usual.pack
        if form.held and traits.reduces:
            assert form.team * form.held * form.pack >= grid.columns
        assert form.tail == (
            (grid.columns if not grid.flat else grid.rows * grid.columns) % form.pack != 0
        )


def test_choices_that_do_not_fit() -> None:
    traits = Traits(regions.softmax("float32"))
    grid = contiguous_grid(traits, (64, 1024))
    usual = form_of(traits, grid, [0, 0])
    default = choice_of(usual)
    wrong: list[dict[str, Any]] = [
        {"pack": 8},  # 32 bytes, of which the alignment is not known
        {"pack": 3},
        {"team": 48},
        {"team": 2048},
        {"held": 1, "team": 32, "teams": 8},  # does not hold the row
        {"team": 256, "teams": 2},  # two rows would share the memory of their reductions
        {"lean": True, "held": 0},
        {"team": 8, "teams": 1, "held": 0},  # less than a warp
    ]
    for fields in wrong:
        assert not fits(traits, grid, usual, replace(default, **fields)), fields


# --- what is chosen, and kept ------------------------------------------------------------------


def test_a_choice_is_kept_for_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is run or timed here; the choice without code is left out."""
    monkeypatch.setattr(subprocess, "run", None)
    region, x = regions.softmax("float32"), torch.zeros(64, 4096)
    device = MadeUp(lambda form: 1e-6 * form.held if form.held else 9e-6)
    kernel = CudaKernel(region, device, tmp_path)
    found = kernel.tune(x, rounds=3)
    assert found.default == CudaChoice(4, 256, 1, 4, False)
    assert found.chosen == CudaChoice(4, 512, 1, 2, False) and found.ratio == 0.5
    assert isinstance(device, Timer) and found.device == device.device
    assert not any(t.choice.team == 1024 for t in found.trials)
    kernel(x)
    assert choice_of(device.forms[-1]) == found.chosen
    for name, expected in (("a made-up GPU", found.chosen), ("another GPU", found.default)):
        other = MadeUp(device.made)
        other.device = name
        CudaKernel(region, other, tmp_path)(torch.ones(100, 4096))  # of the same class
        assert choice_of(other.forms[-1]) == expected
    unaligned = MadeUp(device.made)
    CudaKernel(region, unaligned, tmp_path)(torch.ones(64 * 4096 + 2)[2:].view(64, 4096))
    assert choice_of(unaligned.forms[-1]).pack == 2  # of another class


def test_a_runner_without_a_clock(tmp_path: Path) -> None:
    class Launcher:
        processors = 132

        def prepare(self, source: Source, size: Size, fixed: Sequence[int | None]) -> Start:
            return lambda given: None

    with pytest.raises(CodegenError, match="launches of a Launcher cannot be timed"):
        CudaKernel(regions.softmax("float32"), Launcher(), tmp_path).tune(torch.zeros(4, 8))
    assert not list(tmp_path.iterdir())
