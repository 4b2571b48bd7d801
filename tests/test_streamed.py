"""The algebra against autograd in float64: random shapes, options, blocks; and what it refuses."""

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.stream_ops import ops
from graphopt.streamed import Statistics, spans, statistics_of

ALL = (True, True, True)
NO_INDEX = -(2**62)


def problem(n: int, d: int, v: int, options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Operands, coefficients, and numbers and gradients by autograd."""
    x, w, b = (torch.randn(s, dtype=dtype, requires_grad=True) for s in ((n, d), (v, d), (v,)))
    t = torch.randint(v, (n,))
    mix = torch.rand(1 if options["shared"] else n, v, dtype=dtype)
    by = torch.randn(4, n, dtype=dtype)
    if not options["bias"]:
        b.detach().zero_()
    z = F.linear(x, w, b) * 0.7
    z = 2.5 * torch.tanh(z) if options["capped"] else z
    numbers = (z.logsumexp(1), z.gather(1, t[:, None])[:, 0], z.sum(1), (z * mix).sum(1))
    loss = sum((c * number).sum() for c, number in zip(by, numbers, strict=True))
    numbers = (*numbers, (z.softmax(1) * z).sum(1))
    gradients = torch.autograd.grad(loss, (x, w, b))
    numbers = tuple(number.detach() for number in numbers)
    bias = b.detach() if options["bias"] else None
    common = (x.detach(), w.detach(), bias, t, mix, 0.7, 2.5 if options["capped"] else 0.0, True)
    return {"common": (*common, NO_INDEX, False, True), "by": by, "want": (*numbers, *gradients)}


def assert_close(got: Any, want: Any, tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        if a.numel():
            assert float((a.double() - b.double()).abs().max()) <= tolerance * (1 + float(b.abs().max()))


OPTIONS = st.fixed_dictionaries({k: st.booleans() for k in ("bias", "capped", "shared")})


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 17), OPTIONS, st.integers(1, 20), st.data())
def test_every_plan_equals_autograd(
    n: int, d: int, v: int, options: dict[str, Any], block: int, data: st.DataObject
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        p = problem(n, d, v, options, dtype)
        common, by, want = p["common"], list(p["by"]), p["want"]
        numbers = ops.streamed_statistics(*common, block)
        assert_close(numbers, want[:5], tolerance)
        found = ops.streamed_gradients(*common, numbers[0], *by, None, block, ALL)
        assert_close(found, want[5:], tolerance)
        assert_close(ops.streamed_sweep(*common, *by, None, block, ALL), want, tolerance)
        halved = ops.streamed_sweep(*common, by[0] / 2, *by[1:], by[0] / 2 / want[0], block, ALL)
        assert_close(halved, want, 10 * tolerance)
        if not options["capped"]:
            *numbers, mean = ops.streamed_attention(*common, block)
            assert_close(numbers, want[:5], tolerance)
            dx = ops.streamed_attention_gradient(*common, mean, *by)
            assert_close([dx], want[5:6], tolerance)


@settings(max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 17), OPTIONS, st.integers(1, 20), st.sampled_from([0.1, 1.0, 40.0])
)
def test_the_entropy_equals_autograd(
    n: int, v: int, options: dict[str, bool], block: int, size: float
) -> None:
    torch.manual_seed(n + v)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        p = problem(n, 3, v, options, torch.float64)
        x, w, bias, t, mix, *rest = p["common"]
        x, w = ((size * x).requires_grad_(), w.requires_grad_())
        z = 0.7 * F.linear(x, w, bias)
        z = 2.5 * torch.tanh(z) if options["capped"] else z
        entropy = -(z.softmax(1) * z.log_softmax(1)).sum(1)
        loss = (p["by"][0] * entropy).sum() + (p["by"][1] * z.sum(1)).sum()
        want = (entropy, *torch.autograd.grad(loss, (x, w)))
        given_ = [None if a is None else a.detach().to(dtype) for a in (x, w, bias)]
        common = (*given_, t, mix, *rest)
        lse, _, _, _, mean = ops.streamed_statistics(*common, block)
        scale, one = p["by"][:2]  # of -(p z), and of one
        by = (scale * mean, None, one, None, -scale)
        dx, dw, _ = ops.streamed_gradients(*common, lse, *by, block, (True, True, False))
        slack = size if dtype is torch.float32 else 1.0
        assert_close((lse - mean, dx, dw), [a.detach() for a in want], slack * tolerance)


@pytest.mark.parametrize("terms", [(0,), (0, 1), (1, 2), (3,), ()])
def test_terms_that_are_not_there(terms: tuple[int, ...]) -> None:
    p = problem(7, 3, 11, {"bias": True, "capped": False, "shared": True}, torch.float64)
    common, zero = p["common"], torch.zeros(7, dtype=torch.float64)
    full = [c if i in terms else zero for i, c in enumerate(p["by"])]
    some = [c if i in terms else None for i, c in enumerate(p["by"])]
    lse, *_, mean = ops.streamed_attention(*common, 4)
    for a, b in zip(
        ops.streamed_gradients(*common, lse, *full, None, 4, ALL),
        ops.streamed_gradients(*common, lse, *some, None, 4, ALL),
        strict=True,
    ):
        assert torch.allclose(a, b)
    both = [ops.streamed_attention_gradient(*common, mean, *by) for by in (full, some)]
    assert torch.allclose(*both)


def test_only_the_gradients_that_are_wanted() -> None:
    p = problem(5, 3, 8, {"bias": True, "capped": False, "shared": True}, torch.float64)
    common, by = p["common"], list(p["by"])
    every = ops.streamed_gradients(*common, p["want"][0].detach(), *by, None, 3, ALL)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        one = ops.streamed_gradients(*common, p["want"][0].detach(), *by, None, 3, wanted)
        swept = ops.streamed_sweep(*common, *by, None, 2, wanted)[5:]
        for a, b, whole, is_wanted in zip(one, swept, every, wanted, strict=True):
            assert a.numel() == b.numel() == (whole.numel() if is_wanted else 0)
            assert not is_wanted or (torch.allclose(a, whole) and torch.allclose(b, whole))


def cross_entropy(x: Tensor, w: Tensor, t: Tensor, drop: bool, block: int = 3) -> tuple[Tensor, ...]:
    """The mean loss and its gradients by a sweep, with ignored rows dropped or masked."""
    counts = (t != -100).double()
    by = counts / counts.sum()
    common = (x, w, None, t, None, 1.0, 0.0, False, -100, drop, False)
    lse, picked, _, _, _, dx, dw, _ = ops.streamed_sweep(
        *common, by, -by, None, None, None, block, (True, True, False)
    )
    loss = torch.where(t != -100, lse - picked, 0.0).sum() / counts.sum()
    return loss.to(torch.promote_types(x.dtype, torch.float32)), dx, dw


@pytest.mark.parametrize("ignored", [[], [0], [1, 4, 5], list(range(6))])
def test_ignored_rows_may_be_dropped_first(ignored: list[int]) -> None:
    x, w = torch.randn(6, 4), torch.randn(9, 4)
    t = torch.randint(9, (6,))
    t[ignored] = -100
    x.requires_grad_(), w.requires_grad_()
    loss = F.cross_entropy(F.linear(x, w), t)
    want = (loss, *torch.autograd.grad(loss, (x, w)))
    for drop in (False, True):
        found = cross_entropy(x.detach(), w.detach(), t, drop)
        assert torch.allclose(found[0], want[0], equal_nan=True)
        if len(ignored) < 6:  # where all are ignored, the pass masks with where, as below
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found[1:], want[1:], strict=True))


def test_empty_batches() -> None:
    x, w, t = torch.zeros(0, 4), torch.randn(9, 4), torch.zeros(0, dtype=torch.int64)
    loss, dx, dw = cross_entropy(x, w, t, False)
    assert loss.isnan() and dx.shape == (0, 4) and not dw.any()
    assert F.cross_entropy(F.linear(x, w), t).isnan()


@pytest.mark.parametrize("wrong", [-1, 9, 100])
def test_a_target_outside_of_the_vocabulary(wrong: int) -> None:
    x, w, t = torch.randn(3, 4), torch.randn(9, 4), torch.tensor([1, wrong, 2])
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        cross_entropy(x, w, t, False)
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        F.cross_entropy(F.linear(x, w), t)


@pytest.mark.parametrize("columns", [5, 100])
def test_large_logits_keep_their_digits(columns: int) -> None:
    torch.manual_seed(0)
    x, t = torch.randint(-16, 17, (16, 8)).float(), torch.randint(32, (16,))
    w = torch.randint(-16, 17, (8, 8)).repeat(4, 1) + torch.randint(4, (32, 8)) / 64
    assert F.linear(x, w).max() > 500  # and exact: words come in groups of four close ones
    common = (x, w, None, t, None, 1.0, 0.0, False, NO_INDEX, False, False)
    lse, picked, *_ = ops.streamed_statistics(*common, columns)
    by = torch.ones(16, dtype=torch.float64)
    dx, dw, _ = ops.streamed_gradients(
        *common, lse, by, -by, None, None, None, columns, (True, True, False)
    )
    plain = [a.clone().requires_grad_() for a in (x, w)]
    loss = F.cross_entropy(F.linear(*plain), t, reduction="none")
    want = (loss, *torch.autograd.grad(loss.sum(), plain))
    for mine, theirs in zip((lse - picked, dx, dw), want, strict=True):
        assert float((mine - theirs).norm()) <= 2e-6 * float(theirs.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["tokens", "vocabulary"])
def test_low_precision_is_as_close_as_eager(dtype: torch.dtype, plan: str) -> None:
    torch.manual_seed(0)
    x, w = (torch.randn(s).to(dtype) for s in ((64, 32), (257, 32)))
    t = torch.randint(257, (64,))
    exact = [a.double().requires_grad_() for a in (x, w)]
    loss = F.cross_entropy(F.linear(*exact), t)
    want = (loss, *torch.autograd.grad(loss, exact))
    plain = [a.clone().requires_grad_() for a in (x, w)]
    rough = F.cross_entropy(F.linear(*plain).float(), t)
    eager = (rough, *torch.autograd.grad(rough, plain))
    if plan == "tokens":
        found = cross_entropy(x, w, t, False, block=16)
    else:
        common = (x, w, None, t, None, 1.0, 0.0, False, -100, False, False)
        lse, picked, *_ = ops.streamed_statistics(*common, 100)
        by = torch.full((64,), 1 / 64)
        dx, dw, _ = ops.streamed_gradients(
            *common, lse, by, -by, None, None, None, 100, (True, True, False)
        )
        found = ((lse - picked).mean().float(), dx, dw)
    for mine, theirs, truth in zip(found, eager, want, strict=True):
        errors = [float((a.double() - truth.detach()).norm()) for a in (mine, theirs)]
        assert errors[0] <= 1.3 * errors[1] + 1e-6
        assert mine.dtype is theirs.dtype


def test_repeated_runs_are_equal_bit_for_bit() -> None:
    x, w, t = torch.randn(33, 8), torch.randn(65, 8), torch.randint(65, (33,))
    first, second = (cross_entropy(x, w, t, False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 99))
def test_statistics_of_parts_merge(widths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    z = 30 * torch.randn(4, sum(widths), dtype=torch.float64)
    if len(widths) > 1:
        z[0, : widths[0]] = -torch.inf  # a part of which a row has no finite logit
    t = torch.randint(sum(widths), (4,))
    found: Statistics | None = None
    start = 0
    for width in widths:
        span = slice(start, start + width)
        part = statistics_of(z[:, span].clone(), t - start, summed=True)
        found = part if found is None else found.merge(part)
        start += width
    assert found is not None
    assert torch.allclose(found.lse, z.logsumexp(1), rtol=1e-13)
    assert torch.equal(found.picked, z.gather(1, t[:, None])[:, 0])
    assert torch.allclose(found.total, z.sum(1))


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(0, 99))
def test_means_under_the_softmax_of_parts_merge(widths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    z = 30 * torch.randn(4, sum(widths), dtype=torch.float64)
    parts = (statistics_of(part.clone(), None, expected=True) for part in z.split(widths, 1))
    found = functools.reduce(Statistics.merge, parts)
    assert torch.allclose(found.expected, (z.softmax(1) * z).sum(1), rtol=1e-13)


def test_a_scaled_gradient_is_written_over_only_where_it_is_freed() -> None:
    given_, factor = torch.ones(3), torch.tensor(2.0)
    outside = ops.scaled_gradient_(given_, factor)
    assert (
        outside is not given_ and torch.equal(given_, torch.ones(3)) and torch.equal(outside, 2 * given_)
    )
    kept: list[bool] = []

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(torch.ones(3))
            return x.sum()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (saved,) = ctx.saved_tensors
            result = ops.scaled_gradient_(saved, 3 * g)
            kept.append(result.data_ptr() != saved.data_ptr())
            return result

    x = torch.zeros(3, requires_grad=True)
    loss = Doubled.apply(x)
    loss.backward(retain_graph=True)
    loss.backward()
    assert kept == [True, False] and torch.equal(x.grad, torch.full((3,), 6.0))


def test_spans_cover() -> None:
    assert [s.start for s in spans(7, 3)] == [0, 3, 6] and not list(spans(0, 3))
