"""Checks on Programs: each raises VerifyError with the node, its facts and the lines around it.

Three properties hold for every Program: nodes come after what they read (`check_order`); the inputs
and outputs are those that were traced (`check_interface`); and in a joint graph nothing of the
forward depends on the backward (`check_phases`).
"""

from torch import fx

from graphopt.errors import VerifyError
from graphopt.program import LEAVES, Program, leaves, tensors_of
from graphopt.split import late_nodes

EXCERPT_LINES = 10


def verify(program: Program, before: Program | None = None, *, may_drop_gradients: bool = False) -> None:
    """Run every check; `before` is the program that a pass made this one from."""
    check_order(program)
    check_facts(program)
    check_phases(program)
    if before is not None:
        check_interface(program, before, may_drop_gradients)


def check_order(program: Program) -> None:
    """Every node reads only nodes that come before it, of this graph."""
    seen: set[fx.Node] = set()
    for node in program.graph.nodes:
        for source in node.all_input_nodes:
            if source not in seen:
                raise VerifyError(f"{node.name} reads {source.name} before it is made\n" + excerpt(node))
        seen.add(node)


def check_facts(program: Program) -> None:
    """Every node says what it holds: a value, and a storage for each of its tensors."""
    for node in program.operators():
        tensors = tensors_of(node)
        if LEAVES not in node.meta or len(leaves(node)) != len(tensors):
            raise VerifyError(
                f"{node.name} holds {len(tensors)} tensors and records {len(leaves(node))} storages\n"
                + excerpt(node)
            )
        inputs = len(node.all_input_nodes)
        for leaf in leaves(node):
            if leaf.alias is not None and leaf.alias[0] >= inputs:
                raise VerifyError(f"{node.name} aliases an input that it does not have\n" + excerpt(node))


def check_phases(program: Program) -> None:
    """No output of the forward depends on the backward."""
    late = late_nodes(program)
    for output in program.forward_outputs:
        if isinstance(output, fx.Node) and output in late:
            raise VerifyError(f"forward output {output.name} is made in the backward\n" + excerpt(output))
    for node in program.operators():
        if node not in late and any(n in late for n in node.all_input_nodes):
            raise VerifyError(f"{node.name} of the forward reads the backward\n" + excerpt(node))


def check_interface(program: Program, before: Program, may_drop_gradients: bool = False) -> None:
    """Inputs and outputs are as many as before, with the same roles, shapes and dtypes.

    With `may_drop_gradients` a gradient may have become None.
    """
    if program.inputs != before.inputs or program.num_forward_outputs != before.num_forward_outputs:
        raise VerifyError("the inputs or the number of forward outputs changed")
    pairs = zip(program.outputs, before.outputs, strict=True)
    for index, (new, old) in enumerate(pairs):
        if new is None and may_drop_gradients and index >= before.num_forward_outputs:
            continue
        if isinstance(new, fx.Node) is not isinstance(old, fx.Node):
            raise VerifyError(f"output {old} became {new}")
        if isinstance(new, fx.Node) and _facts(new) != _facts(old):
            raise VerifyError(f"output {old.name} {_facts(old)} became {_facts(new)}\n" + excerpt(new))


def _facts(node: fx.Node) -> list[tuple[object, ...] | None]:
    return [None if t is None else (t.dtype, *t.shape) for t in tensors_of(node)]


def excerpt(node: fx.Node) -> str:
    """The lines of the graph around `node`."""
    nodes = list(node.graph.nodes)
    place = nodes.index(node)
    first = max(0, place - EXCERPT_LINES // 2)
    lines = []
    for other in nodes[first : first + EXCERPT_LINES]:
        mark = ">" if other is node else " "
        lines.append(f"{mark} {other.format_node() or other.name}")
    return "\n".join(lines)
