"""Well-known architectures by name, with random weights and example batches that give a loss.

Every model is built from a configuration, never downloaded. The size ``"default"`` is the default
configuration of the transformers library, with 1000 classes for image models; the size ``"small"``
keeps the structure, with two layers and a width of 64, for tests. Small models have no dropout.

>>> from graphopt import zoo
>>> model = zoo.build("gpt2", "small", {"n_layer": 3})
>>> batch = zoo.example_batch("gpt2", model, batch=2, seq=16)
>>> {key: tuple(value.shape) for key, value in batch.items()}
{'input_ids': (2, 16), 'labels': (2, 16)}
>>> model(**batch).loss.shape
torch.Size([])
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphopt.errors import GraphoptError

Value = str | int | float | bool
Size = Literal["small", "default"]
Batch = dict[str, Tensor | bool]


@dataclass(frozen=True)
class ZooEntry:
    """One architecture: where its class is found and what its configuration is given.

    ``small`` and ``default`` are attributes of the configuration class; a dotted name such as
    ``text_config.hidden_size`` is an attribute of a configuration inside it.
    """

    name: str
    family: str  # a key of _BATCHES
    model_class: str
    small: Mapping[str, Any]
    default: Mapping[str, Any] = field(default_factory=dict)
    source: str = "transformers"  # the module that holds model_class


# --- the models --------------------------------------------------------------------------------

_IDS = {"vocab_size": 512, "bos_token_id": 1, "eos_token_id": 2}
_WIDTH = {"hidden_size": 64, "intermediate_size": 128}
_LAYERS = _WIDTH | {"num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = _IDS | _LAYERS | {"num_key_value_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER = _IDS | _LAYERS | _NO_DROPOUT | {"max_position_embeddings": 130}
_GPT2 = (
    _IDS
    | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
)
# A loop over the experts that were hit cannot be captured, since its trip count is data. Grouped
# products can; batched products too, but they copy the weights of an expert for every token.
_EXPERTS = {"experts_implementation": "grouped_mm"}
_MIXTRAL = _DECODER | _EXPERTS | {"num_local_experts": 4}
_T5_START = {"decoder_start_token_id": 0}
_T5 = (
    _T5_START
    | {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    | {"vocab_size": 512, "dropout_rate": 0.0}
)
# With a fixed problem type the loss function does not write one to the configuration at the first
# call, which would compile every image model twice.
_CLASSES = {"num_labels": 1000, "problem_type": "single_label_classification"}
_IMAGE = _CLASSES | {"num_labels": 10, "image_size": 64}
_SWIN = (
    _IMAGE
    | {"embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    | {"drop_path_rate": 0.0}
)
_CONVNEXT = _IMAGE | {"num_stages": 2, "hidden_sizes": (32, 64), "depths": (1, 1)}
_RESNET50 = _IMAGE | {"depths": (3, 4, 6, 3)} | {"embedding_size": 16, "hidden_sizes": (32, 64, 128, 256)}
_CLIP = (
    {f"text_config.{key}": value for key, value in (_IDS | _LAYERS).items()}
    | {"text_config.eos_token_id": 3}  # 2 is read as the flag of old checkpoints
    | {f"vision_config.{key}": value for key, value in _LAYERS.items()}
    | {"vision_config.image_size": 64, "vision_config.patch_size": 16, "projection_dim": 64}
)
_WHISPER = (
    _IDS
    | {"d_model": 64, "num_mel_bins": 16, "decoder_start_token_id": 1, "pad_token_id": 0}
    | {"max_source_positions": 32, "max_target_positions": 64}
    | {f"{half}_layers": 2 for half in ("encoder", "decoder")}
    | {f"{half}_attention_heads": 4 for half in ("encoder", "decoder")}
    | {f"{half}_ffn_dim": 128 for half in ("encoder", "decoder")}
)
_MAMBA = _IDS | {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8}

_ENTRIES = (
    ZooEntry("gpt2", "causal-lm", "GPT2LMHeadModel", _GPT2),
    ZooEntry("llama", "causal-lm", "LlamaForCausalLM", _DECODER),
    ZooEntry("qwen2", "causal-lm", "Qwen2ForCausalLM", _DECODER),
    ZooEntry("mistral", "causal-lm", "MistralForCausalLM", _DECODER),
    ZooEntry("gemma", "causal-lm", "GemmaForCausalLM", _DECODER | {"head_dim": 16}),
    ZooEntry("phi3", "causal-lm", "Phi3ForCausalLM", _DECODER | {"pad_token_id": None}),
    ZooEntry("mixtral", "causal-lm", "MixtralForCausalLM", _MIXTRAL, _EXPERTS),
    ZooEntry("bert", "masked-lm", "BertForMaskedLM", _ENCODER),
    ZooEntry("roberta", "masked-lm", "RobertaForMaskedLM", _ENCODER),
    ZooEntry("t5", "seq2seq", "T5ForConditionalGeneration", _T5, _T5_START),
    ZooEntry("vit", "image", "ViTForImageClassification", _IMAGE | _LAYERS, _CLASSES),
    ZooEntry("swin", "image", "SwinForImageClassification", _SWIN, _CLASSES),
    ZooEntry("convnext", "image", "ConvNextForImageClassification", _CONVNEXT, _CLASSES),
    ZooEntry("resnet50", "image", "ResNetForImageClassification", _RESNET50, _CLASSES),
    ZooEntry("clip", "contrastive", "CLIPModel", _CLIP),
    ZooEntry("whisper", "speech", "WhisperForConditionalGeneration", _WHISPER),
    ZooEntry("mamba", "causal-lm", "MambaForCausalLM", _MAMBA),
)

ENTRIES: Mapping[str, ZooEntry] = MappingProxyType({entry.name: entry for entry in _ENTRIES})


def names() -> tuple[str, ...]:
    """The names that `build` and `example_batch` know."""
    return tuple(ENTRIES)


def entry_of(name: str) -> ZooEntry:
    """The entry with this name, or a GraphoptError that lists the names and the nearest ones."""
    if name in ENTRIES:
        return ENTRIES[name]
    raise GraphoptError(
        f"no zoo model is called {name!r}{_did_you_mean(name, ENTRIES)}; the zoo has {', '.join(ENTRIES)}"
    )


# --- overrides ---------------------------------------------------------------------------------


def parse_overrides(text: str) -> dict[str, Value]:
    """Read ``name=value`` pairs separated by commas; values are int, float, bool or plain text.

    >>> parse_overrides("n_layer=12, resid_pdrop=0.0, scale_attn_weights=false, model=a")
    {'n_layer': 12, 'resid_pdrop': 0.0, 'scale_attn_weights': False, 'model': 'a'}
    >>> parse_overrides("")
    {}
    """
    overrides: dict[str, Value] = {}
    for pair in text.split(",") if text.strip() else ():
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not (key and equals and value):
            raise GraphoptError(
                f"cannot read {pair.strip()!r} in the overrides {text!r}: "
                "expected name=value pairs separated by commas, such as n_layer=12,n_embd=768"
            )
        if key in overrides:
            raise GraphoptError(f"the overrides {text!r} set {key!r} twice")
        overrides[key] = _parse_value(value)
    return overrides


def _parse_value(text: str) -> Value:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=4, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def _settings(
    entry: ZooEntry, config_class: Any, size: Size, overrides: Mapping[str, Value]
) -> dict[str, Any]:
    """Keyword arguments of the configuration: those of the size, then what the user set."""
    settings = dict({"small": entry.small, "default": entry.default}[size])
    if "use_cache" in _attributes(config_class):
        settings["use_cache"] = False
    for key, value in overrides.items():
        head, dot, attribute = key.rpartition(".")
        owner = config_class.sub_configs.get(head, config_class)
        known = _attributes(owner)
        if owner is config_class:  # some have no field of the class: a ResNet's image_size
            attribute, known = key, known | {name for name in entry.small if "." not in name}
        if attribute not in known:
            raise GraphoptError(
                f"{entry.name} has no configuration attribute {key!r}"
                f"{_did_you_mean(attribute, known)}; "
                f"{owner.__name__} has {', '.join(sorted(known))}"
            )
        prefix = head + dot if owner is not config_class else ""
        settings[prefix + owner.attribute_map.get(attribute, attribute)] = value
    return _nested(settings)


def _attributes(config_class: Any) -> set[str]:
    """What can be set on a configuration class, aliases included, but no configuration inside."""
    fields = {item.name for item in dataclasses.fields(config_class) if item.name[0] != "_"}
    named = fields | {"num_labels", "attn_implementation", *config_class.attribute_map}
    return named - set(config_class.sub_configs)


def _nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a.b": 1, "c": 2}`` as ``{"a": {"b": 1}, "c": 2}``."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        *path, last = key.split(".")
        inner = result
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return result


# --- building ----------------------------------------------------------------------------------


def build(
    name: str,
    size: Size = "small",
    overrides: Mapping[str, Value] | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> nn.Module:
    """A model of the zoo in training mode; the same arguments give the same weights.

    ``overrides`` are attributes of the model's configuration. On the device ``"meta"`` no memory
    is used for weights, however large the model.
    """
    entry, place = entry_of(name), torch.device(device)
    if size not in ("small", "default"):
        raise GraphoptError(f"the size of a zoo model is 'small' or 'default', not {size!r}")
    model_class = _model_class(entry)
    settings = _settings(entry, model_class.config_class, size, overrides or {})
    try:
        with seeded(seed, place), _default_dtype(dtype), place:
            model = model_class(model_class.config_class(**settings))
    except Exception as error:
        written = ", ".join(f"{key}={value}" for key, value in (overrides or {}).items())
        raise GraphoptError(
            f"cannot build {name} in size {size!r}{f' with {written}' if written else ''} "
            f"on {place}: {error}"
        ) from error
    if entry.family == "causal-lm" and model.loss_type is None:
        # GPT2LMHeadModel's name does not tell the library its loss; the warning about that, given
        # in the forward pass, would break the captured graph in two.
        model.loss_type = "ForCausalLM"
    trained: nn.Module = model.train()
    return trained


def _model_class(entry: ZooEntry) -> Any:
    try:
        return getattr(importlib.import_module(entry.source), entry.model_class)
    except ImportError as error:
        raise GraphoptError(
            f"the zoo model {entry.name} needs {entry.source}, which cannot be imported here "
            f"({error}); install it with: pip install graphopt[zoo]"
        ) from error


@contextlib.contextmanager
def seeded(seed: int, place: torch.device) -> Iterator[None]:
    """Random numbers on the CPU and on ``place`` start from ``seed``, and go on as before after."""
    devices = [] if place.type in ("cpu", "meta") else [place]
    with torch.random.fork_rng(devices, device_type=place.type if devices else None):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            state = torch.Generator(device).manual_seed(seed).get_state()
            torch.get_device_module(device).set_rng_state(state, device)
        yield


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Floating point parameters are made in ``dtype``; buffers that ask for float32 keep it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# --- batches -----------------------------------------------------------------------------------


def example_batch(name: str, model: nn.Module, batch: int = 2, seq: int = 32, seed: int = 0) -> Batch:
    """Random inputs and labels on the model's device; ``model(**batch).loss`` is a scalar.

    ``batch`` is the number of samples; ``seq`` the number of tokens of each, which image models do
    not use. CLIP's batch also has ``return_loss=True``, the one value that is not a tensor.
    """
    entry = entry_of(name)
    if batch < 1 or seq < 2:
        raise GraphoptError(
            f"a batch of {name} needs batch >= 1 and seq >= 2, not batch={batch}, seq={seq}"
        )
    config: Any = model.config
    weight = next(model.parameters())
    made = _BATCHES[entry.family](config, batch, seq, torch.Generator().manual_seed(seed))
    return {key: _placed(value, weight) for key, value in made.items()}


def _placed(value: Tensor | bool, like: Tensor) -> Tensor | bool:
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _tokens(config: Any, batch: int, seq: int, draw: torch.Generator) -> Tensor:
    """Token numbers, int64[batch, seq], above the few special ones that start a vocabulary."""
    limits = ("max_position_embeddings", "n_positions", "max_target_positions")
    limit = min(getattr(config, key, None) or seq for key in limits)
    if seq > limit and not hasattr(config, "rope_parameters"):  # rotary positions have no end
        raise GraphoptError(
            f"seq={seq} is longer than the {limit} positions of this {config.model_type} model"
        )
    low = min(4, config.vocab_size - 1)
    return torch.randint(low, config.vocab_size, (batch, seq), generator=draw)


def _causal_lm(config: Any, batch: int, seq: int, draw: torch.Generator) -> Batch:
    ids = _tokens(config, batch, seq, draw)
    return {"input_ids": ids, "labels": ids.clone()}


def _masked_lm(config: Any, batch: int, seq: int, draw: torch.Generator) -> Batch:
    ids = _tokens(config, batch, seq, draw)
    masked = torch.rand(batch, seq, generator=draw) < 0.15
    masked[:, 0] = True  # a loss over no token would be nan
    return {"input_ids": ids, "labels": ids.masked_fill(~masked, -100)}


def _seq2seq(config: Any, batch: int, seq: int, draw: torch.Generator) -> Batch:
    source, target = (_tokens(config, batch, seq, draw) for _ in range(2))
    return {"input_ids": source, "labels": target}


def _pixels(config: Any, batch: int, draw: torch.Generator) -> Tensor:
    """Images, float32[batch, channels, height, width]."""
    side = getattr(config, "image_size", 224)
    return torch.randn(batch, config.num_channels, side, side, generator=draw)


def _image(config: Any, batch: int, seq: int, draw: torch.Generator) -> Batch:
    labels = torch.randint(config.num_labels, (batch,), generator=draw)
    return {"pixel_values": _pixels(config, batch, draw), "labels": labels}


def _contrastive(config: Any, batch: int, seq: int, draw: torch.Generator) -> Batch:
    ids = _tokens(config.text_config, batch, seq, draw)
    ids[:, -1] = config.text_config.eos_token_id  # where the text is pooled
    pixels = _pixels(config.vision_config, batch, draw)
    return {"input_ids": ids, "pixel_values": pixels, "return_loss": True}


def _speech(config: Any, batch: int, seq: int, draw: torch.Generator) -> Batch:
    """Spectrograms, float32[batch, mel bins, frames], of the one length that the encoder takes."""
    frames = 2 * config.max_source_positions
    features = torch.randn(batch, config.num_mel_bins, frames, generator=draw)
    return {"input_features": features, "labels": _tokens(config, batch, seq, draw)}


_BATCHES: Mapping[str, Callable[[Any, int, int, torch.Generator], Batch]] = MappingProxyType(
    {
        "causal-lm": _causal_lm,
        "masked-lm": _masked_lm,
        "seq2seq": _seq2seq,
        "image": _image,
        "contrastive": _contrastive,
        "speech": _speech,
    }
)
