"""Parameters that are gathered from their shards: where, and gathered once more in the backward.

What depends on one parameter alone, such as the whole of a shard or its transpose, can be made at any
time. Where the backward reads it, it is either kept from the forward on, or the backward gathers the
parameter again: the bits are the same, as the parameter does not change in between.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch import fx

from graphopt import ops
from graphopt.errors import PlanError
from graphopt.program import Program, Role, leaves, storages_of
from graphopt.split import is_backward, late_nodes, saved_nodes

AGAIN = "_again"  # behind the name of a node that is run a second time
# The all-gather; the parameter; bytes of the whole of it; "forward", "kept" (from the forward on, for the
# backward) or "again" (in the backward); how many others are first used between its start and its use.
GatherRow = tuple[str, str, int, str, int]


@dataclass(frozen=True, eq=False)
class Gather:
    """The all-gather `start` of the parameter called `label`, and what is `made` of its result alone.

    `saved_bytes` of that wait from the forward to the backward.
    """

    start: fx.Node
    label: str
    made: tuple[fx.Node, ...]
    saved_bytes: int

    @property
    def is_saved(self) -> bool:
        """True where the backward reads some of it."""
        return self.saved_bytes > 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter, as it is gathered."""
        return sum(leaf.nbytes for leaf in leaves(self.start))


def gathers_of(program: Program) -> list[Gather]:
    """The all-gathers of parameters in `program`, forward and backward, in its order."""
    labels = {i.name: i.label for i in program.inputs if i.role is Role.PARAMETER and not i.mutated}
    source: dict[fx.Node, tuple[str, fx.Node | None]] = {}  # the parameter, and its all-gather
    made: dict[fx.Node, list[fx.Node]] = {}
    for node in program.graph.nodes:
        if node.name in labels and node.op == "placeholder":
            source[node] = labels[node.name], None
        elif own := _made_of(node, source):
            source[node] = own
            if own[1] is not None:
                made.setdefault(own[1], []).append(node)
    saved, storages = set(saved_nodes(program)), storages_of(program.graph)
    found: list[Gather] = []
    for start, nodes in made.items():
        held = {s for node in nodes if node in saved for s in storages[node]}
        nbytes = sum(leaves(owner)[leaf].nbytes for owner, leaf in held)
        found.append(Gather(start, source[start][0], tuple(nodes), nbytes))
    return found


def _made_of(
    node: fx.Node, source: dict[fx.Node, tuple[str, fx.Node | None]]
) -> tuple[str, fx.Node | None] | None:
    """The one parameter that `node` is made of, and the one all-gather on the way, if there is one."""
    if node.op != "call_function" or not node.all_input_nodes:
        return None
    before = [source.get(n) for n in node.all_input_nodes]
    if before[0] is None or any(b != before[0] for b in before):
        return None
    transfer = ops.transfer_of(node)
    if transfer is not None:
        return (before[0][0], node) if transfer.kind == "all_gather" and before[0][1] is None else None
    if ops.is_wait(node) or (ops.is_movable(node) and not ops.is_random(node)):
        return before[0]
    return None


def gathered_again(program: Program, names: Collection[str]) -> Program:
    """A copy of `program` whose backward gathers anew what the all-gathers `names` of the forward made.

    PlanError for a name that is no all-gather of a parameter whose result the backward reads.
    """
    result = program.copy()
    gathers = {g.start.name: g for g in gathers_of(result) if g.is_saved}
    if wrong := sorted(set(names) - set(gathers)):
        raise PlanError(
            f"the plan gathers {wrong[0]} again, which is no gathered parameter that the backward reads"
        )
    again = {node for name in names for node in gathers[name].made}
    late, copies = late_nodes(result), dict[fx.Node, fx.Node]()
    for node in list(result.graph.nodes):
        for source in node.all_input_nodes if node in late else ():
            if source in again:
                node.replace_input_with(source, _copied(source, node, again, copies))
    result.graph.eliminate_dead_code()
    result.graph.lint()
    result.module.recompile()
    return result


def _copied(
    node: fx.Node, reader: fx.Node, again: set[fx.Node], copies: dict[fx.Node, fx.Node]
) -> fx.Node:
    """`node` a second time, before its first late `reader`."""
    if node not in copies:
        given = {n: _copied(n, reader, again, copies) for n in node.all_input_nodes if n in again}
        with reader.graph.inserting_before(reader):
            made = reader.graph.create_node(
                node.op,
                node.target,
                *fx.node.map_arg((node.args, node.kwargs), lambda n: given.get(n, n)),
                name=f"{node.name}{AGAIN}",
            )
        made.meta = {**node.meta, "partitioner_tag": "is_backward"}
        copies[node] = made
    return copies[node]


def gather_rows(program: Program, order: Sequence[str]) -> tuple[tuple[GatherRow, ...], int]:
    """The all-gathers of parameters when `program` runs in `order`, and their most bytes at once."""
    place = {name: i for i, name in enumerate(order)}
    found = [g for g in gathers_of(program) if g.start.name in place]
    starts = [place[g.start.name] for g in found]
    uses = [_first_use(g, place) for g in found]
    rows = []
    for gather, start, use in zip(found, starts, uses, strict=True):
        kept = "kept" if gather.is_saved else "again" if is_backward(gather.start) else "forward"
        ahead = sum(start < other < use for other in uses)
        rows.append((gather.start.name, gather.label, gather.nbytes, kept, ahead))
    return tuple(rows), _most_bytes(program, found, place)


def _first_use(gather: Gather, place: dict[str, int]) -> int:
    made = set(gather.made)
    users = (user for node in made for user in node.users if user not in made)
    return min((place[u.name] for u in users if u.name in place), default=place[gather.start.name])


def _most_bytes(program: Program, found: Iterable[Gather], place: dict[str, int]) -> int:
    """The most bytes of gathered parameters alive at once, each from its start to its last reader."""
    storages = storages_of(program.graph)
    own = {s: g.start for g in found for s in storages[g.start]}
    last: dict[fx.Node, int] = {}
    for node in program.operators():
        behind = {own[s] for n in node.all_input_nodes for s in storages[n] if s in own}
        for start in behind:
            last[start] = max(last.get(start, -1), place.get(node.name, -1))
    events = [(place[g.start.name], 1, g.nbytes) for g in found]
    events += [(last.get(g.start, -1), 2, -g.nbytes) for g in found]
    live, most = 0, 0
    for _, _, change in sorted(events):
        live += change
        most = max(most, live)
    return most
