"""What a launch may choose: plain fields, in a form that a file can hold and a table can show."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

from graphopt.errors import CodegenError


@dataclass(frozen=True)
class Choice:
    """Fields of numbers and bools; those of one backend are a subclass."""

    def beside(self, default: "Choice") -> str:
        """The fields that differ from those of `default`.

        >>> from graphopt.codegen.numba_choice import NumbaChoice
        >>> NumbaChoice(block=512, online=False).beside(NumbaChoice())
        'block=512 online=False'
        """
        own, other = vars(self), vars(default)
        return " ".join(f"{k}={v}" for k, v in own.items() if v != other[k]) or "default"

    def with_best_of(self, better: Sequence["Choice"]) -> Self:
        """What each of `better`, the best first, has other than this, together; the first word counts."""
        changed: dict[str, Any] = {}
        for choice in better:
            changed |= {k: v for k, v in vars(choice).items() if v != vars(self)[k] and k not in changed}
        return replace(self, **changed)

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """The choice of which `data` is `vars`; CodegenError where it is none."""
        kinds = {field.name: field.type for field in fields(cls)}
        if not isinstance(data, dict) or data.keys() != kinds.keys():
            raise CodegenError(f"{data!r} is no {cls.__name__}")
        for name, kind in kinds.items():
            if type(data[name]) is not kind or data[name] < 0:
                raise CodegenError(f"{name}={data[name]!r} in a {cls.__name__}")
        return cls(**data)
