"""Which losses are recognised, in every variant; what is refused; plans, choices, a golden text."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_models import FORMS, D, N, Projection, V, inputs, safe
from programs import arguments, run_joint, run_split
from texts import program_text
from torch import Tensor, nn

import graphopt
from graphopt import PlanError, Program, StreamLoss, zoo
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.passes.loss_choice import candidates
from graphopt.passes.loss_rewrite import streamed
from graphopt.passes.loss_variants import VARIANTS, NotPossible
from graphopt.passes.stream_loss import StreamLossPlan
from graphopt.program import Role
from graphopt.stream_ops import ops
from graphopt.tangents import unlikely_tangents, without_gradients
from graphopt.verify import verify

CPU = get_device("cpu-generic")
# The softmax coefficients of these depend on the logits in a way that no pass over tokens knows.
ENTROPIES = {form for form in FORMS if "entropy" in form}
NOT_BY_TOKENS = {"none", "preference", *ENTROPIES}


@functools.cache
def traced(form: str, frozen: bool = False, bias: bool = False) -> tuple[Program, nn.Module, Any]:
    """A program of one form in float64, the model, and its inputs."""
    torch.manual_seed(1)
    torch._dynamo.reset()
    known = {k: v.double() if v.is_floating_point() else v for k, v in inputs().items()}
    known["x"] = known["x"].detach().requires_grad_()
    model = Projection(FORMS[form], bias).double()
    model.head.requires_grad_(not frozen)
    return graphopt.trace(model, known), model, known


def planned(program: Program, **options: Any) -> StreamLossPlan:
    return StreamLoss(**options).plan(program, Costs.of(program, CPU))


def assert_close(found: Sequence[Tensor | None], want: Sequence[Tensor | None]) -> None:
    """Within 1e-12 of the largest number; None where None."""
    for a, b in zip(found, want, strict=True):
        assert (a is None) is (b is None)
        if a is not None and b is not None:
            assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(b.abs().max()))


def wide(program: Program, rows: int = N, columns: int = V) -> list[str]:
    """The nodes that hold a tensor like the logits."""
    values = ((n.name, n.meta["val"]) for n in program.operators())
    return [name for name, v in values if isinstance(v, torch.Tensor) and v.numel() == rows * columns]


# --- equal to the program before -----------------------------------------------------------------


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_in_every_variant(form: str, frozen: bool) -> None:
    program, model, known = traced(form, frozen)
    values = arguments(program, model, known)
    want = run_joint(program, values)
    ran = []
    for variant in VARIANTS:
        plan = planned(program, variant=variant, block=5)
        if not plan.heads:
            continue
        result = StreamLoss().apply(program, plan)
        verify(result, before=program)
        own = [n for n in wide(result) if not form.startswith("probabilities")]
        assert not own, f"{variant} still makes {own}"
        for run in (run_joint, run_split):
            assert_close(run(result, values), want)
        ran.append(variant)
    expected = {"vocabulary"}
    expected |= set() if form in NOT_BY_TOKENS else {"tokens"}
    expected |= {"frozen"} if frozen and form not in {"soft cap", *ENTROPIES} else set()
    assert set(ran) == expected


OPTIONS = st.fixed_dictionaries(
    {
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "probabilities": st.booleans(),
        "weighted": st.booleans(),
        "smoothing": st.sampled_from([0.0, 0.1]),
        "ignore": st.sampled_from([-100, 3]),
        "inner": st.sampled_from([1.0, 0.3]),
        "cap": st.sampled_from([0.0, 4.0]),
        "z_loss": st.booleans(),
        "entropy": st.booleans(),
        "bias": st.booleans(),
    }
)


def loss_with(o: Mapping[str, Any]) -> Any:
    """A loss with these options; one for each token is weighted."""

    def loss(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
        z = z * o["inner"]
        z = o["cap"] * torch.tanh(z / o["cap"]) if o["cap"] else z
        targets = g["q"] if o["probabilities"] else g["t"] if o["ignore"] < 0 else safe(g["t"])
        found = F.cross_entropy(
            z,
            targets,
            g["w"] if o["weighted"] else None,
            ignore_index=-100 if o["probabilities"] else o["ignore"],
            reduction=o["reduction"],
            label_smoothing=o["smoothing"],
        )
        found = (found * g["w"][:N]).sum() if o["reduction"] == "none" else found
        if o["entropy"]:
            logp = z.log_softmax(-1)
            found = found - 0.1 * (g["w"][:N] * -(logp.exp() * logp).sum(-1)).sum()
        return found + 1e-2 * z.logsumexp(-1).square().mean() if o["z_loss"] else found

    return loss


@settings(max_examples=10)
@given(OPTIONS, st.integers(1, 20))
def test_options_against_eager_in_float64(o: dict[str, Any], block: int) -> None:
    torch._dynamo.reset()
    known = {k: v.detach().double() if v.is_floating_point() else v for k, v in inputs().items()}
    known["x"].requires_grad_()
    model = Projection(loss_with(o), o["bias"]).double()
    program = graphopt.trace(model, known)
    loss = model(**known)
    loss.backward()
    leaves = {**dict(model.named_parameters()), **known}
    labels = [i.label for i in program.inputs if i.role is not Role.TANGENT]
    want = [loss.detach(), *(leaves[label].grad for label in labels)]
    values = arguments(program, model, known)
    for variant in ("tokens", "vocabulary"):
        plan = planned(program, variant=variant, block=block)
        assert plan.heads or variant == "tokens"
        assert_close(run_split(StreamLoss().apply(program, plan), values), want)


@pytest.mark.parametrize("variant", ["tokens", "vocabulary"])
def test_a_bias(variant: str) -> None:
    program, model, known = traced("mean", bias=True)
    result = StreamLoss().apply(program, planned(program, variant=variant, block=5))
    values = arguments(program, model, known)
    for a, b in zip(run_split(result, values), run_joint(program, values), strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("variant", ["tokens", "vocabulary"])
def test_all_tokens_ignored(variant: str, drop: bool) -> None:
    program, model, known = traced("mean")
    plan = planned(program, variant=variant, block=5, drop_ignored=drop)
    assert plan.drop_ignored is drop
    values = arguments(program, model, known | {"t": torch.full((N,), -100)})
    found = run_joint(StreamLoss().apply(program, plan), values)
    assert found[0].isnan() and run_joint(program, values)[0].isnan()
    values = arguments(program, model, known)
    found = run_joint(StreamLoss().apply(program, plan), values)
    for a, b in zip(found, run_joint(program, values), strict=True):
        assert a is b is None or torch.allclose(a, b, rtol=1e-9, atol=1e-11)


def test_tokens_that_others_read_are_not_dropped() -> None:
    program = traced("z-loss")[0]
    assert not planned(program, variant="vocabulary", block=5, drop_ignored=True).drop_ignored
    plan = StreamLossPlan.from_json(planned(program, variant="vocabulary", block=5).to_json())
    forced = StreamLossPlan(**{**plan.__dict__, "drop_ignored": True})
    with pytest.raises(NotPossible, match="only be dropped where only the loss reads them"):
        StreamLoss().apply(program, forced)


class Heads(nn.Module):
    """Two losses on one weight, which is the embedding's too."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.body = nn.Linear(D, 2 * D)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        first, second = torch.tanh(self.body(self.table(t))).chunk(2, -1)
        scores = [F.linear(h, self.table.weight) for h in (first, second)]
        return F.cross_entropy(scores[0], t) + 0.3 * F.cross_entropy(scores[1], t.flip(0))


def test_several_heads_on_a_tied_weight() -> None:
    torch.manual_seed(0)
    model, t = Heads().double(), torch.randint(V, (N,))
    program = graphopt.trace(model, {"t": t})
    values = arguments(program, model, {"t": t})
    for variant in ("tokens", "vocabulary"):
        plan = planned(program, variant=variant, block=4)
        assert len(plan.heads) == 2
        result = StreamLoss().apply(program, plan)
        assert not wide(result)
        for a, b in zip(run_split(result, values), run_joint(program, values), strict=True):
            assert a is b is None or torch.allclose(a, b, rtol=1e-9, atol=1e-11)


LANGUAGE_MODELS = [
    pytest.param(name, marks=() if name in ("gpt2", "bert") else pytest.mark.slow)
    for name, entry in zoo.ENTRIES.items()
    if entry.family in ("causal-lm", "masked-lm", "seq2seq", "speech")
]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_are_matched(name: str) -> None:
    pytest.importorskip("transformers")
    model = zoo.build(name, "small", {"vocab_size": 1031})
    program = graphopt.trace(model, zoo.example_batch(name, model, 2, 16))
    program = without_gradients(program, unlikely_tangents(program))
    found = streamed(program, returns="loss")
    assert len(found.heads) == 1 and found.heads[0].vocabulary == 1031 and not found.remarks
    left = [
        n for n in found.program.operators() if n.name in wide(found.program, found.heads[0].rows, 1031)
    ]
    assert [n.target for n in left] == [ops.absent_logits.default]


# --- left alone ----------------------------------------------------------------------------------

REFUSED = {
    "transpose": lambda z, g: F.cross_entropy(z.view(2, -1, V).transpose(1, 2), safe(g["t"]).view(2, -1)),
    "sort": lambda z, g: F.cross_entropy(z.sort(-1)[0], safe(g["t"])),
    "mul": lambda z, g: F.cross_entropy(z * z, safe(g["t"])),
    "slice": lambda z, g: F.cross_entropy(z[:, : V - 1], safe(g["t"]).clamp_max(V - 2)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_recognised_is_left_alone_with_a_remark(what: str) -> None:
    program = graphopt.trace(Projection(REFUSED[what]), inputs())
    plan = planned(program)
    assert plan.heads == () and plan.peak_bytes == plan.baseline_bytes
    assert "mm is left alone" in str(plan) and what in plan.remarks[0]
    result = StreamLoss().apply(program, plan)
    assert [n.name for n in result.graph.nodes] == [n.name for n in program.graph.nodes]


def test_a_program_without_a_loss() -> None:
    program = graphopt.trace(nn.Linear(4, 4), torch.ones(3, 4))
    assert str(planned(program)) == "no loss is streamed"


def test_options_are_checked() -> None:
    with pytest.raises(PlanError, match="variant='all' is none of tokens, vocabulary, frozen"):
        StreamLoss(variant="all")
    with pytest.raises(PlanError, match="returns='none' is none of"):
        StreamLoss(returns="none")
    with pytest.raises(PlanError, match="block=0 must be positive"):
        StreamLoss(block=0)


def test_a_plan_for_another_program() -> None:
    program = traced("mean")[0]
    plan = planned(program, variant="tokens", block=3)
    other = StreamLossPlan(**{**plan.__dict__, "heads": (("mm_9", "tokens", 3),)})
    with pytest.raises(PlanError, match="mm_9 is no projection"):
        StreamLoss().apply(program, other)
    wrong = StreamLossPlan(**{**plan.__dict__, "heads": ((plan.heads[0][0], "frozen", 3),)})
    with pytest.raises(PlanError, match="its weight needs a gradient"):
        StreamLoss().apply(program, wrong)


# --- the choice ----------------------------------------------------------------------------------


@functools.cache
def large() -> Program:
    """A head whose logits are by far the largest tensors."""
    torch._dynamo.reset()
    loss = FORMS["mean"]
    x = torch.ones(512, 32, requires_grad=True)
    g = {"x": x, "t": torch.zeros(512, dtype=torch.int64), "q": torch.ones(1), "w": torch.ones(1)}
    return graphopt.trace(Projection(loss, vocabulary=4096, hidden=32), g)


def test_a_budget_takes_the_fastest_that_fits() -> None:
    least, free = planned(large(), memory="min"), planned(large(), memory=1.0)
    assert free.heads == () or free.seconds <= free.baseline_seconds
    assert least.peak_bytes < 0.2 * least.baseline_bytes
    middle = (least.peak_bytes + least.baseline_bytes) // 4
    plan = planned(large(), memory=middle)
    assert least.peak_bytes <= plan.peak_bytes <= middle and plan.seconds <= least.seconds
    default = planned(large())
    assert default.peak_bytes <= 1.3 * least.peak_bytes and default.seconds <= least.seconds
    with pytest.raises(PlanError) as caught:
        planned(large(), memory=least.peak_bytes - 1)
    assert caught.value.reachable_bytes == least.peak_bytes


def test_the_module_of_a_result_runs_what_its_graph_says() -> None:
    program = large()
    result = StreamLoss().apply(program, planned(program, variant="tokens", block=64))
    assert "streamed_sweep" in result.module.code and "_log_softmax" not in result.module.code


def test_a_frozen_head_in_thin_blocks_of_tokens_is_slower_than_attention() -> None:
    program = traced("mean", frozen=True)[0]
    base = streamed(program)
    found = candidates(base, Costs.of(program, CPU), None, None, False, True)
    seconds = {c.heads[0][1:]: c.seconds for c in found}
    assert seconds["frozen", V] <= min(s for (way, _), s in seconds.items() if way == "vocabulary")


def test_planning_changes_nothing_and_repeats() -> None:
    before = str(large().graph)
    assert planned(large()) == planned(large())
    assert str(large().graph) == before


def test_the_names_of_a_rewritten_program_do_not_depend_on_the_run() -> None:
    first, second = (streamed(large()).program for _ in range(2))
    assert [n.name for n in first.graph.nodes] == [n.name for n in second.graph.nodes]


# --- golden text ---------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent.parent / "golden" / "stream_loss.txt"


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    x, t = torch.ones(8, 2, requires_grad=True), torch.zeros(8, dtype=torch.int64)
    g = {"x": x, "t": t, "q": torch.ones(1), "w": torch.ones(1)}
    program = graphopt.trace(Projection(FORMS["mean"], vocabulary=64, hidden=2), g)
    parts = {"before": program_text(program)}
    for variant, block in (("tokens", 4), ("vocabulary", 16)):
        plan = planned(program, variant=variant, block=block)
        parts[f"plan: {variant}"] = str(plan)
        parts[f"after: {variant}"] = program_text(StreamLoss().apply(program, plan))
    text = "".join(f"# {title}\n{part}\n\n" for title, part in parts.items())
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
