"""Streamed layers: the outputs of the model, bit for bit, within the memory, and clear refusals."""

import copy
import gc
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from block_models import FAMILIES, block_model, token_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt import GraphoptError, PlanError, StreamLayers, VerifyError, measure
from graphopt.cost_models.layer_pipeline import STEPS
from graphopt.passes.blocks import find_stack
from graphopt.passes.layer_plan import StreamLayersPlan
from graphopt.passes.layer_streaming import own_weights
from graphopt.passes.made_up_inputs import made_up_batch

GOLDEN = Path(__file__).parent.parent / "golden" / "stream_layers.txt"
RATE = 1e12  # bytes/s: planned for without being measured


@pytest.fixture(autouse=True)
def _short_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """The least number of timed steps; what was planned is as right with worse times."""
    monkeypatch.setattr("graphopt.passes.layer_times.SECONDS", 0.0)


class Block(nn.Module):
    """A residual MLP with a buffer that its forward writes to."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        if self.training or not x.isfinite().all():
            raise ValueError("no numbers")
        return x + self.down(torch.relu(self.up(self.norm(x))))


class HandWritten(nn.Module):
    """Blocks, of which two share a weight with each other, and one with the head."""

    def __init__(self, blocks: int = 6, width: int = 32, inner: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, inner) for _ in range(blocks))
        self.head = nn.Linear(width, inner)

    def shared(self) -> "HandWritten":
        """With tied weights."""
        self.blocks[1].up.weight = self.blocks[0].up.weight  # type: ignore[union-attr,assignment]
        self.head.weight = self.blocks[2].up.weight  # type: ignore[union-attr,assignment]
        return self

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def hand_written(**sizes: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return HandWritten(**sizes).eval(), torch.randn(3, 32)


def streamed(model: nn.Module, memory: Any = "min", **options: Any) -> Any:
    options = {"bytes_per_s": RATE} | options
    return graphopt.optimize(model, passes=[StreamLayers(memory, **options)])


def plan_of(model: Any) -> StreamLayersPlan:
    return model.report.steps[0].plan  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_weights_are_those_of_the_model(family: str) -> None:
    model = block_model(family)
    weights, batch = copy.deepcopy(model.state_dict()), made_up_batch(model)
    with torch.no_grad():
        expected = model(**batch).logits
    for memory in ("min", 0.8):
        short = streamed(model, memory)
        assert type(short).__name__ == type(model).__name__ and isinstance(short, type(model))
        assert plan_of(short).streamed
        for _ in range(3):
            assert torch.equal(short(**batch).logits, expected)
        found = short.state_dict()
        assert list(found) == list(weights)
        assert all(torch.equal(value, weights[name]) for name, value in found.items())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_generates_the_same(family: str) -> None:
    model = block_model(family)
    short = streamed(model, 0.8)
    for samples in (1, 3):  # batches change
        ids = token_batches(1, samples, 7)[0]
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "min_new_tokens": 8}
        for cache in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            expected = model.generate(ids, do_sample=False, **options, **cache)
            assert torch.equal(short.generate(ids, do_sample=False, **options, **cache), expected)


def test_saves_the_whole_model(tmp_path: Path) -> None:
    model = block_model("llama")
    streamed(model, 0.8).save_pretrained(tmp_path)
    loaded, batch = type(model).from_pretrained(tmp_path).eval(), made_up_batch(model)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_stack_by_hand() -> None:
    model, x = hand_written()
    short = streamed(model, 0.7, calibration=[x])
    assert 0 < len(plan_of(short).streamed) < 6
    before = [int(block.runs) for block in (*model.blocks, *short.blocks)]  # type: ignore[union-attr]
    for rows in (x, x[:1], torch.cat([x, x])):
        assert torch.equal(short(rows), model(rows))
    after = [int(block.runs) for block in (*model.blocks, *short.blocks)]  # type: ignore[union-attr]
    assert after == [runs + 3 for runs in before]  # buffers that a forward writes to keep what it wrote


def test_what_is_shared_stays() -> None:
    model, x = HandWritten().eval().shared(), torch.randn(3, 32)
    short = streamed(model, calibration=[x])
    assert torch.equal(short(x), model(x))
    assert short.head.weight is short.blocks[2].up.weight
    assert short.blocks[0].up.weight is short.blocks[1].up.weight
    kept = [name for name, p in short.blocks[2].named_parameters() if p.device.type == "cpu"]
    assert kept == ["up.weight"]
    assert not any(p.device.type == "cpu" for p in short.blocks[3].parameters())


def test_one_weight_twice_in_a_block() -> None:
    model, x = hand_written(inner=32)
    for block in model.blocks:  # type: ignore[union-attr]
        block.down.weight = block.up.weight
    short = streamed(model, calibration=[x])
    assert torch.equal(short(x), model(x))
    assert list(short.state_dict()) == list(model.state_dict())
    assert plan_of(short).block_bytes == (2 * 4096,) * 6  # 32 x 32 numbers once, and four vectors


def tensors_there_are() -> list[Tensor]:
    """All on the CPU, found without the pass; those of other classes (fakes, say) have no data."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    return [tensor for tensor in found if tensor.device.type == "cpu"]


def held_bytes(others: list[Tensor]) -> int:
    """Of the storages of all tensors but `others`, which are kept so that no address comes again."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors_there_are()}
    seen = {t.untyped_storage().data_ptr() for t in others}
    return sum(s.nbytes() for address, s in storages.items() if address not in seen)


@settings(max_examples=5)
@given(
    blocks=st.integers(2, 7),
    inner=st.sampled_from([64, 200, 1000]),
    rows=st.integers(1, 300),
    share=st.floats(0, 1),
)
def test_the_peak_is_as_predicted_and_within_the_memory(
    blocks: int, inner: int, rows: int, share: float
) -> None:
    """All tensors there are, found without the pass, and what the allocator gives out in a step."""
    others = tensors_there_are()
    model, x = hand_written(blocks=blocks, inner=inner)[0], torch.randn(rows, 32)
    least = StreamLayers("min", calibration=[x], bytes_per_s=RATE).plan(model).peak_bytes
    whole = sum(p.numel() * 4 for p in model.parameters())
    memory = least + int(share * whole)
    short = streamed(model, memory, calibration=[x])
    plan = plan_of(short)
    del model
    held = held_bytes(others)
    with torch.no_grad():
        peak = held + measure(lambda: short(x)).peak_bytes
    assert peak <= plan.peak_bytes <= memory
    assert peak >= 0.5 * plan.peak_bytes
    short.close()


def test_in_place_changes_the_model_itself() -> None:
    model, x = hand_written(inner=1000)
    expected, weights = model(x), copy.deepcopy(model.state_dict())
    short = streamed(model, calibration=[x], in_place=True)
    assert short is model
    assert torch.equal(model(x), expected)
    assert sum(p.numel() for p in model.parameters() if p.device.type == "cpu") == 32 * 1000 + 1000
    found = model.state_dict()
    assert all(torch.equal(found[name], weights[name]) for name in weights if "runs" not in name)


class Reads(HandWritten):
    """Looks at a weight of a block outside of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.blocks[0].up.weight.sum()  # type: ignore[union-attr,operator,no-any-return]


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_used_outside_of_their_block(in_place: bool) -> None:
    torch.manual_seed(0)
    gc.collect()
    model, x, threads = Reads().eval(), torch.randn(3, 32), threading.active_count()
    expected = model(x)
    with pytest.raises(VerifyError, match=r"Reads fails with streamed layers, whose weights"):
        streamed(model, calibration=[x], in_place=in_place)
    assert torch.equal(model(x), expected) and type(model) is Reads
    assert threading.active_count() == threads


def test_an_exception_within_a_block() -> None:
    model, x = hand_written()
    short = streamed(model, 0.7, calibration=[x])
    expected = model(x)
    for _ in range(3):
        with pytest.raises(ValueError, match="no numbers"):
            short(x * float("nan"))
        assert all(p.device.type == "meta" for p in short.blocks[plan_of(short).streamed[0]].parameters())
        assert torch.equal(short(x), expected)
    with pytest.raises(RuntimeError):
        short(torch.randn(3, 31))
    assert torch.equal(short(x), expected)


def test_a_damaged_file(tmp_path: Path) -> None:
    model, x = hand_written()
    streamed(model, calibration=[x], folder=tmp_path).close()
    (path,) = tmp_path.iterdir()  # a given folder keeps its file
    data = bytearray(path.read_bytes())
    data[-5000] ^= 1
    path.write_bytes(data)
    with pytest.raises(GraphoptError, match="is not what was written"):
        streamed(model, calibration=[x], folder=tmp_path)
    path.unlink()
    assert torch.equal(streamed(model, calibration=[x], folder=tmp_path)(x), model(x))


def test_closing_and_letting_go() -> None:
    model, x = hand_written()
    gc.collect()
    threads = threading.active_count()
    short = streamed(model, calibration=[x])
    path = short._layer_ring._channel.file.path
    assert path.exists() and threading.active_count() == threads + 1
    del short
    gc.collect()
    assert not path.parent.exists() and threading.active_count() == threads
    short = streamed(model, calibration=[x])
    short.close()
    with pytest.raises(GraphoptError, match="the model was closed"):
        short(x)
    assert threading.active_count() == threads


def test_refusals_of_the_model() -> None:
    model, x = hand_written()
    short = streamed(model, calibration=[x])
    inner = short.blocks
    for attempt, what in (
        (lambda: short.train(), "cannot train"),
        (lambda: short.requires_grad_(), "cannot compute gradients"),
        (lambda: short(x.clone().requires_grad_()), "cannot compute gradients"),
        (lambda: short.half(), "cannot be moved"),
        (lambda: inner.double(), "cannot be moved"),
        (lambda: short.load_state_dict(model.state_dict()), "cannot be given other weights"),
        (lambda: inner.load_state_dict(model.blocks.state_dict()), "cannot be given other weights"),  # type: ignore[union-attr]
        (lambda: copy.deepcopy(short), "cannot be copied"),
        (lambda: copy.deepcopy(inner), "cannot be copied"),
        (lambda: pickle.dumps(short), "cannot be pickled"),
        (lambda: pickle.dumps(inner), "cannot be pickled"),
    ):
        with pytest.raises(GraphoptError, match=rf"stream-layers: .*{what}"):
            attempt()  # type: ignore[no-untyped-call]
    inner.train()
    with pytest.raises(GraphoptError, match=r"stream-layers: .*cannot train"):
        short(x)
    assert torch.equal(short.eval()(x), model(x))
    with pytest.raises(PlanError, match="streams its layers already"):
        streamed(short, calibration=[x])


def test_under_torch_compile() -> None:
    model, x = hand_written()
    short = streamed(model, 0.7, calibration=[x])
    compiled = torch.compile(short, backend="eager")
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(compiled(x), model(x))


def test_other_passes_behind_it() -> None:
    model, x = hand_written()
    passes = [StreamLayers("min", calibration=[x], bytes_per_s=RATE), graphopt.Checkpoint()]
    both: Any = graphopt.optimize(model, passes=passes)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(both(x), model(x))


def test_too_little_memory() -> None:
    model, x = hand_written()
    pass_ = StreamLayers("min", calibration=[x], bytes_per_s=RATE)
    least = pass_.plan(model).peak_bytes
    with pytest.raises(PlanError, match=rf"one block in memory at a time .*\({least} bytes\)") as e:
        streamed(model, least - 1, calibration=[x])
    assert e.value.reachable_bytes == least
    assert plan_of(streamed(model, least, calibration=[x])).slots == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": None}, "memory=None: give"),
        ({"memory": 0.0}, "a share lies above 0"),
        ({"memory": "min", "phase": "train"}, "phase='train' is none of prefill, decode"),
        ({"memory": "min", "bytes_per_s": 0}, "bytes_per_s=0 is no rate"),
        ({"memory": "min", "throttled": True}, "throttled=True needs bytes_per_s"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        StreamLayers(**options)


def test_models_that_are_refused() -> None:
    _, x = hand_written()
    with torch.device("meta"):
        model = HandWritten()
    stack = find_stack(hand_written()[0], (x,))
    with pytest.raises(PlanError, match="the model is on meta"):
        own_weights(model, stack)
    mixed, _ = hand_written()
    mixed.blocks[1].up.to("meta")  # type: ignore[union-attr,index]
    with pytest.raises(PlanError, match=r"up\.weight is a Parameter on meta; .* plain parameters on cpu"):
        own_weights(mixed, find_stack_of(mixed))
    with pytest.raises(PlanError, match="takes a module, not function"):
        StreamLayers("min").plan(lambda: None)  # type: ignore[arg-type]
    empty = nn.Sequential(nn.Linear(32, 4), nn.Sequential(nn.Tanh(), nn.Tanh()))
    with pytest.raises(PlanError, match="no weights that nothing else has"):
        streamed(empty, calibration=[x])


def find_stack_of(model: nn.Module) -> Any:
    """The stack of a model that cannot run."""
    stack = find_stack(hand_written()[0], (torch.randn(3, 32),))
    return type(stack)(stack.path, tuple(model.blocks), stack.slot, stack.others)  # type: ignore[arg-type]


GOLDEN_PLAN = StreamLayersPlan(
    path="model.layers",
    blocks=6,
    resident=(2,),
    slots=2,
    memory_bytes=3200,
    peak_bytes=3100,
    fixed_bytes=60,
    step_bytes=40,
    block_bytes=(1000,) * 6,
    compute_seconds=(0.01,) * 6,
    rest_seconds=0.005,
    load_seconds=(0.02,) * 6,
    channel="file, throttled to 0.1 MB/s",
    seconds=0.1,
    bound_seconds=0.1,
)


def test_golden(request: Any) -> None:
    pipeline = GOLDEN_PLAN.pipeline()
    assert pipeline.run.peak_bytes == GOLDEN_PLAN.peak_bytes
    assert pipeline.seconds == pytest.approx(GOLDEN_PLAN.seconds)
    changes: dict[str, Any] = {"exposed": pipeline.exposed()}
    plan = type(GOLDEN_PLAN)(**(vars(GOLDEN_PLAN) | changes))
    whole = type(plan)(**(vars(plan) | {"resident": tuple(range(6)), "slots": 0, "exposed": ()}))
    text = f"{plan}\n{plan.table()}\n{plan.timeline()}\n\n{whole}\n\n{plan.to_json()}\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
    assert StreamLayersPlan.from_json(plan.to_json()) == plan
    events = json.loads(plan.chrome_trace())["traceEvents"]
    assert sum(e["name"] == "load 2" for e in events) == STEPS  # without residents only


def test_a_plan_edited_by_hand() -> None:
    model, x = hand_written()
    pass_ = StreamLayers("min", calibration=[x], bytes_per_s=RATE)
    plan = pass_.plan(model)
    edited = type(plan)(**(vars(plan) | {"resident": (1, 4), "slots": 3}))
    assert edited.streamed == (0, 2, 3, 5)
    assert torch.equal(pass_.apply(model, edited)(x), model(x))
    for changes, message in (
        ({"resident": (4, 1)}, r"resident=\[4, 1\]: positions from 0 to 5, ascending"),
        ({"resident": (6,)}, "positions from 0 to 5"),
        ({"slots": 0}, "slots=0: 1 to 6"),
        ({"slots": 7}, "slots=7"),
    ):
        with pytest.raises(PlanError, match=message):
            pass_.apply(model, type(plan)(**(vars(plan) | changes)))
    with pytest.raises(PlanError, match=r"the plan is for 6 blocks .* the model has 5"):
        pass_.apply(hand_written(blocks=5)[0], plan)
