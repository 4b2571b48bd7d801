"""Which operators compute tokens apart from each other, and what of their operands a few tokens need.

A tensor may count its tokens along one dimension, [tokens, width], or along two that stand side by side,
[batch, length, width]: cut, these are taken as one, so that a part is [1, tokens of the part, width].
In an attention whose scores are in memory, each head of each text is such a token.
A rule says what an operator reads of its operands for some tokens of its result; nothing else is
assumed of the program. Sums over the tokens have rules of their own: they are added up over the parts.
"""

import math
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import fx

from graphopt import ops
from graphopt.passes.batch_rules import NotByRows
from graphopt.program import tensors_of

aten = torch.ops.aten
Dims = tuple[int, ...]  # the dimensions that count tokens, side by side


@dataclass(frozen=True)
class TokenRule:
    """How an operator is cut: `dims` count the tokens of its results; None for a sum over the tokens.

    `operands` are cut along these dimensions, others are read whole. `sizes` is the position of an
    argument that gives sizes, those of the result's dimensions.
    """

    dims: Dims | None
    operands: Mapping[fx.Node, Dims] = field(default_factory=dict)
    sizes: int | None = None


def token_rule(node: fx.Node, dims: Dims) -> TokenRule:
    """The rule of `node` whose results count tokens along `dims`.

    Raises NotByRows with the reason where tokens depend on other tokens, or where that is not known.
    """
    if ops.mutates(node.target) or ops.is_random(node):
        raise NotByRows("writes to an operand or is random")
    make = _RULES.get(node.target)
    if make is None and ops.is_elementwise(node):
        make = _pointwise
    if make is None:
        raise NotByRows("is not known to treat tokens apart")
    rule = make(node, dims)
    if not all(_is_one_run(source, place) for source, place in rule.operands.items()):
        raise NotByRows("reads tokens that are no single run of memory")
    return rule


def inferred_rule(node: fx.Node, known: Mapping[fx.Node, Dims | None], tokens: int) -> TokenRule:
    """The rule of `node`, at least one of whose operands is `known` to be cut, into parts of `tokens`.

    An operand with None is a sum over the tokens, not complete before the last part. Raises NotByRows.
    """
    mine = {n: known[n] for n in node.all_input_nodes if n in known}
    if None in mine.values():
        raise NotByRows("reads a sum over the tokens")
    add_up = _SUMS.get(node.target)
    operands = None if add_up is None else add_up(node, mine)
    if operands is not None:
        return TokenRule(None, operands)
    reason = NotByRows("mixes tokens")
    for dims in places(shape_of(node), tokens):
        try:
            rule = token_rule(node, dims)
        except NotByRows as error:
            reason = error
            continue
        if all(rule.operands.get(n) == d for n, d in mine.items()):
            return rule
    raise reason


def places(shape: tuple[int, ...], tokens: int) -> Iterator[Dims]:
    """The dimensions of a tensor that may count `tokens`.

    >>> list(places((2, 8, 16), 16))
    [(0, 1), (2,)]
    """
    for dim, size in enumerate(shape):
        if size == tokens:
            yield (dim,)
        following = shape[dim + 1] if dim + 1 < len(shape) else 1
        if size > 1 and following > 1 and size * following == tokens and math.prod(shape[:dim]) == 1:
            yield (dim, dim + 1)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of the first tensor of `node`; () where it has none of fixed sizes."""
    tensor = next((t for t in tensors_of(node) if t is not None), None)
    shape = () if tensor is None else tuple(tensor.shape)
    return shape if all(isinstance(size, int) for size in shape) else ()


def _is_one_run(node: fx.Node, dims: Dims) -> bool:
    """True where dimensions side by side can be taken as one, without a copy."""
    tensor = next(t for t in tensors_of(node) if t is not None)
    sizes, strides = tensor.shape, tensor.stride()
    return all(strides[a] == sizes[b] * strides[b] for a, b in pairwise(dims))


def _argument(node: fx.Node, position: int, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else default


def _pointwise(node: fx.Node, dims: Dims) -> TokenRule:
    """Elementwise; operands are broadcast from the right, and those of one token are read whole."""
    shape, cut = shape_of(node), {}
    for source in node.all_input_nodes:
        own = shape_of(source)
        mine = tuple(d - len(shape) + len(own) for d in dims)
        sizes = [own[d] if d >= 0 else 1 for d in mine]
        if all(size == 1 for size in sizes):
            continue
        if mine[0] < 0 or sizes != [shape[d] for d in dims]:
            raise NotByRows("repeats an operand along the tokens")
        cut[source] = mine
    return TokenRule(dims, cut)


def _expand(node: fx.Node, dims: Dims) -> TokenRule:
    return TokenRule(dims, _pointwise(node, dims).operands, sizes=1)


def _view(node: fx.Node, dims: Dims) -> TokenRule:
    """Other dimensions over the same elements in the same order, tokens outermost."""
    source, new = node.all_input_nodes[0], shape_of(node)
    old, tokens = shape_of(source), math.prod(new[d] for d in dims)
    for found in places(old, tokens):
        if math.prod(old[: found[0]]) == 1 == math.prod(new[: dims[0]]):
            return TokenRule(dims, {source: found}, sizes=1)
    raise NotByRows("merges tokens with what is no token")


def _permuted(node: fx.Node, dims: Dims) -> TokenRule:
    """The dimensions in another order, those of the tokens still side by side."""
    source = node.all_input_nodes[0]
    rank = len(shape_of(source))
    order = _argument(node, 1, range(rank)[::-1])  # a transpose of a matrix names none
    found = tuple(order[d] % rank for d in dims)
    if any(b != a + 1 for a, b in pairwise(found)):
        raise NotByRows("parts the dimensions of the tokens")
    return TokenRule(dims, {source: found})


def _product(left: int) -> Callable[[fx.Node, Dims], TokenRule]:
    """A matrix product of the operands `left` and the one behind it, to which others are added."""

    def rule(node: fx.Node, dims: Dims) -> TokenRule:
        first, second = node.args[left : left + 2]
        if first is second or any(n in (first, second) for n in node.args[:left]):
            raise NotByRows("multiplies a tensor with itself")
        cut: dict[fx.Node, Dims] = {(first, second)[dims[0]]: dims}  # type: ignore[dict-item]
        for added in node.args[:left]:
            assert isinstance(added, fx.Node)
            place = dims[0] - 2 + len(shape_of(added))
            if place >= 0 and shape_of(added)[place] > 1:
                cut[added] = (place,)
        return TokenRule(dims, cut)

    return rule


def _transposed(node: fx.Node, dims: Dims) -> TokenRule:
    """Two dimensions in each other's place, neither of which counts tokens."""
    if not {d % len(shape_of(node)) for d in node.args[1:]}.isdisjoint(dims):  # type: ignore[operator]
        raise NotByRows("parts the dimensions of the tokens")
    return TokenRule(dims, {node.all_input_nodes[0]: dims})


def _products(node: fx.Node, dims: Dims) -> TokenRule:
    """Many matrix products, each of a token of its own."""
    if dims != (0,):
        raise NotByRows("works along the tokens")
    return TokenRule(dims, dict.fromkeys(node.all_input_nodes, dims))


def _reduction(node: fx.Node, dims: Dims) -> TokenRule:
    """Over dimensions behind those of the tokens."""
    source = node.all_input_nodes[0]
    rank, named = len(shape_of(source)), _argument(node, 1, ())
    if not named or min(d % rank for d in named) <= dims[-1]:
        raise NotByRows("reduces over tokens")
    return TokenRule(dims, {source: dims})


def _along(position: int, default: int = 0, sizes: int | None = None) -> Callable[..., TokenRule]:
    """Along one dimension, which argument `position` names and which counts no tokens."""

    def rule(node: fx.Node, dims: Dims) -> TokenRule:
        if _argument(node, position, default) % len(shape_of(node)) in dims:
            raise NotByRows("works along the tokens")
        return TokenRule(dims, dict.fromkeys(node.all_input_nodes, dims), sizes)

    return rule


def _norm(node: fx.Node, dims: Dims) -> TokenRule:
    """A norm over the last dimensions, with its statistics."""
    source: Any = node.args[0]
    if dims[-1] >= len(shape_of(source)) - len(node.args[1]):  # type: ignore[arg-type]
        raise NotByRows("works along the tokens")
    return TokenRule(dims, {source: dims})


def _norm_backward(statistics: int) -> Callable[[fx.Node, Dims], TokenRule]:
    """The gradients of a norm; those of its parameters are sums over the tokens."""

    def rule(node: fx.Node, dims: Dims) -> TokenRule:
        cut: Any = [*node.args[:2], *node.args[3 : 3 + statistics]]
        if dims[-1] >= len(shape_of(cut[0])) - len(node.args[2]):  # type: ignore[arg-type]
            raise NotByRows("works along the tokens")
        return TokenRule(dims, dict.fromkeys(cut, dims))

    return rule


def _item(node: fx.Node, dims: Dims) -> TokenRule:
    source = node.all_input_nodes[0]
    if source.target in _NORM_BACKWARD and node.args[1] != 0:
        raise NotByRows("sums over the tokens")
    return TokenRule(dims, {source: dims})


Known = Mapping[fx.Node, Dims | None]


def _product_sum(node: fx.Node, known: Known) -> dict[fx.Node, Dims] | None:
    first, second = node.args
    if first is second or (known.get(first) != (1,) and known.get(second) != (0,)):  # type: ignore
        return None
    if known.get(first, (1,)) != (1,) or known.get(second, (0,)) != (0,):  # type: ignore
        return None
    return {first: (1,), second: (0,)}  # type: ignore[dict-item]


def _sum(node: fx.Node, known: Known) -> dict[fx.Node, Dims] | None:
    ((source, dims),) = known.items()
    rank = len(shape_of(source))
    named = {d % rank for d in _argument(node, 1) or range(rank)}
    return {source: dims} if dims is not None and named.issuperset(dims) else None


def _item_sum(node: fx.Node, known: Known) -> dict[fx.Node, Dims] | None:
    ((source, dims),) = known.items()
    is_sum = source.target in _NORM_BACKWARD and node.args[1] != 0
    return {source: dims} if dims is not None and is_sum else None


_SAME = (
    *(aten.alias.default, aten.detach.default, aten.clone.default, aten._to_copy.default),
    torch.ops.prims.convert_element_type.default,
)
_NORM_BACKWARD = {
    aten.native_layer_norm_backward.default: _norm_backward(2),
    aten._fused_rms_norm_backward.default: _norm_backward(1),
}
_RULES: Mapping[Any, Callable[[fx.Node, Dims], TokenRule]] = {
    operator.getitem: _item,
    **dict.fromkeys(_SAME, _pointwise),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.reshape.default), _view),
    aten.expand.default: _expand,
    **dict.fromkeys((aten.t.default, aten.permute.default), _permuted),
    aten.transpose.int: _transposed,
    aten.mm.default: _product(0),
    aten.addmm.default: _product(1),
    aten.bmm.default: _products,
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim, aten.var_mean.correction), _reduction),
    **dict.fromkeys((aten.amax.default, aten.amin.default), _reduction),
    **dict.fromkeys((aten._softmax.default, aten.slice.Tensor, aten.cat.default), _along(1)),
    **dict.fromkeys((aten._softmax_backward_data.default,), _along(2)),
    **dict.fromkeys((aten.split.Tensor, aten.split_with_sizes.default), _along(2)),
    aten.slice_backward.default: _along(2, sizes=1),
    **dict.fromkeys((aten.native_layer_norm.default, aten._fused_rms_norm.default), _norm),
    **_NORM_BACKWARD,
}
_SUMS: Mapping[Any, Callable[[fx.Node, Known], dict[fx.Node, Dims] | None]] = {
    operator.getitem: _item_sum,
    aten.mm.default: _product_sum,
    aten.sum.dim_IntList: _sum,
}
