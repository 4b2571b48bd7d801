"""Whether operators give the same bits on parts of the batch, tried on made-up numbers.

Rows of a matrix product are the same numbers on a part of the batch; whether they are rounded in the same
order is up to the library, which chooses its kernel by the shape. Each distinct operator runs once on the
whole batch and once on each part.
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
from graphopt.program import tensors_of
from graphopt.ranks import outside_tracing


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
                found[key] = _same_bits(node, rule, mine, batch)
            if not found[key]:
                names.append(node.name)
    return names


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
        # fx keeps the order of operands, so that those of a part stand where those of the whole do
        pairs = zip(_operands(part), _operands(node), strict=True)
        mine = {p: _piece(values[n], rule.operands.get(n), p, index, batch) for p, n in pairs}
        for a, b, dim in zip(whole, _results(part, mine), rule.dims, strict=True):
            if dim is not None and not _equal(_slice(a, dim, index, batch), b):
                return False
    return True


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
