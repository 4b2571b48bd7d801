"""What must hold of a model whose blocks were removed; each check raises VerifyError."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import VerifyError
from graphopt.passes.blocks import Batch, Stack, call, evaluation
from graphopt.passes.skip_units import Unit, muted

NEW_TOKENS = 6
# What models raise that do not fit together.
_FAILURES = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def leading_tensor(output: Any) -> Tensor:
    """The logits of an output, or else its first tensor.

    >>> leading_tensor({"loss": torch.tensor(1.0), "logits": torch.zeros(2, 3)}).shape
    torch.Size([2, 3])
    """
    if isinstance(output, Mapping):
        output = (output["logits"],) if "logits" in output else tuple(output.values())
    found = output if isinstance(output, tuple | list) else (output,)
    return next(value for value in found if isinstance(value, Tensor))


def check_function(
    model: nn.Module, units: Sequence[Unit], removed: frozenset[int], short: nn.Module, batch: Batch
) -> None:
    """`short` computes what `model` does with the units `removed` without effect, bit for bit."""
    with muted(units, removed), evaluation(model):
        expected = leading_tensor(call(model, batch))
    with evaluation(short):
        what = "layers" if all(units[i].branch is None for i in removed) else "sublayers"
        _check_equal(f"the model without these {what}", short, batch, expected)


def check_rebuild(short: nn.Module, stack: Stack, batch: Batch) -> None:
    """The configuration that would be saved builds `short` again: same weights, blocks and outputs.

    Weights are shared with the rebuilt model, not copied. Nothing is checked of a model that is not
    built from a configuration.
    """
    if not hasattr(type(short), "_from_config"):
        return
    rebuilt = _rebuild(short)
    for name in _differing_attributes(stack.blocks):
        values = [_values(model.get_submodule(stack.path), name) for model in (short, rebuilt)]
        if values[0] != values[1]:
            raise VerifyError(
                f"{type(short).__name__} cannot be saved without these blocks: {name} is {values[0]} in "
                f"its blocks, and would be {values[1]} in those of the model loaded again"
            )
    with evaluation(short):
        expected = leading_tensor(call(short, batch))
    with evaluation(rebuilt):
        _check_equal("the model loaded again", rebuilt, batch, expected)


def check_generation(short: nn.Module, batch: Batch) -> None:
    """Generation with a cache has the logits of a run over the whole text, up to rounding.

    A false state of one block changes them by far more than the square root of the precision of
    their dtype, which is the tolerance, relative to the largest logit.
    """
    can_generate = getattr(short, "can_generate", None)
    if can_generate is None or not can_generate() or not isinstance(batch, Mapping):
        return
    model: Any = short
    settings = type(model.generation_config)(
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = batch["input_ids"][:1]
    with evaluation(short):
        try:
            cached = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings)
        except _FAILURES as error:
            raise VerifyError(
                f"{type(short).__name__}: generation with a cache fails after the blocks were removed: "
                f"{type(error).__name__}: {error}"
            ) from error
        whole = model(input_ids=cached.sequences, use_cache=False).logits
    check_close(
        torch.stack(cached.logits, dim=1),
        whole[:, -NEW_TOKENS - 1 : -1],
        f"{type(short).__name__}: generation with a cache differs from that without one after the "
        "blocks were removed",
    )


def check_shared(short: nn.Module, stored: int, saved: int) -> None:
    """`short` stores `saved` parameters less than `stored`, and trains those that are left once."""
    left = sum(parameter.numel() for parameter in short.parameters())
    if left != stored - saved:
        raise VerifyError(
            f"{type(short).__name__} stores {left} parameters with shared blocks; {stored - saved} were "
            "expected"
        )


def check_close(got: Tensor, expected: Tensor, failure: str) -> None:
    """VerifyError that begins with `failure` where `got` is not `expected` up to rounding.

    The tolerance is the square root of the precision of the dtype of `expected`, relative to its
    largest number.
    """
    error = (got.float() - expected.float()).abs().max()
    relative = error / expected.float().abs().max().clamp(min=1e-30)
    if not relative <= torch.finfo(expected.dtype).eps ** 0.5:
        raise VerifyError(f"{failure} (relative error {relative:.2g})")


def _check_equal(what: str, model: nn.Module, batch: Batch, expected: Tensor) -> None:
    try:
        got = leading_tensor(call(model, batch))
    except _FAILURES as error:
        raise VerifyError(f"{what} fails: {type(error).__name__}: {error}") from error
    if got.shape != expected.shape or not torch.equal(got, expected):
        raise VerifyError(
            f"{what} computes something else: these blocks of {type(model).__name__} depend on their "
            "place in it, so that they cannot be removed"
        )


def _rebuild(short: Any) -> nn.Module:
    """A model from the configuration of `short`, written and read, with the weights of `short`."""
    name = type(short).__name__
    try:
        config = type(short.config).from_dict(json.loads(short.config.to_json_string()))
        with torch.device("meta"):
            rebuilt = type(short)._from_config(
                config, attn_implementation=short.config._attn_implementation
            )
        rebuilt.load_state_dict(short.state_dict(), assign=True)
    except _FAILURES as error:
        raise VerifyError(f"{name} cannot be saved without these blocks: {error}") from error
    rebuilt.tie_weights()
    for path, buffer in short.named_buffers():
        owner, _, own = path.rpartition(".")
        rebuilt.get_submodule(owner)._buffers[own] = buffer  # those that are not saved
    return rebuilt  # type: ignore[no-any-return]


def _differing_attributes(blocks: Sequence[nn.Module]) -> list[str]:
    """The plain attributes, as `path.name` inside a block, that are not alike in all blocks."""
    places = {
        (path, name)
        for block in blocks
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if not name.startswith("_") and name != "training" and isinstance(value, int | float | str | None)
    }
    dotted = sorted(f"{path}.{name}".lstrip(".") for path, name in places)
    return [name for name in dotted if len({_value(block, name) for block in blocks}) > 1]


def _values(container: nn.Module, name: str) -> list[Any]:
    return [_value(block, name) for block in container.children()]


def _value(block: nn.Module, dotted: str) -> Any:
    path, _, name = dotted.rpartition(".")
    module = dict(block.named_modules()).get(path)
    return None if module is None else vars(module).get(name)
