"""Probes of single nodes: workspaces known by hand, and nothing disturbed."""

import json

import pytest
import torch
from torch._subclasses import FakeTensorMode

from graphopt.cost_models import calibrate, measured
from graphopt.cost_models.measured import probe, probe_key, workspaces
from graphopt.cost_models.values import output_tensors, touched_bytes

aten = torch.ops.aten


def the_node(graph, target):
    (node,) = [node for node in graph.nodes if node.target is target]
    return node


def probed(graph, target):
    node = the_node(graph, target)
    return probe([node], repeats=0, cache=None)[probe_key(node)]


def test_workspace_by_hand(traced) -> None:
    x = torch.randn(64, 100)
    size = 4 * 64 * 100
    dropout = probed(traced(lambda x: aten.native_dropout(x, 0.3, True), x), aten.native_dropout.default)
    assert (dropout.workspace_bytes, dropout.retained_bytes) == (size, size + 64 * 100)
    add = probed(traced(lambda x: x + x.t().reshape(64, 100), x), aten.add.Tensor)
    assert (add.workspace_bytes, add.retained_bytes) == (0, size)
    # A sum of two dtypes converts one operand first, a cumulative one of booleans all of it.
    promoted = probed(traced(lambda x: x + x.half(), x), aten.add.Tensor)
    assert (promoted.workspace_bytes, promoted.retained_bytes) == (size, size)
    counts = probed(traced(lambda x: (x > 0).cumsum(-1), x), aten.cumsum.default)
    assert (counts.workspace_bytes, counts.retained_bytes) == (2 * size, 2 * size)


def test_output_in_a_larger_storage_is_seen(traced) -> None:
    x = torch.randn(64, 100)
    loss = probed(traced(lambda x: aten.mse_loss(x, x), x), aten.mse_loss.default)
    assert loss.retained_bytes == 4 * 64 * 100  # one number, in the memory of all the differences


def test_in_place_op_works_on_its_own_copy(traced) -> None:
    x = torch.ones(8, 8)
    result = probed(traced(lambda x: x.mul_(x), x), aten.mul_.Tensor)
    assert (result.workspace_bytes, result.retained_bytes) == (0, 0)
    assert result.seconds is not None
    assert x.sum() == 64


def test_every_node_of_a_joint_graph_retains_its_outputs(joint_graph) -> None:
    model = torch.nn.Sequential(
        torch.nn.Embedding(32, 16),
        torch.nn.Linear(16, 16),
        torch.nn.LayerNorm(16),
        torch.nn.Dropout(0.1),
        torch.nn.Linear(16, 32),
    )
    ids = torch.randint(0, 32, (4, 12))

    def loss(ids):
        return torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())

    nodes = list(joint_graph(loss, ids).nodes)
    probes = probe(nodes, cache=None)
    assert len(probes) > 10
    for node in nodes:
        if (key := probe_key(node)) is not None:
            assert probes[key].remark == ""
            assert probes[key].seconds is not None
            outputs = sum(touched_bytes(tensor) for tensor in output_tensors(node))
            assert probes[key].retained_bytes == outputs, key
    dropout = the_node(joint_graph(loss, ids), aten.native_dropout.default)
    assert workspaces([dropout], probes) == {dropout.name: 4 * 4 * 12 * 16}


def test_convolution_copies_its_operands(traced) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("only oneDNN computes in a layout of its own")
    inputs = torch.randn(2, 32, 16, 16), torch.randn(32, 32, 3, 3)
    graph = traced(lambda x, w: torch.conv2d(x, w, padding=1), *inputs)
    found = probed(graph, aten.convolution.default)
    assert found.retained_bytes == 4 * 2 * 32 * 16 * 16
    assert found.workspace_bytes > 0


def test_random_state_modes_and_autocast_are_undisturbed(traced) -> None:
    graph = traced(lambda x: aten.bernoulli(x.sigmoid()), torch.randn(64, 64))
    state = torch.get_rng_state()
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = probed(graph, aten.bernoulli.default)
    assert torch.equal(state, torch.get_rng_state())
    assert found.retained_bytes == 4 * 64 * 64
    assert found.seconds is not None


def test_equal_nodes_share_a_key_and_others_do_not(traced) -> None:
    def function(x):
        return x + 1, x + 1, x + 2, x.t() + 1, x.double() + 1

    nodes = [n for n in traced(function, torch.randn(3, 4)).nodes if n.target is aten.add.Tensor]
    keys = [probe_key(node) for node in nodes]
    assert keys[0] == keys[1] == "aten.add.Tensor(float32[3, 4]{4, 1}@cpu, 1)@cpu"
    assert len(set(keys)) == 4
    assert len(probe(nodes, cache=None)) == 4


def test_left_out(traced) -> None:
    def function(x):
        return x.t(), x.nonzero(), x.sum().item()

    graph = make_unbacked(function, torch.randn(3, 4))
    sum_ = the_node(graph, aten.sum.default)
    assert [key for node in graph.nodes if (key := probe_key(node))] == [probe_key(sum_)]


def make_unbacked(function, x):
    """A symbolic graph of `function`, with sizes that depend on data."""
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    environment = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    mode = FakeTensorMode(shape_env=environment)
    return make_fx(function, tracing_mode="real")(mode.from_tensor(x)).graph


def test_custom_op_is_left_out(traced) -> None:
    with torch.library._scoped_library("graphopt_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
        graph = traced(lambda x: torch.ops.graphopt_test.twice(x), torch.randn(3))
        assert probe(graph.nodes, cache=None) == {}


def test_op_that_fails_gets_a_remark(traced) -> None:
    def function(x):
        return aten.linalg_cholesky_ex(x @ x, check_errors=True)[0]

    graph = traced(function, torch.randn(4, 4))
    found = probed(graph, aten.linalg_cholesky_ex.default)
    assert found.seconds is None
    assert "LinAlgError" in found.remark
    assert workspaces(graph.nodes, probe(graph.nodes, cache=None)) == {}


def test_input_too_large_gets_a_remark(traced, monkeypatch) -> None:
    monkeypatch.setattr(measured, "physical_memory_bytes", lambda: 1000)
    found = probed(traced(lambda x: x + 1, torch.randn(64, 64)), aten.add.Tensor)
    assert found.seconds is None
    assert "16384 bytes" in found.remark


def test_large_operators_of_known_scratch_are_not_run(traced, monkeypatch) -> None:
    """Planning is not to hold what the plan avoids; where they are timed, or read columns, they run."""

    def function(x, weight):
        logits = (x @ weight.t()).tanh()
        return logits.log_softmax(-1), logits.t().log_softmax(-1), logits.cumsum(0)

    graph = traced(function, torch.randn(8, 16), torch.randn(32, 16))
    every = {key for node in graph.nodes if (key := probe_key(node))}
    assert set(probe(graph.nodes, repeats=0, cache=None)) == every
    monkeypatch.setattr(measured, "_LARGE_BYTES", 1000)
    run = set(probe(graph.nodes, repeats=0, cache=None))
    assert {key.split(".")[1] for key in every - run} == {"mm", "tanh", "_log_softmax"}
    assert {key.split(".")[1] for key in run} == {"cumsum", "_log_softmax"}
    assert set(probe(graph.nodes, repeats=1, cache=None)) == every


def test_missing_device_gets_a_remark(traced) -> None:
    if torch.cuda.is_available():
        pytest.skip("the device is there")
    with FakeTensorMode():
        x = torch.empty(4, device="cuda")
        found = probed(traced(lambda x: aten.add(x, 1), x), aten.add.Tensor)
    assert found.seconds is None
    assert found.remark == "there is no device cuda:0 here"


def test_caller_that_profiles_gets_times_only(traced, tmp_path) -> None:
    graph = traced(lambda x: x + 1, torch.randn(64, 64))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as session:
        found = probe(graph.nodes, cache=tmp_path)
        torch.ones(3).sigmoid()
    assert all(item.seconds is not None and item.remark for item in found.values())
    assert "aten::sigmoid" in {event.key for event in session.key_averages()}
    assert not any(item.remark for item in probe(graph.nodes, cache=tmp_path).values())


def test_cache_holds_what_was_probed(traced, tmp_path, monkeypatch) -> None:
    graph = traced(lambda x: aten.native_dropout(x, 0.3, True), torch.randn(8, 8))
    first = probe(graph.nodes, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    assert [*json.loads(file.read_text())] == [*first]
    monkeypatch.setattr(measured, "_measure", lambda *_: pytest.fail("it was probed before"))
    assert probe(graph.nodes, cache=tmp_path) == first
    monkeypatch.undo()
    more = traced(lambda x: x + 1, torch.randn(8, 8))
    probe(more.nodes, cache=tmp_path)
    assert len(json.loads(file.read_text())) == 2
    assert calibrate.read_json(file)[next(iter(first))][1] == 4 * 8 * 8


def test_a_first_run_is_no_time(traced, tmp_path, monkeypatch) -> None:
    """What ran once for its scratch is timed where time is asked for; what is timed is not run again."""
    graph = traced(lambda x: x + 1, torch.randn(8, 8))
    (key,) = probe(graph.nodes, repeats=0, cache=tmp_path)
    monkeypatch.setattr(measured, "_run", lambda *_: (7.0, True))
    assert probe(graph.nodes, cache=tmp_path)[key].seconds == 7.0
    monkeypatch.setattr(measured, "_measure", lambda *_: pytest.fail("it was timed before"))
    assert probe(graph.nodes, repeats=0, cache=tmp_path)[key].seconds == 7.0


@pytest.mark.parametrize(
    ("runs", "seconds", "kept"),
    [
        ([(9.0, True), (0.1, False), (0.15, True)], 0.15, True),  # the first run does not count
        ([(0.05, True), (0.03, False), (0.02, False), (0.04, False)], 0.02, False),
        ([(0.05, True), *[(0.02, False)] * 4, (0.03, True)], 0.03, True),
    ],
)
def test_disturbed_times_are_not_kept(traced, tmp_path, monkeypatch, runs, seconds, kept) -> None:
    given = iter(runs + [(0.02, False)] * 20)
    monkeypatch.setattr(measured, "_run", lambda *_: next(given))
    graph = traced(lambda x: x + 1, torch.randn(8, 8))
    (found,) = probe(graph.nodes, repeats=2, cache=tmp_path).values()
    assert found.seconds == seconds and bool(found.remark) is not kept
    (file,) = tmp_path.iterdir()
    assert bool(json.loads(file.read_text())) is kept


def test_symbolic_graph_is_probed_at_its_hints(traced) -> None:
    graph = traced(lambda x: aten.native_dropout(x, 0.3, True), torch.randn(6, 10), mode="symbolic")
    assert probed(graph, aten.native_dropout.default).workspace_bytes == 4 * 6 * 10
