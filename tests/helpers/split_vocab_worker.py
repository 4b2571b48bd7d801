"""Ranks of a gloo group that compare losses over a split vocabulary with those of one process.

    python split_vocab_worker.py RANKS FOLDER

Rank 0 writes FOLDER/results.json: for every group of cases, what was found.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from ranks import join, leave
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.errors import GraphoptError
from graphopt.streamed import Head
from graphopt.vocab_exchange import ALGORITHMS, Way
from graphopt.vocab_loss import LossOptions
from graphopt.vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
    vocab_parallel_linear,
)
from graphopt.vocab_shard import Shard, gather_rows

N, D, V = 13, 6, 11  # V is a multiple of neither 2 nor 4
BLOCKS = (("words", 2), ("tokens", 4), ("tokens", 64))


class Counter(TorchDispatchMode):
    """The collectives that run, as (kind, bytes that this rank puts in)."""

    KINDS = ("all_reduce", "all_gather_into_tensor")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == "_c10d_functional" and name != "wait_tensor":
            assert name in self.KINDS, name
            self.seen.append((name, args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))


class Inputs:
    """What both sides work on: fresh leaves of the same numbers on every rank."""

    def __init__(
        self, dtype: torch.dtype = torch.float64, size: tuple[int, int, int] = (N, D, V)
    ) -> None:
        torch.manual_seed(0)
        n, d, v = size
        self.x = (2 * torch.randn(n, d, dtype=torch.float64)).to(dtype).requires_grad_()
        self.weight = torch.randn(v, d, dtype=torch.float64).to(dtype).requires_grad_()
        self.bias = torch.randn(v, dtype=torch.float64).to(dtype).requires_grad_()
        self.class_weight = (torch.rand(v, dtype=torch.float64) + 0.5).to(dtype)
        self.targets = torch.randint(v, (n,))
        self.targets[::4] = -100
        self.upstream = torch.rand(n, dtype=torch.float64).to(dtype) + 0.5


def plain(i: Inputs, o: LossOptions, head: Head, weighted: bool, bias: bool) -> list[Tensor]:
    """The loss and the gradients of x, weight and bias in one process."""
    z = F.linear(i.x, i.weight, i.bias if bias else None) * head.inner
    z = head.cap * torch.tanh(z) if head.cap else z
    weight = i.class_weight if weighted else None
    loss = F.cross_entropy(
        z,
        i.targets,
        weight,
        ignore_index=o.ignore_index,
        reduction=o.reduction,
        label_smoothing=o.label_smoothing,
    )
    if o.z_loss:
        counts = i.targets != o.ignore_index
        extra = o.z_loss * z.logsumexp(1).square() * counts
        per_row = torch.ones_like(i.class_weight) if weight is None else weight
        divisor = (per_row[i.targets.clamp_min(0)] * counts).sum() if o.reduction == "mean" else 1.0
        loss = loss + (extra if o.reduction == "none" else extra.sum() / divisor)
    leaves = (i.x, i.weight, i.bias)
    upstream = i.upstream if o.reduction == "none" else i.upstream[0]
    found = torch.autograd.grad(loss, leaves, upstream, allow_unused=True)
    return [
        loss.detach(),
        *(torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)),
    ]


def split(
    i: Inputs, o: LossOptions, head: Head, weighted: bool, bias: bool, way: Way, shard: Shard
) -> list[Tensor]:
    """The same with the vocabulary split; of the gradients of weight and bias, this rank's part."""
    x = i.x.detach().requires_grad_()
    weight, own_bias = (shard.part(t.detach()).clone().requires_grad_() for t in (i.weight, i.bias))
    loss = vocab_parallel_cross_entropy(
        x,
        weight,
        i.targets,
        shard,
        bias=own_bias if bias else None,
        class_weight=i.class_weight if weighted else None,
        options=o,
        head=head,
        way=way,
    )
    upstream = i.upstream if o.reduction == "none" else i.upstream[0]
    loss.backward(upstream.to(loss.dtype))
    grads = [torch.zeros_like(t) if t.grad is None else t.grad for t in (weight, own_bias)]
    return [loss.detach(), x.grad, *grads]


def parts(found: list[Tensor], shard: Shard) -> list[Tensor]:
    """What `split` should return where one process finds `found`."""
    return [*found[:2], *map(shard.part, found[2:])]


def worst_of(values: dict[str, float]) -> dict[str, float]:
    """The largest of each value over all ranks."""
    largest = torch.tensor(list(values.values()), dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return dict(zip(values, largest.tolist(), strict=True))


def ways() -> Iterator[Way]:
    for algorithm, (stream, block) in itertools.product(ALGORITHMS, BLOCKS):
        yield Way(algorithm, stream, block)


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of each tensor."""
    differences = [
        (a.detach() - b.detach()).abs().max() / b.detach().abs().max().clamp_min(1e-3)
        for a, b in zip(found, exact, strict=True)
    ]
    return float(torch.stack(differences).max())


def options(shard: Shard) -> Any:
    """Every combination of options, in float64: the worst error by way, and whether repeats are equal."""
    inputs, worst, count = Inputs(), {}, 0
    few = shard.ranks > 2
    reductions, caps = (("mean",), (0.0,)) if few else (("mean", "sum", "none"), (0.0, 3.0))
    for number, (reduction, smoothing, z_loss, weighted, cap) in enumerate(
        itertools.product(reductions, (0.0, 0.1), (0.0, 1e-2), (False, True), caps)
    ):
        bias = bool(number // 2 % 2)
        o = LossOptions(-100, reduction, smoothing, z_loss)
        head = Head(0.7, cap)
        exact = parts(plain(inputs, o, head, weighted, bias), shard)
        for way in ways():
            if cap and way.algorithm == "one-barrier":
                continue
            found = split(inputs, o, head, weighted, bias, way, shard)
            key = f"{way.algorithm} {way.stream} {way.block}"
            worst[key] = max(worst.get(key, 0.0), error(found, exact))
            count += 1
    return {"worst": worst_of(worst), "count": count}


def repeats(shard: Shard) -> Any:
    """Two runs of each way give the same bits, on every rank."""
    inputs, o = Inputs(torch.float32), LossOptions(label_smoothing=0.1)
    same = True
    for way in ways():
        runs = [split(inputs, o, Head(), True, True, way, shard) for _ in range(2)]
        same &= all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        for t in runs[0][:2]:
            others = [torch.empty_like(t) for _ in range(shard.ranks)]
            dist.all_gather(others, t)
            same &= all(torch.equal(t, other) for other in others)
    return bool(same)


def precision(shard: Shard) -> Any:
    """Errors in float32 and bfloat16 against float64, of one process and of each way."""
    return {str(dtype): errors_of(shard, dtype) for dtype in (torch.float32, torch.bfloat16)}


def errors_of(shard: Shard, dtype: torch.dtype) -> Any:
    """Of one dtype, for the loss and the gradients of x and the weight."""
    size, o = (96, 64, 999), LossOptions()
    inputs, wide = Inputs(dtype, size), Inputs(dtype, size)
    for name in ("x", "weight", "bias", "class_weight", "upstream"):
        value = getattr(wide, name).detach().double()
        setattr(wide, name, value.requires_grad_(getattr(wide, name).requires_grad))
    exact = parts(plain(wide, o, Head(), False, False), shard)

    def errors(found: list[Tensor]) -> list[float]:
        return [
            float((a.double() - b).norm() / b.norm()) for a, b in zip(found[:3], exact[:3], strict=True)
        ]

    eager = errors(parts(plain(inputs, o, Head(), False, False), shard))
    blocks = [Way(a, s, b) for a in ALGORITHMS for s, b in (("words", 128), ("tokens", 32))]
    ours = {str(w): errors(split(inputs, o, Head(), False, False, w, shard)) for w in blocks}
    return {"eager": eager, "ours": ours}


def counted(shard: Shard) -> Any:
    """The collectives of each way, with and without gradients."""
    inputs, found = Inputs(torch.float32), []
    own = shard.part(inputs.weight.detach())
    for way in ways():
        for smoothing in (0.0, 0.1):
            for training in (True, False):
                x, weight = inputs.x.detach(), own.clone()
                if training:
                    x.requires_grad_(), weight.requires_grad_()
                with Counter() as counter:
                    loss = vocab_parallel_cross_entropy(
                        x,
                        weight,
                        inputs.targets,
                        shard,
                        options=LossOptions(label_smoothing=smoothing),
                        way=way,
                    )
                    if training:
                        loss.backward()
                found.append([list(way), smoothing, training, counter.seen])
    return found


def probable(shard: Shard) -> Any:
    """The largest error with probabilities as targets, over all options; and how many there were."""
    inputs, errors = Inputs(), []
    inputs.targets = torch.rand(N, V, dtype=torch.float64).softmax(-1)
    chosen = itertools.product(("mean", "none"), (0.0, 0.1), (False, True), (Head(), Head(0.7, 2.0)))
    for reduction, smoothing, weighted, head in chosen:
        o = LossOptions(reduction=reduction, label_smoothing=smoothing)
        want = parts(plain(inputs, o, head, weighted, True), shard)
        for way in ways():
            if not head.cap or way.algorithm != "one-barrier":
                errors.append(error(split(inputs, o, head, weighted, True, way, shard), want))
    return {"count": len(errors), **worst_of({"worst": max(errors)})}


def refusal(call: Callable[[], Any]) -> str:
    """The error that `call` raises, as text."""
    try:
        call()
    except (GraphoptError, IndexError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def edges(shard: Shard) -> Any:
    """Targets that eager refuses or that all are ignored, second backwards, and misfits."""
    inputs = Inputs()
    own = shard.part(inputs.weight.detach())
    found: dict[str, Any] = {}

    def loss(way: Way | None = None, **changed: Any) -> Tensor:
        given = {"x": inputs.x.detach(), "weight": own, "targets": inputs.targets} | changed
        return vocab_parallel_cross_entropy(
            given.pop("x"), given.pop("weight"), given.pop("targets"), shard, way=way, **given
        )

    bad = inputs.targets.clone()
    bad[1] = V
    found["target"] = refusal(lambda: loss(targets=bad))
    found["eager target"] = refusal(lambda: F.cross_entropy(inputs.x @ inputs.weight.t(), bad))
    found["probabilities"] = refusal(lambda: loss(targets=torch.rand(N, V - 1)))
    found["their gradient"] = refusal(lambda: loss(targets=torch.rand(N, V).requires_grad_()))
    first = LossOptions(ignore_index=0)
    found["their index"] = refusal(lambda: loss(targets=torch.rand(N, V), options=first))
    found["weight"] = refusal(lambda: loss(weight=inputs.weight.detach()))
    found["dtype"] = refusal(lambda: loss(weight=own.float()))
    found["cap"] = refusal(lambda: loss(Way("one-barrier"), head=Head(1.0, 2.0)))
    found["way"] = refusal(lambda: loss(Way("four-barrier")))
    found["small"] = refusal(lambda: Shard(1, 0, 2, ""))
    grid = init_device_mesh("cpu", (1, shard.ranks), mesh_dim_names=("dp", "tp"))
    found["mesh"] = refusal(lambda: Shard.on_mesh(V, grid))
    found["dim"] = refusal(lambda: Shard.on_mesh(V, grid, "pp"))
    found["right dim"] = Shard.on_mesh(V, grid, "tp") == Shard(
        V, shard.rank, shard.ranks, grid["tp"].get_group().group_name
    )
    nothing = torch.full((N,), -100)
    ignored = []
    for way in ways():
        x, weight = inputs.x.detach().requires_grad_(), own.clone().requires_grad_()
        value = loss(way, x=x, weight=weight, targets=nothing)
        value.backward()
        ignored.append(bool(value.isnan()) and not x.grad.any() and not weight.grad.any())
    found["ignored"] = all(ignored)
    twice = []
    for way in ways():
        x, weight = inputs.x.detach().requires_grad_(), own.clone().requires_grad_()
        value = loss(way, x=x, weight=weight)
        value.backward(retain_graph=True)
        first = [x.grad.clone(), weight.grad.clone()]
        value.backward()
        twice.append(
            all(torch.equal(2 * a, b) for a, b in zip(first, (x.grad, weight.grad), strict=True))
        )
    found["twice"] = all(twice)
    return found


def ends(shard: Shard) -> Any:
    """The embedding and the gathered logits, and a tied weight of both ends."""
    inputs = Inputs()
    ids = torch.randint(V, (3, 5))
    worst = []
    for padding in (None, 4):
        exact = inputs.weight.detach().requires_grad_()
        own = shard.part(inputs.weight.detach()).clone().requires_grad_()
        upstream = torch.randn(3, 5, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        F.embedding(ids, exact, padding).backward(upstream)
        rows = vocab_parallel_embedding(ids, own, shard, padding)
        rows.backward(upstream)
        worst.append(error([rows, gather_rows(own.grad, shard)], [F.embedding(ids, exact), exact.grad]))
    leaves = [t.detach().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias)]
    F.linear(*leaves).square().sum().backward()
    x = inputs.x.detach().requires_grad_()
    own, bias = (shard.part(t.detach()).clone().requires_grad_() for t in (inputs.weight, inputs.bias))
    vocab_parallel_linear(x, own, shard, bias).square().sum().backward()
    gathered = [x.grad, *(gather_rows(t.grad, shard) for t in (own, bias))]
    worst.append(error(gathered, [t.grad for t in leaves]))
    for way in ways():
        exact = inputs.weight.detach().requires_grad_()
        own = shard.part(inputs.weight.detach()).clone().requires_grad_()
        rows = F.embedding(inputs.targets.clamp_min(0), exact)
        value = F.cross_entropy(rows.tanh() @ exact.t(), inputs.targets)
        value.backward()
        rows = vocab_parallel_embedding(inputs.targets.clamp_min(0), own, shard)
        ours = vocab_parallel_cross_entropy(rows.tanh(), own, inputs.targets, shard, way=way)
        ours.backward()
        worst.append(error([ours.detach(), gather_rows(own.grad, shard)], [value.detach(), exact.grad]))
    return {"worst": max(worst), "index": refusal(lambda: vocab_parallel_embedding(ids + V, own, shard))}


def work(rank: int, ranks: int, folder: str) -> None:
    """One rank."""
    join(rank, folder, ranks)
    shard = Shard.on_mesh(V, init_device_mesh("cpu", (ranks,)))
    large = Shard.on_mesh(999, init_device_mesh("cpu", (ranks,)))
    found = {case.__name__: case(shard) for case in (options, probable, repeats, counted, edges, ends)}
    found["precision"] = precision(large)
    leave(rank, folder, found)


if __name__ == "__main__":
    count = int(sys.argv[1])
    mp.start_processes(work, (count, sys.argv[2]), nprocs=count, start_method="fork")
