"""What a backward forgets between its operators: how nested recomputation is said and carried out.

A value that is read again much later may be given up meanwhile: after an operator of the backward it is
*forgotten*, and made again where it is read next. Any such list can be carried out,
as what is read and not there is made; so a list says what is spent, never what is computed.
"""

from collections.abc import Collection, Mapping, Sequence

from graphopt.cost_models.memory import NO_PRODUCER, Dataflow
from graphopt.cost_models.schedule import Step
from graphopt.errors import PlanError

Forget = tuple[tuple[int, tuple[int, ...]], ...]  # operators of the backward, and the values of each
ForgetNames = tuple[tuple[str, tuple[str, ...]], ...]


def forgotten(
    steps: Sequence[Step], wish: Mapping[int, Collection[int]], keep: Collection[int] = ()
) -> Forget:
    """What of `wish` changes anything in `steps`: what was there before, and is made again later.

    `steps` are those of the backward that forgets all of `wish`, by operators that run once, and begins
    with the values `keep`.
    """
    made = set(keep)
    found: list[tuple[int, set[int]]] = []
    for step in steps:
        made.update(step.makes)
        if step.operator in wish:
            given_up = made.intersection(wish[step.operator])
            found.append((step.operator, given_up))
            made -= given_up
    later: set[int] = set()
    useful: dict[int, tuple[int, ...]] = {}
    open_places = dict(found)
    for step in reversed(steps):
        if values := open_places.get(step.operator, set()) & later:
            useful[step.operator] = tuple(sorted(values))
        later.update(step.makes)
    return tuple((operator, useful[operator]) for operator, _ in found if operator in useful)


def forget_names(flow: Dataflow, forget: Forget) -> ForgetNames:
    """`forget` by names of operators and labels of values."""
    return tuple(
        (flow.operators[operator].name, tuple(flow.values[v].label for v in values))
        for operator, values in forget
    )


def forget_named(flow: Dataflow, names: ForgetNames, order: Collection[int]) -> Forget:
    """What `names` means in `flow`; PlanError for what is not there, or is there only once.

    An operator has to be one of `order`. What an operator of the backward makes once cannot be
    forgotten.
    """
    anchors = {flow.operators[a].name: a for a in order}
    by_label = {v.label: i for i, v in enumerate(flow.values)}
    found: list[tuple[int, tuple[int, ...]]] = []
    for name, labels in names:
        if name not in anchors:
            raise PlanError(f"the plan forgets after {name!r}, which the backward does not run once")
        for label in labels:
            if label not in by_label:
                raise PlanError(f"the plan was made for another program: it forgets {label!r}")
            _check(flow, by_label[label])
        found.append((anchors[name], tuple(by_label[label] for label in labels)))
    return tuple(found)


def _check(flow: Dataflow, value: int) -> None:
    label, producer = flow.values[value].label, flow.values[value].producer
    if producer == NO_PRODUCER:
        raise PlanError(f"{label} is there all through the step and cannot be forgotten")
    operator = flow.operators[producer]
    if operator.anchored or not operator.recomputable:
        raise PlanError(f"{label} is made only once and cannot be forgotten")
