"""Tensors that stand for a vocabulary split over ranks: a weight, and the logits that it projects onto.

`SplitWeight` holds this rank's rows. `F.embedding` of it sums over the ranks, `F.linear` onto it returns
`SplitLogits`, and everything else (optimizers, norms, copies) sees the rows as a plain tensor.
`SplitLogits` has the shape and dtype of all logits and no memory. A dtype, a shape that keeps
the vocabulary, a slice of tokens, a factor and a tanh are noted; `F.cross_entropy` of it runs as
`graphopt.vocab_parallel`. Any other use gathers the logits, and every rank must take part in that.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError
from graphopt.streamed import Head
from graphopt.vocab_dtensor import Layout, layout_of
from graphopt.vocab_exchange import SplitSizes, Way
from graphopt.vocab_loss import LossOptions
from graphopt.vocab_parallel import (
    vocab_parallel_cross_entropy,
    vocab_parallel_embedding,
    vocab_parallel_linear,
)
from graphopt.vocab_shard import Shard

Chooser = Callable[[SplitSizes], Way]
_plainly = torch._C.DisableTorchFunctionSubclass


class SplitWeight(Tensor):
    """The rows (V_i, ..) of the words of `shard`; `choose` says how a loss onto it runs.

    `origin` is the layout of the DTensor that it was made of, None for another tensor.
    """

    shard: Shard
    choose: Chooser
    origin: Layout | None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:  # of `Tensor`
        """Run `func` as the vocabulary needs it, or on this rank's rows."""
        rule = _WEIGHT_RULES.get(func)
        with _plainly():
            if rule is not None:
                return rule(*args, **(kwargs or {}))
            return func(*args, **(kwargs or {}))


def split_weight(rows: Tensor, shard: Shard, choose: Chooser, like: Tensor) -> torch.nn.Parameter:
    """The parameter of this rank's `rows`, trained where `like` is, and of the layout of that."""
    origin = like.origin if isinstance(like, SplitWeight) else layout_of(like)
    made: Any = _weight(rows, shard, choose, origin).requires_grad_(like.requires_grad)
    made._is_param = True  # as `nn.Parameter` marks tensors of other classes
    return made  # type: ignore[no-any-return]


def _weight(rows: Tensor, shard: Shard, choose: Chooser, origin: Layout | None) -> SplitWeight:
    made: SplitWeight = torch.Tensor._make_subclass(SplitWeight, rows)
    made.shard, made.choose, made.origin = shard, choose, origin
    return made


def _detached(weight: SplitWeight) -> SplitWeight:
    return _weight(weight.detach(), weight.shard, weight.choose, weight.origin)


def _copied(weight: SplitWeight, memo: dict[int, Any]) -> Any:
    if id(weight) not in memo:
        memo[id(weight)] = split_weight(weight.detach().clone(), weight.shard, weight.choose, weight)
    return memo[id(weight)]


def _embedding(
    ids: Tensor,
    weight: SplitWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise GraphoptError("a split embedding has no max_norm, scale_grad_by_freq or sparse gradient")
    if padding_idx is not None:
        padding_idx %= weight.shard.words
    return vocab_parallel_embedding(ids, weight, weight.shard, padding_idx)


def _linear(x: Tensor, weight: Any, bias: Any = None) -> Tensor:
    if not isinstance(weight, SplitWeight) or not isinstance(bias, SplitWeight | None):
        raise GraphoptError("of a projection, the weight and the bias are split, or neither is")
    return _logits(x, weight, bias, Head(), torch.result_type(x, weight))


class SplitLogits(Tensor):
    """Logits (.., V) = `head` of x (.., D) on a split weight, in `dtype`; made where they must be."""

    _x: Tensor
    _weight: SplitWeight
    _bias: SplitWeight | None
    _head: Head

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what `func` does, or run it on the logits themselves."""
        kwargs = kwargs or {}
        if func in _FACTS:
            with _plainly():
                return func(*args, **kwargs)
        rule = _LOGITS_RULES.get(func)
        if rule is not None and args and isinstance(args[0], SplitLogits):
            with _plainly():
                found = rule(*args, **kwargs)
            if found is not None:
                return found
        args, kwargs = pytree.tree_map_only(SplitLogits, SplitLogits.gathered, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = pytree.tree_map_only(SplitLogits, SplitLogits.gathered, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"SplitLogits(shape={tuple(self.shape)}, dtype={self.dtype}, {self._weight.shard})"

    def gathered(self) -> Tensor:
        """All logits, on every rank; a collective, with gradients."""
        with _plainly():
            z = vocab_parallel_linear(self._x, self._weight, self._weight.shard, self._bias)
            z = z.to(self.dtype) * self._head.inner
            return self._head.cap * z.tanh() if self._head.cap else z


def _logits(
    x: Tensor, weight: SplitWeight, bias: SplitWeight | None, head: Head, dtype: torch.dtype
) -> SplitLogits:
    shape = (*x.shape[:-1], weight.shard.words)
    made: SplitLogits = Tensor._make_wrapper_subclass(SplitLogits, shape, dtype=dtype, device=x.device)
    made._x, made._weight, made._bias, made._head = x, weight, bias, head
    return made


def _changed(z: SplitLogits, *, x: Tensor | None = None, head: Head | None = None) -> SplitLogits:
    return _logits(z._x if x is None else x, z._weight, z._bias, head or z._head, z.dtype)


def _same(z: SplitLogits, *args: Any, **kwargs: Any) -> SplitLogits | None:
    return z if not args and not kwargs else None


def _cast(dtype: torch.dtype) -> Callable[[SplitLogits], SplitLogits]:
    return lambda z: _logits(z._x, z._weight, z._bias, z._head, dtype)


def _to(z: SplitLogits, *args: Any, **kwargs: Any) -> SplitLogits | None:
    device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if device not in (None, z.device) or memory_format is not None:
        return None
    return _cast(dtype or z.dtype)(z)


def _view(z: SplitLogits, *shape: Any) -> SplitLogits | None:
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        return None
    new = torch.empty(z.shape, device="meta").view(*shape).shape
    return _changed(z, x=z._x.reshape(*new[:-1], z._x.shape[-1])) if new[-1] == z.shape[-1] else None


def _item(z: SplitLogits, index: Any) -> SplitLogits | None:
    """Slices and picks that keep the vocabulary."""
    items = index if isinstance(index, tuple) else (index,)
    if not all(isinstance(i, slice | int) or i is Ellipsis for i in items):
        return None
    if Ellipsis in items:
        where = items.index(Ellipsis)
        rest = (slice(None),) * (z.dim() - len(items) + 1)
        items = (*items[:where], *rest, *items[where + 1 :])
    if len(items) > z.dim() or (len(items) == z.dim() and items[-1] != slice(None)):
        return None
    return _changed(z, x=z._x[items])


def _multiplied(z: SplitLogits, factor: Any) -> SplitLogits | None:
    if not isinstance(factor, int | float):
        return None
    inner, cap = z._head
    head = Head(inner, cap * factor) if cap else Head(inner * factor)
    return _changed(z, head=head) if factor > 0 else None


def _divided(z: SplitLogits, divisor: Any) -> SplitLogits | None:
    return _multiplied(z, 1 / divisor) if isinstance(divisor, int | float) and divisor else None


def _tanh(z: SplitLogits) -> SplitLogits | None:
    return None if z._head.cap else _changed(z, head=Head(z._head.inner, 1.0))


def _cross_entropy(
    z: SplitLogits,
    targets: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    if z.dim() != 2 or targets.requires_grad or not (size_average is None is reduce):
        return None
    options, shard = LossOptions(ignore_index, reduction, label_smoothing), z._weight.shard
    training = torch.is_grad_enabled() and (z._x.requires_grad or z._weight.requires_grad)
    numbers = 3 if label_smoothing or targets.is_floating_point() else 2
    (n, d), dtype = z._x.shape, z._x.dtype
    sizes = SplitSizes(n, d, shard.words, shard.ranks, dtype, numbers, training, bool(z._head.cap))
    return vocab_parallel_cross_entropy(
        z._x,
        z._weight,
        targets,
        shard,
        bias=z._bias,
        class_weight=weight,
        options=options,
        head=z._head,
        way=z._weight.choose(sizes),
    ).to(z.dtype)


_WEIGHT_RULES: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    F.linear: _linear,
    Tensor.detach: _detached,
    Tensor.__deepcopy__: _copied,
}
_FACTS = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")),
    *(getattr(Tensor, name).__get__ for name in ("layout", "is_cuda", "is_meta", "grad_fn")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.is_floating_point),
    *(Tensor.__repr__, Tensor.element_size, torch.is_floating_point, torch.numel),
}
_LOGITS_RULES: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    Tensor.contiguous: _same,
    Tensor.float: _cast(torch.float32),
    Tensor.double: _cast(torch.float64),
    Tensor.to: _to,
    Tensor.view: _view,
    Tensor.reshape: _view,
    Tensor.__getitem__: _item,
    **dict.fromkeys((Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.mul), _multiplied),
    **dict.fromkeys((Tensor.div, Tensor.__truediv__, torch.div), _divided),
    **dict.fromkeys((Tensor.tanh, torch.tanh), _tanh),
}
