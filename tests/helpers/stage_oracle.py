"""Random steps of pipelines, and naive ways to run them that share no code with the package."""

from hypothesis import strategies as st

from graphopt.cost_models.stage_tasks import ANYWHERE, StageTask, StageTasks

HALVES = st.integers(1, 8).map(lambda n: n / 2)
MAYBE = st.integers(0, 4).map(lambda n: n / 2)


@st.composite
def stage_steps(draw: st.DrawFn, most: int = 12) -> StageTasks:
    """Up to `most` tasks on up to three devices; forwards hold an activation, their backwards free it."""
    devices, count = draw(st.integers(1, 3)), draw(st.integers(1, most))
    tasks: list[StageTask] = []
    holding: list[tuple[int, int]] = []  # forwards whose activation is not freed yet, and their devices
    for index in range(count):
        kind = draw(st.sampled_from("FFBC"))
        before = (
            st.lists(st.sampled_from(range(index)), unique=True, max_size=2) if index else st.just([])
        )
        after = {other: draw(MAYBE) for other in draw(before)}
        ready = draw(MAYBE)
        if kind == "B" and holding:
            forward, device = holding.pop(draw(st.integers(0, len(holding) - 1)))
            after[forward] = draw(MAYBE)
            waits = tuple(sorted(after.items()))
            task = StageTask(
                f"0B{index}", device, draw(HALVES), waits, activations_freed=1.0, ready_s=ready
            )
        elif kind == "C":
            seconds = draw(st.sampled_from((0.0, 0.5)))
            task = StageTask(f"0C{index}", ANYWHERE, seconds, tuple(sorted(after.items())), ready_s=ready)
        else:
            device = draw(st.integers(0, devices - 1))
            holding.append((index, device))
            waits = tuple(sorted(after.items()))
            task = StageTask(f"0F{index}", device, draw(HALVES), waits, activations=1.0, ready_s=ready)
        tasks.append(task)
    return StageTasks(tuple(tasks), devices, draw(MAYBE))


def slow_orders(step: StageTasks, orders: list[list[int]]) -> list[float] | None:
    """When each task begins with these orders: they move later until all fits; None: they never do."""
    begin = [task.ready_s for task in step.tasks]
    for _ in range(len(begin) + 1):
        moved = False
        for index, task in enumerate(step.tasks):
            least = [begin[other] + step.tasks[other].seconds + delay for other, delay in task.after]
            row = orders[task.device] if task.device != ANYWHERE else []
            place = row.index(index) if row else 0
            if place:
                least.append(begin[row[place - 1]] + step.tasks[row[place - 1]].seconds + step.pause_s)
            latest = max([begin[index], *least])
            moved, begin[index] = moved or latest > begin[index], latest
        if not moved:
            return begin
    return None


def slow_greedy(step: StageTasks, memory: float, bias: list[float]) -> dict[int, float]:
    """When each task begins where devices take what has arrived; only those that ever begin.

    Time goes on in steps of a half: all durations and delays are multiples of it.
    """
    begin: dict[int, float] = {}
    level, free = [0.0] * step.devices, [0.0] * step.devices
    now, last = 0.0, 0.0
    while now <= last + 40:
        while _begin_one(step, memory, bias, begin, level, free, now):
            last = now
        now += 0.5
    return begin


def _begin_one(
    step: StageTasks,
    memory: float,
    bias: list[float],
    begin: dict[int, float],
    level: list[float],
    free: list[float],
    now: float,
) -> bool:
    arrived: dict[int, float] = {}
    for index, task in enumerate(step.tasks):
        if index in begin or any(other not in begin for other, _ in task.after):
            continue
        ends = [begin[other] + step.tasks[other].seconds + delay for other, delay in task.after]
        when = max([task.ready_s, *ends])
        if when <= now:
            arrived[index] = when
    for index in arrived:
        if step.tasks[index].device == ANYWHERE:
            begin[index] = now
            return True
    for device in range(step.devices):
        fits = [
            index
            for index in arrived
            if step.tasks[index].device == device
            and free[device] <= now
            and level[device] + step.tasks[index].activations <= memory
        ]
        if fits:
            index = min(fits, key=lambda i: (arrived[i] + bias[i], i))
            task = step.tasks[index]
            begin[index], free[device] = now, now + task.seconds + step.pause_s
            level[device] += task.activations - task.activations_freed
            return True
    return False
