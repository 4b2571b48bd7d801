"""Facts about operators, in one place: what is random, what mutates, what may write over its input.

Facts are keyed by the operator object (``torch.ops.aten.add.Tensor``), never by its name. Whether an
operator returns a view is not listed here: the storages recorded while tracing tell it exactly
(`graphopt.program.Leaf`).
"""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

aten = torch.ops.aten

# Attention operators that draw random numbers only when their dropout probability is positive,
# with the position of that argument.
_DROPOUT_ARGUMENT: dict[Any, int] = {
    aten._scaled_dot_product_flash_attention.default: 3,
    aten._scaled_dot_product_flash_attention_for_cpu.default: 3,
    aten._scaled_dot_product_efficient_attention.default: 5,
    aten._scaled_dot_product_cudnn_attention.default: 5,
    aten.native_dropout.default: 1,
}

# Operators that may write their result over an operand of the same layout: the operator
# that does it, and the operand positions that may be overwritten. ``out`` says that the target takes
# the destination as ``out=``; otherwise the target is the in-place form, whose first argument is it.
_OVERWRITE: dict[Any, tuple[Any, tuple[int, ...], bool]] = {
    aten.add.Tensor: (aten.add.out, (0, 1), True),
    aten.sub.Tensor: (aten.sub.out, (0, 1), True),
    aten.mul.Tensor: (aten.mul.out, (0, 1), True),
    aten.div.Tensor: (aten.div.out, (0, 1), True),
    aten.add.Scalar: (aten.add_.Scalar, (0,), False),
    aten.sub.Scalar: (aten.sub_.Scalar, (0,), False),
    aten.mul.Scalar: (aten.mul_.Scalar, (0,), False),
    aten.div.Scalar: (aten.div_.Scalar, (0,), False),
    aten.neg.default: (aten.neg.out, (0,), True),
    aten.exp.default: (aten.exp.out, (0,), True),
    aten.tanh.default: (aten.tanh.out, (0,), True),
    aten.sigmoid.default: (aten.sigmoid.out, (0,), True),
    aten.rsqrt.default: (aten.rsqrt.out, (0,), True),
    aten.sqrt.default: (aten.sqrt.out, (0,), True),
    aten.relu.default: (aten.relu_.default, (0,), False),
    aten.hardtanh.default: (aten.hardtanh_.default, (0,), False),
    aten.hardswish.default: (aten.hardswish_.default, (0,), False),
    aten.gelu.default: (aten.gelu.out, (0,), True),
    aten.silu.default: (aten.silu.out, (0,), True),
    aten.pow.Tensor_Scalar: (aten.pow.Tensor_Scalar_out, (0,), True),
    aten.tanh_backward.default: (aten.tanh_backward.grad_input, (0, 1), True),
    aten.sigmoid_backward.default: (aten.sigmoid_backward.grad_input, (0, 1), True),
    aten.gelu_backward.default: (aten.gelu_backward.grad_input, (0, 1), True),
    aten.silu_backward.default: (aten.silu_backward.grad_input, (0, 1), True),
    aten.threshold_backward.default: (aten.threshold_backward.grad_input, (0, 1), True),
    # A product added to a matrix: BLAS adds to its result where it lies.
    aten.addmm.default: (aten.addmm_.default, (0,), False),
    # Row by row: a row is reduced before any of it is written.
    aten._softmax.default: (aten._softmax.out, (0,), True),
    aten._log_softmax.default: (aten._log_softmax.out, (0,), True),
    aten._softmax_backward_data.default: (aten._softmax_backward_data.out, (0,), True),
    aten._log_softmax_backward_data.default: (aten._log_softmax_backward_data.out, (0,), True),
}

# Operators that work row by row, and where their argument for the dimension stands.
_BY_ROWS: dict[Any, int] = {
    aten._softmax.default: 1,
    aten._log_softmax.default: 1,
    aten._softmax_backward_data.default: 2,
    aten._log_softmax_backward_data.default: 2,
}

# The keyword under which each ``out`` form takes its destination.
_OUT_KEYWORD = {
    aten.tanh_backward.grad_input: "grad_input",
    aten.sigmoid_backward.grad_input: "grad_input",
    aten.gelu_backward.grad_input: "grad_input",
    aten.silu_backward.grad_input: "grad_input",
    aten.threshold_backward.grad_input: "grad_input",
    aten._softmax_backward_data.out: "grad_input",
}

# Linear in the named tensor argument: a gradient known to be zero there makes the result zero.
_ZERO_IF_ANY_ARGUMENT_ZERO = {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.mm.default,
    aten.bmm.default,
}
_ZERO_IF_FIRST_ARGUMENT_ZERO = {
    aten.div.Tensor,
    aten.div.Scalar,
    aten.neg.default,
    aten.sum.default,
    aten.sum.dim_IntList,
    aten.clone.default,
    aten._to_copy.default,
    aten.slice_backward.default,
    aten.select_backward.default,
    aten.constant_pad_nd.default,
    aten.embedding_dense_backward.default,
    aten.native_dropout_backward.default,
    aten.gelu_backward.default,
    aten.tanh_backward.default,
    aten.silu_backward.default,
    aten.sigmoid_backward.default,
    aten.threshold_backward.default,
    operator.getitem,
}
_ZERO_IF_ALL_ARGUMENTS_ZERO = {
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.cat.default,
    aten.stack.default,
}


def is_random(node: fx.Node) -> bool:
    """True where running `node` draws from the random number generator."""
    return draws(node.target, node.args, node.kwargs)


def draws(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True where calling `target` so draws from the random number generator."""
    if torch.Tag.nondeterministic_seeded not in getattr(target, "tags", ()):
        return False
    position = _DROPOUT_ARGUMENT.get(target)
    if position is None:
        return True
    probability = args[position] if len(args) > position else kwargs.get("dropout_p", 0.0)
    if target is aten.native_dropout.default and len(args) > 2 and args[2] is False:
        return False
    return bool(probability != 0.0)


def mutates(target: Any) -> bool:
    """True where the operator writes to one of its arguments."""
    schema = getattr(target, "_schema", None)
    return schema is not None and schema.is_mutable


@functools.cache
def is_collective(target: Any) -> bool:
    """True for communication operators (functional collectives and c10d)."""
    return getattr(target, "namespace", None) in {
        "_c10d_functional",
        "c10d",
        "_dtensor",
        "c10d_functional",
    }


# Operators that start a transfer which `_WAITS` end: what each does, and the position of its group.
# By the name of their schema, as some are registered only when a part of torch is imported.
_STARTS: dict[str, tuple[str, int | None]] = {
    "_c10d_functional::all_reduce": ("all_reduce", 2),
    "_c10d_functional::all_reduce_coalesced": ("all_reduce", 2),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", 2),
    "_c10d_functional::all_gather_into_tensor_coalesced": ("all_gather", 2),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 3),
    "_c10d_functional::reduce_scatter_tensor_coalesced": ("reduce_scatter", 3),
    "_c10d_functional::all_to_all_single": ("all_to_all", 3),
    "_c10d_functional::broadcast": ("broadcast", 2),
    "ao::offload": ("device_to_host", None),
    "ao::reload": ("host_to_device", None),
    "graphopt::offload": ("device_to_host", None),
    "graphopt::fetch": ("host_to_device", None),
}
# Operators that wait for a transfer, and whether they return what it made.
_WAITS = {
    "_c10d_functional::wait_tensor": True,
    "ao::wait_tensor": True,
    "graphopt::offload_wait": False,
    "graphopt::fetch_wait": True,
}
# What moves values to places outside of the memory and back: each has its own place in the order.
_OFFLOADS = {"graphopt::offload", "graphopt::offload_wait", "graphopt::fetch", "graphopt::fetch_wait"}


class Transfer(NamedTuple):
    """What an operator starts: a collective of `group` (a name, or what stands for it), or a copy."""

    kind: str
    group: Any


def transfer_of(node: fx.Node) -> Transfer | None:
    """The transfer that `node` starts, to be ended by the nodes for which `is_wait` holds."""
    entry = _STARTS.get(schema_name(node.target))
    if entry is None:
        return None
    kind, position = entry
    return Transfer(kind, None if position is None else node.args[position])


def is_wait(node: fx.Node) -> bool:
    """True where `node` waits for the end of the transfer that made its operand."""
    return schema_name(node.target) in _WAITS


def waits_for_operand(node: fx.Node) -> bool:
    """True for a wait whose result is its operand, ready."""
    return _WAITS.get(schema_name(node.target), False)


def is_transfer(target: Any) -> bool:
    """True for operators that take the time of a link: transfers, their waits, and all collectives."""
    name = schema_name(target)
    return name in _STARTS or name in _WAITS or is_collective(target)


def offloads(node: fx.Node) -> bool:
    """True where `node` starts to move a value to a place outside of the memory."""
    return schema_name(node.target) == "graphopt::offload"


def operands_in_flight(wait: fx.Node) -> list[fx.Node]:
    """What the transfer that `wait` ends reads until then."""
    start = wait.all_input_nodes[0]
    if start.target is operator.getitem:
        start = start.all_input_nodes[0]
    return start.all_input_nodes if transfer_of(start) is not None else []


@functools.cache
def schema_name(target: Any) -> str:
    """The name of an operator as it is registered, "" for other functions."""
    schema = getattr(target, "_schema", None)
    return "" if schema is None else str(schema.name)


def is_movable(node: fx.Node) -> bool:
    """True where `node` may run at any time after its operands were made.

    Operators of libraries may hide communication, and what returns nothing is there for an effect.
    """
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return getattr(node.target, "__module__", None) in ("_operator", "math")
    schema, known = node.target._schema, ("aten", "prims", "graphopt")
    return node.target.namespace in known and not schema.is_mutable and bool(schema.returns)


def is_elementwise(node: fx.Node) -> bool:
    """True where every element of the result is made of the elements at its place."""
    return torch.Tag.pointwise in getattr(node.target, "tags", ())


def may_recompute(node: fx.Node) -> bool:
    """True where running `node` again on the same inputs gives the same outputs and changes nothing.

    Random operators qualify: they are replayed from the saved state of the generator.
    """
    if node.op != "call_function" or is_collective(node.target) or mutates(node.target):
        return False
    if schema_name(node.target) in _OFFLOADS:
        return False
    if getattr(node.target, "namespace", None) == "inductor_prims" and is_random(node):
        return False  # Inductor's seeds: drawn once, and all that depends on them can be replayed
    return isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem


def replay_form(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """How to run `node` again without the inputs that its first run changed; None: as it is.

    A batch norm in training reads nothing of its running statistics, but updates them.
    """
    if node.target is aten._native_batch_norm_legit_functional.default and node.args[5] is True:
        x, weight, bias, _, _, training, momentum, epsilon = node.args
        args = (x, weight, bias, training, momentum, epsilon)
        return aten._native_batch_norm_legit.no_stats, args, {}
    return None


def drop_unread_arguments(node: fx.Node) -> None:
    """Take out of `node` the arguments that its kernel does not read.

    The backward of a batch norm in training is given the running statistics, and uses the batch's.
    """
    if node.target is aten.native_batch_norm_backward.default and node.args[7] is True:
        node.args = (*node.args[:3], None, None, *node.args[5:])


def overwrite_positions(node: fx.Node) -> tuple[int, ...]:
    """Positions of the operands that `node` may write its result over; empty where none."""
    entry = _OVERWRITE.get(node.target)
    if entry is None or (node.target in _BY_ROWS and not _over_last_dimension(node)):
        return ()
    return entry[1]


def _over_last_dimension(node: fx.Node) -> bool:
    """True for a softmax, or its gradient, over the last dimension of a contiguous tensor."""
    tensor = node.meta["val"]
    dimension = node.args[_BY_ROWS[node.target]]
    return dimension in (-1, tensor.dim() - 1) and bool(tensor.is_contiguous())


def overwriting(node: fx.Node, position: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Target, arguments and keywords of `node` writing over its operand at `position`."""
    target, positions, takes_out = _OVERWRITE[node.target]
    if position not in positions:
        raise ValueError(f"{node.target} cannot write over its operand {position}")
    if not takes_out:
        return target, node.args, dict(node.kwargs)
    keyword = _OUT_KEYWORD.get(target, "out")
    return target, node.args, {**node.kwargs, keyword: node.args[position]}


def zero_if(target: Any) -> str | None:
    """Which tensor arguments being zero make the result zero: "any", "first", "all" or None."""
    if target in _ZERO_IF_ANY_ARGUMENT_ZERO:
        return "any"
    if target in _ZERO_IF_FIRST_ARGUMENT_ZERO:
        return "first"
    if target in _ZERO_IF_ALL_ARGUMENTS_ZERO:
        return "all"
    return None


def is_view(target: Any) -> bool:
    """True where the operator returns a view of its input by its schema (reshapes may or may not)."""
    if target in (aten._unsafe_view.default, aten.reshape.default, aten.detach.default):
        return True
    schema = getattr(target, "_schema", None)
    if schema is None or schema.is_mutable:
        return False
    return any(r.alias_info is not None for r in schema.returns)
