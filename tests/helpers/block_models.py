"""Tiny models of repeated blocks with random weights, of several families."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
POSITIONS = {"max_position_embeddings": 64}
DECODER = SIZES | IDS | POSITIONS
GROUPED = DECODER | {"num_key_value_heads": 1}


def _llama(n: int) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, num_hidden_layers=n))


def _qwen2(n: int) -> nn.Module:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": n // 2}
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**GROUPED, **window, num_hidden_layers=n)
    )


def _gemma3(n: int) -> nn.Module:
    config = transformers.Gemma3TextConfig(**GROUPED, head_dim=8, sliding_window=4, num_hidden_layers=n)
    return transformers.Gemma3ForCausalLM(config)


def _gemma2(n: int) -> nn.Module:
    config = transformers.Gemma2Config(
        **GROUPED, head_dim=8, sliding_window=4, query_pre_attn_scalar=8, num_hidden_layers=n
    )
    return transformers.Gemma2ForCausalLM(config)


def _gpt2(n: int) -> nn.Module:
    sizes = {"vocab_size": 61, "n_embd": 16, "n_head": 2, "n_positions": 64, "n_layer": n}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **IDS))


def _opt(n: int) -> nn.Module:
    sizes = {"vocab_size": 61, "hidden_size": 16, "ffn_dim": 24, "num_attention_heads": 2}
    config = transformers.OPTConfig(
        **sizes, **IDS, **POSITIONS, word_embed_proj_dim=16, num_hidden_layers=n
    )
    return transformers.OPTForCausalLM(config)


def _neox(n: int) -> nn.Module:
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**DECODER, num_hidden_layers=n))


def _bert(n: int) -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**DECODER, num_hidden_layers=n))


def _vit(n: int) -> nn.Module:
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    config = transformers.ViTConfig(**sizes, image_size=8, patch_size=4, num_hidden_layers=n)
    return transformers.ViTForImageClassification(config)


FAMILIES: dict[str, Callable[[int], nn.Module]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "opt": _opt,
    "gpt_neox": _neox,
    "bert": _bert,
    "vit": _vit,
}


def block_model(family: str, blocks: int = 8, scale: float = 8.0, seed: int = 0) -> Any:
    """A model whose blocks do something: their initial weights are multiplied by `scale`."""
    torch.manual_seed(seed)
    model = FAMILIES[family](blocks).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(scale)
    return model


def token_batches(batches: int = 2, samples: int = 2, tokens: int = 10, seed: int = 0) -> list[Any]:
    """Random token ids for the text models."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 61, (samples, tokens), generator=generator) for _ in range(batches)]
