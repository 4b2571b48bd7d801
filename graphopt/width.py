"""The hidden size as a variable: a model of the zoo at several widths, which grow by whole heads.

The size of a head is fixed, and the widths of feed-forward layers and the number of key-value heads keep
their ratio to the hidden size. So there are models only at multiples of a unit: the hidden size of one
head, or of as many as share key-value heads, or as the feed-forward layer needs for a whole width.
"""

import math
from dataclasses import dataclass
from typing import Any

from graphopt import zoo
from graphopt.errors import GraphoptError

FAMILIES = ("causal-lm", "masked-lm")
REQUIRED = ("hidden_size", "num_attention_heads")
GROWING = (*REQUIRED, "num_key_value_heads", "intermediate_size", "n_inner")
LEAST_UNITS = 2  # with one head, copies become views: another step
LEAST_WIDTHS = 3  # as many as the coefficients of a square


@dataclass(frozen=True)
class Width:
    """Hidden sizes from `low` to `high`, multiples of `unit`.

    `of_unit` are the configuration's attributes that grow, with their values for one unit.
    """

    unit: int
    of_unit: tuple[tuple[str, int], ...]
    low: int
    high: int

    def overrides(self, hidden: int) -> dict[str, zoo.Value]:
        """The configuration of the model with this hidden size; GraphoptError between multiples.

        >>> Width(16, (("hidden_size", 16), ("num_attention_heads", 1)), 32, 64).overrides(48)
        {'hidden_size': 48, 'num_attention_heads': 3}
        """
        if hidden % self.unit:
            raise GraphoptError(f"hidden={hidden} is not a multiple of {self.unit}")
        return {name: value * (hidden // self.unit) for name, value in self.of_unit}

    def between(self, part: int, parts: int) -> int:
        """The multiple `part` of `parts` of the way from the smallest to the largest width."""
        return self.low + (self.high - self.low) * part // (parts * self.unit) * self.unit


def width_of(name: str, config: Any, widths: tuple[int, int]) -> Width:
    """The widths of a zoo model with this configuration, smallest and largest.

    Raises GraphoptError for a model whose width is no number of heads, and for widths that are not
    multiples of the unit, or too few.
    """
    known = {key: getattr(config, key, None) for key in GROWING}
    grows = {key: value for key, value in known.items() if isinstance(value, int) and value > 0}
    if zoo.entry_of(name).family not in FAMILIES or not set(REQUIRED) <= set(grows):
        raise GraphoptError(
            f"widths= is for {' and '.join(FAMILIES)} models of the zoo with {' and '.join(REQUIRED)} in "
            f"their configuration, not for {name}"
        )
    units = math.gcd(*grows.values())
    unit, (low, high) = grows["hidden_size"] // units, widths
    heads = grows["num_attention_heads"] // units
    for hidden in widths:
        if hidden % unit:
            grown = "a head" if heads == 1 else f"{heads} heads"
            raise GraphoptError(f"the width {hidden} of {name} is not a multiple of {unit}, {grown}")
    least = LEAST_UNITS * unit
    if low < least or high < low + (LEAST_WIDTHS - 1) * unit:
        raise GraphoptError(
            f"widths={widths} of {name}: the smallest is at least {least}, and the largest at least "
            f"{(LEAST_WIDTHS - 1) * unit} more"
        )
    return Width(unit, tuple((key, value // units) for key, value in grows.items()), low, high)
