"""Logits that nobody made: a tensor that computes itself when it is first used, or that was dropped.

It has the shape, dtype and device of the logits, and holds no memory but what it would be made from: the
hidden rows. Views of it are absent, too. Any other operator that reads it computes it once, from the
weight as it was; where the weight has changed since, or the logits were dropped, it raises GraphoptError.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError

aten = torch.ops.aten
_CPU = torch.device("cpu")


class _Maker:
    """Makes the logits once; several tensors may stand for them, or for views of them."""

    def __init__(self, make: Callable[[], Tensor] | None, sources: tuple[Tensor, ...]) -> None:
        self.make = make
        self.sources = sources
        self.versions = tuple(t._version for t in sources)
        self.made: Tensor | None = None

    def value(self) -> Tensor:
        if self.made is None:
            if self.make is None:
                raise GraphoptError(
                    "these logits were dropped: StreamLoss(returns='loss'); 'lazy' makes them when "
                    "they are used, and 'logits' always"
                )
            if tuple(t._version for t in self.sources) != self.versions:
                raise GraphoptError(
                    "these logits were not used before the weights changed, and cannot be made any "
                    "more: read them before the optimizer's step, or take StreamLoss(returns='logits')"
                )
            with torch.no_grad():
                self.made = self.make()
            self.make, self.sources = None, ()
        return self.made


class AbsentLogits(Tensor):
    """Stands for logits that were not made; `absent_logits` makes one.

    >>> logits = absent_logits((2, 3), (), lambda: torch.ones(2, 3))
    >>> logits.shape, logits.view(3, 2).is_made
    (torch.Size([2, 3]), False)
    >>> float(logits.sum()), logits.is_made
    (6.0, True)
    """

    _maker: _Maker

    @property
    def is_made(self) -> bool:
        """True once somebody used them."""
        return self._maker.made is not None

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        try:
            return repr(self._maker.value())
        except GraphoptError as error:
            return f"AbsentLogits(shape={tuple(self.shape)}, dtype={self.dtype}: {error})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run `func` on the logits themselves, except where it only looks at them in another way."""
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return _absent(args[0], args[0]._maker, args[0].device)
        if func in _VIEWS:
            return _view(func, args, kwargs)
        args, kwargs = pytree.tree_map_only(cls, lambda t: t._maker.value(), (args, kwargs))
        return func(*args, **kwargs)


_VIEWS = {
    *(aten.view.default, aten._unsafe_view.default, aten.as_strided.default),
    *(aten.slice.Tensor, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim),
}


def absent_logits(
    shape: Sequence[int],
    sources: tuple[Tensor, ...],
    make: Callable[[], Tensor] | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device = _CPU,
) -> AbsentLogits:
    """Logits that `make` computes from `sources`, if at all; without it they were dropped.

    Their strides are zero, as of one number that is expanded: compilers are told so, for
    the memory they take is that of one number.
    """
    like = torch.empty((), dtype=dtype, device="meta").expand(tuple(shape))
    return _absent(like, _Maker(make, sources), device)


def _absent(like: Tensor, maker: _Maker, device: torch.device) -> AbsentLogits:
    made: AbsentLogits = Tensor._make_wrapper_subclass(
        AbsentLogits, like.shape, strides=like.stride(), dtype=like.dtype, device=device
    )
    made._maker = maker
    return made


def _view(func: Any, args: Any, kwargs: Any) -> AbsentLogits:
    """A view that is made when it is used, from what `args[0]` stands for."""
    source: AbsentLogits = args[0]
    shaped = torch.empty_strided(source.shape, source.stride(), dtype=source.dtype, device="meta")
    like = func(shaped, *args[1:], **kwargs)
    maker = _Maker(lambda: func(source._maker.value(), *args[1:], **kwargs), ())
    return _absent(like, maker, source.device)
