"""What a region may say, what follows from it, and in which passes it is evaluated."""

import pytest

from graphopt.codegen import regions
from graphopt.codegen.builder import Builder
from graphopt.codegen.layout import grid_of, grid_shape
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
)
from graphopt.codegen.stages import Online, Stage, may_overwrite, stages
from graphopt.errors import CodegenError

X = Input("x", "float32")
ROW = Input("row", "int64", Extent.ROW)
COLUMN = Input("column", "float32", Extent.COLUMN)
SEED = Input("seed", "int64", Extent.SCALAR)


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ((X, Apply("sinh", (0,))), "no operator is named sinh"),
        ((X, Apply("add", (0,))), "add takes 2 operands"),
        ((X, Apply("add", (0, 2))), "not made of earlier ones"),
        ((ROW, Apply("exp", (0,))), "exp takes floats"),
        ((X, ROW, Apply("eq", (0, 1))), "two floats or two integers"),
        ((X, Apply("logical_not", (0,))), "logical_not takes bools"),
        ((X, Apply("where", (0, 0, 0))), "where takes a bool"),
        ((X, Apply("to_float", (0,))), "to_float takes an integer"),
        ((ROW, Round(0, "bfloat16")), "round takes a float"),
        ((ROW, Reduce("sum", 0)), "sum takes floats by column"),
        ((COLUMN, Reduce("sum", 0, "rows")), "sum takes a full float"),
        ((X, Reduce("max", 0, "rows")), "max takes a reduction over columns"),
        ((X, Reduce("sum", 0, "rows"), Apply("neg", (1,))), "needs a sum over all rows"),
        ((COLUMN, ROW, Gather(0, 1)), "gather takes an input"),
        ((X, SEED, Gather(0, 1)), "gather takes an integer for each row"),
        ((X, Uniform(0)), "uniform takes an integer scalar"),
    ],
)
def test_values_that_break_a_rule(values: tuple[object, ...], fault: str) -> None:
    with pytest.raises(CodegenError, match=fault):
        Region(values, (Output("out", 0, "float32"),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("output", "fault"),
    [
        (Output("x", 0, "float32"), "share a name"),
        (Output("out", 1, "float32"), "same for all rows"),
        (Output("out", 0, "int64"), "stores a float as int64"),
    ],
)
def test_outputs_that_break_a_rule(output: Output, fault: str) -> None:
    with pytest.raises(CodegenError, match=fault):
        Region((X, COLUMN), (output,))


def test_constants_differ_by_their_type_and_sign() -> None:
    assert len({Constant(1), Constant(1.0), Constant(True), Constant(0.0), Constant(-0.0)}) == 5
    assert Constant(float("nan")) == Constant(float("nan"))
    b = Builder()
    assert b.constant(2.0) == b.constant(2.0) != b.constant(2)


def test_stages_of_softmax() -> None:
    region = regions.softmax("float32")
    found = [stage.stage for stage in region.facts]
    assert found == [0, 1, 1, 1, 2, 2, 2]  # x, max, shifted, exp, sum, reciprocal, product
    first, second, third = stages(region)
    assert first.online == Online(peak=1, shifted=2, exponential=3, total=4)
    assert second == Stage() and third.outputs == (0,)
    assert first.kept == third.fetched == (3,)  # the exponential, but not the cheap difference


def test_what_is_no_online_softmax() -> None:
    b = Builder()
    x = b.input("x", "float32")
    e = b.apply("exp", (x - b.max(x)) * 0.5)
    found = stages(b.region(b.output("out", e / b.sum(e), "float32")))
    assert not any(stage.online for stage in found) and found[1].reductions


def test_cheap_values_are_computed_again() -> None:
    _, second = stages(regions.rms_norm("float32", residual=True))
    assert not second.fetched
    kept = stages(regions.rms_norm("float32", residual=True), recompute_cost=0)
    assert kept[0].kept == kept[1].fetched == (2,)


def test_unused_values_take_no_part() -> None:
    b = Builder()
    x = b.input("x", "float32")
    b.sum(b.apply("exp", x))
    (stage, _) = stages(b.region(b.output("out", -x, "float32")))
    assert stage.places == (0, 3) and not stage.reductions


def test_which_outputs_may_lie_over_inputs() -> None:
    loss = regions.cross_entropy("float32", gradient=True)
    assert may_overwrite(loss, 0, 1)  # the gradient over the logits
    norm = regions.rms_norm("float32", residual=True)
    assert [i.name for i in norm.inputs] == ["x", "residual", "eps", "weight"]
    assert may_overwrite(norm, 0, 0)
    assert not may_overwrite(norm, 0, 1)  # the sum is stored first, and computed again from x
    assert not may_overwrite(norm, 3, 0)  # a column
    b = Builder()
    x, y = b.input("x", "float32"), b.input("y", "float32")
    swapped = b.region(b.output("first", -y, "float32"), b.output("second", -x, "float32"))
    assert not may_overwrite(swapped, 0, 0) and may_overwrite(swapped, 0, 1)


def test_grids_merge_rows() -> None:
    region = regions.swiglu("float32")
    full = [Extent.FULL] * 3
    shape = grid_shape(full[:2], [(4, 3, 8), (3, 8)])
    assert shape == (4, 3, 8)
    even = grid_of(region, shape, full, [shape] * 3, [(24, 8, 1)] * 3)
    assert (even.sizes, even.columns, even.flat) == ((12,), 8, True)
    spread = grid_of(region, shape, full, [shape, (3, 8), shape], [(24, 8, 1), (8, 1), (24, 8, 1)])
    assert (spread.sizes, spread.flat, spread.steps[1]) == ((4, 3), False, (0, 8, 1))
    with pytest.raises(CodegenError, match="make no grid"):
        grid_shape(full[:2], [(4, 3), (4, 5)])
    with pytest.raises(CodegenError, match="does not lie"):
        grid_of(region, shape, full, [shape, shape, (2, 3, 8)], [(24, 8, 1)] * 3)


def test_rows_in_the_order_of_memory() -> None:
    """Heads before tokens in the shape, after them in memory; a table that knows tokens alone."""
    shape, heads = (2, 4, 6, 8), (192, 8, 32, 1)
    extents, shapes = [Extent.FULL] * 3, [shape, (6, 8), shape]
    grid = grid_of(regions.swiglu("float32"), shape, extents, shapes, [heads, (8, 1), heads])
    assert grid.sizes == (2, 6, 4)
    assert grid.steps == ((192, 32, 8, 1), (0, 8, 0, 1), (192, 32, 8, 1))
    again = grid_of(regions.swiglu("float32"), shape, extents, [shape] * 3, [heads] * 3)
    assert again.sizes == (48,) and again.flat
    drawn = regions.dropout("float32")  # numbers by the place in the shape
    assert grid_of(drawn, shape, extents[:2], [shape] * 2, [heads] * 2).sizes == (2, 4, 6)


def test_a_reduction_needs_whole_rows() -> None:
    shape = (4, 8)
    grid = grid_of(regions.softmax("float32"), shape, [Extent.FULL] * 2, [shape] * 2, [(8, 1)] * 2)
    assert not grid.flat
