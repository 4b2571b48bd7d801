"""The passes of a split vocabulary between those of a pipeline's stages, on one rank.

The algorithms are those of Yeung et al., "Balancing Pipeline Parallelism with Vocabulary Parallelism",
MLSys 2025, sections 4 and 5, as `plan_pipeline` places them. For each microbatch the last stage sends
its output to every rank, each rank runs S and later T on its own words, and the last stage's backward
waits for the gradient that comes back; the embedding does likewise before the first stage.

Collectives run beside the passes. Each kind has a lane and a process group of its own, in which every
rank has the same order, that of the plan: nothing depends on which pass comes first on a rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.lane import Lane, Promise
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.pipeline_transfers import algorithm_of, order_of
from graphopt.pipeline_vocabulary import PipelineVocabulary
from graphopt.stream_plans import attention_gradient
from graphopt.vocab_exchange import Problem, Way, exchange
from graphopt.vocab_loss import loss_of, targets_of
from graphopt.vocab_sweeps import Kept, Streamed, Sweep, WeightGradients, gradient_of

_WAYS = {"vocab-1": "two-barrier", "vocab-2": "one-barrier"}
_AHEAD = 2  # microbatches whose rows, or whose hidden values, are there before they are needed


@dataclass(frozen=True)
class Place:
    """Where the passes run: this rank of `group`, on `device`.

    Gradients are added to `.grad` times `scale`, under `lock`: a weight that is embedding and head has
    gradients from two threads.
    """

    group: dist.ProcessGroup
    device: torch.device
    scale: float
    lock: Lock = field(default_factory=Lock)


class Channel:
    """A lane and a process group for one kind of collective."""

    def __init__(self, place: Place) -> None:
        group = place.group
        ranks = [dist.get_global_rank(group, r) for r in range(dist.get_world_size(group))]
        self.group, self.lane = dist.new_group(ranks), Lane(place.device)


class EmbeddingPasses:
    """Rows of the embedding for the first stage, and their gradients back to the ranks."""

    def __init__(self, vocabulary: PipelineVocabulary, place: Place) -> None:
        self._vocabulary, self._place = vocabulary, place
        self._down, self._up = Channel(place), Channel(place)

    def follow(self, plan: PipelinePlan) -> None:
        """Take the orders of `plan`."""
        self._first = plan.stage_devices[0][0]
        self._is_first = dist.get_rank(self._place.group) == self._first
        self._entered = order_of(plan, self._first, 0, "F")
        self._left = order_of(plan, self._first, 0, "BW")

    def begin(self, inputs: Sequence[tuple[Any, ...]], with_backward: bool) -> None:
        """Begin a step; `inputs` are those of each microbatch, the ids first."""
        self._ids = [row[0] for row in inputs]
        weight = self._vocabulary.embedding
        self._trains = with_backward and weight is not None and weight.requires_grad
        self._rows: dict[int, Promise[Tensor | None]] = {}
        self._begun: list[Promise[None]] = []
        for microbatch in self._entered[: _AHEAD if self._is_first else None]:
            self._look_up(microbatch)
        if self._trains and not self._is_first:
            for microbatch in self._left:
                self._spread(microbatch, None)

    def rows(self, microbatch: int) -> Tensor:
        """What the first stage takes (.., D)."""
        later = self._entered.index(microbatch) + _AHEAD
        if later < len(self._entered):
            self._look_up(self._entered[later])
        rows = self._rows.pop(microbatch).result()
        assert rows is not None
        if self._trains:
            rows.requires_grad_()
            rows.register_hook(lambda gradient: self._spread(microbatch, gradient))
        return rows

    def finish(self) -> None:
        """Wait for what was begun."""
        begun: list[Promise[Any]] = [*self._rows.values(), *self._begun]
        for promise in begun:
            promise.result()
        self._rows, self._begun, self._ids = {}, [], []

    def _look_up(self, microbatch: int) -> None:
        self._rows[microbatch] = self._down.lane.begin(self._sum_rows, self._ids[microbatch])

    def _sum_rows(self, ids: Tensor) -> Tensor | None:
        if bool(((ids < 0) | (ids >= self._vocabulary.shard.words)).any()):
            raise IndexError("index out of range in self")
        rows = self._vocabulary(ids)
        dist.reduce(rows, group=self._down.group, group_dst=self._first)
        return rows if self._is_first else None

    def _spread(self, microbatch: int, gradient: Tensor | None) -> None:
        self._begun.append(self._up.lane.begin(self._add_rows, self._ids[microbatch], gradient))

    def _add_rows(self, ids: Tensor, gradient: Tensor | None) -> None:
        """Send, or receive, the gradient of the rows of `ids`, and add those that are this rank's."""
        vocabulary, weight = self._vocabulary, self._vocabulary.embedding
        assert weight is not None
        rows = (
            weight.new_empty((*ids.shape, weight.shape[1])) if gradient is None else gradient.contiguous()
        )
        dist.broadcast(rows, group=self._up.group, group_src=self._first)
        inside, local = vocabulary.own(ids)
        if vocabulary.padding_idx is not None:
            inside = inside & (ids != vocabulary.padding_idx)
        with self._place.lock:
            gradient_of(weight).index_add_(0, local[inside], rows[inside], alpha=self._place.scale)


class HeadPasses:
    """S and T of the output layer, and the loss."""

    def __init__(self, vocabulary: PipelineVocabulary, place: Place, hidden: Tensor) -> None:
        self._vocabulary, self._place, self._like = vocabulary, place, hidden
        self._hidden, self._numbers, self._sums = Channel(place), Channel(place), Channel(place)
        self._shard = vocabulary.shard.within(self._numbers.group)

    def follow(self, plan: PipelinePlan) -> None:
        """Take the algorithm and the orders of `plan`."""
        self._way = Way(_WAYS[algorithm_of(plan) or ""], "words", self._vocabulary.block)
        self._last = plan.stage_devices[-1][0]
        self._is_last = dist.get_rank(self._place.group) == self._last
        self._finals = order_of(plan, self._last, plan.stages - 1, "F")

    def begin(self, with_backward: bool) -> None:
        """Begin a step."""
        self._with_backward = with_backward
        self._received: dict[int, Promise[Tensor]] = {}
        self._open: dict[int, tuple[Sweep, Problem, Promise[Any]]] = {}
        self._gradients: dict[int, Promise[Any]] = {}
        self._losses: dict[int, Tensor] = {}
        self._waiting = iter(() if self._is_last else self._finals)
        for _ in range(_AHEAD):
            self._receive()

    def send(self, microbatch: int, output: Tensor) -> Tensor:
        """Send the last stage's output (.., D) to all; what comes back stands for the loss."""
        mine = output.detach().contiguous()
        self._received[microbatch] = self._hidden.lane.begin(self._spread, mine)
        handed: Tensor = _Handed.apply(output, self, microbatch)  # type: ignore[no-untyped-call]
        return handed

    def first(self, microbatch: int, target: Tensor) -> None:
        """S: the numbers of this rank's words, and with "vocab-2" what the gradient of x is made of."""
        x = self._received.pop(microbatch).result().flatten(0, -2)
        self._receive()
        vocabulary, with_mean = (
            self._vocabulary,
            self._with_backward and self._way.algorithm == "one-barrier",
        )
        targets = targets_of(target.flatten(), vocabulary.shard.words, None, vocabulary.options)
        problem = Problem(self._shard, targets, None, vocabulary.scale, self._way)
        bias = None if vocabulary.bias is None else vocabulary.bias.detach()
        operands = problem.operands(x, vocabulary.head.detach(), bias)
        sweep: Sweep
        if vocabulary.streamed or not self._with_backward:
            sweep = Streamed(operands, vocabulary.block, with_mean)
        else:
            sweep = Kept(operands, with_mean)
        numbers = self._numbers.lane.begin(self._exchange, sweep, problem)
        self._open[microbatch] = (sweep, problem, numbers)
        if with_mean:
            self._gradients[microbatch] = numbers

    def second(self, microbatch: int) -> None:
        """T: the gradient of this rank's words, and with "vocab-1" that of x."""
        sweep, problem, begun = self._open.pop(microbatch)
        lse, loss, _ = begun.result()
        self._losses[microbatch] = loss
        if not self._with_backward:
            return
        vocabulary, with_x = self._vocabulary, self._way.algorithm == "two-barrier"
        by = problem.by(lse, torch.ones_like(loss))
        with self._place.lock:
            into = WeightGradients(vocabulary.head, vocabulary.bias, self._place.scale)
            dx = sweep.finish(lse, by, into, with_x)
        if dx is not None:
            self._gradients[microbatch] = self._sums.lane.begin(self._sum, dx, self._sums.group)

    def gradient(self, microbatch: int) -> Tensor:
        """Of the last stage's output (.., D), on its rank."""
        found = self._gradients.pop(microbatch).result()
        dx: Tensor = found[-1] if isinstance(found, tuple) else found
        return dx.view(self._like.shape)

    def finish(self) -> dict[int, Tensor]:
        """Wait for what was begun; the losses of the microbatches."""
        for promise in (*self._received.values(), *self._gradients.values()):
            promise.result()
        for microbatch, (_, _, begun) in self._open.items():
            self._losses[microbatch] = begun.result()[1]
        self._received, self._open, self._gradients = {}, {}, {}
        return self._losses

    def _receive(self) -> None:
        if (microbatch := next(self._waiting, None)) is not None:
            self._received[microbatch] = self._hidden.lane.begin(self._spread, None)

    def _spread(self, output: Tensor | None) -> Tensor:
        if output is None:
            output = torch.empty_like(self._like, device=self._place.device)
        dist.broadcast(output, group=self._hidden.group, group_src=self._last)
        return output

    def _exchange(self, sweep: Sweep, problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
        """The log-sum-exp of all words and the loss, and on the last rank the gradient of x (N, D)."""
        numbers = exchange(sweep.own, sweep.operands, problem)
        dx, loss = None, loss_of(numbers, problem.targets)
        if sweep.mean is not None:
            by = problem.by(numbers.lse, torch.ones_like(loss)).rebased(sweep.base, numbers.lse)
            dx = self._sum(attention_gradient(sweep.operands, sweep.mean, by), self._numbers.group)
            sweep.mean = None
        return numbers.lse, loss.to(sweep.operands.dtype), dx

    def _sum(self, dx: Tensor, group: dist.ProcessGroup) -> Tensor | None:
        dist.reduce(dx, group=group, group_dst=self._last)
        return dx if self._is_last else None


class _Handed(torch.autograd.Function):
    """A zero whose backward is the gradient that the passes find for `output`."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, passes: HeadPasses, microbatch: int) -> Tensor:
        ctx.passes, ctx.microbatch = passes, microbatch
        return output.new_zeros(())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        return ctx.passes.gradient(ctx.microbatch), None, None


class VocabularyPasses:
    """All that a rank does for the vocabulary in a step."""

    def __init__(self, vocabulary: PipelineVocabulary, place: Place, hidden: Tensor) -> None:
        """`hidden` (.., D) is of the shape and dtype of what the last stage puts out."""
        self._head = HeadPasses(vocabulary, place, hidden)
        self._embedding = None if vocabulary.embedding is None else EmbeddingPasses(vocabulary, place)

    def follow(self, plan: PipelinePlan) -> None:
        """Run the passes of `plan` from the next step on."""
        self._head.follow(plan)
        if self._embedding is not None:
            self._embedding.follow(plan)

    def begin(self, inputs: Any, targets: Any, with_backward: bool) -> None:
        """Begin a step with the inputs and the targets of each microbatch, as on every rank."""
        if targets is None:
            raise GraphoptError("with a vocabulary that is split, step takes the target on every rank")
        if self._embedding is not None and not all(inputs or ((),)):
            raise GraphoptError("with an embedding that is split, step takes the ids on every rank")
        self._targets = targets
        self._head.begin(with_backward)
        if self._embedding is not None:
            self._embedding.begin(inputs, with_backward)

    def run(self, kind: str, microbatch: int) -> None:
        """The pass `kind`, S or T."""
        if kind == "S":
            self._head.first(microbatch, self._targets[microbatch])
        else:
            self._head.second(microbatch)

    def rows(self, microbatch: int, given: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the first stage takes, which was `given` the ids."""
        return given if self._embedding is None else (self._embedding.rows(microbatch), *given[1:])

    def send(self, microbatch: int, output: Tensor) -> Tensor:
        """Hand on what the last stage puts out; stands for its loss."""
        return self._head.send(microbatch, output)

    def finish(self) -> dict[int, Tensor]:
        """Wait for all that was begun; the losses by microbatch."""
        if self._embedding is not None:
            self._embedding.finish()
        self._targets = None
        return self._head.finish()
