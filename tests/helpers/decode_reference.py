"""Decoding with skipped blocks, written again in the plainest way, to compare with."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from block_models import GROUPED, block_model
from torch import Tensor

# Where the blocks of each family are, written down by hand.
BLOCKS: Mapping[str, Callable[[Any], Any]] = {
    "llama": lambda model: model.model.layers,
    "qwen2": lambda model: model.model.layers,
    "gemma2": lambda model: model.model.layers,
    "gemma3": lambda model: model.model.layers,
    "gpt2": lambda model: model.transformer.h,
    "opt": lambda model: model.model.decoder.layers,
    "gpt_neox": lambda model: model.gpt_neox.layers,
}


def decoder(family: str, blocks: int = 6) -> Any:
    """A small model in float64, so that rounding decides no comparison.

    Gemma2 is in float32: its attention computes in that, where the mask of float64 is infinite.
    """
    if family != "gemma2":
        return block_model(family, blocks).double()
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**GROUPED, head_dim=8, sliding_window=4, num_hidden_layers=blocks)
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
    return model


@contextlib.contextmanager
def running_until(blocks: Any, ends: list[int]) -> Iterator[None]:
    """Block i changes the hidden states of the tokens before ends[i], and no others."""

    def hook(end: int) -> Any:
        def replace(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            hidden = output if isinstance(output, Tensor) else output[0]
            runs = (torch.arange(hidden.shape[1]) < end)[None, :, None]
            merged = torch.where(runs, hidden, before)
            return merged if isinstance(output, Tensor) else (merged, *output[1:])

        return replace

    hooks = [
        block.register_forward_hook(hook(end), with_kwargs=True)
        for block, end in zip(blocks, ends, strict=True)
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def logits_until(family: str, model: Any, ids: list[int], ends: list[int]) -> Tensor:
    """Logits of one text without a cache, shape (tokens, classes), in float32 as `generate` has them."""
    with torch.no_grad(), running_until(BLOCKS[family](model), ends):
        return model(torch.tensor([ids]), use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def skipping_loop(
    family: str, model: Any, prompt: list[int], sets: Mapping[int, tuple[int, ...]], new: int
) -> list[int]:
    """The tokens behind one prompt, where later tokens run through the blocks of `sets`."""
    ids = list(prompt)
    ends = [len(prompt)] * len(BLOCKS[family](model))
    for token in range(new):
        kept = [sets[first] for first in sorted(sets) if first <= token]
        for i in kept[-1] if kept else ():
            ends[i] = len(ids)
        ids.append(int(logits_until(family, model, ids, ends)[-1].argmax()))
    return ids[len(prompt) :]


@dataclass
class SpeculationLoop:
    """Speculative decoding of one prompt at a time, without a cache; counts as `Speculation` does."""

    family: str
    model: Any
    keep: tuple[int, ...]
    length: int | str
    relaxed: bool = False
    accepted: int = 0
    passed: int = 0
    most: int = 1
    lengths: list[int] = field(default_factory=list)
    spreads: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    distances: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def run(self, prompt: list[int], new: int) -> list[int]:
        """The tokens behind the prompt."""
        ids = [*prompt, self._best(prompt, [len(prompt)] * self._blocks())[0]]
        while len(ids) - len(prompt) < new:
            ids += self._round(ids, new - (len(ids) - len(prompt)))
        return ids[len(prompt) :][:new]

    def _blocks(self) -> int:
        return len(BLOCKS[self.family](self.model))

    def _best(self, ids: list[int], ends: list[int]) -> tuple[int, Tensor]:
        probabilities = logits_until(self.family, self.model, ids, ends)[-1].softmax(-1)
        return int(probabilities.argmax()), probabilities

    def _round(self, ids: list[int], most: int) -> list[int]:
        drafts = self._draft(ids, most)
        self.lengths.append(len(drafts))
        found: list[int] = []
        spreads = self.spreads[True], self.spreads[False]
        for token, draft in drafts:
            text = ids + found
            choice, chosen = self._best(text, [len(text)] * self._blocks())
            apart, bound = distance(draft, chosen), threshold(self.distances)
            close = self.relaxed and bound is not None and apart < bound
            self.distances[token == choice].append(apart)
            spreads[0 if token == choice or close else 1].append(spread(draft))
            if token == choice:
                self.accepted += 1
            elif close:
                self.passed += 1
            else:
                self.most = 2 * len(found) + 1
                return [*found, choice]
            found.append(token)
        self.most = max(self.most, 2 * len(found) + 1)
        return found

    def _draft(self, ids: list[int], most: int) -> list[tuple[int, Tensor]]:
        """The last token in `ids` and the drafts run through some blocks, those before through all."""
        drafts: list[tuple[int, Tensor]] = []
        while True:
            text = [*ids, *(token for token, _ in drafts)]
            ends = [len(text) if i in self.keep else len(ids) - 1 for i in range(self._blocks())]
            drafts.append(self._best(text, ends))
            if len(drafts) == most or self._stops([spread(p) for _, p in drafts]):
                return drafts

    def _stops(self, spreads: list[float]) -> bool:
        if isinstance(self.length, int):
            return len(spreads) == self.length
        if self.length == "adasd":
            bound = threshold(self.spreads)
            return len(spreads) >= self.most or (bound is not None and spreads[-1] > bound)
        first = min(i for i in range(self._blocks()) if i not in self.keep)
        chances = [self._chance(h) for h in spreads]
        rates = []
        for count in (len(spreads), len(spreads) + 1):
            tokens = sum(math.prod(chances[:i]) for i in range(count))
            rates.append(tokens / (count * len(self.keep) + self._blocks() - first))
        return len(spreads) >= self.most or rates[1] <= rates[0]

    def _chance(self, h: float) -> float:
        """Of agreement, counted among entropies of the same octave."""

        def octave(x: float) -> int:
            return min(3, max(-8, math.floor(math.log2(x)) + 1)) if x else -8

        same, others = (sum(octave(x) == octave(h) for x in self.spreads[kind]) for kind in (True, False))
        rate = (len(self.spreads[True]) + 1) / (sum(map(len, self.spreads.values())) + 2)
        return (same + rate) / (same + others + 1)


def threshold(numbers: dict[bool, list[float]]) -> float | None:
    """Halfway between two means."""
    if not numbers[True] or not numbers[False]:
        return None
    return sum(math.fsum(part) / len(part) for part in numbers.values()) / 2


def spread(p: Tensor) -> float:
    """Entropy in nats."""
    return math.fsum(-x * math.log(x) for x in p.tolist() if x > 0)


def distance(p: Tensor, q: Tensor) -> float:
    """Jensen-Shannon distance."""
    total = 0.0
    for x, y in zip(p.tolist(), q.tolist(), strict=True):
        middle = (x + y) / 2
        total += sum(z * math.log2(z / middle) for z in (x, y) if z > 0)
    return math.sqrt(max(0.0, total / 2))


class PlainLlama:
    """A Llama written by hand on the weights of `model`: one token at a time, states in lists."""

    def __init__(self, model: Any) -> None:
        self.weights = {name: value.detach() for name, value in model.state_dict().items()}
        self.config = model.config
        self.states: list[list[tuple[Tensor, Tensor, int]]] = [[] for _ in model.model.layers]
        self.tokens = 0

    def feed(self, token: int, running: set[int]) -> Tensor:
        """Run one token through some blocks; its logits."""
        x = self.weights["model.embed_tokens.weight"][token]
        for i in sorted(running):
            x = self._block(i, x)
        self.tokens += 1
        return self.weights["lm_head.weight"] @ self._norm(x, "model.norm.weight")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return self.weights[name] * x / (x.pow(2).mean() + self.config.rms_norm_eps).sqrt()

    def _block(self, i: int, x: Tensor) -> Tensor:
        part = f"model.layers.{i}."
        h = self._norm(x, f"{part}input_layernorm.weight")
        size = self.config.hidden_size // self.config.num_attention_heads
        q, k, v = (
            (self.weights[f"{part}self_attn.{n}_proj.weight"] @ h).view(-1, size) for n in ("q", "k", "v")
        )
        self.states[i].append((self._turned(k), v, self.tokens))
        q = self._turned(q)
        shared = q.shape[0] // k.shape[0]
        heads = []
        for head in range(q.shape[0]):
            keys = torch.stack([state[0][head // shared] for state in self.states[i]])
            values = torch.stack([state[1][head // shared] for state in self.states[i]])
            heads.append((keys @ q[head] / math.sqrt(size)).softmax(0) @ values)
        x = x + self.weights[f"{part}self_attn.o_proj.weight"] @ torch.cat(heads)
        h = self._norm(x, f"{part}post_attention_layernorm.weight")
        gate, up = (self.weights[f"{part}mlp.{n}_proj.weight"] @ h for n in ("gate", "up"))
        return x + self.weights[f"{part}mlp.down_proj.weight"] @ (gate * gate.sigmoid() * up)

    def _turned(self, x: Tensor) -> Tensor:
        """Rotary positions: halves of a head are turned by angles that fall with their place."""
        half = x.shape[-1] // 2
        angles = self.tokens * 10000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
        cos, sin = angles.cos().double(), angles.sin().double()
        a, b = x[:, :half], x[:, half:]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
