"""Small language models of the bytes of Python's own library, trained once and kept in a folder.

`exits=True` trains in the manner of LayerSkip (Elhoushi et al., arXiv 2404.16710, section 4.1): layers
are dropped at random, more often the higher they are, and to the loss of the last layer that of one
earlier layer is added, read by the same norm and head, with the exit rotating from step to step. Such a
model predicts well from its lower layers. Dropping is per batch here, not per sample, and the weights
of the exits are equal.
"""

import contextlib
import math
import sysconfig
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import note
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from graphopt.passes.blocks import find_stack
from graphopt.passes.skip_units import Unit, bypassed, whole_blocks

SAMPLES = 32
HELD_OUT = 10  # every tenth file
DROPPED = 0.2  # of the runs of the last layer, with `exits`
EXIT_WEIGHT = 0.5


def config(layers: int, width: int, tokens: int) -> LlamaConfig:
    """A Llama of bytes, without tokens that begin or end a text."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=tokens,
        bos_token_id=None,
        eos_token_id=None,
    )


def texts() -> tuple[Tensor, Tensor]:
    """Bytes to train on and bytes held out, from the modules of the standard library."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    parts = [torch.frombuffer(bytearray(file.read_bytes() or b"\n"), dtype=torch.uint8) for file in files]
    seen = [part for i, part in enumerate(parts) if i % HELD_OUT]
    return torch.cat(seen).long(), torch.cat(parts[::HELD_OUT]).long()


def batch(text: Tensor, generator: torch.Generator, samples: int, tokens: int) -> Tensor:
    """Random pieces of a text, shape (samples, tokens)."""
    starts = torch.randint(len(text) - tokens, (samples,), generator=generator)
    return torch.stack([text[i : i + tokens] for i in starts.tolist()])


def trained(
    text: Tensor, config: LlamaConfig, steps: int, cache: Path, exits: bool = False
) -> LlamaForCausalLM:
    """The model after `steps` steps of AdamW, from the cache where it is there."""
    kind = "-exits" if exits else ""
    folder = cache / f"llama-{config.num_hidden_layers}x{config.hidden_size}{kind}-{steps}"
    if folder.exists():
        return LlamaForCausalLM.from_pretrained(folder).eval()  # type: ignore[no-any-return]
    torch.manual_seed(0)
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    units = whole_blocks(find_stack(model, {"input_ids": text[None, :8]}))
    begin = time.perf_counter()
    for step in range(steps):
        rate = min(1, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = 3e-3 * max(rate, 0.02)
        ids = batch(text, generator, SAMPLES, config.max_position_embeddings)
        if exits:
            loss = _loss_with_exit(model, units, ids, step, generator)
        else:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            note(f"step {step}: loss {loss:.3f}, {time.perf_counter() - begin:.0f} s")
    model.save_pretrained(folder)
    return model.eval()  # type: ignore[no-any-return]


def _loss_with_exit(
    model: LlamaForCausalLM, units: Sequence[Unit], ids: Tensor, step: int, generator: torch.Generator
) -> Tensor:
    """The loss of the last layer and, weighted, that of another, some layers being dropped."""
    layers = len(units)
    with _dropping(units, generator):
        output = model(ids, labels=ids, output_hidden_states=True)
    early = model.model.norm(output.hidden_states[1 + step % (layers - 1)])
    logits = model.lm_head(early)[:, :-1].float()
    exit_loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    return output.loss + EXIT_WEIGHT * exit_loss  # type: ignore[no-any-return]


@contextlib.contextmanager
def _dropping(units: Sequence[Unit], generator: torch.Generator) -> Iterator[None]:
    """Layers are left out at random, none of the first and `DROPPED` of the last, growing in between."""
    last = len(units) - 1
    rates = [DROPPED * (2 ** (i / last) - 1) for i in range(last + 1)]
    drawn = torch.rand(last + 1, generator=generator).tolist()
    with bypassed(units, frozenset(i for i in range(1, last + 1) if drawn[i] < rates[i])):
        yield
