"""The time of steps: what a target speed-up asks for, and how surely it is met."""

import time
from typing import Any

import pytest
import torch
from block_models import block_model, token_batches
from torch import nn

import graphopt
from graphopt import PlanError, SkipLayers
from graphopt.passes import layer_times
from graphopt.passes.layer_times import LayerTimes, median_range


class Slow(nn.Module):
    """Blocks that take 10 ms each, in a model that takes 20 ms besides."""

    def __init__(self, blocks: int = 6) -> None:
        super().__init__()
        self.parts = nn.ModuleList(Wait() for _ in range(blocks))
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        for part in self.parts:
            x = part(x)
        return self.head(x)  # type: ignore[no-any-return]


class Wait(nn.Module):
    """A residual block that sleeps."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        return x + torch.tanh(self.linear(x))


def test_a_target_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_times, "SECONDS", 0.0)  # as few runs as there may be
    pass_ = SkipLayers(target_speedup=1.45, strategy="block_influence", calibration=[torch.randn(4, 6)])
    short = graphopt.optimize(Slow(), passes=[pass_])
    plan, measured = short.report.steps[0].plan, short.report.steps[0].measured
    assert len(plan.kept) == 3  # 80 ms / 50 ms = 1.6, and 80 / 60 = 1.33
    assert plan.speedup == pytest.approx(1.6, rel=0.15)
    assert measured.speedup >= 1.45 * 0.95
    with pytest.raises(PlanError, match=r"target_speedup=4.0: at most 2.\d+ is reachable \(prefill\)"):
        graphopt.optimize(Slow(), passes=[SkipLayers(target_speedup=4.0, calibration=[torch.ones(1, 6)])])
    with pytest.raises(PlanError, match="phase='decode' needs a model that generates, not Slow"):
        SkipLayers(target_speedup=1.1, phase="decode", calibration=[torch.ones(1, 6)]).plan(Slow())


def test_the_time_of_one_more_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_times, "SECONDS", 0.1)
    pass_ = SkipLayers(target_speedup=1.05, phase="decode", calibration=token_batches(1))
    try:
        plan = pass_.plan(block_model("llama", 8))
    except PlanError as error:  # other work on these cores
        assert "is reachable (decode)" in str(error)
    else:
        assert plan.speedup is not None and plan.speedup >= 1.05


def test_steps_that_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load that comes and goes hits both models: their ratio stays, whichever is first."""
    seen: list[float] = []

    def seconds(prepare: Any, device: Any) -> float:
        seen.append(prepare())
        load = (1, 1, 9, 9, 4)[(len(seen) - 1) // 2 % 5]
        return load * seen[-1]

    monkeypatch.setattr(layer_times, "_seconds", seconds)
    found = layer_times._turns((lambda: 3.0, lambda: 2.0), torch.device("cpu"))  # type: ignore[arg-type,return-value]
    assert (found.speedup, *found.speedup_range) == pytest.approx((1.5, 1.5, 1.5))
    assert found.rounds == layer_times.MOST_RUNS and found.whole_seconds == 12.0
    assert seen[:8] == [3.0, 2.0, 2.0, 3.0, 3.0, 2.0, 2.0, 3.0]


def test_more_rounds_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_times, "SECONDS", 0.05)
    noise = torch.Generator().manual_seed(0)

    def rounds(spread: float) -> layer_times.Comparison:
        def seconds(prepare: Any, device: Any) -> float:
            time.sleep(1e-3)
            return float(prepare()) * (1 + spread * float(torch.rand((), generator=noise)))

        monkeypatch.setattr(layer_times, "_seconds", seconds)
        return layer_times._turns((lambda: 3.0, lambda: 2.0), torch.device("cpu"))  # type: ignore[arg-type,return-value]

    quiet, loaded = rounds(0.001), rounds(2.0)
    assert loaded.rounds > 2 * quiet.rounds
    low, high = loaded.speedup_range
    assert low <= loaded.speedup <= high and low < 1.5 < high
    assert quiet.speedup == pytest.approx(1.5, rel=0.002)


def test_a_result_that_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the pass accepted and the last measurement does not confirm is refused, with its range."""
    monkeypatch.setattr(layer_times, "SECONDS", 0.0)
    pass_ = SkipLayers(target_speedup=1.3, strategy="block_influence", calibration=[torch.randn(4, 6)])
    model = Slow()
    plan = pass_.plan(model)
    slower = pass_.apply(model, plan)
    slower.parts.extend([Wait(), Wait(), Wait()])  # type: ignore[operator,union-attr]
    with pytest.raises(PlanError, match=r"the result is \d\.\d+ \(\d\.\d+ to \d\.\d+\) times as fast"):
        pass_.measure(model, plan, slower)


def test_layer_times() -> None:
    times = LayerTimes(2.0, (1.0, 3.0, 2.0))
    assert times.seconds() == 8 and times.seconds(frozenset({0, 1})) == 4
    assert times.greatest_speedup == pytest.approx(8 / 3)
    assert [times.speedup_bound(n) for n in (0, 1, 2)] == pytest.approx([1, 8 / 5, 8 / 3])


def test_the_range_of_a_median() -> None:
    """It holds the true median in 95 of 100 samples, nearly."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        low, high = median_range(torch.randn(31, generator=generator).tolist())
        held += low <= 0 <= high
    assert 370 <= held < 400
