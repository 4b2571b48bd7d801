"""A plan for microbatches whose paths are given: the best orders of the devices that some trials find."""

from collections.abc import Sequence

import numpy as np

from graphopt.cost_models.stage_costs import StageCost, StageLinks
from graphopt.cost_models.stage_run import StageRun, run_greedy
from graphopt.cost_models.stage_tasks import Path, StageStep, StageTasks
from graphopt.errors import PlanError
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.passes.stage_schedule import pipeline_plan


def plan_paths(
    costs: Sequence[StageCost],
    paths: Sequence[Path],
    *,
    stage_devices: Sequence[Sequence[int]] | None = None,
    links: StageLinks | None = None,
    split: bool = False,
    memory: float | None = None,
    head_s: float | None = None,
    trials: int = 200,
    seed: int = 0,
) -> PipelinePlan:
    """A schedule for one training step in which microbatch m takes `paths[m]`, (stage, device) pairs.

    `stage_devices[s]` are the devices of stage s, if others than those that paths go through. `split`
    cuts backwards in two. A device begins no forward beyond `memory` activations, each of its stages
    being a share of one. The loss is on the last stage of each path; or, with `head_s`, head and loss are
    on the first, which paths come back to, and take so many seconds. Devices run what comes first, or
    backwards before forwards; `trials` draws let tasks wait for others from there.

    PlanError for paths on devices that do not have the stage.

    >>> plan = plan_paths([StageCost(1.0, 1.0, 1.0)] * 3, [((0, 0), (1, 1), (2, 2)), ((0, 0), (2, 2))])
    >>> plan.orders[1], plan.makespan_s
    (('1F0', '1B0'), 11.0)
    """
    if stage_devices is None:
        stage_devices = _devices(len(costs), paths)
    count = 1 + max((device for devices in stage_devices for device in devices), default=0)
    held = [[s for s, devices in enumerate(stage_devices) if d in devices] for d in range(count)]
    step = StageStep(costs, links or StageLinks.even(count), split, max(map(len, held)), head_s)
    for microbatch, path in enumerate(paths):
        step.add_path(microbatch, path)
    run = _best_run(step.step(count, held), memory, trials, np.random.default_rng(seed))
    return pipeline_plan("paths", tuple(map(tuple, stage_devices)), paths, run)


def _devices(stages: int, paths: Sequence[Path]) -> list[list[int]]:
    """The devices on which paths go through each stage."""
    found: list[set[int]] = [set() for _ in range(stages)]
    for path in paths:
        for stage, device in path:
            if not 0 <= stage < stages:
                raise PlanError(f"there is no stage {stage} of {stages}")
            found[stage].add(device)
    return [sorted(devices) for devices in found]


def _best_run(
    step: StageTasks, memory: float | None, trials: int, random: np.random.Generator
) -> StageRun:
    """The shortest of runs in which tasks count as having come later, by draws around the best so far."""
    seconds = step.arrays.seconds
    is_forward = np.array(["F" in task.name for task in step.tasks])
    starts = (np.zeros(len(seconds)), np.where(is_forward, float(seconds.sum()), 0.0))
    found = [(run, bias) for bias in starts if (run := _run(step, memory, bias))]
    if not found:
        raise PlanError(f"devices with room for {memory} activations wait for each other")
    best, bias = min(found, key=lambda pair: pair[0].seconds)
    for _ in range(trials):
        noise = random.normal(0.0, 2 * seconds.mean(), len(seconds))
        drawn = bias + noise * (random.random(len(bias)) < 0.2)
        run = _run(step, memory, drawn)
        if run is not None and run.seconds <= best.seconds:
            best, bias = run, drawn
    return best


def _run(step: StageTasks, memory: float | None, bias: np.ndarray) -> StageRun | None:
    """None where devices that are full wait for each other."""
    try:
        return run_greedy(step, memory, bias)
    except PlanError:
        return None
