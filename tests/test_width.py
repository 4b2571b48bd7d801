"""Formulas of the hidden size against steps captured at single widths, and what is refused."""

import functools
import random

import pytest
from sized_nets import CPU

import graphopt
from graphopt import Checkpoint, GraphoptError, StreamLoss
from graphopt.cost_models.memory import Dataflow
from graphopt.cost_models.symbolic import SymbolicFlow
from graphopt.cost_models.training_state import TrainingSetup
from graphopt.passes.checkpoint import CheckpointPlan, choice_of, plan_of
from graphopt.passes.checkpoint_choice import everything, step_of
from graphopt.passes.nested_choice import choose_best
from graphopt.passes.symbolic_peak import SymbolicStep
from graphopt.sized_model import LEAST, Captures, SizedModel, sized_model
from graphopt.zoo import Value

SMALL: dict[str, Value] = {"num_hidden_layers": 1, "vocab_size": 64}
GPT2 = SMALL | {"n_positions": 300}  # the largest parameter of the narrow models, not of the wide ones
WIDTHS = {"gpt2": (32, 128), "llama": (64, 256), "bert": (32, 128)}
SEQ = 16


def model_of(name: str, overrides: dict[str, Value]) -> SizedModel:
    return sized_model(name, size="small", overrides=overrides, widths=WIDTHS[name])


def captured(name: str, overrides: dict[str, Value], hidden: int, batch: int, seq: int) -> Dataflow:
    """The step of a model whose whole configuration is written out, captured at these sizes."""
    heads = hidden // 16
    width: dict[str, Value] = {"hidden_size": hidden, "num_attention_heads": heads}
    if name != "gpt2":  # whose feed-forward layer is four times as wide if nothing is said
        width["intermediate_size"] = 2 * hidden
    if name == "llama":
        width["num_key_value_heads"] = heads // 2
    captures = Captures(sized_model(name, size="small", overrides={**overrides, **width}), CPU)
    sizes = {"batch": batch, "seq": seq}
    program = captures.program(sizes)
    return captures.costs(program, sizes).dataflow(program)


def planned(flow: SymbolicFlow, *sizes: int) -> CheckpointPlan:
    """A plan of the least peak at some sizes."""
    concrete = flow.at(sizes, CPU)
    return plan_of(concrete, choose_best(concrete, True, None), None, 0)


def compare(flow: SymbolicFlow, plan: CheckpointPlan, sizes: tuple[int, ...], step: Dataflow) -> None:
    for choice, held in ((everything(step), None), (choice_of(step, plan), plan)):
        formula = SymbolicStep.of(flow, held).formula()
        assert formula.at(*sizes) == step.static_bytes + step_of(step, choice).peak_bytes


@functools.cache
def gpt2() -> SymbolicFlow:
    """The step of batch and width."""
    return Captures(model_of("gpt2", GPT2), CPU).flow({"seq": SEQ})


@pytest.mark.parametrize("sizes", [(3, 48), (60, 112)])
def test_batches_and_widths_to_the_byte(sizes: tuple[int, int]) -> None:
    plan = planned(gpt2(), 8, 128)
    compare(gpt2(), plan, sizes, captured("gpt2", GPT2, sizes[1], sizes[0], SEQ))


def test_heads_that_share_keys_and_values() -> None:
    flow = Captures(model_of("llama", SMALL), CPU).flow({"batch": 5, "seq": SEQ})
    compare(flow, planned(flow, 256), (160,), captured("llama", SMALL, 160, 5, SEQ))


@pytest.mark.parametrize("hidden", [32, 128])
def test_adam_holds_moments_and_updates_the_largest_parameter_of_each_width(hidden: int) -> None:
    adam, found = TrainingSetup("adam"), SymbolicStep.of(gpt2())
    loaded = model_of("gpt2", GPT2).load(batch=2, seq=SEQ, hidden=hidden).model
    sizes = [p.nbytes for p in loaded.parameters()]
    held = 2 * sum(sizes) + 4 * len(sizes)
    during = found.formula().at(2, hidden) + held
    inputs = gpt2().at((2, hidden), CPU).static_bytes - sum(sizes)
    update = inputs + 2 * sum(sizes) + held + 2 * max(sizes)  # with all gradients, and two temporaries
    formula = found.formula(adam)
    assert formula.at(2, hidden) == max(during, update) == update
    assert formula.binding(2, hidden).half == "update"
    assert sum(found.parts((2, hidden), adam).values()) == update


def test_the_largest_width_and_pieces_along_it() -> None:
    found = SymbolicStep.of(gpt2()).formula()
    limit = (found.at(40, 80) + found.at(40, 96)) // 2
    assert found.largest("hidden", limit, (40,)) == 80
    along, (batch, hidden) = found.piecewise("hidden", (40,)), found.terms.symbols()
    for width in range(32, 129, 16):
        assert along.subs(hidden, width) == found.at(40, width)
        assert found.expression.subs({batch: 40, hidden: width}) == found.at(40, width)
    assert "hidden a multiple of 16" in str(found)


def test_sizes_and_setups_that_are_refused() -> None:
    step = SymbolicStep.of(gpt2())
    with pytest.raises(GraphoptError, match="hidden=40 is not a multiple of 16"):
        step.formula().at(40, 40)
    with pytest.raises(GraphoptError, match="hidden=144 is outside of the 32 to 128"):
        step.formula().at(40, 144)
    with pytest.raises(GraphoptError, match="weights are those of one device"):
        step.formula(TrainingSetup(zero=3, data=4))


@pytest.mark.parametrize(
    ("name", "widths", "said"),
    [
        ("vit", (32, 64), "not for vit"),
        ("mamba", (32, 64), "not for mamba"),
        ("llama", (64, 80), "the width 80 of llama is not a multiple of 32, 2 heads"),
        ("gpt2", (40, 64), "the width 40 of gpt2 is not a multiple of 16, a head"),
        ("gpt2", (16, 64), "the smallest is at least 32"),
        ("gpt2", (32, 48), "the largest at least 32 more"),
        ("gpt2", (128, 32), "the largest at least 32 more"),
        ("net.py:build", (32, 64), "widths= is for models of the zoo"),
    ],
)
def test_what_is_refused(name: str, widths: tuple[int, int], said: str) -> None:
    with pytest.raises(GraphoptError, match=said):
        graphopt.peak_formula(name, widths=widths)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("layers", [2, 6])
def test_twelve_batches_sequences_and_widths_to_the_byte(name: str, layers: int) -> None:
    overrides: dict[str, Value] = {"num_hidden_layers": layers}
    model, draw = model_of(name, overrides), random.Random(layers)
    flow = Captures(model, CPU).flow({}, LEAST, high=128)
    assert model.width is not None
    unit, (low, high) = model.width.unit, WIDTHS[name]
    plan = planned(flow, 8, 128, high)
    for _ in range(12):
        sizes = draw.randint(2, 64), draw.randint(2, 128), draw.randrange(low, high + 1, unit)
        step = captured(name, overrides, sizes[2], *sizes[:2])
        if layers == 2:
            compare(flow, plan, sizes, step)
        else:  # names of repeated layers are other ones than those of a captured step
            assert SymbolicStep.of(flow).formula().at(*sizes) == (
                step.static_bytes + step_of(step, everything(step)).peak_bytes
            )


@pytest.mark.slow
def test_a_pass_decides_once_for_all_widths() -> None:
    options = {"size": "small", "seqs": (64, 64), "widths": (32, 128), "device": CPU}
    plain = graphopt.peak_formula("gpt2", **options)
    passes = [StreamLoss(returns="lazy"), Checkpoint(memory="min")]
    least = graphopt.peak_formula("gpt2", passes=passes, **options)
    assert least.terms.variables == ("batch", "hidden")
    assert least.at(8, 128) < plain.at(8, 128)
    assert least.at(4, 64) < plain.at(4, 64)
    with pytest.raises(GraphoptError, match="hidden=40 is not a multiple of 16"):
        graphopt.peak_formula("gpt2", passes=passes, at=(8, 64, 40), **options)
