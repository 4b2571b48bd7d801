"""A model whose blocks have their weights only while they run, taken from a ring of slots."""

import copy
import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from graphopt.errors import GraphoptError, PlanError
from graphopt.passes.blocks import Stack
from graphopt.passes.layer_ring import NAME, LayerRing, Single, refuse


@dataclass(frozen=True, eq=False)
class OwnWeights:
    """The parameters of one block that nothing else has, by name, each with all its names there."""

    tensors: Mapping[str, nn.Parameter]
    names: Mapping[str, tuple[str, ...]]


def own_weights(model: nn.Module, stack: Stack) -> tuple[OwnWeights, ...]:
    """What each block alone has. Buffers, which a forward may write to, are not among it.

    PlanError for parameters of other classes than torch's, on other devices than the first of the model,
    or without data.
    """
    device = next(model.parameters()).device
    if device.type not in ("cpu", "cuda"):
        raise PlanError(f"layers are streamed to the CPU or to CUDA; the model is on {device}")
    owner_of = {id(m): i for i, block in enumerate(stack.blocks) for m in block.modules()}
    users: dict[int, set[tuple[int, int]]] = {}  # of a storage: the tensors of it, with their owner
    for module in model.modules():
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                key = tensor.untyped_storage().data_ptr()
                users.setdefault(key, set()).add((owner_of.get(id(module), -1), id(tensor)))
    return tuple(_own(block, users, device) for block in stack.blocks)


def _own(block: nn.Module, users: Mapping[int, set[Any]], device: torch.device) -> OwnWeights:
    tensors: dict[str, nn.Parameter] = {}
    names: dict[str, tuple[str, ...]] = {}
    first: dict[int, str] = {}
    for name, parameter in block.named_parameters(remove_duplicate=False):
        if type(parameter) is not nn.Parameter or parameter.device != device:
            what = f"a {type(parameter).__name__} on {parameter.device}"
            raise PlanError(f"{name} is {what}; layers are streamed as plain parameters on {device}")
        if parameter.numel() and len(users[parameter.untyped_storage().data_ptr()]) == 1:
            main = first.setdefault(id(parameter), name)
            tensors[main] = parameter
            names[main] = (*names.get(main, ()), name)
    return OwnWeights(tensors, names)


def without_weights(
    model: nn.Module, stack: Stack, own: Sequence[OwnWeights], streamed: Collection[int], in_place: bool
) -> nn.Module:
    """A copy of `model` (or itself) in which the weights of the blocks `streamed` have no memory."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
        for i in streamed
        for p in own[i].tensors.values()
    }
    if not in_place:
        changed = copy.deepcopy(model, dict[int, Any](empty))
        return changed.eval().requires_grad_(False)
    for i in streamed:
        for module in stack.blocks[i].modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = empty.get(id(parameter), parameter)
    return model.eval().requires_grad_(False)


Names = tuple[tuple[str, ...], ...]  # of each tensor of a block, all the names that it has there


def attach(model: Any, path: str, names: Mapping[int, Names], ring: LayerRing | None) -> nn.Module:
    """Lets blocks at `path` take their weights from `ring`, whose records are the keys of `names`."""
    for position, block in enumerate(model.get_submodule(path).children()):
        kind: Any = type(block)
        block.__class__ = _block_class(kind)
        block._streamed = None
        if ring is not None and position in names:
            block._streamed = _Streamed(ring, list(names).index(position), names[position])
    model.__class__ = _model_class(type(model))  # type: ignore[arg-type] # classes are hashable
    model._layer_ring = ring
    return model  # type: ignore[no-any-return]


def restore(model: Any, path: str) -> None:
    """Undoes `attach`: the blocks get their weights back, in memory of their own."""
    for block in model.get_submodule(path).children():
        if (own := block._streamed) is not None:
            stored = own.ring.tensors(own.record)
            weights = [nn.Parameter(stored[names[0]], requires_grad=False) for names in own.names]
            _put(own.places(block), weights)
        del block._streamed
        block.__class__ = type(block).__bases__[1]
    del model._layer_ring
    model.__class__ = type(model).__bases__[1]


@dataclass(frozen=True, eq=False)
class _Streamed:
    """What a block runs with: record `record` of `ring`, and the names of each of its tensors."""

    ring: LayerRing
    record: int
    names: Names

    def places(self, block: nn.Module) -> list[list[tuple[nn.Module, str]]]:
        """Where each tensor belongs."""
        return [[_place(block, name) for name in names] for names in self.names]

    def run(self, block: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        """The block's own `forward` with its weights."""
        _check_inference(block, args, kwargs)
        places = self.places(block)
        weights = self.ring.take(self.record)
        empty = [owners[0][0]._parameters[owners[0][1]] for owners in places]
        try:
            _put(places, weights)
            return forward(block, *args, **kwargs)
        finally:
            _put(places, empty)
            self.ring.give_back()


def _place(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, own = name.rpartition(".")
    return block.get_submodule(path), own


def _put(places: Sequence[Sequence[tuple[nn.Module, str]]], weights: Sequence[Any]) -> None:
    for owners, weight in zip(places, weights, strict=True):
        for module, name in owners:
            module._parameters[name] = weight


def _check_inference(block: nn.Module, args: Any, kwargs: Any) -> None:
    if block.training:
        refuse_training("train")
    if not torch.is_grad_enabled():
        return
    given = [*args, *kwargs.values(), *block.parameters()]
    if any(isinstance(value, Tensor) and value.requires_grad for value in given):
        refuse_training("compute gradients")


def refuse_training(what: str) -> NoReturn:
    """The model cannot train."""
    raise GraphoptError(
        f"{NAME}: a model that streams its layers cannot {what}: their weights are overwritten while it "
        "runs; call eval() and requires_grad_(False), and run it on inputs without gradients"
    )


class _Fixed(Single):
    """A module that stays where it is."""

    def _apply(self, *_: Any, **__: Any) -> NoReturn:
        refuse("moved or given another dtype")


class StreamedModel(_Fixed):
    """What a model that streams its layers has beside its own class.

    Its `parameters()` of streamed layers are on the meta device while they do not run; `state_dict()` is
    whole, in memory of its own. It cannot train, move, change its dtype, load weights, be pickled or
    copied; each raises GraphoptError.
    """

    _layer_ring: LayerRing | None

    def close(self) -> None:
        """Ends the thread that loads, and removes a temporary file. The model cannot run afterwards."""
        if self._layer_ring is not None:
            self._layer_ring.close()

    def train(self, mode: bool = True) -> Any:
        """Only to evaluation mode."""
        if mode:
            refuse_training("train")
        return super().train(mode)  # type: ignore[misc]

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Only to False."""
        if requires_grad:
            refuse_training("compute gradients")
        return super().requires_grad_(requires_grad)  # type: ignore[misc]

    def load_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        """Refused."""
        refuse("given other weights")

    def _valid_auto_compile_criteria(self, *_: Any) -> bool:
        return False  # transformers would compile all of it as one graph


@functools.cache
def _model_class(kind: Any) -> Any:
    members = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (StreamedModel, kind), members)


class _StreamedBlock(_Fixed):
    """What a block has beside its own class: where its weights come from, None for one that stays."""

    _streamed: _Streamed | None

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        found = super().state_dict(*args, **kwargs)  # type: ignore[misc]
        if (own := self._streamed) is not None:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
            stored = own.ring.tensors(own.record)
            for names in own.names:
                found |= {f"{prefix}{name}": stored[names[0]] for name in names}
        return found

    def _load_from_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        refuse("given other weights")


@functools.cache
def _block_class(kind: Any) -> Any:
    """A subclass of `kind` with the same name and the same signature of `forward`."""

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._streamed is None:
            return kind.forward(self, *args, **kwargs)
        return self._streamed.run(self, kind.forward, args, kwargs)

    reason = "stream-layers runs its layers eagerly: their weights come and go"
    members = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    members["forward"] = torch.compiler.disable(forward, reason=reason)
    return type(kind.__name__, (_StreamedBlock, kind), members)
