"""Plans: what a pass decided, as plain data that can be printed, compared, edited and saved."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Self

from graphopt.errors import PlanError
from graphopt.html_table import fields_table, folded, heading, preformatted


@dataclass(frozen=True)
class Plan:
    """Base of all plans: a frozen dataclass whose fields are names, numbers and tuples of them."""

    def table(self) -> str:
        """More lines for the report; "" where `str` of the plan says all."""
        return ""

    def _repr_html_(self) -> str:
        """The plan for a notebook: what it says, and its fields."""
        title = heading(type(self).__name__)
        fields = folded("all fields", fields_table(self))
        return "\n".join([title, preformatted(str(self)), preformatted(self.table()), fields])

    def to_json(self) -> str:
        """The plan as JSON text, with the name of its class."""
        return json.dumps({"plan": type(self).__name__, **dataclasses.asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan that `to_json` wrote; PlanError where the text is not one of this class."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise PlanError(f"not a plan: {error}") from None
        if not isinstance(data, dict) or data.pop("plan", None) != cls.__name__:
            raise PlanError(f"not a {cls.__name__}: {text[:60]!r}")
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := sorted(set(data) - names):
            raise PlanError(f"{cls.__name__} has no field {', '.join(unknown)}")
        try:
            return cls(**{name: _frozen(value) for name, value in data.items()})
        except TypeError as error:
            raise PlanError(f"not a {cls.__name__}: {error}") from None


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
