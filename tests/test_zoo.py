"""Zoo models build, train and are captured; one line of text names a model or is refused."""

import resource
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from graphopt import zoo
from graphopt.errors import GraphoptError
from graphopt.models import load_model, loss_of

pytest.importorskip("transformers")

NAMES = zoo.names()
IMAGES = ("vit", "swin", "convnext", "resnet50")
LLAMA_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
# Parameters of the default size, as published with the checkpoints of the same configuration.
PUBLISHED = {
    "gpt2": 124_439_808,
    "llama": 6_738_415_616,
    "mistral": 7_241_732_096,
    "mixtral": 46_702_792_704,
    "t5": 60_506_624,
    "vit": 86_567_656,
    "swin": 28_288_354,
    "convnext": 28_589_128,
    "resnet50": 25_557_032,
    "clip": 151_277_313,
    "whisper": 37_760_640,
}


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- building ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_small_model_has_a_finite_loss_and_all_its_gradients(name: str) -> None:
    model = zoo.build(name)
    loss = model(**zoo.example_batch(name, model)).loss
    loss.backward()
    assert loss.shape == () and loss.isfinite()
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:  # Whisper's sinusoidal positions
            continue
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), f"{key} has a zero gradient"


@pytest.mark.parametrize("name", NAMES)
def test_a_small_model_is_small_in_training_and_without_dropout(name: str) -> None:
    model = zoo.build(name)
    assert parameters(model) < 500_000
    assert model.training
    assert not getattr(model.config, "use_cache", False)
    batch = zoo.example_batch(name, model)
    statistics = {key: value.clone() for key, value in model.state_dict().items()}
    first = model(**batch).loss
    model.load_state_dict(statistics)  # a batch norm changes its own
    assert torch.equal(first, model(**batch).loss)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_the_default_size_is_the_published_one(name: str) -> None:
    assert parameters(zoo.build(name, "default", device="meta")) == PUBLISHED[name]


def test_dropout_of_the_default_size_is_kept() -> None:
    assert zoo.build("bert", "default", device="meta").config.hidden_dropout_prob == 0.1


def test_the_same_seed_gives_the_same_weights_and_leaves_the_generator_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (zoo.build("gpt2", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.transformer.wte.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_dtype_applies_to_parameters_and_inputs_but_not_to_rotary_frequencies() -> None:
    model = zoo.build("llama", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32
    vit = zoo.build("vit", dtype=torch.bfloat16)
    assert zoo.example_batch("vit", vit)["pixel_values"].dtype == torch.bfloat16


def test_70_billion_parameters_on_meta_stay_in_bounded_memory() -> None:
    zoo.build("llama")  # so that the imports are not counted
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    model = zoo.build("llama", overrides=LLAMA_70B, device="meta", dtype=torch.bfloat16)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert parameters(model) == 70_553_706_496
    assert grown_kib < 200 * 1024
    assert time.perf_counter() - started < 60
    batch = zoo.example_batch("llama", model, batch=1, seq=2048)
    assert {value.device.type for value in batch.values()} == {"meta"}


# --- batches -----------------------------------------------------------------------------------


def test_the_batch_has_the_asked_shape_and_is_reproducible() -> None:
    model = zoo.build("t5")
    batch = zoo.example_batch("t5", model, batch=3, seq=16, seed=4)
    assert {key: tuple(value.shape) for key, value in batch.items()} == {
        "input_ids": (3, 16),
        "labels": (3, 16),
    }
    again = zoo.example_batch("t5", model, batch=3, seq=16, seed=4)
    assert all(torch.equal(batch[key], again[key]) for key in batch)


@pytest.mark.parametrize("name", IMAGES)
def test_images_have_the_size_of_the_configuration(name: str) -> None:
    batch = zoo.example_batch(name, zoo.build(name), batch=1)
    assert batch["pixel_values"].shape == (1, 3, 64, 64)


def test_more_tokens_than_positions_are_refused() -> None:
    with pytest.raises(GraphoptError, match="seq=200 is longer than the 128 positions"):
        zoo.example_batch("gpt2", zoo.build("gpt2"), seq=200)
    with pytest.raises(GraphoptError, match="batch=0"):
        zoo.example_batch("gpt2", zoo.build("gpt2"), batch=0)


# --- overrides and errors ----------------------------------------------------------------------


def test_overrides_reach_the_configuration_by_name_alias_and_path() -> None:
    assert zoo.build("gpt2", overrides={"n_layer": 3}).config.n_layer == 3
    assert zoo.build("gpt2", overrides={"num_hidden_layers": 3}).config.n_layer == 3
    assert zoo.build("vit", overrides={"num_labels": 7}).config.num_labels == 7
    assert zoo.build("bert", overrides={"hidden_dropout_prob": 0.5}).config.hidden_dropout_prob
    clip = zoo.build("clip", overrides={"text_config.num_hidden_layers": 3})
    assert clip.config.text_config.num_hidden_layers == 3
    assert clip.config.vision_config.num_hidden_layers == 2
    eager = zoo.build("gpt2", overrides={"attn_implementation": "eager"})
    assert eager.config._attn_implementation == "eager"


def test_overrides_are_read_from_text() -> None:
    read = zoo.parse_overrides(" n_layer=12,resid_pdrop=1e-1 ,use_cache=True,activation=relu")
    assert read == {"n_layer": 12, "resid_pdrop": 0.1, "use_cache": True, "activation": "relu"}
    assert [type(value) for value in read.values()] == [int, float, bool, str]


@pytest.mark.parametrize("text", ["n_layer", "n_layer=", "=3", "a=1,,b=2", "a=1,"])
def test_malformed_overrides_are_shown(text: str) -> None:
    with pytest.raises(GraphoptError, match="expected name=value") as caught:
        zoo.parse_overrides(text)
    assert repr(text) in str(caught.value)


def test_an_override_given_twice_is_refused() -> None:
    with pytest.raises(GraphoptError, match="'a' twice"):
        zoo.parse_overrides("a=1,a=2")


def test_an_unknown_attribute_is_named_with_the_close_ones() -> None:
    with pytest.raises(GraphoptError, match=r"'n_layers' \(did you mean n_layer"):
        zoo.build("gpt2", overrides={"n_layers": 3})
    with pytest.raises(GraphoptError, match=r"'text_config.hidden' .*did you mean hidden_act"):
        zoo.build("clip", overrides={"text_config.hidden": 3})
    with pytest.raises(GraphoptError, match="no configuration attribute 'to_dict'"):
        zoo.build("gpt2", overrides={"to_dict": 3})


@pytest.mark.parametrize("override", [{"n_layer": "many"}, {"n_embd": 65}])
def test_a_value_that_cannot_be_built_is_named(override: dict[str, str | int]) -> None:
    ((key, value),) = override.items()
    with pytest.raises(GraphoptError, match=f"cannot build gpt2 .* with {key}={value} on cpu"):
        zoo.build("gpt2", overrides=override)


def test_an_unknown_model_is_named_with_the_list() -> None:
    with pytest.raises(GraphoptError, match=r"'lama' \(did you mean llama.*has gpt2, llama"):
        zoo.build("lama")
    with pytest.raises(GraphoptError, match="'huge'"):
        zoo.build("gpt2", "huge")


def test_without_transformers_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(GraphoptError, match=r"gpt2 needs .*pip install graphopt\[zoo\]"):
        zoo.build("gpt2")


# --- capture -----------------------------------------------------------------------------------


def captured(model: nn.Module, batch: zoo.Batch) -> int:
    """The number of graphs that two runs of a training step are captured in, without a break."""
    torch._dynamo.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=count, fullgraph=True, dynamic=False)
    for _ in range(2):
        compiled(**batch).loss.backward()
    return len(graphs)


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "vit"])
def test_a_model_is_captured_as_one_graph(name: str) -> None:
    model = zoo.build(name)
    assert captured(model, zoo.example_batch(name, model)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_captured_as_one_graph(name: str) -> None:
    model = zoo.build(name)
    assert captured(model, zoo.example_batch(name, model)) == 1


# --- loading -----------------------------------------------------------------------------------

NET = """
    import torch
    from helper import width

    def make(depth=1):
        layers = [torch.nn.Linear(width, width) for _ in range(depth)]
        return torch.nn.Sequential(*layers), torch.randn(2, width)

    def bare():
        return make()[0]

    def named():
        return make()[0], {"input": torch.ones(1, width)}

    def broken():
        raise ValueError("no weights today")

    def wrong():
        return 3

    def wrong_pair():
        return make()[0], 3
"""


@pytest.fixture
def net(tmp_path: Path) -> str:
    (tmp_path / "helper.py").write_text("width = 4\n")
    (tmp_path / "net.py").write_text(textwrap.dedent(NET))
    return str(tmp_path / "net.py")


def test_load_a_zoo_model() -> None:
    loaded = load_model("gpt2", overrides={"n_layer": 1}, batch=1, seq=8)
    assert loaded.name == "gpt2" and loaded.model.config.n_layer == 1
    assert loaded.example_args == () and loaded.example_kwargs["input_ids"].shape == (1, 8)
    assert loaded.loss_of(loaded.model(**loaded.example_kwargs)).isfinite()


def test_load_a_factory(net: str) -> None:
    path = list(sys.path)
    loaded = load_model(f"{net}:make", overrides={"depth": 3})
    assert loaded.name == "net.py:make" and len(loaded.model) == 3
    assert loaded.model(*loaded.example_args).shape == (2, 4)
    assert sys.path == path
    assert load_model(f"{net}:bare").example_args == ()
    assert load_model(f"{net}:named").example_kwargs["input"].shape == (1, 4)
    meta = load_model(f"{net}:make", device="meta")
    assert meta.model[0].weight.is_meta and meta.example_args[0].is_meta


def test_load_an_exported_program(tmp_path: Path) -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    path = str(tmp_path / "linear.pt2")
    torch.export.save(torch.export.export(model, (x,)), path)
    loaded = load_model(path)
    assert loaded.name == "linear.pt2"
    assert torch.allclose(loaded.model(*loaded.example_args), model(x))
    with pytest.raises(GraphoptError, match=r"seq=8 has no effect on .*linear.pt2"):
        load_model(path, seq=8)
    with pytest.raises(GraphoptError, match="overrides="):
        load_model(path, overrides={"a": 1})


def test_an_exported_transformers_model_loads_in_a_fresh_process(tmp_path: Path) -> None:
    model = zoo.build("gpt2")
    path = str(tmp_path / "gpt2.pt2")
    torch.export.save(torch.export.export(model, (), zoo.example_batch("gpt2", model)), path)
    code = f"""if True:
        from graphopt.models import load_model
        loaded = load_model({path!r})
        print(float(loaded.loss_of(loaded.model(**loaded.example_kwargs))))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) == pytest.approx(
        model(**zoo.example_batch("gpt2", model)).loss.item(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("", r"names a file but no function in it: write .*net.py:factory"),
        (":mak", r"has no function 'mak'; it has make"),
        (":broken", r"net.py:broken failed: ValueError: no weights today"),
        (":wrong", r"net.py:wrong returned an int, not a torch.nn.Module or \(module, inputs\)"),
        (":wrong_pair", r"net.py:wrong_pair returned an int as the example inputs"),
    ],
)
def test_a_factory_that_cannot_be_used(net: str, factory: str, message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        load_model(net + factory)


def test_a_file_that_cannot_be_used(tmp_path: Path) -> None:
    for spec in ("missing.py:make", "missing.pt2"):
        with pytest.raises(GraphoptError, match=f"there is no file {spec.split(':')[0]}"):
            load_model(spec)
    (tmp_path / "bad.py").write_text("1 / 0\n")
    with pytest.raises(GraphoptError, match=r"running .*bad.py failed: ZeroDivisionError"):
        load_model(f"{tmp_path}/bad.py:make")
    (tmp_path / "bad.pt2").write_text("no program")
    with pytest.raises(GraphoptError, match=r"cannot load .*bad.pt2"):
        load_model(f"{tmp_path}/bad.pt2")
    with pytest.raises(GraphoptError, match="no zoo model is called 'gpt3'"):
        load_model("gpt3")


def test_the_loss_of_an_output() -> None:
    loss = torch.tensor(2.0)
    for output in (loss, (loss, 1), [loss], {"loss": loss}):
        assert loss_of(output) is loss
    for output in (torch.ones(2), (), {"logits": loss}, None):
        with pytest.raises(GraphoptError, match="no scalar loss"):
            loss_of(output)
