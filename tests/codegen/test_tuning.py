"""Tuned launches: every choice is right, noise changes nothing, and what is kept is found again."""

import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_regions import assert_no_worse, drawn_region

from graphopt.codegen import device_text, kernel_cache, numba_bench, numba_cpu, regions, tuning
from graphopt.codegen.layout import Grid
from graphopt.codegen.numba_choice import (
    STREAM_ALL,
    NumbaChoice,
    candidates,
    default_choice,
    fits,
    passes_of,
)
from graphopt.codegen.numba_cpu import NumbaKernel
from graphopt.codegen.region import Region
from graphopt.codegen.stages import RECOMPUTE_ALL, may_overwrite, stages
from graphopt.codegen.tuned_choices import TunedChoices, layout_class
from graphopt.codegen.tuning import Tuned, search, trial
from graphopt.errors import CodegenError

SOFTMAX = regions.softmax("float32")


class Forced(NumbaKernel):
    """A kernel that is launched as it is told."""

    def __init__(self, region: Region, choice: NumbaChoice) -> None:
        super().__init__(region, None)
        self.forced = choice

    def _tuned(self, grid: Grid) -> NumbaChoice:
        return self.forced


def drawn_choice(data: st.DataObject) -> NumbaChoice:
    return NumbaChoice(
        128,  # so that short rows have several blocks, too
        data.draw(st.sampled_from([64, 128])),
        data.draw(st.sampled_from([0, STREAM_ALL])),
        data.draw(st.sampled_from([0, 1])),
        data.draw(st.sampled_from([0, 5, 12, RECOMPUTE_ALL])),
        data.draw(st.booleans()),
    )


# --- every choice that fits is right -----------------------------------------------------------


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])  # each compiles a kernel
@given(st.data())
def test_drawn_choices(data: st.DataObject) -> None:
    region, inputs = drawn_region(data, [130, 200])
    choice = drawn_choice(data)
    if not fits(region, choice):
        choice = replace(choice, recompute_cost=0)
    assert fits(region, choice)  # what keeps more allows all that the default allows
    usual = NumbaKernel(region, None)(*inputs)  # which other tests hold against float64
    for found, expected in zip(Forced(region, choice)(*inputs), usual, strict=True):
        eps = torch.finfo(expected.dtype).eps
        torch.testing.assert_close(found, expected, rtol=32 * eps, atol=32 * eps, equal_nan=True)


@pytest.mark.parametrize("name", ["softmax", "cross_entropy"])
@pytest.mark.parametrize("online", [True, False])
def test_one_pass_and_two(name: str, online: bool) -> None:
    """Rows of usual numbers, of -inf, with a NaN and with +inf, in blocks and streamed."""
    region = regions.softmax("float32") if name == "softmax" else regions.cross_entropy("float32", True)
    x = torch.randn(6, 320)
    x[1], x[2, 7], x[3, 200] = -float("inf"), float("nan"), float("inf")
    more = () if name == "softmax" else (torch.tensor([0, 5, 319, -100, 64, 3]), -100, 0.25)
    choice = NumbaChoice(block=128, tile=64, stream_cost=STREAM_ALL, online=online)
    assert any(stage.online for stage in passes_of(region, choice)) == online
    assert_no_worse(region, (x, *more), Forced(region, choice)(x, *more))


@pytest.mark.parametrize("cost", [0, RECOMPUTE_ALL])
def test_outputs_over_inputs(cost: int) -> None:
    region = regions.rms_norm("float32", True)
    choice = NumbaChoice(block=64, tile=64, recompute_cost=cost)
    assert fits(region, choice) and passes_of(region, NumbaChoice(recompute_cost=0)) != stages(region)
    x, residual, w = torch.randn(3, 150), torch.randn(3, 150), torch.randn(150)
    expected = NumbaKernel(region, None)(x, residual, 1e-6, w)
    total, out = x.clone(), torch.empty(3, 150)
    Forced(region, choice)(total, residual, 1e-6, w, out=(out, total))
    torch.testing.assert_close((out, total), expected)


def test_a_choice_that_takes_back_what_may_be_written_over() -> None:
    """Computed again, an input is read after an output was stored: it may not lie there any more."""
    found = []
    for name in ("rms_norm_backward", "layer_norm_backward", "softmax_backward"):
        region = getattr(regions, name)("float32", *([True] if name == "rms_norm_backward" else []))
        pairs = [(n, k) for n in range(len(region.inputs)) for k in range(len(region.outputs))]
        for cost in (0, RECOMPUTE_ALL):
            choice = NumbaChoice(recompute_cost=cost)
            passes = passes_of(region, choice)
            lost = [
                p for p in pairs if may_overwrite(region, *p) and not may_overwrite(region, *p, passes)
            ]
            assert fits(region, choice) == (not lost)
            found.append(bool(lost))
    for block, tile in ((100, 100), (1 << 20, 512), (512, 1024), (1024, 384), (64, 32)):
        assert not fits(SOFTMAX, NumbaChoice(block, tile)), (block, tile)
    assert not found[0]


def test_two_threads() -> None:
    torch.set_num_threads(2)
    try:
        for threads in (0, 1):
            x, kernel = torch.randn(64, 40), Forced(SOFTMAX, NumbaChoice(threads=threads))
            torch.testing.assert_close(kernel(x)[0], x.softmax(-1))
            assert kernel._threads(threads) == (1 if threads else 2)
    finally:
        torch.set_num_threads(1)


def test_candidates_are_near_the_default() -> None:
    """Each changes one field, and nothing that a layout does not have is offered."""
    large = 64 << 20

    def changed(grid: Grid, nbytes: int, may_stream: bool, threads: int) -> set[str]:
        default = default_choice(SOFTMAX, nbytes)
        found = candidates(SOFTMAX, grid, nbytes, may_stream, threads)
        words = [choice.beside(default).split() for choice in found]
        assert all(len(fields) == 1 for fields in words)
        return {fields[0] for fields in words}

    wide, short = Grid((500,), 3000, ((3000, 1),) * 2), Grid((500,), 48, ((48, 1),) * 2)
    kept = {"online=True", f"recompute_cost={RECOMPUTE_ALL}"}
    blocks = {"block=512", "block=1024", "block=4096"}
    tiles = {"tile=256", "tile=1024", "tile=2048"}
    assert changed(wide, 12_000_000, False, 1) == kept | blocks
    assert changed(wide, large, True, 1) == kept | blocks | {"stream_cost=0", *tiles}
    assert changed(wide, 12_000_000, True, 1) == kept | blocks | {"stream_cost=30"}
    assert changed(short, 192_000, True, 2) == kept | {"threads=0"}
    assert changed(short, 1 << 20, False, 8) == kept | {"threads=1", "threads=4"}


# --- the rule, on made-up times ----------------------------------------------------------------


class MadeUp:
    """A bench whose times come from a function of the choice and the number of the sample."""

    layout, device = "a layout", "a device"

    def __init__(
        self, seconds: Callable[[NumbaChoice, int], float], offered: Sequence[NumbaChoice]
    ) -> None:
        self.default, self.candidates = NumbaChoice(), offered
        self.choices = TunedChoices(regions.softmax("float32"), NumbaChoice, (), "", None)
        self.made, self.samples, self.used = seconds, 0, []

    def fits(self, choice: NumbaChoice) -> bool:
        return choice.recompute_cost != RECOMPUTE_ALL

    def seconds(self, choice: NumbaChoice, count: int) -> float:
        self.samples += 1
        return self.made(choice, self.samples)

    def use(self, choice: NumbaChoice) -> None:
        self.used.append(choice)


OFFERED = [NumbaChoice(block=512), NumbaChoice(stream_cost=20), NumbaChoice(online=False)]


def noisy(seed: int, factors: dict[str, float], deviation: float) -> Callable[[NumbaChoice, int], float]:
    """A machine whose speed wanders by half, and times that scatter around what is true."""
    draw = random.Random(seed)

    def seconds(choice: NumbaChoice, sample: int) -> float:
        true = 1e-3
        for word in choice.beside(NumbaChoice()).split():
            true *= factors.get(word, 1.0)
        slow = 1.5 if sample // 40 % 2 else 1.0
        return true * slow * max(draw.gauss(1, deviation), 0.1)

    return seconds


def test_noise_does_not_change_the_default() -> None:
    """Of 300 measurements of equal launches, whose times scatter by a tenth, hardly any finds another."""
    wrong = sum(
        search(MadeUp(noisy(seed, {}, 0.1), OFFERED), 11).chosen != NumbaChoice() for seed in range(300)
    )
    assert wrong <= 3


def test_a_gain_is_found() -> None:
    found = [search(MadeUp(noisy(s, {"block=512": 0.85}, 0.05), OFFERED), 11) for s in range(50)]
    assert sum(t.chosen == NumbaChoice(block=512) for t in found) >= 48
    assert all(0.75 < t.ratio < 0.95 for t in found if t.chosen != NumbaChoice())


def test_gains_are_put_together() -> None:
    factors = {"block=512": 0.8, "stream_cost=20": 0.9, "online=False": 1.3}
    found = search(MadeUp(noisy(0, factors, 0.01), OFFERED), 11)
    assert found.chosen == NumbaChoice(block=512, stream_cost=20)
    assert found.chosen.beside(found.default) == "block=512 stream_cost=20"
    assert abs(found.ratio - 0.72) < 0.03 and "again, chosen" in found.table()
    assert found.seconds[1] < found.seconds[0]


def test_what_cannot_be_put_together_is_left_apart() -> None:
    offered = [NumbaChoice(block=512), NumbaChoice(recompute_cost=RECOMPUTE_ALL)]
    factors = {"block=512": 0.8, f"recompute_cost={RECOMPUTE_ALL}": 0.9}
    assert search(MadeUp(noisy(0, factors, 0.01), offered), 11).chosen == offered[0]


def test_a_gain_that_is_not_seen_twice() -> None:
    def lucky(choice: NumbaChoice, sample: int) -> float:
        return 0.5 if choice.block == 512 and sample < 60 else 1.0

    found = search(MadeUp(lucky, OFFERED[:1]), 11)
    assert found.finals and found.chosen == NumbaChoice() and found.ratio == 1.0


def test_the_rule_at_its_bounds() -> None:
    choice, default = NumbaChoice(block=512), [1.0] * 8
    assert trial(choice, [0.969] * 8, default).better
    assert not trial(choice, [0.971] * 8, default).better
    assert not trial(choice, [0.5] * 5 + [1.1] * 3, default).better  # not three quarters of them
    assert trial(choice, [0.5] * 7 + [1.1], default).better


def test_a_candidate_without_code_is_left_out() -> None:
    def broken(choice: NumbaChoice, sample: int) -> float:
        if choice.stream_cost:
            raise CodegenError("no code")
        return 1.0

    assert [t.choice for t in search(MadeUp(broken, OFFERED), 3).trials] == [NumbaChoice(), *OFFERED[::2]]


# --- what is kept ------------------------------------------------------------------------------

X = torch.randn(64, 3000)
DEFAULT = default_choice(SOFTMAX, 2 * X.nbytes)


def by_block(bench: Any, choice: NumbaChoice, count: int) -> float:
    """The smaller the block, the shorter: nothing is compiled for it."""
    return choice.block / 1e6


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_bench.NumbaBench, "seconds", by_block)


def blocks(folder: Path | None, rows: int = 64) -> list[int]:
    """Those of a kernel that knows nothing but what is in the folder."""
    kernel, x = NumbaKernel(SOFTMAX, folder), torch.randn(rows, 3000)
    torch.testing.assert_close(kernel(x)[0], x.softmax(-1))
    return [form.block for form in kernel._compiled]


FOUND_AGAIN = """
import sys
from pathlib import Path
import torch
from graphopt.codegen import regions
from graphopt.codegen.numba_cpu import NumbaKernel
torch.set_num_threads(1)
for rows in (100, 50):
    kernel, x = NumbaKernel(regions.softmax("float32"), Path(sys.argv[1])), torch.randn(rows, 3000)
    assert torch.allclose(kernel(x)[0], x.softmax(-1), atol=1e-6)
    print([form.block for form in kernel._compiled])
"""


def test_a_later_process_finds_the_choice(tmp_path: Path, made_up: None) -> None:
    kernel = NumbaKernel(SOFTMAX, tmp_path)
    kernel(X)
    found = kernel.tune(X, rounds=3)
    assert found.chosen == replace(DEFAULT, block=512) and found.device == device_text.cpu_text()
    kernel(X)
    assert [form.block for form in kernel._compiled][-1] == 512  # launches are planned anew
    assert kernel.tune(X, again=False) == NumbaKernel(SOFTMAX, tmp_path).tune(X, again=False) == found
    code = [sys.executable, "-c", FOUND_AGAIN, str(tmp_path)]
    told = subprocess.run(code, capture_output=True, text=True)
    assert told.stdout == "[512]\n[2048]\n", told.stderr  # of 64 to 127 rows, and of fewer


def test_another_device_or_source_does_not(
    tmp_path: Path, made_up: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    NumbaKernel(SOFTMAX, tmp_path).tune(X, rounds=3)
    assert blocks(tmp_path) == [512] and blocks(None) == [2048]
    with monkeypatch.context() as patch:
        patch.setattr(numba_cpu, "cpu_text", lambda: "another CPU")
        assert blocks(tmp_path) == [2048]
    with monkeypatch.context() as patch:
        patch.setattr(numba_cpu, "toolchain", lambda: "another compiler")
        assert blocks(tmp_path) == [2048]
    assert device_text.cpu_text().endswith(f", {torch.get_num_threads()} threads")


@pytest.mark.parametrize("damage", ["cut", "altered", "empty", "no JSON", "no choice", "not right"])
def test_a_damaged_entry_is_ignored(damage: str, tmp_path: Path, made_up: None) -> None:
    found = NumbaKernel(SOFTMAX, tmp_path).tune(X, rounds=3)
    (path,) = tmp_path.glob("*.tuned")
    whole = path.read_bytes()

    def signed(payload: bytes) -> bytes:
        return kernel_cache.hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload

    payload = whole.split(b"\n", 1)[1]
    broken = {
        "cut": whole[:-9],
        "altered": whole.replace(b"512", b"513", 1),
        "empty": b"",
        "no JSON": signed(b"{"),
        "no choice": signed(payload.replace(b'"block"', b'"blocks"')),
        "not right": signed(payload.replace(b'"block": 512', b'"block": 513')),
    }
    path.write_bytes(broken[damage])
    assert blocks(tmp_path) == [2048]
    assert NumbaKernel(SOFTMAX, tmp_path).tune(X, rounds=3).chosen == found.chosen  # and made anew
    assert path.read_bytes().split(b"\n", 1)[1] == payload


KEPT = """
import sys
from pathlib import Path
from graphopt.codegen import regions
from graphopt.codegen.numba_choice import NumbaChoice
from graphopt.codegen.tuned_choices import TunedChoices
for number in range(100):
    for block in (512, 1024):
        choices = TunedChoices(regions.softmax("float32"), NumbaChoice, (), "", Path(sys.argv[1]))
        found = choices.choice("a layout", "a device")
        assert found is None or found.block in (512, 1024)
        choices.keep("a layout", "a device", {"chosen": vars(NumbaChoice(block=block))})
"""


def test_processes_at_once(tmp_path: Path) -> None:
    every = [subprocess.Popen([sys.executable, "-c", KEPT, str(tmp_path)]) for _ in range(2)]
    assert [process.wait() for process in every] == [0, 0]
    assert len(list(tmp_path.iterdir())) == 1
    choices = TunedChoices(SOFTMAX, NumbaChoice, (), "", tmp_path)
    assert choices.choice("a layout", "a device") == NumbaChoice(block=1024)
    assert choices.choice("another layout", "a device") is None


def test_the_folder_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = NumbaKernel(SOFTMAX, tmp_path)
    kernel(X)
    monkeypatch.setattr(kernel_cache, "read", None)
    kernel(X), kernel(torch.randn(90, 3000))  # another of the same class


def test_the_bound_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "MAX_BYTES", 2000)
    choices = TunedChoices(SOFTMAX, NumbaChoice, (), "", tmp_path)
    for number in range(40):
        choices.keep(f"layout {number}", "a device", {"chosen": vars(NumbaChoice())})
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 2000


def test_a_folder_that_cannot_be_written(tmp_path: Path, made_up: None) -> None:
    (tmp_path / "file").write_text("")
    kernel = NumbaKernel(SOFTMAX, tmp_path / "file" / "kernels")
    assert kernel.tune(X, rounds=3).chosen.block == 512  # this process remembers
    kernel(X)
    assert 512 in [form.block for form in kernel._compiled]


def test_layouts() -> None:
    names = ("x", "table")
    plain = layout_class(Grid((64,), 48, ((48, 1), (0, 1))), names)
    assert plain == layout_class(Grid((127,), 48, ((48, 1), (0, 1))), names)
    others = [
        Grid((128,), 48, ((48, 1), (0, 1))),
        Grid((64,), 49, ((49, 1), (0, 1))),
        Grid((64,), 48, ((48, 2), (0, 1))),
        Grid((8, 8), 48, ((500, 48, 1), (0, 48, 1))),
        Grid((64,), 48, ((48, 1), (48, 1)), flat=True),
    ]
    assert len({plain, *(layout_class(grid, names) for grid in others)}) == 6


# --- on this machine ---------------------------------------------------------------------------


def test_a_measurement(tmp_path: Path) -> None:
    """Real times: whatever is chosen, it is right, and said."""
    x = torch.randn(20, 600)
    kernel, total = NumbaKernel(regions.rms_norm("float32", True), tmp_path), torch.empty(20, 600)
    out, w = torch.empty(20, 600), torch.ones(600)
    found = tuning.tune(kernel, x, x, 1e-6, w, out=(out, total), rounds=3)
    assert [t.choice.beside(found.default) for t in found.trials] == [
        "default",
        "block=512",
        "recompute_cost=0",
    ]
    assert all(t.seconds > 0 for t in (*found.trials, *found.finals))
    torch.testing.assert_close(total, 2 * x)
    assert_no_worse(kernel.region, (x, x, 1e-6, w), kernel(x, x, 1e-6, w))
    assert Tuned.from_data(found.to_data(), NumbaChoice) == found
    with pytest.raises(CodegenError, match="not a measurement"):
        Tuned.from_data({"layout": "", "device": "", "chosen": 1, "trials": 2}, NumbaChoice)
    with pytest.raises(CodegenError, match="block='1'"):
        NumbaChoice.from_data({**vars(NumbaChoice()), "block": "1"})
