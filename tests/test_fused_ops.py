"""The fused operator: registered well, exact text, called over dead operands, other layouts copied."""

import pickle

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from random_regions import drawn_region

from graphopt.codegen import regions
from graphopt.codegen.region_text import from_data, to_data
from graphopt.errors import CodegenError
from graphopt.fused_ops import FUSED, Fused, FusedCall, Layout, Place, fused_of, overwritable

SIZES, STRIDES = (6, 8), (8, 1)
FULL = Layout("float32", SIZES, STRIDES)


def swiglu() -> Fused:
    reads = (Place(0, SIZES, STRIDES), Place(1, SIZES, STRIDES))
    return Fused(regions.swiglu("float32"), SIZES, (FULL, FULL), reads, (FULL,), reads[:1])


def softmax() -> Fused:
    place = Place(0, SIZES, STRIDES)
    return Fused(regions.softmax("float32"), SIZES, (FULL,), (place,), (FULL,), (place,))


@settings(max_examples=20, phases=[Phase.explicit, Phase.generate])
@given(st.data())
def test_text(data: st.DataObject) -> None:
    region, _ = drawn_region(data, [8])
    assert from_data(to_data(region)) == region


def test_the_text_of_a_kernel() -> None:
    assert fused_of(swiglu().to_text()) == swiglu()
    for wrong in ("", "{}", swiglu().to_text().replace("apply", "guess")):
        with pytest.raises(CodegenError, match="not a"):
            fused_of(wrong)


def test_the_operator_is_registered_well() -> None:
    gate, up = torch.randn(SIZES), torch.randn(SIZES)
    torch.library.opcheck(FUSED, ([gate, up], swiglu().to_text()))


@pytest.mark.parametrize("over", [None, (0, 0), (1, 0)])
def test_calls(over: tuple[int, int] | None) -> None:
    """The second call is the quick one; written over an operand where that is asked for."""
    call = FusedCall(swiglu(), over)
    for _ in range(3):
        inputs = torch.randn(SIZES), torch.randn(SIZES)
        expected = torch.nn.functional.silu(inputs[0]) * inputs[1]
        (found,) = call(*inputs)
        torch.testing.assert_close(found, expected)
        assert (over is not None) == any(found.data_ptr() == x.data_ptr() for x in inputs)
    assert call._ready[-1](inputs, ()) is not None
    again = pickle.loads(pickle.dumps(call))
    assert (again.fused, again.over, again._ready) == (call.fused, over, {})


def test_other_layouts_are_copied() -> None:
    call, x, y = FusedCall(swiglu()), torch.randn(8, 6).t(), torch.randn(6, 16)[:, ::2]
    for _ in range(2):
        torch.testing.assert_close(call(x, y)[0], torch.nn.functional.silu(x) * y)
    with pytest.raises(CodegenError, match=r"of \(6, 8\) was given \(5, 8\)"):
        call(x[:5], y[:5])


def test_what_may_be_written_over() -> None:
    """A row is read twice by a softmax before it is written, place for place; not in other places."""
    assert overwritable(swiglu()) == [(0, 0), (1, 0)]
    assert overwritable(softmax()) == [(0, 0)]
    turned = Place(0, SIZES, (1, 6))
    assert overwritable(Fused(*list(vars(softmax()).values())[:3], (turned,), (FULL,), (turned,))) == [
        (0, 0)
    ]
    moved = (Place(0, SIZES, STRIDES, 8),)
    assert not overwritable(Fused(*list(vars(softmax()).values())[:3], moved, (FULL,), softmax().writes))


def test_halves_may_be_exchanged_in_place() -> None:
    """Of rotary embeddings: each half is read at its place before it is written."""
    wide = Layout("float32", (6, 16), (16, 1))
    halves = (Place(0, SIZES, (16, 1)), Place(0, SIZES, (16, 1), 8))
    angles = (Place(1, SIZES, STRIDES), Place(2, SIZES, STRIDES))
    fused = Fused(
        regions.rotary("float32"), SIZES, (wide, FULL, FULL), (*halves, *angles), (wide,), halves
    )
    assert (0, 0) in overwritable(fused)
    x, angle = torch.randn(6, 16), torch.randn(SIZES)
    first, second = x.clone().chunk(2, -1)
    expected = torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1
    )
    (found,) = FusedCall(fused, (0, 0))(x, angle.cos(), angle.sin())
    torch.testing.assert_close(found, expected)
    assert found.data_ptr() == x.data_ptr()


def test_instructions() -> None:
    """A product of 48 numbers, one instruction each beside two loads; a sigmoid takes some 20."""
    assert swiglu().instructions == 48 * (2 + 2 + 20 + 1 + 1)
