"""StreamLoss through `optimize`: training steps, returned logits, checkpoints beside it, odd batches."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import graphopt
from graphopt import Checkpoint, GraphoptError, PlanError, StreamLoss, optimize
from graphopt.absent_logits import AbsentLogits
from graphopt.stream_ops import ops

D, V = 16, 257


class Model(nn.Module):
    """A body, a head tied to the embedding, and a loss like that of transformers beside the logits."""

    def __init__(self, depth: int = 2, reduction: str = "mean") -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.body = nn.Sequential(*(Layer() for _ in range(depth)))
        self.reduction = reduction

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = F.linear(self.body(self.table(ids)), self.table.weight)
        if labels is None:
            return {"logits": logits}
        labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
        wide = logits.float().view(-1, V)
        loss = F.cross_entropy(wide, labels.view(-1), reduction=self.reduction)
        # Beside a loss for each token, a gradient of the logits is as likely, and they would be made.
        return {"loss": loss} if self.reduction == "none" else {"loss": loss, "logits": logits}


class Layer(nn.Module):
    """Keeps several values of the width of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(torch.tanh(self.wide(x)).sin())


def batch(rows: int = 3, length: int = 16) -> dict[str, Tensor]:
    torch.manual_seed(7)
    ids = torch.randint(V, (rows, length))
    return {"ids": ids, "labels": ids.clone()}


WAYS = [{"variant": "tokens", "block": 7}, {"variant": "vocabulary", "block": 50}]


def streamed(model: nn.Module, *more: Any, options: dict[str, Any] = WAYS[1], **given: Any) -> Any:
    given.setdefault("device", "cpu-generic")
    return optimize(model, passes=[StreamLoss(**options), *more], **given)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def plans(model: Any) -> list[Any]:
    return [step.plan for record in model._graphopt.log.records for step in record.steps]


def assert_close(found: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert float((a - b).abs().max()) <= tolerance * (1e-3 + float(b.abs().max()))


def eager(model: nn.Module, given: dict[str, Tensor], backward: bool = True) -> dict[str, Tensor]:
    model.zero_grad()
    found: dict[str, Tensor] = model(**given)
    if backward:
        found["loss"].backward()
    return found


@pytest.mark.parametrize("options", WAYS, ids=["tokens", "vocabulary"])
def test_steps_accumulate_repeat_and_go_back_twice(options: dict[str, Any]) -> None:
    model, given = Model(), batch()
    loss = eager(model, given)["loss"]
    want = gradients(model)
    ours = streamed(model, options=options)
    model.zero_grad()
    first = ours(**given)
    first["loss"].backward(retain_graph=True)
    assert torch.equal(first["logits"], model(**given)["logits"])
    once = gradients(model)
    assert_close([first["loss"], *once], [loss, *want])
    (0.5 * first["loss"]).backward()
    assert_close(gradients(model), [1.5 * g for g in want])
    model.zero_grad()
    for _ in range(2):
        ours(**given)["loss"].backward()
    assert_close(gradients(model), [2 * g for g in want])
    model.zero_grad()
    ours(**given)["loss"].backward()
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), once, strict=True))


def test_the_caller_may_weight_tokens() -> None:
    model, given = Model(reduction="none"), batch(8, 64)
    weights = torch.rand(512)
    (model(**given)["loss"] * weights).sum().backward()
    want = gradients(model)
    model.zero_grad()
    ours = streamed(model, options={"memory": "min"})
    (ours(**given)["loss"] * weights).sum().backward()
    assert_close(gradients(model), want)
    assert [variant for _, variant, _ in plans(ours)[0].heads] == ["vocabulary"]


def test_forward_alone() -> None:
    model, given = Model(), batch()
    ours = streamed(model, options={**WAYS[1], "returns": "lazy"})
    with torch.no_grad():
        want, found = model(**given), ours(**given)
    assert torch.allclose(found["loss"], want["loss"])
    assert torch.equal(found["logits"], want["logits"])


# --- logits that are returned --------------------------------------------------------------------


def test_lazy_logits_are_made_on_first_use() -> None:
    model, given = Model(), batch()
    want = eager(model, given, backward=False)["logits"]
    ours = streamed(model, options={**WAYS[1], "returns": "lazy"})
    logits = ours(**given)["logits"]
    assert isinstance(logits, AbsentLogits) and not logits.is_made
    shifted = logits.detach().view(-1, V)[1:]
    assert (logits.shape, logits.dtype, shifted.shape) == (want.shape, want.dtype, (47, V))
    assert not logits.is_made
    assert torch.equal(logits.argmax(-1), want.argmax(-1)) and logits.is_made
    assert torch.equal(shifted, want.view(-1, V)[1:])
    assert not plans(ours)[0].remarks


def test_lazy_logits_are_differentiable() -> None:
    model, given = Model(), batch()
    found = eager(model, given, backward=False)
    (found["loss"] + found["logits"].square().mean()).backward()
    want = gradients(model)
    model.zero_grad()
    ours = streamed(model, options={**WAYS[1], "returns": "lazy"})
    found = ours(**given)
    (found["loss"] + found["logits"].square().mean()).backward()
    assert_close(gradients(model), want)


def test_lazy_logits_do_not_outlive_the_weights_they_are_made_of() -> None:
    model, given = Model(), batch()
    ours = streamed(model, options={**WAYS[1], "returns": "lazy"})
    found = ours(**given)
    found["loss"].backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    with pytest.raises(GraphoptError, match="before the weights changed"):
        found["logits"].sum()
    assert "before the weights changed" in repr(found["logits"])


def test_dropped_logits_say_so() -> None:
    ours = streamed(Model(), options={**WAYS[0], "returns": "loss"})
    found = ours(**batch())
    found["loss"].backward()
    assert found["logits"].shape == (3, 16, V)
    with pytest.raises(GraphoptError, match="these logits were dropped"):
        found["logits"].sum()


@pytest.mark.parametrize("returns", ["logits", "lazy", "loss"])
@pytest.mark.parametrize("variant", ["tokens", "vocabulary"])
def test_the_peak_is_predicted(returns: str, variant: str) -> None:
    given = batch(8, 64)
    ours = streamed(Model(), options={"returns": returns, "variant": variant, "block": 32})
    report = ours.measure(**given)
    # Where a gradient of the logits may arrive, the rows that they are made of are kept for it.
    kept = 0 if variant == "vocabulary" else 4 * D * given["ids"].numel()
    # The prediction has the loss and its gradient at every moment.
    assert -8 <= report.measured_peak_bytes - report.predicted_peak_bytes <= kept + 64
    assert report.measured_peak_bytes < 0.75 * report.measured_baseline_bytes
    assert "stream-loss" in str(report) and "stream-loss" in report.to_json()


# --- with checkpoints ----------------------------------------------------------------------------


def test_checkpoints_behind_it_reach_less() -> None:
    given = batch(8, 64)
    peaks = {}
    for first in ((), (StreamLoss(returns="lazy", memory="min"),)):
        model = Model(depth=3)
        want = eager(model, given)["loss"]
        expected = gradients(model)
        model.zero_grad()
        ours = optimize(model, passes=[*first, Checkpoint(memory="min")], device="cpu-generic")
        loss = ours(**given)["loss"]
        loss.backward()
        assert_close([loss, *gradients(model)], [want, *expected])
        model.zero_grad()
        report = ours.measure(**given)
        peaks[first] = report.measured_peak_bytes
        assert abs(peaks[first] - report.predicted_peak_bytes) <= 0.02 * peaks[first]
    plain, ours = peaks.values()
    assert ours < 0.7 * plain


# --- odd batches ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS, ids=["tokens", "vocabulary"])
def test_labels_outside_of_the_vocabulary(options: dict[str, Any]) -> None:
    model, given = Model(), batch()
    given["labels"][1, 3] = V + 5
    for run in (model, streamed(model, options=options)):
        with pytest.raises(IndexError, match=f"Target {V + 5} is out of bounds"):
            run(**given)


@pytest.mark.parametrize("options", WAYS, ids=["tokens", "vocabulary"])
def test_every_token_ignored(options: dict[str, Any]) -> None:
    model, given = Model(), batch()
    given["labels"].fill_(-100)
    assert eager(model, given)["loss"].isnan()
    want = gradients(model)
    model.zero_grad()
    found = streamed(model, options=options)(**given)
    found["loss"].backward()
    assert found["loss"].isnan()
    for a, b in zip(gradients(model), want, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_an_empty_batch() -> None:
    model, given = Model(), batch(0)
    loss = eager(model, given)["loss"]
    want = gradients(model)
    model.zero_grad()
    found = streamed(model, options={**WAYS[1], "returns": "lazy"})(**given)
    found["loss"].backward()
    assert loss.isnan() and found["loss"].isnan()
    assert len(gradients(model)) == len(want)


def test_shapes_change_between_calls() -> None:
    model = Model()
    ours = streamed(model, options={})
    for rows in (2, 3):
        assert torch.allclose(ours(**batch(rows))["loss"], model(**batch(rows))["loss"])


# --- precision, compilers ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_further_from_float64_than_eager(dtype: torch.dtype) -> None:
    given = batch(8, 32)
    exact, plain = Model().double(), Model().to(dtype)
    exact.load_state_dict(plain.state_dict())
    ours = copy.deepcopy(plain)
    truth, rough = eager(exact, given)["loss"], eager(plain, given)["loss"]
    found = streamed(ours)(**given)["loss"]
    found.backward()
    mine, theirs = [found, *gradients(ours)], [rough, *gradients(plain)]
    for a, b, c in zip(mine, theirs, [truth, *gradients(exact)], strict=True):
        errors = [float((t.double() - c).norm()) for t in (a.detach(), b.detach())]
        assert errors[0] <= 1.1 * errors[1] + torch.finfo(torch.float32).eps * float(c.norm())


def test_autocast() -> None:
    model, given = Model(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        want = eager(model, given)["loss"]
        ours = streamed(model)
        found = ours(**given)["loss"]
    assert plans(ours)[0].heads and abs(float(want - found)) < 1e-2


def test_a_budget_that_cannot_be_met() -> None:
    ours = streamed(Model(), options={"memory": 1000})
    with pytest.raises(PlanError, match="Model: no way to stream the loss keeps the step within"):
        ours(**batch())


def test_full_verification_and_plans_as_json() -> None:
    ours = streamed(Model(), verify="full")
    ours(**batch())["loss"].backward()
    plan = plans(ours)[0]
    assert type(plan).from_json(plan.to_json()) == plan


def test_a_graph_break_between_head_and_loss_is_said() -> None:
    class Broken(Model):
        def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = F.linear(self.table(ids), self.table.weight)
            torch._dynamo.graph_break()
            return {"loss": F.cross_entropy(logits.view(-1, V), labels.view(-1))}

    model, given = Broken(), batch()
    want = eager(model, given)["loss"]
    ours = streamed(model)
    assert torch.equal(ours(**given)["loss"], want)
    first, second = plans(ours)
    assert not first.heads and not second.heads
    assert "_log_softmax is left alone: primals_1 is an input, made before this graph" in str(second)


def test_one_graph() -> None:
    model, given = Model(), batch()
    ours = streamed(model, fullgraph=True)
    assert torch.allclose(ours(**given)["loss"], model(**given)["loss"])
    assert len(plans(ours)) == 1


def test_absent_logits_are_as_compilers_are_told() -> None:
    x, w = torch.randn(6, D), torch.randn(V, D)
    given = (None, 1.0, 0.0, [2, 3, V], torch.float32, True)
    real = ops.absent_logits(x, w, *given)
    with FakeTensorMode() as mode:
        fake = ops.absent_logits(mode.from_tensor(x), mode.from_tensor(w), *given)
    assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)
    assert torch.equal(real.view(6, V) + 0, F.linear(x, w))


def test_it_is_listed() -> None:
    from graphopt.listings import passes

    entry = next(p for p in passes() if p["name"] == "stream-loss")
    assert [o["name"] for o in entry["options"]] == [
        *("memory", "variant", "block", "drop_ignored", "returns"),
    ]
    assert graphopt.passes.StreamLoss is StreamLoss
