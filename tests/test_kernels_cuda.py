"""The fused layers as CUDA C: emulated on a CPU, and where there is a GPU, on it.

What is emulated is the text that a GPU gets, with the arguments of its launches.
"""

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import CASES, TARGET, assert_right, drawn
from torch import Tensor, nn
from torch.library import opcheck

from graphopt import kernels
from graphopt.codegen import cuda_emulation, reference, regions
from graphopt.codegen.cuda_emulation import emulated
from graphopt.fused_ops import FUSED, Fused, FusedCall, Layout, Place, _call

ops = torch.ops.graphopt
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
# Of all pairs, so many in turn that each function and each dtype has its part; -m slow has all of them.
QUICK = [(name, DTYPES[(n + k) % 4]) for n, name in enumerate(CASES) for k in (0, 1)]
PAIRS = [
    pytest.param(name, dtype, marks=[] if (name, dtype) in QUICK else pytest.mark.slow)
    for name in CASES
    for dtype in DTYPES
]
# A region that runs by torch operators instead would prove nothing.
pytestmark = pytest.mark.filterwarnings("error:a region runs by torch")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def device_of(name: str) -> Iterator[str]:
    if name == "cuda":
        yield "cuda"
    else:
        with emulated():
            yield "cpu"


@pytest.fixture(
    params=[
        pytest.param("cuda", marks=needs_gpu),
        pytest.param(
            "emulated",
            marks=pytest.mark.skipif(cuda_emulation.compiler() is None, reason="no C++ compiler"),
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Tensors there take CUDA kernels."""
    _call.cache_clear()
    yield from device_of(request.param)
    _call.cache_clear()


@pytest.mark.parametrize(("name", "dtype"), PAIRS)
def test_layers(name: str, dtype: torch.dtype, device: str) -> None:
    assert_right(CASES[name], drawn(CASES[name], dtype, device))


def test_other_layouts(device: str) -> None:
    """Transposed, sliced and broadcast; rows of several dimensions; of a rotated tensor, heads first."""
    x = torch.randn(24, 6, device=device).t()
    y = torch.randn(6, 49, device=device)[:, 1::2]
    assert_right(CASES["swiglu"], [x, y])
    assert_right(CASES["rms_norm"], [x, torch.randn(48, device=device)[::2]])
    assert_right(CASES["softmax"], [y[:1].expand(6, 24)])
    assert_right(CASES["rotary"], [torch.randn(2, 5, 3, 24, device=device).transpose(1, 2)])


def test_targets_that_are_ignored(device: str) -> None:
    """All of them: zero over zero, as in eager mode; a gradient of zeros."""
    x, target = torch.randn(6, 24, device=device), torch.full((6,), -100, device=device)
    loss, gradient = kernels.cross_entropy_with_gradient(x, target)
    assert loss.isnan() and not gradient.any()
    loss, gradient = kernels.cross_entropy_with_gradient(x, TARGET.clamp(0).to(device), ignore_index=4)
    assert not gradient[5].any() and gradient[0].any()


def test_dropout(device: str) -> None:
    """The numbers that the reference draws; the backward draws them again."""
    x = torch.randn(16, 40, device=device, requires_grad=True)
    seed = torch.tensor(2**40 + 5, device=device)
    out = kernels.dropout(x, 0.3, seed)
    (expected,) = reference.run(regions.dropout("float32"), x.detach().cpu(), 2**40 + 5, 0.3)
    torch.testing.assert_close(out.detach().cpu(), expected)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close(gradient, (out != 0) / 0.7)
    assert torch.equal(kernels.dropout(x, 0.3, 2**40 + 5), out)
    assert not torch.equal(kernels.dropout(x, 0.3), kernels.dropout(x, 0.3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw(dtype: torch.dtype, device: str) -> None:
    ours, theirs = (nn.Linear(24, 5).to(device, dtype) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = kernels.AdamW(ours.parameters(), 0.1), torch.optim.AdamW(theirs.parameters(), 0.1)
    for _ in range(3):
        x = torch.randn(6, 24, device=device, dtype=dtype)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) ** 2).sum().backward()
            optimizer.step()
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.05}
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), **tolerance)


def test_operators(device: str) -> None:
    """As `opcheck` wants them, on the kernels of a GPU."""
    x, w = (torch.randn(s, device=device, requires_grad=True) for s in ((6, 24), (24,)))
    factor = torch.tensor(0.5, dtype=torch.float64, device=device)
    opcheck(ops.kernel_rms_norm.default, (x, x.detach() * 2, w, 1e-3))
    opcheck(ops.kernel_cross_entropy.default, (x, TARGET.to(device), factor, -100, True))
    opcheck(ops.kernel_rotary.default, (x, torch.randn(12).to(device), torch.randn(12).to(device)))


@needs_gpu
def test_nothing_waits_for_the_device() -> None:
    x, target = torch.randn(6, 24, device="cuda", requires_grad=True), TARGET.cuda()
    weight = torch.ones(24, device="cuda")
    for mode in ("default", "error"):  # compiled in the first round
        torch.cuda.set_sync_debug_mode(mode)
        try:
            out, total = kernels.rms_norm(kernels.dropout(x, 0.1), weight, residual=x)
            kernels.cross_entropy(out * total, target).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_cuda_graphs() -> None:
    """A captured layer computes again from what its inputs are when it is replayed."""
    x, weight = torch.randn(6, 24, device="cuda"), torch.rand(24, device="cuda")
    kernels.rms_norm(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernels.rms_norm(x, weight)
    x.normal_()
    graph.replay()
    torch.testing.assert_close(out, nn.functional.rms_norm(x, (24,), weight, 1e-6))


# --- the operator of fused regions -------------------------------------------------------------

SIZES, STRIDES = (6, 24), (24, 1)
FULL, HERE = Layout("float32", SIZES, STRIDES), Place(0, SIZES, STRIDES)


def norm_backward() -> Fused:
    """With a row value, a sum over rows, and a scalar read from memory in the forward's."""
    there = Place(1, SIZES, STRIDES)
    row, column = Place(2, (6,), (1,)), Place(3, (24,), (1,))
    given = (FULL, FULL, Layout("float32", (6,), (1,)), Layout("float32", (24,), (1,)))
    made = (FULL, Layout("float32", (24,), (1,)))
    writes = (HERE, Place(1, (24,), (1,)))
    region = regions.rms_norm_backward("float32", False)
    return Fused(region, SIZES, given, (HERE, there, row, column), made, writes)


def dropped() -> Fused:
    """Of two scalars in memory, and of a part of a tensor."""
    given = (Layout("float32", (6, 48), (48, 1)), Layout("int64", (), ()), Layout("float64", (), ()))
    reads = (Place(0, SIZES, (48, 1), 24), Place(1, (), ()), Place(2, (), ()))
    return Fused(regions.dropout("float32"), SIZES, given, reads, (FULL,), (HERE,))


def calls(fused: Fused, *inputs: Tensor) -> list[list[Tensor]]:
    """What the first call gives, which plans, and what the later ones give, which are quick."""
    call = FusedCall(fused)
    found = [call(*inputs) for _ in range(3)]
    assert call._ready[inputs[0].get_device()](inputs, ()) is not None
    return found


def test_fused_calls(device: str) -> None:
    grad, h = torch.randn(SIZES, device=device), torch.randn(SIZES, device=device)
    scale, weight = torch.rand(6, device=device), torch.randn(24, device=device)
    fused = norm_backward()
    expected = reference.run(fused.region, grad, h, scale, weight)
    for found in calls(fused, grad, h, scale, weight):
        torch.testing.assert_close(tuple(found), expected)
    wide, seed = torch.randn(6, 48, device=device), torch.tensor(7, device=device)
    p = torch.tensor(0.3, dtype=torch.float64, device=device)
    (dropped_,) = reference.run(dropped().region, wide[:, 24:], seed, p)
    for found in calls(dropped(), wide, seed, p):
        torch.testing.assert_close(found, [dropped_])
    memory = torch.randn(6 * 48 + 1, device=device)[1:].view(6, 48)  # not on 16 bytes
    call = FusedCall(dropped())
    for _ in range(2):
        torch.testing.assert_close(call(memory, seed, p)[0] != 0, dropped_ != 0)
    assert call._ready[memory.get_device()]((memory, seed, p), ()) is None


def test_the_fused_operator(device: str) -> None:
    reads = (HERE, Place(1, SIZES, STRIDES))
    fused = Fused(regions.swiglu("float32"), SIZES, (FULL, FULL), reads, (FULL,), (HERE,))
    gate, up = torch.randn(SIZES, device=device), torch.randn(SIZES, device=device)
    opcheck(FUSED, ([gate, up], fused.to_text()))
    for over in ((0, 0), (1, 0)):
        call = FusedCall(fused, over)
        for _ in range(3):
            inputs = gate.clone(), up.clone()
            (found,) = call(*inputs)
            torch.testing.assert_close(found, nn.functional.silu(gate) * up)
            assert found.data_ptr() == inputs[over[0]].data_ptr()
