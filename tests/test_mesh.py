"""One rank of a mesh: its peak beside that of real ranks, its collectives beside what they must be."""

import json
from pathlib import Path

import pytest
import torch
from mesh_worker import BATCH, SEQ, SIZES
from ranks import found_by

from graphopt import measure, optimize, zoo
from graphopt.cli import main
from graphopt.cost_models.devices import Cluster, get_device
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.errors import GraphoptError
from graphopt.mesh import Mesh, ranks_of, split_over, tensor_plan
from graphopt.mesh_report import MeshModel, report_on
from graphopt.models import LoadedModel, load_model
from graphopt.report import Report

pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
H100 = get_device("h100")
WIDTH, VOCABULARY, ITEM = 64, 512, 4


def small(name: str = "llama", **sizes: int) -> MeshModel:
    return MeshModel(
        name,
        lambda _: load_model(name, overrides={**SIZES, **sizes}, batch=BATCH, seq=SEQ, device="meta"),
    )


@pytest.fixture(scope="module")
def report() -> Report:
    """Of a rank of four, two and two."""
    return report_on(small(), Mesh(dp=2, tp=2), H100)


def test_the_peak_is_that_of_real_ranks(tmp_path: Path) -> None:
    def with_whole_head(_: int | None) -> LoadedModel:
        loaded = small().load(None)
        plan = tensor_plan(loaded.model, "llama")
        loaded.model.tp_plan = {path: style for path, style in plan.items() if path != "lm_head"}
        return loaded

    report = report_on(MeshModel("llama", with_whole_head), Mesh(tp=2), H100)
    measured = found_by("mesh_worker", tmp_path)
    assert len(measured) == 2
    assert report.predicted_peak_bytes == pytest.approx(max(measured), rel=0.01)
    assert report.predicted_peak_bytes == pytest.approx(min(measured), rel=0.01)


def test_the_peak_is_the_allocators(report: Report) -> None:
    """The head split, too, in a group whose other rank does not exist: sums are wrong, sizes right."""
    with ranks_of(2) as mesh:
        model = zoo.build("llama", overrides=SIZES)
        split_over(model, "llama", mesh)
        batch = zoo.example_batch("llama", model, BATCH, SEQ)
        optimized = optimize(model, passes=[], device="cpu-generic")
        optimized(**batch).loss.backward()
        model.zero_grad(set_to_none=True)
        peak = measure(lambda: optimized(**batch).loss.backward()).peak_bytes
    predicted = report.predicted_peak_bytes
    assert predicted is not None
    assert predicted - report.graphs[0].static_bytes == pytest.approx(peak, rel=0.01)


def test_collectives_are_those_of_the_plan(report: Report) -> None:
    """After each attention and MLP, for each product that reads what is whole, for ids and for logits."""
    assert report.mesh is not None
    rows = {(r.axis, r.kind, r.half): (r.count, r.nbytes) for r in report.mesh.collectives}
    hidden, layers = BATCH * SEQ * WIDTH * ITEM, SIZES["num_hidden_layers"]
    parameters = report.graphs[0].parameter_bytes
    assert rows == {
        ("tp", "all_reduce", "forward"): (2 * layers + 1, hidden),
        ("tp", "all_reduce", "backward"): (5 * layers + 1, hidden),
        ("tp", "all_gather", "forward"): (1, BATCH * SEQ * VOCABULARY // 2 * ITEM),
        ("dp", "all_reduce", "backward"): (1, parameters + VOCABULARY * WIDTH * ITEM // 2),
    }  # DTensor leaves the gradient of the embedding as a sum that has the rows of all ranks
    split = 4 * WIDTH * WIDTH - WIDTH * WIDTH  # two heads of four share keys and values
    mlp = 3 * WIDTH * 128
    whole = (2 * layers + 1) * WIDTH  # norms
    assert parameters == ITEM * (layers * (split + mlp) // 2 + VOCABULARY * WIDTH + whole)


def test_times_are_of_the_ring(report: Report) -> None:
    assert report.mesh is not None
    for row in report.mesh.collectives:
        hops = {"all_reduce": 2, "all_gather": 1}[row.kind]
        sent = row.nbytes  # of two ranks: both halves once, or the own part
        expected = row.count * (hops * 3.4e-6 + sent / 450e9)
        assert row.seconds == pytest.approx(expected) and row.source == "roofline"
        assert row.sent_bytes == row.count * sent
    facts = report.mesh
    assert facts.step_seconds == pytest.approx(facts.compute_seconds + facts.exposed_seconds)
    assert facts.exposed_seconds == pytest.approx(sum(r.exposed_seconds for r in facts.collectives))
    assert facts.compute_seconds == pytest.approx(report.graphs[0].step_seconds, rel=0.02)


def test_text_and_trace_of_a_mesh(report: Report) -> None:
    text = str(report)
    assert "Communication of each of the 4 ranks of dp=2,tp=2" in text
    assert "5 × all_reduce (tp) of 32.8 kB in the forward" in text
    events = json.loads(report.chrome_trace())["traceEvents"]
    lanes = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert sorted(lanes) == ["backward", "forward", "group dp", "group tp"]
    assert report.mesh is not None
    ends = max(e["ts"] + e["dur"] for e in events if e["ph"] == "X")
    assert ends == pytest.approx(report.mesh.step_seconds * 1e6)


def test_gradients_are_sent_while_others_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """With small buckets the first are averaged beside the backward, and only the last is waited for."""
    monkeypatch.setattr("graphopt.mesh_report.BUCKET_BYTES", 1 << 16)
    facts = report_on(small(num_hidden_layers=1), Mesh(dp=8), H100).mesh
    assert facts is not None and {r.axis for r in facts.collectives} == {"dp"}
    assert sum(r.count for r in facts.collectives) > 3
    assert facts.hidden_seconds > 0.3 * facts.communication_seconds
    assert facts.exposed_seconds > 0


def test_measured_links() -> None:
    samples = {"all_reduce": ((1, 1.0), (10**9, 1.0)), "all_gather": ((1, 2.0), (10**9, 2.0))}
    links = LinkCosts(Cluster(H100, 2, 1e9, 1e-6, "made up"), samples)
    facts = report_on(small(num_hidden_layers=1), Mesh(tp=2), get_device("cpu-generic"), (), links).mesh
    assert facts is not None and {r.source for r in facts.collectives} == {"measured"}
    assert facts.communication_seconds == pytest.approx(sum(r.seconds for r in facts.collectives))
    assert {r.seconds for r in facts.collectives if r.kind == "all_gather"} == {2.0}


REFUSED = {
    "axis": (["--mesh", "ep=2"], "'ep' is no axis; there are dp, tp, pp"),
    "degree": (["--mesh", "tp=two"], "write tp=N with a degree N of at least 1"),
    "twice": (["--mesh", "tp=2,tp=2"], "gives tp twice"),
    "pipeline": (["--mesh", "tp=2,pp=2"], "a stage of a pipeline is not made yet"),
    "heads": (["--mesh", "tp=3"], "tp=3 does not divide the 4 num_attention_heads of llama"),
    "sizes": (
        ["--mesh", "tp=2", "--set", "intermediate_size=129"],
        "tp=2 does not divide the 129 outputs of model.layers.0.mlp.gate_proj",
    ),
    "links alone": (["--links", "links.json"], "--links is for a report on a mesh"),
    "link": (["--mesh", "tp=2", "--device", "cpu-generic"], "what connects devices such as cpu-generic"),
}


@pytest.mark.parametrize("arguments, message", REFUSED.values(), ids=REFUSED)
def test_refusals(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    device = [] if "--device" in arguments else ["--device", "h100"]
    assert main(["report", "llama", "--size", "small", *device, *arguments]) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2", r"gpt2 \(GPT2LMHeadModel\) has no plan of tensor parallelism"),
        ("mixtral", "splits model.layers.*.mlp.experts.gate_up_proj by 'packed_colwise'"),
    ],
)
def test_models_that_are_not_split(name: str, message: str) -> None:
    model = load_model(name, device="meta").model
    with ranks_of(2) as mesh, pytest.raises(GraphoptError, match=message.replace("*", r"\*")):
        split_over(model, name, mesh)


def test_a_process_of_a_group_is_refused() -> None:
    with ranks_of(2), pytest.raises(GraphoptError, match="is a rank of a group already"), ranks_of(2):
        pass


def test_tied_parameters_stay_tied() -> None:
    loaded = load_model("gemma", device="meta")
    assert tensor_plan(loaded.model, "gemma")["lm_head"] == "colwise_gather_output"
    with ranks_of(2) as mesh:
        split_over(loaded.model, "gemma", mesh)
        embedding, head = loaded.model.model.embed_tokens.weight, loaded.model.lm_head.weight
        assert embedding is head and head.to_local().shape[0] * 2 == head.shape[0]
