"""Small inputs for a model of the transformers library, made from its configuration."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graphopt.errors import PlanError
from graphopt.passes.blocks import Batch

TOKENS = 12  # of a made-up text


def knows_inputs(model: nn.Module) -> bool:
    """Whether `made_up_batch` can make inputs of this model."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", None)
    needed = {"input_ids": ("vocab_size",), "pixel_values": ("image_size", "num_channels")}
    return main in needed and all(getattr(config, name, None) for name in needed[main])


def made_up_batch(model: nn.Module) -> dict[str, Any]:
    """One sample of random token ids, or of a random image; PlanError where neither is known to fit.

    A text is longer than a sliding window of up to 60 tokens.
    """
    if not knows_inputs(model):
        raise PlanError(
            f"no inputs are known for {type(model).__name__}; give calibration=[batch], "
            "with a batch that the model takes"
        )
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    weight = next(model.parameters())
    if model.main_input_name == "input_ids":
        window = getattr(config, "sliding_window", None) or 0
        tokens = max(TOKENS, min(window + 4, 64))
        ids = torch.randint(config.vocab_size, (1, tokens), generator=generator)
        return {"input_ids": ids.to(weight.device)}
    size = config.image_size
    sides = (size, size) if isinstance(size, int) else tuple(size)
    return {"pixel_values": torch.randn(1, config.num_channels, *sides, generator=generator).to(weight)}


def as_batch(given: Any, model: nn.Module) -> Batch:
    """A batch as the user wrote it: keyword arguments, a tuple of arguments, or the one argument."""
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, tuple):
        return given
    if not isinstance(given, torch.Tensor):
        raise PlanError(
            f"calibration holds a {type(given).__name__}; a batch is a tensor, a tuple of arguments "
            "or a mapping of keyword arguments"
        )
    main = getattr(model, "main_input_name", None)
    return {main: given} if main else (given,)
