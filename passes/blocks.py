"""The repeated blocks of a model, found by watching one run, and runs with some of them bypassed."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import PlanError

Batch = Mapping[str, Any] | tuple[Any, ...]
Forward = Callable[..., Any]


@dataclass(frozen=True, eq=False)
class Stack:
    """Blocks of one class that hand the hidden states of a model from each to the next.

    `path` names the list that holds them, `slot` the argument of a block that takes the hidden states
    (a position or a keyword), `others` how many outputs follow them where a block returns a tuple.
    """

    path: str
    blocks: tuple[nn.Module, ...]
    slot: int | str
    others: int | None

    def hidden(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """The hidden states among the arguments of a block."""
        return args[self.slot] if isinstance(self.slot, int) else kwargs[self.slot]  # type: ignore[no-any-return]

    def with_hidden(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], hidden: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with other hidden states."""
        if isinstance(self.slot, int):
            return (*args[: self.slot], hidden, *args[self.slot + 1 :]), dict(kwargs)
        return args, {**kwargs, self.slot: hidden}

    def output(self, hidden: Tensor) -> Any:
        """What a block returns that changes nothing."""
        return hidden if self.others is None else (hidden, *[None] * self.others)


def call(model: nn.Module, batch: Batch) -> Any:
    """The model on a batch: keyword arguments, or positional ones."""
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


@contextlib.contextmanager
def forwards(replacements: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Modules run other functions than their own `forward`, for a while."""
    own = {module: module.__dict__.get("forward") for module in replacements}
    try:
        for module, function in replacements.items():
            module.__dict__["forward"] = function
        yield
    finally:
        for module, before in own.items():
            module.__dict__.pop("forward", None)
            if before is not None:
                module.__dict__["forward"] = before


@contextlib.contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@dataclass(frozen=True, eq=False)
class _Call:
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


def find_stack(model: nn.Module, batch: Batch) -> Stack:
    """The one chain of equal blocks that `batch` runs through.

    A chain is a list of two or more modules of one class, each called once and in order, where the
    hidden states that one returns are, as the same tensor, an argument of the next and keep their
    shape. Of chains inside the blocks of another only the outer counts. PlanError where there is none
    or more than one.
    """
    lists = {
        path: tuple(module.children())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and _alike(tuple(module.children()))
    }
    calls: list[_Call] = []

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(_Call(module, args, kwargs, output))

    members = dict.fromkeys(member for blocks in lists.values() for member in blocks)
    hooks = [member.register_forward_hook(watch, with_kwargs=True) for member in members]
    try:
        with evaluation(model):
            call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    found = [stack for path, blocks in lists.items() if (stack := _chain(path, blocks, calls))]
    outer = [s for s in found if not any(s.path.startswith(f"{o.path}.") for o in found if o is not s)]
    if not outer:
        raise PlanError(
            f"{type(model).__name__} has no repeated blocks: no list of modules of one class "
            "that hand hidden states of one shape from each to the next"
        )
    if len(outer) > 1:
        names = ", ".join(f"{s.path} ({len(s.blocks)} blocks)" for s in outer)
        raise PlanError(f"{type(model).__name__} has several stacks of blocks: {names}; one is supported")
    return outer[0]


def _alike(modules: tuple[nn.Module, ...]) -> bool:
    distinct = len({id(module) for module in modules}) == len(modules)
    return len(modules) > 1 and distinct and len({type(module) for module in modules}) == 1


def _chain(path: str, blocks: tuple[nn.Module, ...], calls: list[_Call]) -> Stack | None:
    """The stack of `blocks`, where the calls show that they are a chain."""
    own = [c for c in calls if c.module in blocks]
    if [id(c.module) for c in own] != [id(block) for block in blocks]:
        return None
    hidden = [_first(c.output) for c in own]
    slots = {_slot(after, h) for after, h in zip(own[1:], hidden, strict=False)}
    slot = slots.pop() if len(slots) == 1 else None
    if slot is None:
        return None
    tuples = {len(c.output) - 1 if isinstance(c.output, tuple) else None for c in own}
    stack = Stack(path, blocks, slot, next(iter(tuples)))
    inputs = [stack.hidden(c.args, c.kwargs) for c in own if _has(c, slot)]
    shapes = {h.shape for h in [*hidden, *inputs] if isinstance(h, Tensor)}
    return stack if len(inputs) == len(own) and len(shapes) == len(tuples) == 1 else None


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) and output else output


def _slot(called: _Call, hidden: Any) -> int | str | None:
    """The argument of a call that is the tensor `hidden`."""
    if not isinstance(hidden, Tensor):
        return None
    arguments: list[tuple[int | str, Any]] = [*enumerate(called.args), *called.kwargs.items()]
    return next((name for name, value in arguments if value is hidden), None)


def _has(called: _Call, slot: int | str) -> bool:
    return slot < len(called.args) if isinstance(slot, int) else slot in called.kwargs
