"""Embedding, projection and cross-entropy of a vocabulary that is split over the ranks of a group.

Every rank holds the rows of its words of the weight (V_i, D), the same tokens, and the same hidden rows
x (N, D); loss and gradient of x come out the same on all. The algorithms are those of Yeung et al.,
"Balancing Pipeline Parallelism with Vocabulary Parallelism", MLSys 2025, section 4:

- "three-barrier": maximum, then sums, then the gradient of x are reduced one after the other;
- "two-barrier": the numbers of each rank's rows are gathered once, and the gradient of x is reduced;
- "one-barrier": each rank also makes softmax(z_i) W_i of its own words before it knows the others', and
  scales it afterwards, so that nothing but the gradient of its own weight is left for the backward.

No rank holds its logits (N, V_i). They are made in blocks of words, 8 N D V_i FLOPs in all, or of
tokens, 6 N D V_i FLOPs with one exchange for each block, and the gradients in the forward.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.stream_plans import (
    Gradients,
    RowNumbers,
    add_product,
    attention,
    attention_gradient,
    gradients,
    statistics,
)
from graphopt.streamed import Head, Operands, Tile, spans, statistics_of
from graphopt.vocab_dtensor import layout_of, local, own_rows, replicated, shard_of
from graphopt.vocab_exchange import (
    ALGORITHMS,
    STREAMS,
    Problem,
    Way,
    begin_exchange,
    end_exchange,
    exchange,
)
from graphopt.vocab_loss import LossOptions, Targets, blend, loss_of, probable_targets, targets_of
from graphopt.vocab_shard import Shard, gather_rows, sum_over

aten = torch.ops.aten


def vocab_parallel_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: Shard | None = None,
    *,
    bias: Tensor | None = None,
    class_weight: Tensor | None = None,
    options: LossOptions | None = None,
    head: Head | None = None,
    way: Way | None = None,
) -> Tensor:
    """`F.cross_entropy(x @ weight.T + bias, targets)` of a vocabulary that is split over ranks.

    x (N, D) and targets, (N,) or probabilities (N, V), are the same on every rank; weight (V_i, D) and
    bias (V_i,) are those of the words of `shard`; `class_weight` (V,) is of all words. `head` scales and
    soft-caps the logits. The loss, () or (N,), and the gradient of x are the same on every rank; the loss
    is float32 at least. x, targets and class weights may be replicated DTensors, weight and bias DTensors
    sharded by rows, which say the `shard`; then the loss is a replicated DTensor.

    Raises IndexError for targets outside of the vocabulary and GraphoptError for operands that do not
    fit, before any collective.
    """
    options, head, way = options or LossOptions(), head or Head(), way or Way()
    shard, layout = _shard(weight, shard), layout_of(x, targets, weight)
    x, targets, class_weight = local(x), local(targets, "targets"), local(class_weight, "class weights")
    weight, bias = own_rows(weight, shard), own_rows(bias, shard)
    _check(x, weight, targets, shard, class_weight, head, way)
    dtype = Operands(x, weight).dtype
    found, mix = _weighed(targets, shard, class_weight, options, dtype)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if way.stream == "tokens" and (options.reduction == "none" or not needed):
        way = Way(way.algorithm, "words", max(1, way.block * shard.size // max(1, x.shape[0])))
    problem = Problem(shard, found, mix, head, way)
    function = _TokensLoss if way.stream == "tokens" else _WordsLoss
    loss: Tensor = function.apply(x, weight, bias, problem, needed)  # type: ignore[no-untyped-call]
    return replicated(loss.to(dtype), layout)


def _shard(weight: Tensor, shard: Shard | None) -> Shard:
    found = shard or shard_of(weight)
    if found is None:
        raise GraphoptError("say the shard of a weight that is no DTensor sharded by rows")
    return found


def _weighed(
    targets: Tensor,
    shard: Shard,
    class_weight: Tensor | None,
    options: LossOptions,
    dtype: torch.dtype,
) -> tuple[Targets, Tensor | None]:
    """The targets, and what this rank's logits are summed by: (N, V_i), (1, V_i), or nothing."""
    weight = None if class_weight is None else class_weight.to(dtype)
    own = None if weight is None else shard.part(weight)
    if targets.is_floating_point():
        probability = targets.detach()
        part = probability[:, shard.start : shard.stop]
        found = probable_targets(probability, class_weight, options)
        return found, blend(part, shard.words, own, options)
    found = targets_of(targets, shard.words, class_weight, options)
    return found, own[None] if own is not None and options.label_smoothing else None


def _check(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    shard: Shard,
    class_weight: Tensor | None,
    head: Head,
    way: Way,
) -> None:
    if targets.requires_grad:
        raise GraphoptError("targets of a split vocabulary get no gradient: detach them")
    shape = (*x.shape[:1], shard.words) if targets.is_floating_point() else x.shape[:1]
    if x.dim() != 2 or targets.shape != shape:
        given = f"x {tuple(x.shape)} and targets {tuple(targets.shape)}"
        raise GraphoptError(f"{given} must be (N, D) and (N,), or probabilities (N, {shard.words})")
    if weight.shape != (shard.size, x.shape[1]):
        wanted = (shard.size, x.shape[1])
        raise GraphoptError(f"rank {shard.rank} needs a weight {wanted}, not {tuple(weight.shape)}")
    if weight.dtype is not x.dtype:
        raise GraphoptError(f"x is {x.dtype}, the weight {weight.dtype}: they must be of one dtype")
    if class_weight is not None and class_weight.shape != (shard.words,):
        raise GraphoptError(f"class weights must be ({shard.words},), not {tuple(class_weight.shape)}")
    if way.algorithm not in ALGORITHMS or way.stream not in STREAMS or way.block < 1:
        raise GraphoptError(f"{way} is none of {ALGORITHMS} in blocks of {STREAMS}")
    if head.cap and way.algorithm == "one-barrier":
        raise GraphoptError("the one-barrier algorithm has no soft cap; take two-barrier")


# --- blocks of words -----------------------------------------------------------------------------


class _WordsLoss(torch.autograd.Function):
    """Numbers in the forward; the gradients from logits made again in the backward.

    With "one-barrier" the gradient of x is made in the forward for a loss of gradient 1 per row.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, needed: bool
    ) -> Tensor:
        operands = problem.operands(x, weight, bias)
        ahead = needed and ctx.needs_input_grad[0] and problem.way.algorithm == "one-barrier"
        mean, dx = None, None
        if ahead:
            own, mean = attention(operands, problem.way.block)
        else:
            own = statistics(operands, problem.way.block)
        numbers = exchange(own, operands, problem)
        if mean is not None:
            by = problem.by(numbers.lse, torch.ones_like(numbers.lse))
            own_by = by.rebased(own.lse, numbers.lse)
            dx = sum_over(attention_gradient(operands, mean, own_by), problem.shard)
        ctx.problem = problem
        ctx.save_for_backward(x, weight, bias, numbers.lse, dx)
        return loss_of(numbers, problem.targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        x, weight, bias, lse, dx = ctx.saved_tensors
        problem, needs = ctx.problem, ctx.needs_input_grad
        wanted = (needs[0] and dx is None, needs[1], needs[2])
        found = Gradients(x, x, x)
        if any(wanted):
            by = problem.by(lse, upstream)
            operands = problem.operands(x, weight, bias)
            found = gradients(operands, lse, by, problem.way.block, wanted)
        if dx is not None:
            dx = dx * upstream.to(dx.dtype).reshape(-1, 1)
        elif needs[0]:
            dx = sum_over(found.x, problem.shard)
        return dx, found.weight if needs[1] else None, found.bias if needs[2] else None, None, None


# --- blocks of tokens ----------------------------------------------------------------------------


class _TokensLoss(torch.autograd.Function):
    """Numbers and gradients in the forward, for a reduced loss of gradient 1."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, problem: Problem, needed: bool
    ) -> Tensor:
        numbers, found = _sweep(problem.operands(x, weight, bias), problem, ctx.needs_input_grad)
        ctx.save_for_backward(*found)
        return loss_of(numbers, problem.targets)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        found = ctx.saved_tensors
        scaled = (None if g is None else g * upstream if keep else g.mul_(upstream) for g in found)
        return (*scaled, None, None)


def _sweep(
    operands: Operands, problem: Problem, needs: tuple[bool, ...]
) -> tuple[RowNumbers, tuple[Tensor | None, ...]]:
    """The numbers of all rows, and the gradients of x, weight and bias that are needed."""
    x, weight, dtype, block = operands.x, operands.weight, operands.dtype, problem.way.block
    numbers = RowNumbers.empty(x)
    dx = torch.empty_like(x) if needs[0] else None
    dweight = weight.new_zeros(weight.shape, dtype=dtype) if needs[1] else None
    dbias = weight.new_zeros(weight.shape[:1], dtype=dtype) if needs[2] else None
    tile = Tile(operands, min(block, x.shape[0]), weight.shape[0])
    for span in spans(x.shape[0], block):
        part = operands.rows(span)
        found, gradient = _block(tile, part, problem.rows(span), None if dx is None else dx[span])
        for rows, value in zip(numbers, found, strict=True):
            rows[span] = value
        if dweight is not None:
            add_product(dweight, gradient.t(), part.x)
        if dbias is not None:
            dbias += tile.summed(gradient)
    del tile
    dx = None if dx is None else sum_over(dx, problem.shard)
    return numbers, (dx, *(None if g is None else g.to(x.dtype) for g in (dweight, dbias)))


def _block(tile: Tile, part: Operands, problem: Problem, dx: Tensor | None) -> tuple[RowNumbers, Tensor]:
    """The numbers of some rows and the gradient of their raw scores; `dx` (n, D) is written."""
    z = tile.logits(part)
    slope = tile.slope_of(part)
    found = statistics_of(z, part.targets, part.mix, part.summed)  # z is now exp(z - peak)
    own, one = RowNumbers.of(found), torch.ones_like(found.mass)
    if problem.way.algorithm == "one-barrier" and dx is not None:
        begun = begin_exchange(own, part, problem)
        mean = torch.mm(tile.lowered(z), part.weight)
        numbers = end_exchange(begun, part, problem)
        by = problem.by(numbers.lse, one).rebased(found.peak, numbers.lse)
        dx.copy_(attention_gradient(part, mean.to(z.dtype), by))
    else:
        numbers = exchange(own, part, problem)
        by = problem.by(numbers.lse, one).rebased(found.peak, numbers.lse)
    gradient = tile.finished(part, z, by, slope)
    if problem.way.algorithm != "one-barrier" and dx is not None:
        torch.mm(gradient, part.weight, out=dx)
    return numbers, gradient


# --- rows and logits -----------------------------------------------------------------------------


def vocab_parallel_embedding(
    ids: Tensor, weight: Tensor, shard: Shard | None = None, padding_idx: int | None = None
) -> Tensor:
    """`F.embedding(ids, weight)` (.., D) of a weight split over ranks, of which this one has (V_i, D).

    One sum over the ranks, to which one rank adds each row, so that it is exact; none in the backward.
    DTensors as in `vocab_parallel_cross_entropy`. Raises IndexError for an index outside of the
    vocabulary.
    """
    shard, layout = _shard(weight, shard), layout_of(ids, weight)
    ids, weight = local(ids, "an index"), own_rows(weight, shard)
    if bool(((ids < 0) | (ids >= shard.words)).any()):
        raise IndexError("index out of range in self")
    found: Tensor = _Embedding.apply(weight, ids, shard, padding_idx)  # type: ignore[no-untyped-call]
    return replicated(found, layout)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, shard: Shard, padding_idx: int | None) -> Tensor:
        inside = (ids >= shard.start) & (ids < shard.stop)
        local = torch.where(inside, ids - shard.start, 0)
        ctx.words = weight.shape[0]
        ctx.save_for_backward(local, inside if padding_idx is None else inside & (ids != padding_idx))
        rows = F.embedding(local, weight).masked_fill_(~inside[..., None], 0)
        return sum_over(rows, shard)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        local, counts = ctx.saved_tensors
        rows, index = upstream[counts], local[counts]
        return aten.embedding_dense_backward(rows, index, ctx.words, -1, False), None, None, None


def vocab_parallel_linear(
    x: Tensor, weight: Tensor, shard: Shard | None = None, bias: Tensor | None = None
) -> Tensor:
    """All logits `F.linear(x, weight, bias)` (.., V) on every rank, gathered from the ranks' parts.

    DTensors as in `vocab_parallel_cross_entropy`.
    """
    shard, layout = _shard(weight, shard), layout_of(x, weight)
    x, weight, bias = local(x), own_rows(weight, shard), own_rows(bias, shard)
    rows = x.reshape(-1, x.shape[-1])
    logits: Tensor = _Linear.apply(rows, weight, bias, shard)  # type: ignore[no-untyped-call]
    return replicated(logits.view(*x.shape[:-1], shard.words), layout)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shard: Shard) -> Tensor:
        ctx.shard = shard
        ctx.save_for_backward(x, weight)
        return gather_rows(F.linear(x, weight, bias).t(), shard).t().contiguous()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        (x, weight), shard, needs = ctx.saved_tensors, ctx.shard, ctx.needs_input_grad
        own = upstream[:, shard.start : shard.stop]
        dx = sum_over(own @ weight, shard) if needs[0] else None
        return dx, own.t() @ x if needs[1] else None, own.sum(0) if needs[2] else None, None
