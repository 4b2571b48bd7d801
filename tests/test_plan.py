"""Plans are plain data: they print, compare, and survive JSON; what is no plan is refused."""

import json
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import PlanError
from graphopt.passes.checkpoint import CheckpointPlan
from graphopt.plan import Plan


@dataclass(frozen=True)
class Colours(Plan):
    """Names, numbers, and tuples of them."""

    names: tuple[str, ...]
    pairs: tuple[tuple[str, int], ...] = ()
    share: float = 0.5
    limit: int | None = None


@given(
    st.builds(
        Colours,
        st.lists(st.text()).map(tuple),
        st.lists(st.tuples(st.text(), st.integers())).map(tuple),
        st.floats(allow_nan=False),
        st.none() | st.integers(),
    )
)
def test_json_gives_the_plan_back(plan: Colours) -> None:
    again = Colours.from_json(plan.to_json())
    assert again == plan and hash(again) == hash(plan)


def test_the_text_is_json_with_the_name_of_the_class() -> None:
    data = json.loads(Colours(("red",), limit=3).to_json())
    assert data == {"plan": "Colours", "names": ["red"], "pairs": [], "share": 0.5, "limit": 3}


def test_a_plan_can_be_edited_by_hand() -> None:
    text = Colours(("red", "blue"), limit=3).to_json().replace('"red"', '"green"')
    assert Colours.from_json(text) == Colours(("green", "blue"), limit=3)
    plan = Colours(("red",))
    with pytest.raises(FrozenInstanceError):
        plan.limit = 4  # type: ignore[misc]
    assert replace(plan, limit=4) != plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a plan"),
        ("{", "not a plan"),
        ("[]", "not a Colours"),
        ("3", "not a Colours"),
        ('{"names": []}', "not a Colours"),
        ('{"plan": "CheckpointPlan", "names": []}', "not a Colours: .*CheckpointPlan"),
        ('{"plan": "Colours", "names": [], "colour": 1}', "Colours has no field colour"),
        ('{"plan": "Colours"}', "not a Colours: .*names"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        Colours.from_json(text)
    assert caught.value.reachable_bytes is None


def test_a_checkpoint_plan_survives_json_and_prints_its_gain() -> None:
    plan = CheckpointPlan(("a", "b"), ("c",), ("d", "e"), None, 5 * 2**20, 10 * 2**20, 2.0, 0.1, 100, 10)
    assert CheckpointPlan.from_json(plan.to_json()) == plan
    assert str(plan).startswith("keep 2 tensors: peak ")
    assert "5.0% more time" in str(plan)
    assert "0.0% more time" in str(replace(plan, step_seconds=0.0))
    bounded = replace(plan, least_recompute_seconds=0.08)
    assert CheckpointPlan.from_json(bounded.to_json()) == bounded
    assert str(bounded).endswith("5.0% more time, at least 4.0% by any plan")
