"""The fused layers compiled, exported, under autocast, and where their tensors differ; the optimizer."""

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import CASES, TOLERANCES, assert_right, drawn, with_gradients
from torch import Tensor, nn
from torch.library import opcheck

from graphopt import kernels
from graphopt.codegen import backends, launching
from graphopt.codegen.cuda_emulation import emulated
from graphopt.codegen.numba_cpu import compile_region
from graphopt.errors import CodegenError

ops = torch.ops.graphopt


@pytest.fixture(autouse=True)
def _no_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends.MAKERS, "cpu", lambda region: compile_region(region, None))


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled where only the operators around kernels matter."""
    monkeypatch.setitem(backends.MAKERS, "cpu", backends.torch_kernel)


class Layers(nn.Module):
    """All of them, one after the other, but for losses; with a loss of a number for each row at last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(24)), nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        h, total = kernels.rms_norm(x, self.weight, residual=x * 2)
        h = kernels.swiglu(kernels.layer_norm(h, self.weight, self.bias), total)
        h = kernels.bias_gelu_residual(h, self.bias, x, "tanh")
        angles = torch.linspace(0, 1, 12)
        h = kernels.rotary(h, angles.cos(), angles.sin()) + kernels.softmax(h)
        return kernels.cross_entropy(kernels.dropout(h, 0.25, 11) + self.bias, target)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("by_torch")
def test_each_compiled_whole(name: str) -> None:
    whole = torch.compile(CASES[name].ours, fullgraph=True, backend="aot_eager")
    assert_right(CASES[name], drawn(CASES[name], torch.float32), whole)


def gradients(model: Any, parameters: Any, *inputs: Tensor) -> list[Tensor]:
    loss = model(*inputs)
    return [loss.detach(), *torch.autograd.grad(loss, [*parameters])]


@pytest.mark.usefixtures("by_torch")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_all_compiled_whole(backend: str) -> None:
    model, target = Layers(), torch.tensor([0, 23, -100, 4])
    whole = torch.compile(model, fullgraph=True, backend=backend, dynamic=True)
    for rows in (4, 3):
        x = torch.randn(rows, 24)
        found, expected = (gradients(m, model.parameters(), x, target[:rows]) for m in (whole, model))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("by_torch")
def test_dropout_compiled_without_a_seed() -> None:
    """Other numbers in each call, and in a backward those of its forward."""
    whole = torch.compile(lambda x: kernels.dropout(x, 0.5), fullgraph=True, backend="aot_eager")
    x = torch.ones(64, 16, requires_grad=True)
    first, second = whole(x), whole(x)
    assert not torch.equal(first, second)
    assert torch.equal(torch.autograd.grad(second.sum(), x)[0], second)


def exported() -> Any:
    rows = torch.export.Dim("rows", min=2, max=1024)
    example = torch.randn(4, 24), torch.tensor([0, 23, -100, 4])
    with torch.no_grad():
        return torch.export.export(Layers(), example, dynamic_shapes=({0: rows}, {0: rows}))


@pytest.mark.usefixtures("by_torch")
def test_exported_with_dynamic_rows() -> None:
    program = exported()
    names = {
        str(node.target).split(".")[1] for node in program.graph.nodes if "graphopt" in str(node.target)
    }
    assert len(names) == 8  # nothing was taken apart
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    model = Layers()
    model.load_state_dict(program.state_dict)
    for rows in (2, 7):
        x, target = torch.randn(rows, 24), torch.arange(rows)
        torch.testing.assert_close(loaded(x, target), model(x, target))


@pytest.mark.slow
def test_packaged(tmp_path: Any) -> None:
    """By AOTInductor; the package calls the operators of this process."""
    program = exported()
    path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layers.pt2"))
    loaded, model = torch._inductor.aoti_load_package(path), Layers()
    model.load_state_dict(program.state_dict)
    for rows in (2, 7):
        x, target = torch.randn(rows, 24), torch.arange(rows)
        torch.testing.assert_close(loaded(x, target), model(x, target))


class Missing:
    """A GPU without CuPy."""

    processors = 1

    def prepare(self, *_: Any) -> Any:
        raise CodegenError("CUDA kernels need CuPy: pip install graphopt[cuda]")


def test_without_a_compiler_for_kernels() -> None:
    """All layers run by torch operators, which is said once."""
    launching.say.cache_clear()
    with emulated(Missing()), pytest.warns(UserWarning, match="need CuPy") as remarks:
        for name in ("rms_norm_residual", "rotary", "cross_entropy"):
            assert_right(CASES[name], drawn(CASES[name], torch.float32))
    assert len(remarks) == 1


# --- dtypes ------------------------------------------------------------------------------------


def test_tensors_of_different_dtypes() -> None:
    x, w = torch.randn(4, 24), torch.ones(24, dtype=torch.bfloat16)
    with pytest.raises(CodegenError, match="rms_norm: x is float32, weight is bfloat16; tensors of one"):
        kernels.rms_norm(x, w)
    with pytest.raises(CodegenError, match="softmax: x is int64"):
        kernels.softmax(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(CodegenError, match=r"moments in torch\.float16 of a parameter in torch\.float32"):
        kernels.adamw_(x, x, x.half(), x.half(), 1)
    with pytest.raises(CodegenError, match="different shapes"):
        kernels.adamw_(x, x[:2], x, x, 1)
    with pytest.raises(ValueError, match="probability 2"):
        kernels.dropout(x, 2)


@pytest.mark.usefixtures("by_torch")
def test_autocast() -> None:
    """Norms, softmax and losses in float32, others in the widest dtype; gradients in that of the leaf."""
    x, half = torch.randn(6, 24), torch.rand(24).bfloat16().requires_grad_()
    for compiled in (False, True):
        norm: Any = lambda x, w: kernels.rms_norm(x, w, 1e-3)  # noqa: E731
        if compiled:
            norm = torch.compile(norm, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            out = norm(x, half)
            low = norm(x.bfloat16(), half)
        assert out.dtype == low.dtype == torch.float32
        torch.testing.assert_close(out, F.rms_norm(x, (24,), half.float(), 1e-3))
        (gradient,) = torch.autograd.grad(out.sum(), half)
        assert gradient.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels.softmax(x.bfloat16()).dtype == torch.float32
        assert kernels.cross_entropy(x.bfloat16(), torch.arange(6)).dtype == torch.float32
        assert kernels.swiglu(x.bfloat16(), x.bfloat16()).dtype == torch.bfloat16
        assert kernels.swiglu(x.bfloat16(), x).dtype == torch.float32
        assert kernels.softmax(x.double()).dtype == torch.float64
        with pytest.raises(CodegenError, match="x is float64, weight is bfloat16"):
            kernels.rms_norm(x.double(), half)


# --- dropout and the optimizer -----------------------------------------------------------------


@pytest.mark.usefixtures("by_torch")
def test_new_operators() -> None:
    x, seed = torch.randn(6, 24, requires_grad=True), torch.tensor(3)
    opcheck(ops.kernel_dropout.default, (x, seed, 0.25))
    p, g, m, v = torch.randn(4, 3, 8).unbind()
    opcheck(ops.kernel_adamw_.default, (p, g, m, v.abs(), 0.1, 0.9, 0.99, 1e-8, 0.1, 2))


def test_dropout() -> None:
    x = torch.randn(300, 40, dtype=torch.float64, requires_grad=True)
    out = kernels.dropout(x, 0.25, 3)
    kept = out != 0
    assert abs(float(kept.double().mean()) - 0.75) < 0.02
    torch.testing.assert_close(out, x * kept / 0.75)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], kept.double() / 0.75)
    assert torch.equal(kernels.dropout(x, 0.0), x) and not kernels.dropout(x, 1.0).any()
    assert torch.autograd.gradcheck(
        lambda x: kernels.dropout(x, 0.4, 9), x[:3, :4].detach().requires_grad_()
    )


def trained(optimizer: Any, model: nn.Module, steps: int, first: int = 0) -> Any:
    """The optimizer after some steps with a schedule, on gradients of its own."""
    dtype = next(model.parameters()).dtype
    for step in range(first, first + steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        for n, p in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(100 * step + n)
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.step()
    return optimizer


def pair(dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    models = tuple(nn.Sequential(nn.Linear(8, 5), nn.LayerNorm(5)).to(dtype) for _ in range(2))
    models[1].load_state_dict(models[0].state_dict())
    return models  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_adamw_is_that_of_torch(dtype: torch.dtype) -> None:
    models = pair(dtype)
    options: Any = {"lr": 0.1, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": 0.3}
    optimizers = [
        kernels.AdamW(models[0].parameters(), **options),
        torch.optim.AdamW(models[1].parameters(), **options),
    ]
    for optimizer, model in zip(optimizers, models, strict=True):
        trained(optimizer, model, 6)
    limit = TOLERANCES[dtype] * (1 if dtype != torch.bfloat16 else 3)  # torch rounds in between
    torch.testing.assert_close(*(m.state_dict() for m in models), rtol=limit, atol=limit)
    ours, theirs = (o.state_dict() for o in optimizers)
    assert ours["param_groups"] == theirs["param_groups"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=limit, atol=limit)


def test_adamw_goes_on_from_a_checkpoint_of_torch() -> None:
    """And torch from ours, each with a parameter that had no gradient."""
    makers = kernels.AdamW, torch.optim.AdamW
    for first, then in (makers, makers[::-1]):
        models = pair(torch.float32)
        reference = trained(torch.optim.AdamW(models[0].parameters(), 0.1), models[0], 5)
        before = trained(first(models[1].parameters(), 0.1), models[1], 2)
        after = then(models[1].parameters(), 0.7)
        after.load_state_dict(before.state_dict())
        trained(after, models[1], 3, first=2)
        torch.testing.assert_close(*(m.state_dict() for m in models), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(after.state_dict()["state"], reference.state_dict()["state"])


def test_adamw_is_exact() -> None:
    """In float32, against float64: no worse than torch, whose scalars are exact, too."""
    models, (exact, _) = pair(torch.float32), pair(torch.float64)
    exact.load_state_dict(models[0].state_dict())
    trained(kernels.AdamW(models[0].parameters(), 0.1, (0.9, 0.9999)), models[0], 20)
    for model in (models[1], exact):
        trained(torch.optim.AdamW(model.parameters(), 0.1, (0.9, 0.9999)), model, 20)
    vectors = [nn.utils.parameters_to_vector(m.parameters()).detach() for m in (*models, exact)]
    ours, theirs = (float((v - vectors[2]).abs().max()) for v in vectors[:2])
    assert ours <= 1.5 * theirs


def test_adamw_refuses_what_it_does_not_do() -> None:
    p = nn.Parameter(torch.randn(3))
    p.grad = torch.ones(3)
    optimizer = kernels.AdamW([p])
    other = torch.optim.AdamW([p], amsgrad=True)
    other.step()
    optimizer.load_state_dict(other.state_dict())
    with pytest.raises(CodegenError, match="amsgrad"):
        optimizer.step()


def test_a_step_is_seen_by_autograd() -> None:
    """A tensor that was saved and has changed since is not taken for a gradient."""
    p = nn.Parameter(torch.randn(3, 4))
    loss = (p * p).sum()
    with torch.no_grad():
        kernels.adamw_(p, torch.ones(3, 4), torch.zeros(3, 4), torch.zeros(3, 4), 1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.usefixtures("by_torch")
def test_cases_are_judged() -> None:
    """The comparison of all these tests sees an error of one in a thousand."""
    case = CASES["swiglu"]
    with pytest.raises(AssertionError):
        assert_right(case, drawn(case, torch.float32), lambda g, u: kernels.swiglu(g, u) * 1.001)
    assert len(with_gradients(case.ours, drawn(case, torch.float32))) == 3
