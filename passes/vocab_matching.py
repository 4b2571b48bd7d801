"""Which parameters of a model span its vocabulary: found by running it once, never by their names.

The loss is a cross-entropy; the projection is the `F.linear` whose result reached it through functions
of one tensor at a time; its weight's rows are the vocabulary. Every weight of an `F.embedding` with as
many rows is one of its embeddings, the projection's own (a tied weight) among them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from graphopt.errors import PlanError
from graphopt.vocab_dtensor import gathered, layout_of, replicated

TOKENS = 4


@dataclass(frozen=True)
class Vocabulary:
    """Names of parameters: of the projection, of its bias or None, and of the embeddings."""

    words: int
    head: str
    bias: str | None
    embeddings: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Each parameter once."""
        every = (self.head, *([self.bias] if self.bias else []), *self.embeddings)
        return tuple(dict.fromkeys(every))


class _Recorder(TorchFunctionMode):
    """Notes embeddings, and which projection each tensor came from."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded: list[Tensor] = []
        self.heads: list[tuple[Tensor, Tensor | None]] = []
        self.origin: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.alive: list[Tensor] = []  # so that an id stays that of one tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.embedding:
            self.embedded.append(kwargs.get("weight", args[-1] if len(args) < 2 else args[1]))
        source = args[0] if args and isinstance(args[0], Tensor) else kwargs.get("input")
        if func is F.linear:
            weight, bias = (*args[1:], *kwargs.values(), None)[:2]
            self._note(result, (weight, bias))
        elif func is F.cross_entropy and id(source) in self.origin:
            self.heads.append(self.origin[id(source)])
        elif id(source) in self.origin and isinstance(result, Tensor):
            self._note(result, self.origin[id(source)])
        return result

    def _note(self, result: Tensor, source: tuple[Tensor, Tensor | None]) -> None:
        self.alive.append(result)
        self.origin[id(result)] = source


def example_batch(model: nn.Module) -> dict[str, Tensor]:
    """What a causal language model of transformers takes: `TOKENS` tokens, and labels.

    DTensors where the parameters are.
    """
    device = next(model.parameters()).device
    ids = torch.zeros((1, TOKENS), dtype=torch.long, device=device)
    ids = replicated(ids, layout_of(*model.parameters()))
    return {"input_ids": ids, "labels": ids}


def find_vocabulary(model: nn.Module, batch: Mapping[str, Any] | None = None) -> Vocabulary:
    """Run `model(**batch)` once without gradients, and find its largest vocabulary.

    `batch` must make the model compute its loss; by default, `example_batch`. PlanError where the model
    does not run, or no loss is of a projection onto a parameter. Sharded DTensors are gathered for the
    run, since not every operator takes them as they are.
    """
    whole = {name: gathered(p) for name, p in model.named_parameters()}
    names = {id(p): name for name, p in whole.items()}
    heads, embedded = _recorded(model, whole, example_batch(model) if batch is None else batch)
    known = [h for h in heads if id(h[0]) in names and (h[1] is None or id(h[1]) in names)]
    if not known:
        raise PlanError("no cross-entropy of the model is of a linear projection onto a parameter")
    weight, bias = max(known, key=lambda h: h[0].shape[0])
    words = weight.shape[0]
    found = [w for w in embedded if id(w) in names and w.shape[0] == words]
    embeddings = tuple(dict.fromkeys(names[id(w)] for w in found))
    return Vocabulary(words, names[id(weight)], None if bias is None else names[id(bias)], embeddings)


def _recorded(model: nn.Module, whole: dict[str, Tensor], batch: Mapping[str, Any]) -> Any:
    mode = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(), _Recorder() as recorder:
            functional_call(model, whole, kwargs=dict(batch))
    except Exception as error:  # whatever the model raises, the user gave no batch that fits
        raise PlanError(
            f"the model does not run on {', '.join(batch)} ({type(error).__name__}: {error}); "
            "give SplitVocab().plan a batch that it computes a loss from"
        ) from error
    finally:
        for module, training in mode.items():
            module.training = training
    return recorder.heads, recorder.embedded
