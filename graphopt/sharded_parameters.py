"""Parameters in shards, one for each data parallel rank, gathered where a module reads them.

What a module reads under its parameter's name is made by two differentiable calls of DTensor, so that
`torch.compile` captures the gather of each parameter and the scatter of its gradient as functional
collectives, which `OverlapComm` moves. This is the form in which "SimpleFSDP: Simpler Fully Sharded Data
Parallel with torch.compile" (Zhang et al., arXiv 2411.00284, 2024) has them.
"""

import sys
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from graphopt.errors import GraphoptError, TraceError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

M = TypeVar("M", bound=nn.Module)


def shard_parameters(model: M, mesh: "DeviceMesh") -> M:
    """`model`, changed in place: each rank of `mesh` (of one dimension) holds a part of each parameter.

    The ranks see different batches, of equal size, and gradients are averaged over them, as with
    `torch.distributed.fsdp.fully_shard`. Parameters become DTensors under the names that they have,
    cut along their first dimension that divides by the number of ranks; those that have none stay
    whole on each rank. The values are those of rank 0, and shared parameters stay shared. Make the
    optimizer afterwards: gradients are DTensors of the shards.

    A module gathers a parameter whenever it reads it. `OverlapComm` says in the captured graph how early
    each of them is gathered, and which are kept from the forward to the backward. GraphoptError for
    another mesh, parameters that are DTensors before, or recurrent layers of torch.
    """
    _check(model, mesh)
    sharded: dict[nn.Parameter, nn.Parameter] = {}
    for module in list(model.modules()):
        own = {name: p for name, p in module._parameters.items() if p is not None}
        for name, parameter in own.items():
            if parameter not in sharded:
                sharded[parameter] = _sharded(parameter, mesh)
            module._parameters[name] = sharded[parameter]
        if own:
            kind = type(module)
            members: dict[str, Any] = {name: _gathering(name) for name in own}
            members |= {"__module__": kind.__module__, "__doc__": kind.__doc__}
            module.__class__ = type(kind.__name__, (kind,), members)
    return model


def _check(model: nn.Module, mesh: "DeviceMesh") -> None:
    """GraphoptError for what cannot be sharded, before anything is changed."""
    from torch.distributed.tensor import DTensor

    if mesh.ndim != 1:
        raise GraphoptError(f"parameters are sharded over a mesh of one dimension, not {mesh.ndim}")
    refuse_fully_sharded(model)
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise GraphoptError(
                f"{name} is a DTensor before its sharding; give a model of plain parameters"
            )
    for name, module in model.named_modules():
        if isinstance(module, nn.RNNBase):
            what = f"{type(module).__name__} {name}".rstrip()
            raise GraphoptError(f"{what} keeps its parameters in a list, so that they cannot be sharded")


def _sharded(parameter: nn.Parameter, mesh: "DeviceMesh") -> nn.Parameter:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    ranks = mesh.size()
    dims = [d for d, size in enumerate(parameter.shape) if size and size % ranks == 0]
    placement = Shard(dims[0]) if dims else Replicate()
    shards = distribute_tensor(parameter.detach(), mesh, [placement])
    return nn.Parameter(shards, requires_grad=parameter.requires_grad)


def _gathering(name: str) -> property:
    """A read-only attribute: the whole of a parameter, a plain tensor whose gradient is averaged."""

    def gathered(module: nn.Module) -> torch.Tensor | None:
        from torch.distributed.tensor import DTensor, Partial, Replicate

        shards = module._parameters[name]
        if not isinstance(shards, DTensor):  # set to something else since
            return shards
        whole = shards.redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial("avg")])

    return property(gathered)


def refuse_fully_sharded(model: nn.Module) -> None:
    """TraceError for a model whose parameters torch's own sharding gathers.

    It does so in hooks that `torch.compile` leaves out of the graph, so that nothing of it is seen.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:  # nothing can have been sharded by it
        return
    for name, module in model.named_modules():
        if isinstance(module, (fsdp.FSDPModule, fsdp.FullyShardedDataParallel)):
            what = f"{type(module).__name__} {name}".rstrip()
            raise TraceError(
                f"the parameters of {what} are gathered by torch's fully_shard, in hooks that cannot be "
                "captured; shard the plain model with graphopt.shard_parameters(model, mesh) instead"
            )
