"""What `fit` answers against measured steps, batch plans against the formula, and the command."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from sized_nets import CPU, Net, words
from torch import nn

import graphopt
from graphopt import Checkpoint, GraphoptError, PlanError, StreamLoss
from graphopt.batch_plan import Dual, plan_batches
from graphopt.cli import main
from graphopt.cost_models.training_state import TrainingSetup
from graphopt.fit_answer import Fit
from graphopt.fitting import fit, peak_formula
from graphopt.passes.checkpoint import choice_of, plan_of
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.passes.held_plan import HeldPlan
from graphopt.passes.nested_choice import choose_best
from graphopt.passes.symbolic_peak import SymbolicStep
from graphopt.sized_model import LEAST, Captures, sized_model

LEAST_PEAK = Checkpoint(memory="min")


def measured(net: nn.Module, inputs: torch.Tensor, passes: list[graphopt.passes.base.Pass]) -> int:
    """All bytes of a step of `net` at its peak, parameters and inputs included."""
    optimized = graphopt.optimize(net, passes=passes, device=CPU)

    def train() -> None:
        net.zero_grad(set_to_none=True)
        optimized(inputs).backward()

    train()
    net.zero_grad(set_to_none=True)
    return sum(p.nbytes for p in net.parameters()) + inputs.nbytes + graphopt.measure(train).peak_bytes


@pytest.mark.parametrize("recompute", [False, True])
def test_the_largest_batch_trains_within_the_memory_and_one_more_does_not(recompute: bool) -> None:
    torch.manual_seed(0)
    net, limit, seq = Net(1), 200_000, 24
    passes = [LEAST_PEAK] if recompute else []
    row = fit(net, memory=limit, seq=seq, inputs=words, device=CPU, passes=passes).rows[-1]
    batch = row.largest_batch
    assert batch is not None and batch > 2
    held: list[graphopt.passes.base.Pass] = [Checkpoint(memory=1.0)]
    held = held if row.plan is None else [HeldPlan(LEAST_PEAK, row.plan)]
    assert measured(net, words(batch, seq), held) <= limit
    assert measured(net, words(batch + 1, seq), held) > limit


def test_batches_of_one_and_none() -> None:
    net = Net(1)
    one = fit(net, memory=17_000, seq=16, inputs=words, device=CPU, passes=[]).rows[0]
    assert one.largest_batch == 1
    assert one.peak_bytes <= 17_000
    none = fit(net, memory=9_000, seq=16, inputs=words, device=CPU, passes=[]).rows[0]
    assert none.largest_batch == 0
    assert none.peak_bytes > 9_000


def test_answers_as_json_and_text() -> None:
    setup = TrainingSetup("adam")
    found = fit(Net(1), memory="1MiB", seq=8, inputs=words, device=CPU, passes=[], setup=setup)
    data = json.loads(found.to_json())
    assert data["setup"]["optimizer"] == "adam"
    assert data["rows"][0]["largest_batch"] == found.rows[0].largest_batch
    assert sum(n for _, n in data["rows"][0]["parts"]) == found.rows[0].peak_bytes
    assert f"as it is: batch {found.rows[0].largest_batch}" in str(found)


def test_what_is_refused() -> None:
    net = Net(1)
    with pytest.raises(GraphoptError, match="give inputs="):
        fit(net, memory="1MiB", seq=8)
    with pytest.raises(GraphoptError, match="give seq= for the largest batch"):
        fit(net, memory="1MiB", inputs=words)
    with pytest.raises(GraphoptError, match="has no sequence"):
        fit(net, memory="1MiB", seq=8, inputs=lambda batch: words(batch, 4))
    with pytest.raises(GraphoptError, match="neither 'shapes' nor 'measured'"):
        fit(net, memory="1MiB", seq=8, inputs=words, scratch="guessed")
    with pytest.raises(GraphoptError, match="Checkpoint goes last"):
        passes = [Checkpoint(), StreamLoss()]
        fit(net, memory="1MiB", seq=8, inputs=words, device=CPU, passes=passes)


# --- batch plans -------------------------------------------------------------------------------


def test_shares_of_the_samples() -> None:
    dual = Dual(8, 2, 1.1)
    assert 6 * dual.large_share + 2 * dual.small_share == pytest.approx(1)
    with pytest.raises(GraphoptError, match="does not lie between 1 and"):
        Dual(8, 2, 1.4)
    with pytest.raises(GraphoptError, match="of 2 workers, 3"):
        Dual(2, 3)


def vectors(batch: int, seq: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(batch, seq, 8), torch.ones(batch, seq, 64)


def test_a_stage_that_does_not_fit() -> None:
    with pytest.raises(PlanError, match="no batch of two fits at 8") as caught:
        plan_batches(
            nn.Linear(8, 64),
            memory=9_000,
            stages=[8],
            samples=1,
            inputs=vectors,
            loss=nn.functional.mse_loss,
            device=CPU,
        )
    assert caught.value.reachable_bytes is not None
    assert caught.value.reachable_bytes > 9_000


def test_a_batch_plan_is_the_formula_stage_by_stage() -> None:
    net, dual = nn.Linear(8, 64), Dual(4, 1, 1.2)
    made = plan_batches(
        net,
        memory=300_000,
        stages=[16, 4, 8],
        samples=10_000,
        dual=dual,
        inputs=vectors,
        loss=nn.functional.mse_loss,
        device=CPU,
    )
    formula = peak_formula(net, seqs=(4, 16), inputs=vectors, loss=nn.functional.mse_loss, device=CPU)
    assert [s.size for s in made.stages] == [4, 8, 16]
    assert made.seconds < made.constant_seconds
    for stage in made.stages:
        assert formula.at(stage.large_batch, stage.size) <= 300_000
        assert formula.at(stage.large_batch + 1, stage.size) > 300_000
        assert 2 <= stage.small_batch < stage.large_batch
        assert stage.epoch_seconds == pytest.approx(1.2 * stage.plain_seconds)


# --- the command -------------------------------------------------------------------------------

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 64)

    def forward(self, x):
        return self.linear(x).exp().sum()

def build(batch, seq):
    return Net(), torch.ones(batch, seq, 8)
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.py").write_text(FACTORY)
    spec, answer = f"{tmp_path}/net.py:build", tmp_path / "fit.json"
    words_ = ["fit", spec, "--memory", "1MiB", "--seq", "16", "--device", "h100", "--plain"]
    assert main([*words_, "--optimizer", "adam", "--json", str(answer)]) == 0
    row = json.loads(answer.read_text())["rows"][0]
    assert str(row["largest_batch"]) in capsys.readouterr().out
    assert row["largest_batch"] > 50
    stages = ["--stages", "8,16", "--samples", "1000"]
    assert main(["fit", spec, "--memory", "1MiB", "--device", "h100", "--plain", *stages]) == 0
    assert "seq 16: batches " in capsys.readouterr().out


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "gpt3", "--memory", "1GiB", "--seq", "16", "--device", "h100"]) == 1
    assert "no zoo model is called 'gpt3'" in capsys.readouterr().err
    assert main(["fit", "vit", "--memory", "1GiB", "--stages", "32,x", "--samples", "9"]) == 1
    assert "write sizes such as" in capsys.readouterr().err


# --- models of the zoo -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "vit"])
def test_fifty_sizes_to_the_byte(name: str) -> None:
    model = sized_model(name, size="small")
    flow = Captures(model, CPU).flow({}, LEAST, high=128)
    reference = (8, 128)[: len(model.variables)]
    concrete = flow.at(reference, CPU)
    plan = plan_of(concrete, choose_best(concrete, True, None), None, 0)
    plain, planned = (SymbolicStep.of(flow, p).formula() for p in (None, plan))
    every = list(itertools.product(*(range(2, n) for n in (64, 129)[: len(model.variables)])))
    for sizes in random.Random(0).sample(every, 50):
        captures, named = Captures(model, CPU), dict(zip(model.variables, sizes, strict=True))
        program = captures.program(named)
        step = captures.costs(program, named).dataflow(program)
        for formula, choice in ((plain, everything(step)), (planned, choice_of(step, plan))):
            assert formula.at(*sizes) == step.static_bytes + step_of(step, choice).peak_bytes


@pytest.mark.slow
def test_passes_on_a_deep_model() -> None:
    limit, layers = 2**25, {"num_hidden_layers": 7, "vocab_size": 4000}

    def peak(batch: int) -> int:
        captures = Captures(sized_model("llama", size="small", overrides=layers), CPU)
        sizes = {"batch": batch, "seq": 48}
        program = captures.program(sizes)
        flow = captures.costs(program, sizes).dataflow(program)
        return flow.static_bytes + step_of(flow, everything(flow)).peak_bytes

    found: Fit = fit("llama", memory=limit, seq=48, size="small", overrides=layers, device=CPU)
    batches = [row.largest_batch or 0 for row in found.rows]
    assert peak(batches[0]) == found.rows[0].peak_bytes <= limit < peak(batches[0] + 1)
    assert batches[0] < batches[1] < batches[3]
    assert batches[0] < batches[2] < batches[3]
