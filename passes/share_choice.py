"""What all ranks do on shares of the tokens: nothing that one of them cannot or rounds otherwise."""

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.errors import PlanError
from graphopt.passes.batch_probe import rounded_otherwise
from graphopt.passes.sequence_parallel import CannotShard, TokenShares, shares_of
from graphopt.program import Program
from graphopt.ranks import agree, is_real, largest


@dataclass(frozen=True)
class SharedTokens:
    """`program` with the sums of the all-reduces `names` in shares of the tokens."""

    program: Program
    names: tuple[str, ...]


def agreed_shares(program: Program, groups: Sequence[str], *, exact: bool) -> SharedTokens:
    """Leave the same sums of `program` in shares on all ranks of `groups`; raises CannotShard on all.

    With `exact`, what sums over the tokens reads gathered ones, and all is refused where an operator
    gives other bits on a share, on any rank; tried where the groups are real ones.
    """
    names: tuple[str, ...] = ()
    found, reason = None, ""
    try:
        names = tuple(w.all_input_nodes[0].name for w in shares_of(program, partial=not exact).sums)
        found = TokenShares(program, names, partial=not exact)
    except PlanError as error:
        reason = str(error)
    if not agree(groups, [reason, *names], "what to share"):
        raise CannotShard(reason or "other ranks cannot share the same sums")
    if found is None:
        raise CannotShard(reason)
    shares = shares_of(program, names, partial=not exact)
    parts = {name: [node] * shares.ranks for name, node in found.parts.items()}
    tried = exact and any(map(is_real, groups))
    other = rounded_otherwise(shares.rules, parts, shares.batch) if tried else []
    if any(largest(groups, [bool(other)], "the bits of shares")):
        raise CannotShard(f"{(other or ['an operator'])[0]} rounds otherwise on a share of the tokens")
    return SharedTokens(found.program, names)
