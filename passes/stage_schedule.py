"""Plan a pipeline: a schedule for stages of known cost, or paths that skip stages, and how good it is."""

from collections.abc import Sequence

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.stage_costs import StageCost, StageLinks
from graphopt.cost_models.stage_run import StageRun, run_orders
from graphopt.cost_models.stage_tasks import Path, StageStep
from graphopt.errors import PlanError
from graphopt.passes.stage_bounds import routes_bound, tasks_bound
from graphopt.passes.stage_exact import fastest_routes
from graphopt.passes.stage_orders import SCHEDULES, SPLIT, V_SHAPED, orders_of, stages_of
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.passes.stage_routes import Routing
from graphopt.passes.stage_search import Routed, search_routes
from graphopt.passes.stage_vocab import VocabularyCost, vocabulary_run

_SAME = 1e-9


def plan_pipeline(
    stages: Sequence[StageCost] | Routing,
    microbatches: int | None = None,
    *,
    schedule: str = "best",
    links: StageLinks | None = None,
    memory_bytes: int | None = None,
    vocabulary: VocabularyCost | None = None,
    algorithm: str = "vocab-1",
    trials: int = 800_000,
    exact: bool = False,
    seed: int = 0,
) -> PipelinePlan:
    """A schedule for one training step of a pipeline, with a lower bound of its time.

    `stages` are the costs of the model's stages, in order, one for each device; schedules with two
    stages on a device (`interleaved`, `zbv`, `v-half`) halve each of them, unless there are two for each
    device of `links`. `schedule` is one of `stage_orders.SCHEDULES`, or "best": the one that takes the
    least time within `memory_bytes` on each device. With `vocabulary`, `1f1b` and `v-half` compute the
    output layer on all devices, by `algorithm` (see `stage_vocab`).

    With a `Routing` in place of the stages, microbatches skip stages, and `trials` candidates are looked
    at; `exact` proves the best one of a small instance.

    Raises PlanError where no schedule fits the memory, with the least bytes that any needs.

    >>> plan = plan_pipeline([StageCost(1.0, 1.0, 1.0)] * 4, 8, schedule="1f1b")
    >>> plan.makespan_s, plan.peak_activations, round(plan.bubble_share, 3)
    (33.0, (4.0, 3.0, 2.0, 1.0), 0.273)
    """
    if isinstance(stages, Routing):
        return _routed(stages, trials, exact, seed)
    if microbatches is None:
        raise PlanError("how many microbatches?")
    names = SCHEDULES if schedule == "best" else (schedule,)
    plans: list[PipelinePlan] = []
    refused: list[str] = []
    for name in names:
        try:
            plans.append(_scheduled(name, stages, microbatches, links, vocabulary, algorithm))
        except PlanError as error:
            refused.append(f"{name}: {error}")
    if not plans:
        raise PlanError("; ".join(refused))
    fits = [p for p in plans if memory_bytes is None or max(p.peak_bytes) <= memory_bytes]
    if not fits:
        least = min(max(p.peak_bytes) for p in plans)
        raise PlanError(
            f"no schedule fits {format_bytes(memory_bytes or 0)} on each device: the least is "
            f"{format_bytes(least)} ({least} bytes)",
            reachable_bytes=least,
            budget_bytes=memory_bytes,
        )
    best = min(p.makespan_s for p in fits)
    return min(
        (p for p in fits if p.makespan_s <= best * (1 + _SAME)), key=lambda p: max(p.peak_activations)
    )


def _scheduled(
    schedule: str,
    stages: Sequence[StageCost],
    microbatches: int,
    links: StageLinks | None,
    vocabulary: VocabularyCost | None,
    algorithm: str,
) -> PipelinePlan:
    """The plan of one published schedule."""
    costs, devices = _per_device(schedule, stages, links)
    held = stages_of(schedule, devices, len(costs) // devices)
    place = {stage: device for device, row in enumerate(held) for stage in row}
    path = tuple((stage, place[stage]) for stage in range(len(costs)))
    paths = (path,) * microbatches
    devices_of = tuple((place[stage],) for stage in range(len(costs)))
    if vocabulary is not None:
        if schedule not in ("1f1b", "v-half"):
            raise PlanError("the passes of the vocabulary are placed in 1f1b and v-half")
        run = vocabulary_run(schedule, algorithm, costs, vocabulary, microbatches, links)
        return pipeline_plan(f"{schedule} {algorithm}", devices_of, paths, run)
    step = StageStep(costs, links or StageLinks.even(devices), schedule in SPLIT, len(held[0]))
    for microbatch in range(microbatches):
        step.add_path(microbatch, path)
    tasks = step.step(devices, held)
    orders = orders_of(schedule, devices, microbatches, len(costs) // devices)
    return pipeline_plan(schedule, devices_of, paths, run_orders(tasks, tasks.indices(orders)))


def _per_device(
    schedule: str, stages: Sequence[StageCost], links: StageLinks | None
) -> tuple[list[StageCost], int]:
    """The stages as the schedule takes them, and how many devices there are."""
    devices = len(stages) if links is None else links.devices
    if not stages or len(stages) % devices:
        raise PlanError(f"{len(stages)} stages on {devices} devices")
    has_parts = schedule == "interleaved" or schedule in V_SHAPED
    if has_parts and len(stages) == devices:
        return [part for cost in stages for part in (cost.part(2),) * 2], devices
    if len(stages) != devices * (2 if schedule in V_SHAPED else 1) and schedule != "interleaved":
        raise PlanError(f"{schedule} has no {len(stages)} stages on {devices} devices")
    return list(stages), devices


def pipeline_plan(
    schedule: str,
    stage_devices: tuple[tuple[int, ...], ...],
    paths: Sequence[Path],
    run: StageRun,
    bound: tuple[float, str] | None = None,
    is_optimal: bool = False,
) -> PipelinePlan:
    """The plan that says what `run` did; `bound` of its tasks, if not given."""
    bound_s, why = bound or tasks_bound(run.step)
    activations, sizes = run.peaks()
    plan = PipelinePlan(
        schedule,
        stage_devices,
        tuple(paths),
        run.names(),
        tuple(tuple(run.begin[list(row)].tolist()) for row in run.orders),
        tuple(tuple(run.end[list(row)].tolist()) for row in run.orders),
        activations,
        sizes,
        bound_s,
        why,
        is_optimal or run.seconds <= bound_s * (1 + _SAME),
    )
    plan.check()
    return plan


def _routed(routing: Routing, trials: int, exact: bool, seed: int) -> PipelinePlan:
    """The plan of microbatches that skip stages."""
    is_optimal = False
    routed: Routed
    if exact:
        found = fastest_routes(routing, min(trials, 400_000))
        routed, is_optimal = found.routed, found.is_optimal
    else:
        routed = search_routes(routing, trials, seed)
    routing.check(routed.paths, routed.stage_devices)
    bound = (routed.run.seconds, "branch and bound") if is_optimal else routes_bound(routing)
    name = f"{routing.visited} of {len(routing.costs)} stages"
    return pipeline_plan(name, routed.stage_devices, routed.paths, routed.run, bound, is_optimal)
