"""Training with an optimized model is training with the model, bit for bit."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from eager_steps import assert_same, recomputed, records, step, twin
from tiny_models import CrossAttention, Dropouts, Perceptron, Residual, SharedBlock
from torch import nn

from graphopt import Checkpoint, measure, optimize, zoo
from graphopt.cost_models.memory import dataflow
from graphopt.passes.checkpoint_choice import everything

X = torch.linspace(-1, 1, 48 * 32).reshape(48, 32)


def small(model: Any, **options: Any) -> Any:
    options.setdefault("memory", "min")
    return optimize(model, device="cpu-generic", **options)


# --- random operators --------------------------------------------------------------------------


def test_dropout_is_replayed_bit_for_bit() -> None:
    model = Dropouts()
    passes = [Checkpoint(memory="min", solver="linear")]  # the default has room for the masks
    optimized = twin(model, X, steps=3, passes=passes)
    again = records(optimized)[0].after.graph.nodes
    assert any("run_with_rng_state" in str(n.target) for n in again)
    kept = small(copy.deepcopy(model), memory=1.0)
    for seed in (5, 6):
        assert_same(step(optimized, X, seed=seed), step(kept, X, seed=seed))
    assert not torch.equal(step(optimized, X, seed=5).loss, step(optimized, X, seed=6).loss)


def test_the_generator_is_left_where_eager_leaves_it() -> None:
    model = Dropouts()
    step(model, X, seed=3)
    want = torch.rand(3)
    step(small(model), X, seed=3)
    assert torch.equal(torch.rand(3), want)


RANDOM = {
    "dropout": lambda h: F.dropout(h, 0.3),
    "channels": lambda h: F.dropout1d(h, 0.3),
    "alpha": lambda h: F.alpha_dropout(h, 0.3, training=True),
    "rand": lambda h: h * torch.rand(48, 32),
    "rand_like": lambda h: h * torch.rand_like(h),
    "randn": lambda h: h + h * torch.randn(32),
    "bernoulli": lambda h: h * torch.bernoulli(torch.full_like(h, 0.5)),
    "uniform": lambda h: h * torch.empty_like(h).uniform_(),
    "exponential": lambda h: h * torch.empty_like(h).exponential_(),
    "integers": lambda h: h * torch.randint(0, 5, (48, 32)),
    "order": lambda h: h[torch.randperm(48)],
    "rrelu": lambda h: F.rrelu(h, training=True),
    "gumbel": lambda h: F.gumbel_softmax(h),
    "poisson": lambda h: h * torch.poisson(h.detach().exp()),
    "multinomial": lambda h: h * torch.multinomial(h.detach().softmax(-1), 3).sum(1, keepdim=True),
}


class Noisy(nn.Module):
    """Several random operators, each between two layers."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(len(names) + 1))
        self.names = names

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, layer in zip(self.names, self.layers, strict=False):
            x = RANDOM[name](torch.tanh(layer(x))).sin()
        return torch.tanh(self.layers[-1](x)).exp()


@pytest.mark.parametrize("first", range(3))
def test_every_random_operator_draws_the_same_again(first: int) -> None:
    twin(Noisy(tuple(RANDOM)[first::3]), X)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_dropout(causal: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(32, 96) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                q, k, v = layer(x).view(2, 24, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
                read = F.scaled_dot_product_attention(q, k, v, dropout_p=0.2, is_causal=causal)
                x = x + torch.tanh(read.transpose(1, 2).reshape(x.shape))
            return x

    assert recomputed(twin(Attention(), X.view(2, 24, 32))) > 0


def test_cross_attention_with_dropout() -> None:
    twin(CrossAttention(0.3), x=torch.randn(2, 24, 32), y=torch.randn(2, 24, 32))


# --- state that a step changes -----------------------------------------------------------------


class Normed(nn.Module):
    """Batch norms and two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Tanh(),
            nn.Linear(32, 32), nn.BatchNorm1d(32, momentum=None), nn.Sigmoid(),
            nn.Linear(32, 32), nn.BatchNorm1d(32, track_running_stats=False), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.mark.parametrize("memory", ["min", 1.0])
def test_running_statistics_are_updated_once(memory: Any) -> None:
    """The buffers are compared by `twin`, as everything else is."""
    optimized = twin(Normed(), X, steps=3, memory=memory)
    assert int(optimized.layers[1].num_batches_tracked) == 3


def test_batch_norm_in_evaluation() -> None:
    model = Normed().eval()
    before = copy.deepcopy(model.state_dict())
    optimized = twin(model, X)
    assert all(torch.equal(v, before[k]) for k, v in optimized.state_dict().items())


# --- parameters --------------------------------------------------------------------------------


def test_tied_weights() -> None:
    optimized = twin(SharedBlock(), X)
    assert optimized.head.weight is optimized.block[0].weight


def test_frozen_parameters() -> None:
    model = Perceptron()
    for layer in (model.layers[0], model.layers[2]):
        layer.requires_grad_(False)
    optimized = twin(model, X)
    assert optimized.layers[0].weight.grad is None
    assert optimized.layers[1].weight.grad is not None
    optimized.layers[0].requires_grad_(True)
    model.layers[0].requires_grad_(True)
    assert_same(step(optimized, X), step(model, X))
    assert len(records(optimized)) == 2


def test_an_input_that_requires_grad() -> None:
    model = Residual()
    optimized = small(copy.deepcopy(model))
    gradients = []
    for net in (model, optimized):
        x = X.clone().requires_grad_()
        step(net, x)
        gradients.append(x.grad)
    assert torch.equal(*gradients)


class Beside(nn.Module):
    """A loss, its logits, and a head that only the logits' user trains."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.other = Perceptron(3), nn.Linear(32, 8), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        h = self.body(x)
        logits = self.head(h)
        return {"loss": logits.logsumexp(-1).mean(), "logits": logits, "other": self.other(h)}


def test_a_parameter_that_the_loss_does_not_need_gets_no_gradient() -> None:
    twin(Beside(), X, loss=lambda output: output["loss"])


@pytest.mark.xfail(
    strict=True,
    reason="outputs beside a scalar are planned as if no gradient came back for them; where one does "
    "(a model that returns logits and an auxiliary loss), every step runs the full backward, which "
    "no plan looked at: memory='min' saves nothing, and the predicted peak is wrong",
)
def test_the_budget_holds_where_the_loss_is_computed_outside() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.router = Perceptron(8), nn.Linear(32, 4)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.body(x), self.router(x).softmax(-1).mean(0).square().sum()

    x = torch.randn(2048, 32)
    peaks = []
    for memory in (1.0, "min"):
        optimized = small(Routed(), memory=memory)

        def run(optimized: Any = optimized) -> None:
            logits, auxiliary = optimized(x)
            (logits.square().mean() + auxiliary).backward()

        for _ in range(2):
            run()
            optimized.zero_grad(set_to_none=True)
        peaks.append(measure(run).peak_bytes)
    assert peaks[1] < 0.8 * peaks[0]


def test_backward_from_the_loss_the_logits_or_both() -> None:
    model = Beside()
    optimized = small(copy.deepcopy(model))
    losses = [
        lambda o: o["loss"] + 0 * o["other"].sum(),
        lambda o: (o["logits"] ** 2).sum() + o["other"].sum(),
        lambda o: o["loss"] + o["logits"].exp().sum() + o["other"].prod(),
        lambda o: o["other"].sum() + 0 * o["logits"].sum(),
    ]
    for loss in (*losses, *losses):
        assert_same(step(optimized, X, loss=loss), step(model, X, loss=loss))
    assert len(records(optimized)) == 1
    free = small(copy.deepcopy(model), memory=1.0)
    for loss in losses:
        assert_same(step(free, X, loss=loss), step(model, X, loss=loss))


def test_the_usual_backward_does_only_the_work_of_the_loss() -> None:
    (record,) = records(twin(Beside(), X, loss=lambda o: o["loss"] + 0 * o["other"].sum()))
    names = [str(n.target) for n in record.before.operators()]
    forward = 3 + 2  # the body's layers and two heads
    assert names.count("aten.addmm.default") == forward
    assert names.count("aten.mm.default") == 1 + 3 * 2  # nothing for `other`; x needs no gradient


# --- loops -------------------------------------------------------------------------------------


def train(model: nn.Module, count: int, *, batches: int = 1, dropout_seed: int = 0) -> list[float]:
    """Losses of `count` steps of AdamW on `batches` micro-batches each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(dropout_seed)
    losses = []
    for _ in range(count):
        for _ in range(batches):
            x = torch.randn(48, 32, generator=generator)
            loss = F.mse_loss(model(x), x.roll(1, 1)) / batches
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("kind", [Residual, Dropouts, SharedBlock])
def test_thirty_steps_of_adamw_are_eagers(kind: type[nn.Module]) -> None:
    model = kind()
    optimized = small(copy.deepcopy(model))
    want, got = train(model, 30), train(optimized, 30)
    assert got == want and want[-1] < want[0]
    for p, q in zip(model.parameters(), optimized.parameters(), strict=True):
        assert torch.equal(p, q)
    assert recomputed(optimized) > 0 and len(records(optimized)) == 1


def test_gradients_accumulate_over_three_micro_batches() -> None:
    model = Residual()
    optimized = small(copy.deepcopy(model))
    for k in range(3):
        want = step(model, X * (k + 1), zero=k == 0)
        assert_same(step(optimized, X * (k + 1), zero=k == 0), want)
    assert train(optimized, 4, batches=3) == train(model, 4, batches=3)


def test_gradients_into_buffers_of_their_own() -> None:
    """`zero_grad(set_to_none=False)`: the gradient is added to what is there."""
    model = Residual()
    optimized = small(copy.deepcopy(model))
    for net in (model, optimized):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    held = [p.grad for p in optimized.parameters()]
    assert_same(step(optimized, X, zero=False), step(model, X, zero=False))
    assert all(p.grad is g for p, g in zip(optimized.parameters(), held, strict=True))


def test_a_backward_twice_through_the_same_step() -> None:
    model = Residual()
    optimized = small(copy.deepcopy(model))
    for net in (model, optimized):
        torch.manual_seed(0)
        loss = net(X).sin().sum()
        loss.backward(retain_graph=True)
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    for p, q in zip(model.parameters(), optimized.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_two_steps_at_once() -> None:
    """Two forwards before their backwards, which come in the other order."""
    model = Dropouts()
    results = []
    for net in (model, small(copy.deepcopy(model))):
        torch.manual_seed(0)
        first, second = net(X).sum(), net(X * 2).sum()
        second.backward()
        first.backward()
        results.append([p.grad for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autograd_grad() -> None:
    model = Residual()
    optimized = small(copy.deepcopy(model))
    want = torch.autograd.grad(model(X).sum(), [model.layers[0].weight])
    got = torch.autograd.grad(optimized(X).sum(), [optimized.layers[0].weight])
    assert torch.equal(got[0], want[0]) and optimized.layers[0].weight.grad is None


# --- mixed precision ---------------------------------------------------------------------------


def test_autocast_around_and_inside() -> None:
    class Inside(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x).float()

    twin(Inside(), X)
    model = Residual()
    optimized = small(copy.deepcopy(model))
    assert_same(step(optimized, X), step(model, X))
    with torch.autocast("cpu", torch.bfloat16):
        want, got = model(X), optimized(X)
    assert got.dtype == want.dtype and torch.equal(got, want)
    want.sum().backward()
    got.sum().backward()
    for p, q in zip(model.parameters(), optimized.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    assert len(records(optimized)) == 2
    assert_same(step(optimized, X), step(model, X))


def test_a_gradient_scaler() -> None:
    results = []
    model = Residual()
    for net in (copy.deepcopy(model), small(copy.deepcopy(model))):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        for k in range(4):
            with torch.autocast("cpu", torch.float16):
                loss = net(X * (k + 1)).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        results.append([scaler.get_scale(), loss.item(), *net.parameters()])
    assert results[0][:2] == results[1][:2]
    for p, q in zip(results[0][2:], results[1][2:], strict=True):
        assert torch.equal(p, q)


def test_checkpointed_by_the_user_as_well() -> None:
    class Checkpointed(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for norm, layer in zip(self.norms, self.layers, strict=True):
                x = x + torch.utils.checkpoint.checkpoint(
                    lambda y, norm=norm, layer=layer: torch.tanh(layer(norm(y))),
                    x,
                    use_reentrant=False,
                )
            return x

    twin(Checkpointed(), X)


def test_a_function_with_a_backward_of_its_own() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
            context.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            (x,) = context.saved_tensors
            return 3 * gradient * x * x

    class Cubes(Residual):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Cube.apply(super().forward(Cube.apply(x).tanh())).tanh()

    twin(Cubes(), X)


# --- the zoo -----------------------------------------------------------------------------------

FAST = ("gpt2", "llama", "t5", "vit", "bert")
# AOTAutograd itself adds in another order than autograd here: `aot_eager` gives the same bits.
INEXACT = ("clip", "mamba")


def zoo_case(name: str) -> Any:
    return pytest.param(name, marks=() if name in FAST else pytest.mark.slow)


@pytest.mark.parametrize("name", [zoo_case(name) for name in zoo.names()])
def test_models_of_the_zoo(name: str) -> None:
    pytest.importorskip("transformers")
    model = zoo.build(name)
    # Activations larger than the gradients.
    batch = zoo.example_batch(name, model, batch=32 if name == "vit" else 8)
    optimized = small(copy.deepcopy(model))
    want = step(model, loss=lambda o: o.loss, **batch)
    got = step(optimized, loss=lambda o: o.loss, **batch)
    assert recomputed(optimized) > 0
    if name in INEXACT:
        assert got.loss == pytest.approx(want.loss.item(), rel=1e-6)
        for key, gradient in want.gradients.items():
            difference = (got.gradients[key] - gradient).abs().max()  # type: ignore[operator]
            assert difference <= 1e-6 * gradient.abs().max(), key  # type: ignore[union-attr]
    else:
        assert_same(got, want)
    (record,) = records(optimized)
    plan = record.steps[0].plan
    assert plan.peak_bytes <= plan.baseline_bytes
    assert step_keeps(record) > len(plan.keep)


def step_keeps(record: Any) -> int:
    """How many tensors the step keeps without a plan."""
    return len(everything(dataflow(record.before)).keep)
