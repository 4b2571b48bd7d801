"""The ways to run a streamed head, put into a program in place of the general one.

`vocabulary` makes the logits again in the backward, block by block. `frozen` needs no gradient of the
weight: its forward keeps the mean weight row of each token. `tokens` makes the gradients in the forward,
for an incoming gradient of one, and scales them in the backward; for that the coefficients of every row
must be known in the forward up to that one factor, and depend on no logit but through the log-sum-exp.
"""

from collections.abc import Callable
from operator import getitem
from typing import Any

import torch
from torch import fx

from graphopt.errors import PlanError
from graphopt.passes.loss_builder import fake_mode_of
from graphopt.passes.loss_rewrite import put_in_order
from graphopt.passes.loss_values import Head
from graphopt.program import LEAVES, Program, Role, set_value
from graphopt.split import late_nodes
from graphopt.stream_ops import COMMON, DROP, NUMBERS, ops

aten = torch.ops.aten
_LSE = COMMON  # and, of `streamed_gradients`, of the log-sum-exp, before the coefficients
_KEEP_ROWS = {
    *(aten.view.default, aten.reshape.default, aten.expand.default, aten.unsqueeze.default),
    *(aten.squeeze.dim, aten.squeeze.default, aten.detach.default, aten._to_copy.default),
    *(aten.neg.default, aten.mul.Scalar, aten.div.Scalar, aten.select.int, aten.slice.Tensor),
}


class NotPossible(PlanError):
    """A variant that a head cannot be run in; the message says why."""


def put(
    program: Program, head: Head, variant: str, block: int, drop: bool = False, in_place: bool = True
) -> None:
    """Change `program` so that `head` runs as `variant` in blocks of `block` rows or columns.

    With `drop`, rows that the loss ignores are left out first; NotPossible where others may read them.
    """
    if drop and not (head.only_nll and head.ignore is not None):
        raise NotPossible(f"{head.linear.name}: rows can only be dropped where only the loss reads them")
    if variant not in _VARIANTS:
        raise PlanError(f"{variant!r} is none of {', '.join(_VARIANTS)}")
    for node in (head.statistics, head.gradients):
        if node is not None:
            node.args = (*node.args[:DROP], drop, *node.args[DROP + 1 :])
    _VARIANTS[variant](program, head, block, in_place)


def _vocabulary(program: Program, head: Head, block: int, in_place: bool) -> None:
    assert head.statistics is not None
    head.statistics.args = (*head.statistics.args[:COMMON], block)
    if head.gradients is not None:
        head.gradients.args = (*head.gradients.args[:-2], block, head.gradients.args[-1])


def _frozen(program: Program, head: Head, block: int, in_place: bool) -> None:
    forward, backward = head.statistics, head.gradients
    assert forward is not None
    if backward is None or list(backward.args[-1]) != [True, False, False]:  # type: ignore[arg-type]
        raise NotPossible(f"{head.linear.name}: its weight needs a gradient, or nothing does")
    if forward.args[6]:
        raise NotPossible(f"{head.linear.name}: the gradient of a soft cap is no mean of weights")
    by = _without_entropy(head, backward)
    maker = _Maker(program)
    new = maker.before(forward, ops.streamed_attention.default, *forward.args[:COMMON], block)
    forward.replace_all_uses_with(new)
    mean = maker.before(backward, getitem, new, NUMBERS, like=new)
    gradient = ops.streamed_attention_gradient.default
    dx = maker.before(backward, gradient, *backward.args[:COMMON], mean, *by)
    for user in list(backward.users):
        user.replace_all_uses_with(dx)
    maker.finish()


def _tokens(program: Program, head: Head, block: int, in_place: bool) -> None:
    forward, backward = head.statistics, head.gradients
    assert forward is not None
    if backward is None:
        raise NotPossible(f"{head.linear.name}: there is no gradient to make in the forward")
    by = _without_entropy(head, backward)
    maker = _Maker(program)
    hoist = _Hoist(maker, forward, by)
    unit, per_lse = hoist.unit_coefficients()
    wanted = backward.args[-1]
    sweep = ops.streamed_sweep.default
    arguments = (*forward.args[:COMMON], *unit, per_lse, block, wanted)
    new = maker.before(forward, sweep, *arguments)
    forward.replace_all_uses_with(new)
    for user in list(backward.users):
        index = user.args[1]
        made = maker.before(backward, getitem, new, NUMBERS + index, like=new)  # type: ignore[operator]
        factor = maker.before(backward, aten.reshape.default, hoist.tangent, [], like=backward)
        if in_place:
            scaled = maker.before(backward, ops.scaled_gradient_.default, made, factor, like=backward)
        else:
            scaled = maker.before(backward, aten.mul.Tensor, made, factor, like=backward)
        user.replace_all_uses_with(scaled)
    maker.finish()


def _without_entropy(head: Head, backward: fx.Node) -> tuple[Any, ...]:
    """The coefficients of softmax, one-hot, constant and mix, where there is no other."""
    *by, entropy = backward.args[_LSE + 1 : _LSE + 6]
    if entropy is not None:
        raise NotPossible(f"{head.linear.name}: the gradient of an entropy needs the logits again")
    return tuple(by)


class _Maker:
    """Makes nodes of a program that was finished."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.graph = program.graph
        self.fake_mode = fake_mode_of(program.graph)

    def before(self, place: fx.Node, target: Any, *args: Any, like: fx.Node | None = None) -> fx.Node:
        """A node before `place`, of the phase of `like` (or of `place`)."""
        with self.graph.inserting_before(place):
            name = f"stream_{getattr(target, '_opname', getattr(target, '__name__', 'node'))}"
            node = self.graph.create_node("call_function", target, args, {}, name)
        facts = (like or place).meta
        node.meta = {k: v for k, v in facts.items() if k not in ("val", "tensor_meta", LEAVES, "desc")}
        return self.infer(node)

    def infer(self, node: fx.Node) -> fx.Node:
        """`node`, with its value and storages found by running it on fake tensors."""
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        with self.fake_mode:
            set_value(node, target(*args, **kwargs))
        return node

    def finish(self) -> None:
        """An order that holds, without nodes that nobody reads."""
        put_in_order(self.graph)
        self.graph.eliminate_dead_code()
        self.graph.lint()


class _Hoist:
    """The coefficients of a backward, made in the forward for an incoming gradient of one."""

    def __init__(self, maker: _Maker, forward: fx.Node, by: tuple[Any, ...]) -> None:
        self.maker = maker
        self.forward = forward
        self.by = by
        self.numbers = {u for u in forward.users if u.target is getitem}
        self.lse = {u for u in self.numbers if u.args[1] == 0}
        self.late = late_nodes(maker.program)
        program = maker.program
        self.tangents = {n for n in program.graph.nodes if program.roles.get(n.name) is Role.TANGENT}
        found = {t for c in by if c is not None for t in _above(c) & self.tangents}
        if len(found) != 1 or next(iter(found)).meta["val"].numel() != 1:
            raise NotPossible("the gradient that comes back to the loss is no single number")
        self.tangent = found.pop()

    def unit_coefficients(self) -> tuple[list[fx.Node | None], fx.Node | None]:
        """The coefficients that depend on no logit, and the factor of the log-sum-exp in the first."""
        softmax = self.by[0]
        unit = [self._copied(c, None) for c in (None, *self.by[1:])]
        if softmax is None or not (_above(softmax) & self.numbers):
            return [self._copied(softmax, None), *unit[1:]], None
        self._check_linear(softmax)
        at_zero, at_one = self._copied(softmax, 0.0), self._copied(softmax, 1.0)
        per_lse = self.maker.before(self.forward, aten.sub.Tensor, at_one, at_zero)
        return [at_zero, *unit[1:]], per_lse

    def _copied(self, coefficient: Any, lse: float | None) -> fx.Node | None:
        """A copy of what makes `coefficient`, with 1 for the tangent, and `lse` for that of each row."""
        if coefficient is None:
            return None
        changed = {self.tangent: self._number_like(self.tangent, 1.0)}
        for node in self.lse if lse is not None else ():
            changed[node] = self._number_like(node, lse)  # type: ignore[arg-type]
        above = _above(coefficient)
        for node in list(self.maker.graph.nodes):
            moved = node in self.late or any(n in changed for n in node.all_input_nodes)
            if node in changed or node not in above or not moved:
                continue
            copy = self.maker.graph.node_copy(node, lambda n: changed.get(n, n))
            self.forward.prepend(copy)
            copy.meta = {k: v for k, v in node.meta.items() if k != "partitioner_tag"}
            copy.meta.pop("autograd_backward", None)
            changed[node] = copy
        found = changed.get(coefficient, coefficient)
        if _above(found) & self.numbers:
            raise NotPossible("the gradient of the loss depends on more of the logits than one number")
        return found  # type: ignore[no-any-return]

    def _number_like(self, node: fx.Node, number: float) -> fx.Node:
        value = node.meta["val"]
        with self.maker.graph.inserting_before(self.forward):
            made = self.maker.graph.call_function(
                aten.full.default,
                (list(value.shape), number),
                {"dtype": value.dtype, "device": value.device, "pin_memory": False},
            )
        return self.maker.infer(made)

    def _check_linear(self, coefficient: fx.Node) -> None:
        """NotPossible unless `coefficient` is linear in the log-sum-exp, by every operator on the way."""
        reached, above = set(self.lse), _above(coefficient)
        for node in self.maker.graph.nodes:
            mine = [n for n in node.all_input_nodes if n in reached]
            if not mine or node not in above:
                continue
            if not _is_linear(node, mine):
                raise NotPossible(f"{node.name} is not linear in the log-sum-exp")
            reached.add(node)


def _is_linear(node: fx.Node, reached: list[fx.Node]) -> bool:
    first = node.args[0] if node.args else None
    if node.target in _KEEP_ROWS:
        return True
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return True
    if node.target in (aten.mul.Tensor,):
        return not all(a in reached for a in node.args[:2])
    if node.target in (aten.div.Tensor, aten.masked_fill.Scalar):
        return reached == [first]
    if node.target is aten.pow.Tensor_Scalar:
        return bool(node.args[1] == 1)
    if node.target in (aten.where.self, aten.where.ScalarOther):
        return first not in reached
    return False


def _above(node: fx.Node) -> set[fx.Node]:
    """`node` and all it is made of."""
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


_VARIANTS: dict[str, Callable[[Program, Head, int, bool], None]] = {
    "tokens": _tokens,
    "vocabulary": _vocabulary,
    "frozen": _frozen,
}
VARIANTS = tuple(_VARIANTS)
