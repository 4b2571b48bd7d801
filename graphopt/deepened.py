"""A deep program from a shallow one: the nodes of one layer, once for each layer.

The programs of k and of k + 1 equal layers differ in one run of nodes in the forward and one in the
backward, the unit that repeats, as in `graphopt.cost_models.repetition`, which does this for costs. Here
a whole graph comes out, so that everything that looks at a program can look at the deep one. What a node
of a unit reads of another unit is as far away in every layer. The result is compared with the captured
k + 1 layers, node by node.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.cost_models.repetition import NOT_ALIKE, Half, Key, half_of
from graphopt.errors import GraphoptError
from graphopt.program import Input, Program, Role, leaves, tensors_of
from graphopt.split import late_nodes

_STACKS = ("nn_module_stack", "fwd_nn_module_stack")  # of nodes of the forward, and of the backward
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=\[')\d+(?='\])")
_BEFORE = ("placeholder", "get_attr")


def deepened(shallow: Program, deeper: Program, added: int) -> Program:
    """`shallow` with `added` layers more. `deeper` is the same model captured with one layer more.

    Raises GraphoptError where the layers are not alike, or `shallow` has less than three.
    """
    shallow, deeper = tensors_only(shallow), tensors_only(deeper)
    found = _Deepened(shallow, deeper, 1).program()
    if _canonical(found) != _canonical(deeper):
        raise GraphoptError(NOT_ALIKE)
    return found if added == 1 else _Deepened(shallow, deeper, added).program()


def tensors_only(program: Program) -> Program:
    """`program` without inputs that hold no tensor and that nothing reads: meshes of DTensors.

    Its gradients are then one for each input that is no tangent.
    """
    copied = program.copy()
    graph, first = copied.graph, copied.num_forward_outputs
    empty = {n for n in graph.nodes if n.op == "placeholder" and not _holds_tensor(n)}
    gradients = _gradients(copied, {n.name for n in empty}) if copied.is_joint else {}
    output = graph.output_node()
    output.args = ([*copied.forward_outputs, *gradients.values()],)
    unread = {n.name for n in empty if not n.users}
    inputs = tuple(i for i in copied.inputs if i.name not in unread)
    kept = [gradients[i.name] for i in inputs if i.name in gradients]
    output.args = ([*copied.outputs[:first], *kept],)
    output.meta.pop("desc", None)
    for node in [n for n in empty if n.name in unread]:
        graph.erase_node(node)
    return Program(copied.module, first, inputs, copied.breaks)


def _gradients(program: Program, empty: set[str]) -> dict[str, fx.Node | None]:
    """The gradient of each input that is no tangent, by its name; None for those in `empty`.

    A DTensor is two inputs, its part and its mesh. It has two gradients, or the one that is None.
    """
    left = list(program.gradients)[::-1]
    found: dict[str, fx.Node | None] = {}
    last: fx.Node | None = None
    for item in program.inputs:
        if item.role is Role.TANGENT:
            continue
        is_part = item.name in empty and item.label.startswith(f"{item.name}.")
        if is_part and last is None:
            found[item.name] = None
            continue
        last = left.pop() if left else None
        found[item.name] = None if item.name in empty else last
    if left:
        raise GraphoptError("the gradients of this program cannot be told apart")
    return found


def _holds_tensor(node: fx.Node) -> bool:
    return any(t is not None for t in tensors_of(node))


@dataclass(frozen=True)
class _Made:
    """An input of the deep program, of a unit `by` further than that of the shallow one it is like."""

    item: Input
    old: fx.Node
    by: int


class _Deepened:
    """Makes the deep graph, in which `number` has the node for each key."""

    def __init__(self, shallow: Program, deeper: Program, added: int) -> None:
        self.old, self.added = shallow, added
        self.nodes, middle = _operators(shallow)
        deep, deep_middle = _operators(deeper)
        before, after = list(map(_signature, self.nodes)), list(map(_signature, deep))
        self.halves = [half_of(before[:middle], after[:deep_middle], 0, False)]
        if len(before) > middle:
            self.halves.append(half_of(before[middle:], after[deep_middle:], middle, True))
        self.keys = self._keys()
        self.graph = fx.Graph()
        self.number: dict[Key, fx.Node] = {}

    def program(self) -> Program:
        """The deep program."""
        inputs = self._inputs()
        for half in self.halves:
            for index, unit in half.sequence(self.added):
                self._operator(half, index, unit)
        new = self.graph.output(self._outputs(inputs))
        new.meta = dict(self.old.graph.output_node().meta)
        module = fx.GraphModule(self.old.module, self.graph)
        module.meta = dict(self.old.module.meta)
        items = tuple(made.item for made in inputs)
        return Program(module, self.old.num_forward_outputs, items, self.old.breaks)

    def _keys(self) -> dict[fx.Node, Key]:
        """For every node its unit and its place there: its own, or that of its first reader."""
        found: dict[fx.Node, Key] = {}
        readers: dict[fx.Node, list[tuple[int | None, Any]]] = {}
        for index, node in enumerate(self.nodes):
            half = self.halves[index >= self.halves[0].stop]
            unit = half.unit(index)
            place = None if unit is None else (half.reverse, index - half.begin(unit))
            found[node] = (None, node) if unit is None else (unit, place)
            for position, source in enumerate(node.all_input_nodes if not half.reverse else ()):
                if source.op in _BEFORE:
                    readers.setdefault(source, []).append((unit, (place, position)))
        for node in self.old.graph.nodes:
            if node.op in _BEFORE:
                known = readers.get(node, [(None, node)])
                units = {unit for unit, _ in known}
                own = len(units) == 1 and None not in units
                found[node] = known[0] if own else (None, node)
        return found

    def _inputs(self) -> list["_Made"]:
        """Make placeholders and attributes."""
        middle = self.halves[0].count // 2
        facts = {i.name: i for i in self.old.inputs}
        before = [n for n in self.old.graph.nodes if n.op in _BEFORE]
        found: list[_Made] = []
        last = max((i for i, n in enumerate(before) if self.keys[n][0] == middle), default=-1)
        repeated = [n for n in before if self.keys[n][0] == middle]

        def make(node: fx.Node, unit: int | None) -> None:
            owner, place = self.keys[node]
            by = 0 if unit is None or owner is None else unit - owner
            new = self._new((unit, place), node, (), {}, by, self._suffix(self.halves[0], unit))
            if node.op == "placeholder":
                old = facts[node.name]
                item = Input(new.name, old.role, shifted(old.label, by), old.mutated)
                found.append(_Made(item, node, by))

        for index, node in enumerate(before):
            owner = self.keys[node][0]
            make(node, owner if owner is None or owner <= middle else owner + self.added)
            if index == last:
                for unit in range(middle + 1, middle + 1 + self.added):
                    for each in repeated:
                        make(each, unit)
        return found

    def _outputs(self, inputs: Sequence["_Made"]) -> list[fx.Node | None]:
        """What the deep graph returns: outputs of the forward, and a gradient for each input."""
        outputs = [self._end(o, self.added) for o in self.old.forward_outputs]
        if not self.old.is_joint:
            return outputs
        names = (i.name for i in self.old.inputs if i.role is not Role.TANGENT)
        gradient_of = dict(zip(names, self.old.gradients, strict=True))
        for made in inputs:
            if made.item.role is not Role.TANGENT:
                outputs.append(self._end(gradient_of[made.old.name], made.by))
        return outputs

    def _end(self, output: Any, by: int) -> fx.Node | None:
        """The node of the deep graph for an output of the shallow one, of a unit `by` further."""
        if not isinstance(output, fx.Node):
            return None
        owner, place = self.keys[output]
        return self.number[None if owner is None else owner + by, place]

    def _operator(self, half: Half, index: int, unit: int | None) -> None:
        node, own = self.nodes[index], half.unit(index)
        if unit is None or own is None:
            by = self.added if half.is_near_output(index) else 0
        else:
            by = unit - own

        def meant(source: fx.Node) -> fx.Node:
            owner, place = self.keys[source]
            key = (None if owner is None else owner + by, place)
            if key not in self.number:
                raise GraphoptError(NOT_ALIKE)
            return self.number[key]

        given: Any = fx.map_arg((node.args, node.kwargs), meant)
        args, kwargs = given
        key = (unit, self.keys[node][1])
        self._new(key, node, args, kwargs, by, self._suffix(half, unit))

    def _suffix(self, half: Half, unit: int | None) -> str:
        """What tells the names of an added unit from those of its template."""
        middle = half.count // 2
        added = unit is not None and middle < unit <= middle + self.added
        return f"_layer{unit}" if added else ""

    def _new(self, key: Key, old: fx.Node, args: Any, kwargs: Any, by: int, suffix: str) -> fx.Node:
        target = f"{old.target}{suffix}" if old.op == "placeholder" else old.target
        new = self.graph.create_node(old.op, target, args, kwargs, old.name + suffix)
        new.meta = dict(old.meta)
        for name in _STACKS if by else ():
            if stack := old.meta.get(name):
                new.meta[name] = {
                    shifted(k, by): (shifted(path, by), kind) for k, (path, kind) in stack.items()
                }
        self.number[key] = new
        return new


def shifted(path: str, by: int) -> str:
    """The path of a module of another layer: its first number is larger by `by`.

    >>> shifted("model.layers.1.mlp.up_proj.weight", 40), shifted("L['self']._modules['h']['1'].mlp", 2)
    ('model.layers.41.mlp.up_proj.weight', "L['self']._modules['h']['3'].mlp")
    """
    return _NUMBER.sub(lambda match: str(int(match[0]) + by), path, count=1) if by else path


def _operators(program: Program) -> tuple[list[fx.Node], int]:
    """The nodes that compute, those of the forward first, and how many these are."""
    late = late_nodes(program)
    nodes = [n for n in program.graph.nodes if n.op not in (*_BEFORE, "output")]
    first = [n for n in nodes if n not in late]
    return [*first, *(n for n in nodes if n in late)], len(first)


def _signature(node: fx.Node) -> Any:
    """What a node is like, whichever nodes it reads."""
    known = [
        None if t is None else (str(t.dtype), tuple(map(int, t.shape)), tuple(map(int, t.stride())))
        for t in tensors_of(node)
    ]

    def marked(source: fx.Node) -> Any:
        return _Marker(source.op in _BEFORE)

    shape: Any = fx.map_arg((node.args, node.kwargs), marked)
    return node.op, node.target, repr(shape), repr(known), leaves(node)


class _Marker:
    """Stands for a node among the arguments of another."""

    def __init__(self, outside: bool) -> None:
        self.outside = outside

    def __repr__(self) -> str:
        return "input" if self.outside else "%"


def _canonical(program: Program) -> Any:
    """What two equal programs agree in: nodes numbered in order, placeholders as they are first read."""
    number: dict[fx.Node, int] = {}
    rows = []
    for node in _operators(program)[0]:
        reads = tuple(number.setdefault(n, len(number)) for n in node.all_input_nodes)
        number.setdefault(node, len(number))
        rows.append((_signature(node), reads))
    ends = tuple(number.get(o, -1) if isinstance(o, fx.Node) else None for o in program.forward_outputs)
    gradients = sorted(number.get(o, -1) for o in program.gradients if isinstance(o, fx.Node))
    held = sorted(
        (leaf.nbytes, i.role.value)
        for i, n in zip(
            program.inputs, (n for n in program.graph.nodes if n.op == "placeholder"), strict=True
        )
        for leaf in leaves(n)
    )
    return rows, ends, gradients, held
