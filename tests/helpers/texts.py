"""Programs as short texts for golden files."""

from torch import fx

from graphopt.program import Program


def program_text(program: Program) -> str:
    """One line for each node: name = op(arguments)."""
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            lines.append(f"{node.name} = {program.roles[node.name].value}()")
        elif node.op == "output":
            lines.append(f"return {', '.join(map(str, program.outputs))}")
        else:
            arguments = [*map(_text, node.args)]
            arguments += [f"{k}={_text(v)}" for k, v in node.kwargs.items()]
            lines.append(f"{node.name} = {_target(node)}({', '.join(arguments)})")
    return "\n".join(lines)


def _target(node: fx.Node) -> str:
    name = getattr(node.target, "__name__", "")
    return name if name == "getitem" else str(node.target).removeprefix("aten.")


def _text(argument: object) -> str:
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(map(_text, argument))}]"
    return str(argument)
