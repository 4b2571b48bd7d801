"""The pass that runs prompts through all blocks and the tokens after them through some."""

import copy
import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from graphopt.errors import GraphoptError, PlanError
from graphopt.passes.blocks import Stack, find_stack
from graphopt.passes.cached_runs import cache_seen_by, check_entries, tokens_seen
from graphopt.passes.decode_checks import check_decoding
from graphopt.passes.decode_plan import DecodePlan, given_sets, skipdecode_sets
from graphopt.passes.made_up_inputs import made_up_batch
from graphopt.passes.module_pass import ModulePass
from graphopt.passes.skip_units import bypassed, whole_blocks


@dataclass(frozen=True)
class DecodeMeasurement:
    """`read` counts the parameters in the blocks that run, for each set of the plan; `whole` for all."""

    read: tuple[int, ...]
    whole: int

    def __str__(self) -> str:
        parts = " then ".join(str(count) for count in self.read)
        return f"  measured   {parts} of {self.whole} block parameters for a token after the prompt"


@dataclass(frozen=True)
class SkipDecode(ModulePass):
    """Runs prompts through all blocks of a model, and later tokens through some: their states stay right.

    Give one of:

    - `keep`: the blocks that run for tokens after the prompt, block 0 among them; or a mapping from the
      first token of each set to the set, where sets only get smaller: {1: [0, 1, 3], 33: [0, 3]}.
    - `depths`, `tokens` and `warmup`: the schedule of SkipDecode (Del Corro et al., arXiv 2307.02628):
      from depths[0] blocks down to depths[1] at token `tokens`, the first `warmup` of them at the bottom.

    To choose the blocks by what they are worth, give `keep=SkipLayers(...).plan(model).kept`.

    The result generates with a dynamic or a static cache. All rows of a batch are at the same set,
    counted from the end of the prompt, so that padding on the left changes nothing. A token is taken for
    a later one where it comes alone to a cache that is not empty. Several tokens after a later one, for
    which all blocks would have to run without the states of the tokens they skipped, are a GraphoptError.
    `save_pretrained` writes the whole model.
    """

    keep: Sequence[int] | Mapping[int, Sequence[int]] | None = None
    depths: tuple[int, int] | None = None
    tokens: int = 64
    warmup: int = 1
    name: ClassVar[str] = "skip-decode"

    def __post_init__(self) -> None:
        given = [name for name in ("keep", "depths") if getattr(self, name) is not None]
        if len(given) != 1:
            raise PlanError(f"give one of keep, depths; given: {', '.join(given) or 'none'}")

    def plan(self, model: nn.Module) -> DecodePlan:
        """The sets of blocks; PlanError where they do not fit the model."""
        stack = decoder_stack(model)
        if self.keep is not None:
            sets, rule = given_sets(self.keep), "given"
        else:
            assert self.depths is not None
            sets = skipdecode_sets(len(stack.blocks), self.depths, self.tokens, self.warmup)
            rule = "skipdecode"
        plan = DecodePlan(stack.path, len(stack.blocks), tuple(sets), tuple(sets.values()), rule)
        plan.check()
        return plan

    def apply(self, model: nn.Module, plan: DecodePlan) -> nn.Module:
        """A copy of `model` that skips; VerifyError where a run without a cache gives other logits."""
        stack = decoder_stack(model)
        if (stack.path, len(stack.blocks)) != (plan.path, plan.blocks):
            raise PlanError(
                f"the plan is for {plan.blocks} blocks at {plan.path!r}; the model has "
                f"{len(stack.blocks)} at {stack.path!r}"
            )
        plan.check()
        changed: Any = copy.deepcopy(model)
        own = replace(stack, blocks=tuple(changed.get_submodule(stack.path).children()))
        changed.__class__ = _skipping_class(type(model))  # type: ignore[arg-type] # classes are hashable
        changed._skip_decode = (plan, own)
        check_decoding(changed, own, plan, made_up_batch(model)["input_ids"])
        return changed  # type: ignore[no-any-return]

    def measure(self, model: nn.Module, plan: DecodePlan, changed: nn.Module) -> DecodeMeasurement:
        """How many parameters of the blocks a later token reads."""
        blocks = decoder_stack(model).blocks
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks]
        return DecodeMeasurement(tuple(sum(sizes[i] for i in kept) for kept in plan.kept), sum(sizes))


def decoder_stack(model: nn.Module) -> Stack:
    """The blocks of a model that generates, all of which run; PlanError where `model` is none."""
    if isinstance(model, _Skipping):
        raise PlanError("the model skips blocks after the prompt already")
    can_generate = getattr(model, "can_generate", None)
    config = getattr(model, "config", None)
    if can_generate is None or not can_generate() or getattr(config, "is_encoder_decoder", False):
        raise PlanError(f"{type(model).__name__} is not a decoder of transformers that generates")
    return find_stack(model, made_up_batch(model))


class _Skipping:
    """What a skipping model has beside its own class: `_skip_decode`, its plan and its blocks."""

    _skip_decode: tuple[DecodePlan, Stack]

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own; without a cache, or with the prompt in pieces, a GraphoptError."""
        configs = (kwargs.get("generation_config"), getattr(self, "generation_config", None))

        def option(name: str) -> Any:
            values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
            return next((value for value in values if value is not None), None)

        if option("use_cache") is False:
            raise GraphoptError("use_cache=False: without a cache every token runs through all blocks")
        if option("prefill_chunk_size") is not None:
            raise GraphoptError("prefill_chunk_size=: a piece of one token passes for a later token")
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def _valid_auto_compile_criteria(self, *args: Any) -> bool:
        return False  # blocks change from call to call

    def __reduce__(self) -> Any:
        return _blank, (type(self).__mro__[2],), self.__dict__


def _blank(kind: type) -> Any:
    made = _skipping_class(kind)
    return made.__new__(made)


@functools.cache
def _skipping_class(kind: Any) -> Any:
    """A subclass of `kind` with the same name and the same signature of `forward`."""
    parameters = list(inspect.signature(kind.forward).parameters)[1:]

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _run(self, kind.forward, dict(zip(parameters, args, strict=False)) | kwargs)

    members = {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (_Skipping, kind), members)


def _run(model: Any, whole: Any, given: dict[str, Any]) -> Any:
    """The forward: all blocks for a prompt, those of the plan for one token after it."""
    cache = given.get("past_key_values")
    plan, stack = model._skip_decode
    token = None if cache is None else _later_token(plan, cache, given)
    if token is None:
        return whole(model, **given)
    kept = plan.kept_at(token)
    seen = cache_seen_by(cache, kept)
    with bypassed(whole_blocks(stack), frozenset(range(plan.blocks)) - set(kept)):
        output = whole(model, **(given | {"past_key_values": seen}))
    return _with_cache(output, seen, cache)


def _later_token(plan: DecodePlan, cache: Any, given: dict[str, Any]) -> int | None:
    """Which token after the prompt this is, from 1; None where it is more of the prompt.

    The blocks that the first set leaves out have seen the prompt only.
    """
    if int(cache.get_seq_length()) == 0:
        return None
    check_entries(cache, plan.blocks)
    ids = given.get("input_ids")
    inputs: Tensor = given["inputs_embeds"] if ids is None else ids
    later = tokens_seen(cache, 0) - tokens_seen(cache, plan.never_run)
    if inputs.shape[1] == 1:
        return later + 1
    if later:
        raise GraphoptError(
            f"{inputs.shape[1]} tokens at once, {later} tokens after the prompt: the blocks that these "
            "skipped lack their states; give the whole text with a new cache"
        )
    return None


def _with_cache(output: Any, seen: Any, cache: Any) -> Any:
    """The output with the cache that the caller gave."""
    if isinstance(output, tuple):
        return tuple(cache if value is seen else value for value in output)
    output.past_key_values = cache
    return output
