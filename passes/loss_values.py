"""What the rules of `graphopt.passes.loss_rules` know of tensors over a vocabulary.

Let z be the logits (N, V) of a head, flattened to N rows. A `Value` is a tensor (.., V) written as a sum
of terms, each a row coefficient (N,) times one of a few known tensors:

    z, 1, softmax(z), one-hot(targets), m and m z, for a product m of tensors given by the user

That is closed under what losses and their gradients do. A `Row` is a linear combination of row vectors
(N,), so that a shift by the maximum of each row, which losses take for safety, cancels exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import fx

PEAK: Literal["peak"] = "peak"  # the maximum of each row of z: it has to cancel, for nobody computes it
Atom = fx.Node | Literal["peak"] | None  # a row of the new graph; PEAK; the number 1


@dataclass(frozen=True)
class Row:
    """A linear combination of rows (N,): factor by atom.

    >>> Row({None: 2.0}).plus(Row({PEAK: 1.0}), -1).terms
    {None: 2.0, 'peak': -1.0}
    """

    terms: Mapping[Atom, float]

    def plus(self, other: "Row", factor: float = 1.0) -> "Row":
        """The sum of this and `factor` times `other`."""
        found = dict(self.terms)
        for atom, number in other.terms.items():
            found[atom] = found.get(atom, 0.0) + factor * number
        return Row({a: f for a, f in found.items() if f != 0})

    def times(self, factor: float) -> "Row":
        """This, scaled."""
        return Row({a: f * factor for a, f in self.terms.items() if f * factor != 0})

    @property
    def constant(self) -> float | None:
        """The number that every element is, if it is one."""
        return self.terms.get(None, 0.0) if set(self.terms) <= {None} else None


ZERO, ONE = Row({}), Row({None: 1.0})

Mix = tuple[fx.Node, ...]  # factors (original nodes), in order of their names


@dataclass(frozen=True)
class Basis:
    """One of the known tensors: "z", "1", "p" (softmax), "hot", "m", "mz" or "pz" (softmax times z).

    `index` is the node (original) of the indices of a one-hot, `mix` are the factors of m.
    """

    kind: Literal["z", "1", "p", "hot", "m", "mz", "pz"]
    index: fx.Node | None = None
    mix: Mix = ()


Z, CONSTANT, SOFTMAX, SOFTMAX_Z = Basis("z"), Basis("1"), Basis("p"), Basis("pz")


@dataclass(frozen=True)
class Slice:
    """A slice along a leading dimension, as `aten.slice` takes it, of a tensor (*lead, ..)."""

    lead: tuple[int, ...]
    dim: int
    start: int | None
    end: int | None
    step: int


@dataclass(frozen=True)
class Raw:
    """Scores on their way to a loss: `outer f(inner (x weight^T + bias))`, with f = tanh if `capped`."""

    head: "Head"
    bias: fx.Node | None = None
    inner: float = 1.0
    capped: bool = False
    outer: float = 1.0
    slices: tuple[Slice, ...] = ()

    def scaled(self, factor: float) -> "Raw":
        """These scores times a number."""
        if self.capped:
            return replace(self, outer=self.outer * factor)
        return replace(self, inner=self.inner * factor)


@dataclass(frozen=True)
class Value:
    """A tensor over the vocabulary as a sum of terms.

    A gradient on its way back from the loss to the scores has undone the last `undone` slices, and the
    soft cap where `uncapped`. `extra` is a further addend: a node of the new graph.
    """

    head: "Head | None"
    terms: Mapping[Basis, Row]
    undone: int = 0
    uncapped: bool = False
    extra: fx.Node | None = None

    def times(self, factor: float) -> "Value":
        """This, scaled; `extra` must be None."""
        return replace(self, terms={b: r.times(factor) for b, r in self.terms.items()})

    @property
    def kinds(self) -> set[str]:
        """The kinds of its terms."""
        return {b.kind for b in self.terms}


@dataclass(frozen=True)
class KnownRow:
    """One number for each row; where `exponential`, `factor` times the exponential of it."""

    head: "Head | None"
    row: Row
    exponential: bool = False
    factor: Row = ONE


@dataclass(frozen=True)
class Shifted:
    """softmax(z) exp(shift), with a shift that contains the maximum of each row."""

    head: "Head"
    shift: Row


@dataclass(frozen=True)
class Turned:
    """The transpose (V, N) of a value (N, V)."""

    value: Value


Known = Raw | Value | KnownRow | Shifted | Turned


@dataclass(eq=False)
class Head:
    """One projection onto the vocabulary, and what was found out about its use.

    `linear` is the original node, `x` and `weight` its operands, as they stand there: (N, D) and (D, V).
    `form` is the one way in which the loss reads the scores; `index`, `mix` and `ignore` are what it
    reads beside them, `summed` that it needs the sums of the logits and `expected` that it needs their
    means under the softmax, `only_nll` that only the fused negative log-likelihood reads them.
    `statistics` and `gradients` are the operators of the new graph, `numbers` the
    results of the former, `results` the gradients of x, weight and bias.
    """

    linear: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    rows: int
    vocabulary: int
    hidden: int
    form: Raw | None = None
    index: fx.Node | None = None
    mix: Mix | None = None
    ignore: int | None = None
    only_nll: bool = True
    summed: bool = False
    expected: bool = False
    statistics: fx.Node | None = None
    gradients: fx.Node | None = None
    numbers: tuple[fx.Node, ...] = ()
    results: tuple[fx.Node, ...] = ()
    result_of: Value | None = None
    remarks: list[str] = field(default_factory=list)
