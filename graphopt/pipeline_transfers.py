"""What the devices of a pipeline send each other, for any paths that microbatches take.

A row of texts for each device, as `torch.distributed.pipelining` writes them: "1RECV_F0" takes in the
activations of microbatch 0 for stage 1, "0SEND_F0" sends what stage 0 made of it to wherever the path
goes next; with B, gradients, the way back. A receive stands where the receiving device is when the
sending one is done, so any two devices have all that passes between them in the same order: nothing
needs a tag to be told apart, and neither side waits for the other in a circle.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from graphopt.errors import PlanError
from graphopt.passes.stage_plan import TORCH_KINDS, Action, PipelinePlan

Hop = tuple[int, int]  # a stage, and the device that runs it
Rows = tuple[tuple[str, ...], ...]
PASSES = "ST"  # those of a split vocabulary
ALGORITHMS = ("vocab-1", "vocab-2")


@dataclass(frozen=True)
class Message:
    """What one device sends another: activations ("F") or gradients ("B") of a microbatch for a stage."""

    source: Hop
    target: Hop
    kind: str
    microbatch: int

    @property
    def texts(self) -> tuple[str, str]:
        """How it is sent, and how it is received."""
        kind, microbatch = self.kind, self.microbatch
        return f"{self.source[0]}SEND_{kind}{microbatch}", f"{self.target[0]}RECV_{kind}{microbatch}"


@dataclass(frozen=True)
class Routes:
    """The ways of a plan's microbatches, by stage and microbatch.

    `before[s, m]` and `after[s, m]` are where microbatch m is before and after stage s.
    """

    plan: PipelinePlan

    @cached_property
    def before(self) -> dict[tuple[int, int], Hop]:
        """Where a microbatch comes from."""
        return {(b[0], m): a for m, path in enumerate(self.plan.paths) for a, b in pairwise(path)}

    @cached_property
    def after(self) -> dict[tuple[int, int], Hop]:
        """Where a microbatch goes."""
        return {(a[0], m): b for m, path in enumerate(self.plan.paths) for a, b in pairwise(path)}

    def sent(self, device: int, action: Action) -> Message | None:
        """What follows from the action: None where its path ends, and after gradients of weights."""
        here, key = (action.stage, device), (action.stage, action.microbatch)
        if action.kind == "F" and key in self.after:
            return Message(here, self.after[key], "F", action.microbatch)
        if action.kind in "IB" and key in self.before:
            return Message(here, self.before[key], "B", action.microbatch)
        return None

    def needed(self, action: Action) -> tuple[str, ...]:
        """The actions whose results `action` takes, as texts without their microbatch's device."""
        key, last = (action.stage, action.microbatch), self.plan.stages - 1
        if action.kind == "F" and key in self.before:
            return (f"{self.before[key][0]}F{action.microbatch}",)
        if action.kind in "IB" and key in self.after:
            return (f"{self.after[key][0]}B{action.microbatch}",)
        if action.kind == "S":
            return (f"{last}F{action.microbatch}",)
        if action.kind == "T" or (action.kind in "IB" and action.stage == last and self.algorithm):
            kind = "T" if action.kind != "T" and self.algorithm == "vocab-1" else "S"
            return tuple(f"{d}{kind}{action.microbatch}" for d in range(self.plan.devices))
        return ()

    @cached_property
    def algorithm(self) -> str | None:
        """That of the passes of a vocabulary, None where there are none."""
        return algorithm_of(self.plan)


def with_head(plan: PipelinePlan) -> PipelinePlan:
    """The plan with its heads as a stage of their own, after the others, and without the passes E.

    Rows of a split embedding are looked up ahead, beside the other passes. Where the first stage holds
    the head (SkipPipe), `H` of a microbatch becomes the forward and, right after it, the backward of
    stage `plan.stages` on the same device: `torch.distributed.pipelining` has no action for it.
    """
    head = plan.stages
    kinds = {action.kind for device in range(plan.devices) for action in plan.actions(device)}
    if unknown := sorted(kinds - set(TORCH_KINDS) - set(PASSES) - {"H", "E"}):
        raise PlanError(
            f"{plan.schedule}: torch.distributed.pipelining has no action for {', '.join(unknown)}"
        )
    if kinds & set(PASSES):
        check_passes(plan)
    if not kinds & {"H", "E"}:
        return plan
    orders, begins, ends = [], [], []
    for device in range(plan.devices):
        timed: list[tuple[str, float, float]] = []
        rows = zip(plan.actions(device), plan.begin_s[device], plan.end_s[device], strict=True)
        for action, begin, end in rows:
            if action.kind == "E":
                continue
            if action.kind != "H":
                timed.append((str(action), begin, end))
                continue
            middle = begin + (end - begin) / 3
            timed.append((f"{head}F{action.microbatch}", begin, middle))
            timed.append((f"{head}B{action.microbatch}", middle, end))
        orders.append(tuple(text for text, _, _ in timed))
        begins.append(tuple(begin for _, begin, _ in timed))
        ends.append(tuple(end for _, _, end in timed))
    found = replace(plan, orders=tuple(orders), begin_s=tuple(begins), end_s=tuple(ends))
    if "H" in kinds:
        found = replace(
            found,
            stage_devices=(*plan.stage_devices, plan.stage_devices[0]),
            paths=tuple((*path, (head, path[0][1])) for path in plan.paths),
        )
    found.check()
    return found


def with_transfers(plan: PipelinePlan) -> Rows:
    """Each device's actions with what it sends and receives, as texts.

    PlanError where the orders wait for each other, and for paths that cannot be run.

    >>> from graphopt.cost_models.stage_costs import StageCost
    >>> from graphopt.passes.stage_schedule import plan_pipeline
    >>> rows = with_transfers(plan_pipeline([StageCost(1.0, 1.0, 1.0)] * 2, 2, schedule="1f1b"))
    >>> rows[1]
    ('1RECV_F0', '1RECV_F1', '1F0', '1B0', '1SEND_B0', '1F1', '1B1', '1SEND_B1', '1REDUCE_GRAD')
    """
    check_runs(plan)
    routes = Routes(plan)
    actions = [plan.actions(device) for device in range(plan.devices)]
    rows: list[list[str]] = [[] for _ in actions]
    place, done = [0] * plan.devices, set[str]()
    for _ in range(sum(map(len, actions))):
        ready = [
            (plan.end_s[device][place[device]], device)
            for device, row in enumerate(actions)
            if place[device] < len(row) and done.issuperset(routes.needed(row[place[device]]))
        ]
        if not ready:
            raise PlanError(f"{plan.schedule}: the orders of the devices wait for each other")
        _, device = min(ready)
        action = actions[device][place[device]]
        place[device] += 1
        rows[device].append(str(action))
        done.add(f"{action.stage}{'B' if action.kind in 'IB' else action.kind}{action.microbatch}")
        message = routes.sent(device, action)
        if message is None or _passed_by_torch(message):
            continue
        send, receive = message.texts
        if message.target[1] != device:
            rows[device].append(send)
        rows[message.target[1]].append(receive)
    for device, row in enumerate(rows):
        row += [f"{s}REDUCE_GRAD" for s, devices in enumerate(plan.stage_devices) if device in devices]
    return tuple(map(tuple, rows))


def algorithm_of(plan: PipelinePlan) -> str | None:
    """The algorithm of the passes S and T in `plan`, None where it has none; PlanError for others."""
    if not any(action.kind == "S" for d in range(plan.devices) for action in plan.actions(d)):
        return None
    found = next((name for name in ALGORITHMS if plan.schedule.endswith(name)), None)
    if found is None:
        raise PlanError(f"{plan.schedule}: of the algorithms, {' and '.join(ALGORITHMS)} can be run")
    return found


def order_of(plan: PipelinePlan, device: int, stage: int, kinds: str) -> list[int]:
    """The microbatches of a stage's actions of these kinds, in the order of its device."""
    return [a.microbatch for a in plan.actions(device) if a.stage == stage and a.kind in kinds]


def check_passes(plan: PipelinePlan) -> None:
    """PlanError unless all devices run S, and T, in one order, and each end of the model is on one."""
    for kind in "ST":
        if len({tuple(order_of(plan, d, d, kind)) for d in range(plan.devices)}) != 1:
            raise PlanError(f"{plan.schedule}: the devices run {kind} in different orders")
    for stage in (0, plan.stages - 1):
        if len(plan.stage_devices[stage]) > 1:
            raise PlanError(
                f"{plan.schedule}: with a split vocabulary, stage {stage} has to be on one device"
            )


def _passed_by_torch(message: Message) -> bool:
    """Between neighbours on one device, where the runtime passes tensors on by itself."""
    (source, here), (target, there) = message.source, message.target
    return here == there and abs(source - target) == 1


def check_runs(plan: PipelinePlan) -> None:
    """PlanError, naming it, for what `torch.distributed.pipelining` cannot run."""
    plan.check()
    for device in range(plan.devices):
        if not any(device in devices for devices in plan.stage_devices):
            raise PlanError(f"device {device} holds no stage")
    for microbatch, path in enumerate(plan.paths):
        ends = (path[0][0], path[-1][0])
        if ends != (0, plan.stages - 1):
            raise PlanError(
                f"microbatch {microbatch} goes from stage {ends[0]} to stage {ends[1]}: it has to begin "
                f"on stage 0, and the loss is on stage {plan.stages - 1}"
            )
        hops = set(pairwise(path))
        for stage, device in path:
            for low in (stage - 1, stage):
                pair = ((low, device), (low + 1, device))
                if all(_holds(plan, *hop) for hop in pair) and pair not in hops:
                    raise PlanError(
                        f"microbatch {microbatch} does not go from stage {low} right to stage {low + 1}, "
                        f"which are both on device {device}: such paths run with Relay"
                    )


def _holds(plan: PipelinePlan, stage: int, device: int) -> bool:
    return 0 <= stage < plan.stages and device in plan.stage_devices[stage]


def messages(
    plan: PipelinePlan, rows: Sequence[Sequence[str]], device: int
) -> Iterator[tuple[Message, bool]]:
    """What `device` sends and receives, in its order, and whether it sends it."""
    routes = Routes(plan)
    for text in rows[device]:
        stage, found, rest = text.partition("SEND_")
        if found:
            action = Action(int(stage), rest[0], int(rest[1:]))
            if (message := routes.sent(device, action)) is None:
                raise PlanError(f"device {device} has {text}, but the path ends there")
            yield message, True
        stage, found, rest = text.partition("RECV_")
        if found:
            here, key = (int(stage), device), (int(stage), int(rest[1:]))
            source = (routes.before if rest[0] == "F" else routes.after).get(key)
            if source is None:
                raise PlanError(f"device {device} has {text}, but nothing is sent to it")
            if source[1] != device:
                yield Message(source, here, rest[0], key[1]), False


def check_messages(plan: PipelinePlan, rows: Sequence[Sequence[str]]) -> None:
    """PlanError unless any two devices have what passes between them in the same order.

    Messages of the same size carry nothing to tell them apart (NCCL takes no tags): where the orders
    differ, one is taken for another without an error, or both devices wait.
    """
    lanes: dict[tuple[int, int], list[Message]] = {}
    for device in range(plan.devices):
        for message, _ in messages(plan, rows, device):
            ends = (message.source[1], message.target[1])
            other = ends[0] if ends[1] == device else ends[1]
            lanes.setdefault((device, other), []).append(message)
    for (device, other), here in lanes.items():
        there = lanes.get((other, device), [])
        if here != there:
            at = next((i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b), None)
            at = min(len(here), len(there)) if at is None else at
            names = [row[at].texts[0] if at < len(row) else "nothing" for row in (here, there)]
            raise PlanError(
                f"devices {device} and {other} do not agree on what passes between them: message {at} is "
                f"{names[0]} on device {device}, {names[1]} on device {other}"
            )
