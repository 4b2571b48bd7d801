"""Split the vocabulary of a model over the ranks of a mesh: embedding, projection and loss.

The only pass on modules instead of Programs: it changes which rows of the parameters each process has,
before anything is captured. `graphopt.vocab_parallel` is what then runs.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from graphopt.cost_models.devices import Cluster, Device, format_bytes
from graphopt.cost_models.split_vocab import SplitCost, cheapest
from graphopt.errors import GraphoptError, PlanError
from graphopt.passes.vocab_matching import find_vocabulary
from graphopt.plan import Plan
from graphopt.split_tensors import SplitWeight, split_weight
from graphopt.vocab_dtensor import part_of, placed, shard_of
from graphopt.vocab_exchange import ALGORITHMS, SplitSizes, Way
from graphopt.vocab_shard import Shard, gather_rows, group_of, sum_over

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_PROBE_BYTES = 2**22


@dataclass(frozen=True)
class SplitVocabPlan(Plan):
    """The parameters to split over `ranks`, and how the loss of a step of `tokens` runs.

    `payload_bytes` is what a rank puts into the `collectives` of the loss, `sent_bytes` what it sends by
    ring algorithms, `peak_bytes` what it holds above the operands. The links are those of the cluster;
    losses of other sizes, and without gradients, choose their way by the same costs.
    """

    head: str
    bias: str | None
    embeddings: tuple[str, ...]
    words: int
    ranks: int
    tokens: int
    algorithm: str
    stream: str
    block: int
    collectives: int
    payload_bytes: int
    sent_bytes: int
    seconds: float
    peak_bytes: int

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters to split, each once."""
        bias = () if self.bias is None else (self.bias,)
        return tuple(dict.fromkeys((self.head, *bias, *self.embeddings)))

    def __str__(self) -> str:
        return (
            f"{', '.join(self.names)}: {self.words} words over {self.ranks} ranks; loss of {self.tokens} "
            f"tokens {self.algorithm} in blocks of {self.block} {self.stream}: {self.collectives} "
            f"collectives of {format_bytes(self.payload_bytes)}, peak {format_bytes(self.peak_bytes)}"
        )


@dataclass(frozen=True)
class SplitVocab:
    """Split the embedding, the projection and the loss of a language model over ranks.

    Every rank of the mesh dimension `dim` must see the same batch. The gradients of split parameters are
    of this rank's rows: a norm over all gradients needs their squares summed over the ranks. `algorithm`
    fixes the one of `graphopt.vocab_parallel` that the loss runs; None takes the fastest that fits
    `memory` (bytes that the loss may hold above its operands; None: 1.5 times its gradients). The printed
    plan is for so many `tokens`. `cluster` has the costs of a link; None measures them.
    """

    name: ClassVar[str] = "split-vocab"

    dim: str | None = None
    algorithm: str | None = None
    memory: int | None = None
    tokens: int = 2048
    cluster: Cluster | None = None

    def __post_init__(self) -> None:
        if self.algorithm not in (None, *ALGORITHMS):
            raise PlanError(f"algorithm={self.algorithm!r} is none of {', '.join(ALGORITHMS)}")

    def plan(
        self,
        model: nn.Module,
        mesh: "DeviceMesh",
        device: Device,
        batch: Mapping[str, Any] | None = None,
    ) -> SplitVocabPlan:
        """What to split, and how the loss runs; changes nothing. Every rank must call it.

        `batch` makes the model compute its loss; see `graphopt.passes.vocab_matching`.
        """
        if any(isinstance(p, SplitWeight) for p in model.parameters()):
            raise PlanError("the vocabulary of this model is split already")
        found = find_vocabulary(model, batch)
        weight = model.get_parameter(found.head)
        shard = self._shard(weight, mesh)
        cluster = self._cluster(mesh, shard, device, weight.device)
        sizes = SplitSizes(self.tokens, weight.shape[1], found.words, shard.ranks, weight.dtype)
        cost = _Chooser(cluster, self).cost(sizes)
        payload = sum(c.nbytes for c in cost.collectives)
        parts = (found.head, found.bias, found.embeddings, found.words, shard.ranks, self.tokens)
        count = len(cost.collectives)
        return SplitVocabPlan(
            *parts, *cost.way, count, payload, cost.sent_bytes, cost.seconds, cost.peak_bytes
        )

    def apply(
        self, model: nn.Module, mesh: "DeviceMesh", device: Device, plan: SplitVocabPlan
    ) -> nn.Module:
        """`model` itself, its parameters replaced by this rank's rows; PlanError for a wrong plan."""
        wrong = [n for n in plan.names if _rows(model, n) != plan.words]
        if wrong:
            raise PlanError(f"{', '.join(wrong)}: no parameter with {plan.words} rows")
        head = model.get_parameter(plan.head)
        shard, where = self._shard(head, mesh), head.device
        chooser = _Chooser(self._cluster(mesh, shard, device, where), self)
        for name in plan.names:
            old = model.get_parameter(name)
            new = split_weight(part_of(old.detach(), shard).clone(), shard, chooser, old)
            _replace(model, old, new)
        model.register_state_dict_post_hook(_whole)
        model.register_load_state_dict_pre_hook(_parted)
        return model

    def _shard(self, weight: torch.Tensor, mesh: "DeviceMesh") -> Shard:
        """The part that this rank has of a DTensor already, or gets of another weight."""
        wanted = Shard.on_mesh(weight.shape[0], mesh, self.dim)
        found = shard_of(weight)
        if found is not None and found.group != wanted.group:
            raise PlanError(
                "the weight of the projection is sharded over other ranks than those of the mesh"
            )
        return found or wanted

    def _cluster(self, mesh: "DeviceMesh", shard: Shard, device: Device, where: torch.device) -> Cluster:
        """The same on every rank, so that all choose the same way."""
        found = [self.cluster or measured_cluster(shard, device, where)]
        group = group_of(mesh, self.dim)
        first = torch.distributed.get_global_rank(group, 0)
        torch.distributed.broadcast_object_list(found, src=first, group=group)
        if found[0].count != shard.ranks:
            raise PlanError(f"the cluster has {found[0].count} devices, the mesh {shard.ranks} ranks")
        return found[0]


@dataclass(frozen=True)
class _Chooser:
    """Chooses the way of a loss; equal on all ranks of a group."""

    cluster: Cluster
    options: SplitVocab

    def cost(self, sizes: SplitSizes) -> SplitCost:
        """The chosen way and what it costs."""
        fixed = self.options.algorithm
        algorithms = ALGORITHMS if fixed is None else (fixed,)
        return cheapest(sizes, self.cluster, self.options.memory, algorithms)

    def __call__(self, sizes: SplitSizes) -> Way:
        return self.cost(sizes).way


def measured_cluster(shard: Shard, device: Device, where: torch.device) -> Cluster:
    """The costs of a link, from sums of one number and of 4 MiB over the ranks of `shard`."""
    seconds = []
    for count in (1, _PROBE_BYTES // 4):
        numbers = torch.zeros(count, device=where)
        seconds.append(min(_timed(numbers, shard) for _ in range(4)))
    steps = max(1, 2 * (shard.ranks - 1))
    rate = _PROBE_BYTES * steps / shard.ranks / max(seconds[1] - seconds[0], 1e-9)
    return Cluster(device, shard.ranks, rate, seconds[0] / steps, "measured here")


def _timed(numbers: torch.Tensor, shard: Shard) -> float:
    begin = time.perf_counter()
    sum_over(numbers, shard).flatten()[0].item()
    return time.perf_counter() - begin


def _rows(model: nn.Module, name: str) -> int | None:
    try:
        return model.get_parameter(name).shape[0]
    except AttributeError:
        return None


def _replace(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Put `new` wherever `old` is, so that a tied weight stays tied."""
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter is old:
                setattr(module, name, new)


def _whole(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Gather the split parameters of a state_dict; every rank must make it."""
    made: dict[int, torch.Tensor] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if isinstance(parameter, SplitWeight) and prefix + name in state:
            if id(parameter) not in made:
                rows = parameter.detach().as_subclass(torch.Tensor)
                whole = gather_rows(rows, parameter.shard)
                made[id(parameter)] = placed(whole, parameter.origin)
            state[prefix + name] = made[id(parameter)]


def _parted(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take this rank's rows of a state_dict of the whole model."""
    for name, parameter in module.named_parameters(remove_duplicate=False):
        whole = state.get(prefix + name)
        if isinstance(parameter, SplitWeight) and whole is not None:
            if whole.shape[1:] != parameter.shape[1:]:
                raise GraphoptError(f"{name}: {tuple(whole.shape)} are not rows of the vocabulary")
            state[prefix + name] = part_of(whole, parameter.shard)
