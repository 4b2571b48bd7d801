"""Operators that write into given tensors: the bits and strides of eager, and no memory of their own."""

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt import measure, out_forms
from graphopt.arena_blocks import Placed
from graphopt.out_forms import can_write_into, out_form, written_into

aten = torch.ops.aten
TARGETS = sorted(out_forms._WITH_OUT, key=str)
ROWS, COLUMNS = 96, 128


def native_functions() -> list[dict[str, Any]]:
    spec = find_spec("torchgen")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "packaged/ATen/native/native_functions.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def test_no_form_is_made_of_the_plain_operator() -> None:
    """ATen generates some `out=` forms, which call the plain operator and copy."""
    generated = {
        name.strip() for f in native_functions() for name in str(f.get("autogen", "")).split(",")
    }
    assert "relu.out" in generated
    for target in TARGETS:
        form, keyword = out_form(target) or (None, "")
        assert str(form).removeprefix("aten.") not in generated
        assert [a.name for a in form._schema.arguments if a.is_out] == [keyword]


def test_operators_without_a_form() -> None:
    assert out_form(aten.relu.default) is None
    assert out_form(aten.native_layer_norm.default) is None


def arguments(target: Any, dtype: torch.dtype, turned: bool) -> tuple[list[Any], dict[str, Any]]:
    """What `target` can be called with, by the types of its schema; matrices where it takes these."""

    def tensor(*sizes: int) -> Tensor:
        x = torch.rand(*sizes) * 0.9 + 0.05
        return (x.mT.contiguous().mT if turned else x).to(dtype)

    square = (ROWS, COLUMNS)
    known: dict[Any, list[Any]] = {
        aten.mm.default: [tensor(*square), tensor(COLUMNS, ROWS)],
        aten.bmm.default: [tensor(2, *square), tensor(2, COLUMNS, ROWS)],
        aten.addmm.default: [torch.rand(ROWS).to(dtype), tensor(*square), tensor(COLUMNS, ROWS)],
        aten.baddbmm.default: [tensor(2, ROWS, ROWS), tensor(2, *square), tensor(2, COLUMNS, ROWS)],
        aten._softmax.default: [tensor(*square), -1, False],
        aten._log_softmax.default: [tensor(*square), -1, False],
        aten._softmax_backward_data.default: [tensor(*square), tensor(*square), -1, dtype],
        aten._log_softmax_backward_data.default: [tensor(*square), tensor(*square), -1, dtype],
        aten.cat.default: [[tensor(*square), tensor(*square)], 1],
        aten.index_select.default: [tensor(*square), 0, torch.randint(0, ROWS, (2 * ROWS,))],
        aten.gather.default: [tensor(*square), 1, torch.randint(0, COLUMNS, square)],
        aten.where.self: [tensor(*square) > 0.5, tensor(*square), tensor(*square)],
        aten.clamp.default: [tensor(*square), 0.2, 0.7],
        aten.elu_backward.default: [tensor(*square), 1.0, 1.0, 1.0, False, tensor(*square)],
        aten.leaky_relu_backward.default: [tensor(*square), tensor(*square), 0.1, False],
        aten.hardtanh_backward.default: [tensor(*square), tensor(*square), 0.2, 0.7],
        aten.softplus_backward.default: [tensor(*square), tensor(*square), 1.0, 20.0],
    }
    if target in known:
        return known[target], {}
    given: list[Any] = []
    is_bits = target.__name__.startswith(("logical", "bitwise"))
    for argument in target._schema.arguments:
        if argument.kwarg_only or argument.has_default_value():
            continue
        if str(argument.type) == "Tensor":
            given.append(tensor(*square) > 0.5 if is_bits else tensor(*square))
        else:
            given.append(0.5)
    return given, {}


@pytest.mark.parametrize("target", TARGETS, ids=str)
@settings(max_examples=3, deadline=None)
@given(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.booleans(), st.integers(0, 99))
def test_same_bits(target: Any, dtype: torch.dtype, turned: bool, seed: int) -> None:
    """Also where the tensor that is written holds something else before."""
    torch.manual_seed(seed)
    args, kwargs = arguments(target, dtype, turned)
    expected = target(*args, **kwargs)
    form, keyword = out_form(target) or (None, "")
    block = torch.full((64 + expected.untyped_storage().nbytes(),), 255, dtype=torch.uint8)
    made = Placed(64, expected.dtype, tuple(expected.shape), tuple(expected.stride()))(block)
    found = form(*args, **kwargs, **{keyword: made})
    assert found.data_ptr() == block.data_ptr() + 64
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())
    assert found.stride() == expected.stride()


def test_no_memory() -> None:
    """None of them allocates as much as a result."""
    calls = []
    for target in TARGETS:
        args, kwargs = arguments(target, torch.float32, False)
        form, keyword = out_form(target) or (None, "")
        calls.append(partial(form, *args, **kwargs, **{keyword: target(*args, **kwargs)}))

    def every() -> None:
        for call in calls:
            call()

    assert measure(every).peak_bytes < ROWS * COLUMNS


@pytest.mark.parametrize(
    ("function", "can"),
    [
        (lambda x: x.t().clone(), True),
        (lambda x: x.clone(memory_format=torch.contiguous_format), True),
        (lambda x: x.to(torch.bfloat16), True),
        (lambda x: x.to("meta"), False),
        (lambda x: x.sum(0), False),
    ],
)
def test_copies(function: Any, can: bool) -> None:
    """A copy of another dtype or layout is a copy into its place."""
    x = torch.randn(6, 8)
    module = make_fx(function, tracing_mode="fake")(x)
    node = list(module.graph.nodes)[-2]
    assert can_write_into(node) is can
    if not can:
        return
    like = node.meta["val"]
    with module.graph.inserting_before(node):
        given = module.graph.call_function(torch.empty_strided, (like.shape, like.stride()))
        given.kwargs = {"dtype": like.dtype}
        target, args, kwargs = written_into(node, {0: given})
        new = module.graph.call_function(target, args, kwargs)
    node.replace_all_uses_with(new)
    module.recompile()
    found, expected = module(x), function(x)
    assert torch.equal(found, expected) and found.stride() == expected.stride()
