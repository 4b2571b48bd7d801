"""Whether operators give the same bits on parts of the batch, tried on made-up numbers.

Rows of a matrix product are the same numbers on a part of the batch; whether they are rounded in the same
order is up to the library, which chooses its kernel by the shape. Each distinct operator runs on the
whole batch and on each part; small ones several times, as few numbers may round alike by chance.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt import ops
from graphopt.cost_models.calls import TensorSpec, call_of, make
from graphopt.passes.batch_rewrite import wanted
from graphopt.passes.batch_rules import Batch, RowRule, aten
from graphopt.passes.causal_parts import keys_of
from graphopt.program import tensors_of
from graphopt.ranks import outside_tracing

_MOST_TRIES, _ENOUGH = 8, 2**16  # so many numbers, but no more tries


def rounded_otherwise(
    rules: Mapping[fx.Node, RowRule], parts: Mapping[str, Sequence[fx.Node]], batch: Batch
) -> list[str]:
    """The names of the operators of `rules` whose parts (by name) give other bits than the whole."""
    found: dict[str, bool] = {}
    names = []
    with outside_tracing(), torch.random.fork_rng(devices=[]):
        for node, rule in rules.items():
            call = call_of(node)
            if call is None or node.name not in parts or ops.is_view(node.target):
                continue
            mine = parts[node.name]
            key = " ".join([call.key, *(getattr(call_of(p), "key", "") for p in mine), str(rule.dims)])
            if key not in found:
                found[key] = all(_same_bits(node, rule, mine, batch) for _ in range(_tries(node)))
            if not found[key]:
                names.append(node.name)
    return names


def _tries(node: fx.Node) -> int:
    numbers = sum(tensor.numel() for tensor in tensors_of(node) if tensor is not None)
    return max(1, min(_MOST_TRIES, _ENOUGH // max(1, numbers)))


def _same_bits(node: fx.Node, rule: RowRule, parts: Sequence[fx.Node], batch: Batch) -> bool:
    values = {n: make(_spec(n.meta["val"])) for n in node.all_input_nodes}
    whole = _results(node, values)
    if rule.mask is not None:
        rest = list(node.args)
        rest[rule.mask] = wanted(node.args[rule.mask], rule, cut=False)
        others = _results(node, values, rest)
        if not all(
            _equal(a, b) for a, b, dim in zip(whole, others, rule.dims, strict=True) if dim is None
        ):
            return False
    for index, part in enumerate(parts):
        mine = _given(node, rule, part, index, values, batch)
        for a, b, dim in zip(whole, _results(part, mine), rule.dims, strict=True):
            if dim is not None and not _equal(_slice(a, dim, index, batch), b):
                return False
    return True


def _given(
    node: fx.Node,
    rule: RowRule,
    part: fx.Node,
    index: int,
    values: Mapping[fx.Node, torch.Tensor],
    batch: Batch,
) -> dict[fx.Node, torch.Tensor]:
    """The operands of a part, made of the `values` of those of the whole."""
    mine: dict[fx.Node, torch.Tensor] = {}
    # fx keeps the order of operands, so that those of a part stand where those of the whole do
    whole, own = _operands(node), _operands(part)
    for place, (key, source) in enumerate(zip(own, whole, strict=False)):
        dim = rule.operands.get(source)
        if place in rule.upto and dim is not None:
            mine[key] = _keys(values[source], dim, key, index, batch)
        else:
            mine[key] = _piece(values[source], dim, key, index, batch)
    return mine | {extra: _constant(extra) for extra in own[len(whole) :]}


def _operands(node: fx.Node) -> list[fx.Node]:
    leaves = pytree.tree_leaves((node.args, dict(node.kwargs)))
    return [leaf for leaf in leaves if isinstance(leaf, fx.Node)]


def _piece(value: torch.Tensor, dim: int | None, part: fx.Node, index: int, batch: Batch) -> torch.Tensor:
    """The operand `part` of a part, laid out as there; a slice where it is one, or expanded, there."""
    if dim is None:
        return value
    mine: torch.Tensor = _slice(value, dim, index, batch)
    if part.target is aten.slice.Tensor or 0 in part.meta["val"].stride():
        return mine
    made: torch.Tensor = make(_spec(part.meta["val"]))
    return made.copy_(mine)


def _keys(value: torch.Tensor, dim: int, key: fx.Node, index: int, batch: Batch) -> torch.Tensor:
    """The rows up to the last of a part, as the node `key` has them, with zeros behind them."""
    end, _ = keys_of(batch, index, value.shape[dim])
    if 0 in key.meta["val"].stride():
        return value.narrow(dim, 0, end)
    made: torch.Tensor = make(_spec(key.meta["val"])).zero_()
    made.narrow(dim, 0, end).copy_(value.narrow(dim, 0, end))
    return made


def _constant(node: fx.Node) -> Any:
    """The value of a node that depends on no input."""
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), _constant)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _slice(value: Any, dim: int, index: int, batch: Batch) -> Any:
    if value is None:
        return None
    cuts = batch.cuts(value.shape[dim])
    return value.narrow(dim, cuts[index], cuts[index + 1] - cuts[index])


def _results(node: fx.Node, values: Mapping[fx.Node, torch.Tensor], args: Any = None) -> list[Any]:
    given = fx.node.map_arg((list(args or node.args), dict(node.kwargs)), values.__getitem__)
    result = node.target(*given[0], **given[1])  # type: ignore[operator]
    return [result] if isinstance(result, torch.Tensor) else list(result)[: len(tensors_of(node))]


def _spec(tensor: torch.Tensor) -> TensorSpec:
    return TensorSpec(tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)


def _equal(first: Any, second: Any) -> bool:
    """The same numbers, or none in the same places; one that is not there equals anything."""
    if first is None or second is None:
        return True
    return bool(((first == second) | (first.isnan() & second.isnan())).all())
