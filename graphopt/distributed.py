"""Run the plans of `plan_pipeline` on `torch.distributed.pipelining`, with gloo or NCCL.

    plan = plan_pipeline(costs, microbatches=8)
    schedule = pipeline_schedule(plan, {rank: layers}, loss_fn, (one_microbatch,))
    schedule.step(inputs, target=targets, losses=losses)

What comes back is a schedule of torch. Its stages send each microbatch where its path leads, so one that
skips a stage takes no time there. `Relay` skips with any other schedule, too, by its public interface: a
skipped stage hands its input on.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.errors import PlanError
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.pipeline_transfers import algorithm_of, check_messages, with_head, with_transfers
from graphopt.pipeline_vocabulary import PipelineVocabulary
from graphopt.pipelining import PlanSchedule, RoutedStage
from graphopt.ranks import check_same
from graphopt.vocabulary_passes import Place, VocabularyPasses

Shapes = tuple[tuple[tuple[int, ...], torch.dtype], ...]


def pipeline_schedule(
    plan: PipelinePlan,
    stages: Mapping[int, nn.Module],
    loss_fn: Callable[..., Tensor] | None,
    example: Sequence[Tensor],
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    group: dist.ProcessGroup | None = None,
    scale_grads: bool = True,
    dw_builders: Mapping[int, Callable[[], Callable[..., None]]] | None = None,
    vocabulary: PipelineVocabulary | None = None,
) -> PlanSchedule:
    """A schedule that runs `plan`; every rank of `group` calls this, rank d being device d of the plan.

    `stages` has the modules of this rank's stages by their numbers (others are ignored), on the device
    that they run on. Where the first stage of the plan holds the head, too, stage `plan.stages` is the
    head. A stage on several ranks has the same weights on all of them; its gradients are summed.

    `example` and `example_kwargs` are one microbatch as the first stage takes it: each stage runs once on
    one rank, without gradients, for the shapes of what is sent. `loss_fn(output, target)` is of one
    microbatch; `scale_grads` divides gradients by how many there are. `dw_builders` are those of torch's
    stages, by stage.

    A plan with a split vocabulary (passes S and T) takes this rank's part of it as `vocabulary`, which
    has the loss: `loss_fn` is None. The last stage then puts out hidden values, the first one takes rows
    of the embedding if that is split, too, and every rank gives `step` the ids and the target.

    PlanError, the same on every rank, where plan, ranks and stages do not fit each other.
    """
    group = group or dist.distributed_c10d._get_default_group()
    check_same([group.group_name], plan.to_json().splitlines(), "pipeline plans")
    plan = with_head(plan)
    rank = dist.get_rank(group)
    held = [s for s, devices in enumerate(plan.stage_devices) if rank in devices]
    fault = _fault(plan, held, stages, dist.get_world_size(group))
    _agree(group, fault or _vocabulary_fault(plan, vocabulary, loss_fn))
    device = _device_of(stages[held[0]])
    example = _entering(example, vocabulary)
    shapes = _shapes(plan, stages, example, example_kwargs or {}, group, device)
    _agree(group, _unfit(plan, shapes))
    builders = dw_builders or {}
    made = [_routed(plan, s, stages[s], shapes, device, group, builders.get(s)) for s in held]
    _meet(group, device)
    replicas = _replicas(plan, group, rank)
    if vocabulary is None:
        return PlanSchedule(plan, made, loss_fn, scale_grads, replicas)
    place = Place(group, device, 1 / plan.microbatches if scale_grads else 1.0)
    passes = VocabularyPasses(vocabulary, place, _empty(shapes[-1])[0])
    return PlanSchedule(plan, made, _no_loss, scale_grads, replicas, passes)


def _routed(
    plan: PipelinePlan,
    number: int,
    module: nn.Module,
    shapes: Sequence[Shapes],
    device: torch.device,
    group: dist.ProcessGroup,
    dw_builder: Callable[[], Callable[..., None]] | None,
) -> RoutedStage:
    """Stage `number` of the plan on this rank."""
    routed = RoutedStage(
        module,
        number,
        max(plan.stages, plan.devices),  # torch has no more ranks than stages; replicas may
        device,
        input_args=_empty(shapes[number]),
        output_args=_empty(shapes[number + 1]),
        group=group,
        dw_builder=dw_builder,
    )
    routed.num_stages = plan.stages
    return routed


def follow(schedule: PlanSchedule, plan: PipelinePlan) -> None:
    """Let `schedule` run `plan` from the next step on; every rank calls this with the same plan.

    PlanError where it is not the same, or unless the stages are on the same devices and there are as many
    microbatches.
    """
    if schedule.group is not None:
        check_same([schedule.group.group_name], plan.to_json().splitlines(), "pipeline plans")
    plan = with_head(plan)
    old = schedule.plan
    if (plan.stage_devices, plan.microbatches) != (old.stage_devices, old.microbatches):
        raise PlanError(
            f"the schedule has {old.microbatches} microbatches and stages on {old.stage_devices}; the "
            f"plan has {plan.microbatches} and {plan.stage_devices}"
        )
    schedule.follow(plan)


class Relay(nn.Module):
    """A stage that hands on, as they are, the microbatches that skip it.

    Each rank passes `visits=visits_of(plan)` to `step`, of any schedule of torch.distributed.pipelining;
    bool[microbatches, stages], it is cut into microbatches as inputs are. What a stage puts out has to
    be of the shape that it takes; the hop over a skipped stage is still sent.

    >>> relay = Relay(nn.Linear(2, 2), stage=1)
    >>> x, visits = torch.ones(3, 2), torch.tensor([[True, False]])
    >>> relay(x, visits=visits) is x
    True
    """

    def __init__(self, module: nn.Module, stage: int) -> None:
        super().__init__()
        self.module, self.stage = module, stage

    def forward(self, *args: Any, visits: Tensor, **kwargs: Any) -> Any:
        """What the stage makes of `args`, or the only one of them; `visits` is bool[1, stages]."""
        if visits[0, self.stage]:
            return self.module(*args, **kwargs)
        return args[0] if len(args) == 1 else args


def visits_of(plan: PipelinePlan) -> Tensor:
    """Which stages each microbatch goes through, bool[microbatches, stages].

    PlanError for a path that goes back: a relay keeps the order of the stages.
    """
    visits = torch.zeros(plan.microbatches, plan.stages, dtype=torch.bool)
    for microbatch, path in enumerate(plan.paths):
        stages = [stage for stage, _ in path]
        if stages != sorted(stages):
            raise PlanError(
                f"microbatch {microbatch} goes through {stages}: a relay keeps the stages' order"
            )
        visits[microbatch, stages] = True
    return visits


def _fault(
    plan: PipelinePlan, held: Sequence[int], stages: Mapping[int, nn.Module], ranks: int
) -> str | None:
    """What this rank finds wrong."""
    if plan.devices != ranks:
        return f"the plan is for {plan.devices} devices, and the group has {ranks} ranks"
    if absent := [s for s in held if s not in stages]:
        return f"the plan has stages {held} on this rank, which was not given stage {absent[0]}"
    try:
        check_messages(plan, with_transfers(plan))
    except PlanError as error:
        return str(error)
    return None


def _vocabulary_fault(
    plan: PipelinePlan, vocabulary: PipelineVocabulary | None, loss_fn: Callable[..., Tensor] | None
) -> str | None:
    """What is wrong with the plan and the vocabulary together."""
    algorithm = algorithm_of(plan)
    if (algorithm is None) is not (vocabulary is None):
        has, given = ("no", "one") if algorithm is None else ("a", "none")
        return f"the plan has {has} split vocabulary, and {given} was given"
    if vocabulary is None:
        return None
    if loss_fn is not None:
        return "a split vocabulary has its own loss: loss_fn must be None"
    if vocabulary.scale.cap and algorithm == "vocab-2":
        return "vocab-2 has no soft cap of logits; take vocab-1"
    if vocabulary.shard.ranks != plan.devices:
        return f"the vocabulary is split over {vocabulary.shard.ranks} ranks, not {plan.devices}"
    return None


def _entering(example: Sequence[Tensor], vocabulary: PipelineVocabulary | None) -> Sequence[Tensor]:
    """What the first stage takes: rows of the embedding, where that is split."""
    if vocabulary is None or vocabulary.embedding is None:
        return example
    ids, *rest = example
    return [torch.zeros(*ids.shape, vocabulary.head.shape[1], dtype=vocabulary.head.dtype), *rest]


def _no_loss(output: Tensor, target: Tensor) -> Tensor:
    """torch wants a loss for a backward."""
    raise AssertionError("the vocabulary has the loss")


def _agree(group: dist.ProcessGroup, fault: str | None) -> None:
    """PlanError on every rank where one of them has found a fault."""
    faults: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(faults, fault, group=group)
    for rank, text in enumerate(faults):
        if text is not None:
            raise PlanError(text if len(set(faults)) == 1 else f"rank {rank}: {text}")


def _shapes(
    plan: PipelinePlan,
    stages: Mapping[int, nn.Module],
    example: Sequence[Tensor],
    kwargs: Mapping[str, Any],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[Shapes]:
    """Of what each stage takes, and of what the last one puts out, by running each on one rank."""
    found: list[Shapes] = []
    taken = _of(example)
    for number, devices in enumerate(plan.stage_devices):
        box: list[Any] = [None]
        if dist.get_rank(group) == devices[0]:
            inputs = list(example) if not number else [torch.zeros(s, dtype=t) for s, t in taken]
            try:
                box = [(_of(inputs), _of(_run(stages[number], inputs, kwargs, device)))]
            except Exception as error:
                box = [f"stage {number} does not run on {_text(_of(inputs))}: {error}"]
        dist.broadcast_object_list(box, group=group, group_src=devices[0], device=device)
        if isinstance(box[0], str):
            raise PlanError(box[0])
        found.append(box[0][0])
        taken = box[0][1]
    return [*found, taken]


def _run(
    module: nn.Module, inputs: Sequence[Tensor], kwargs: Mapping[str, Any], device: torch.device
) -> Sequence[Tensor]:
    """What `module` puts out; no random number is used up."""
    moved, named = pytree.tree_map_only(Tensor, lambda t: t.to(device), (list(inputs), dict(kwargs)))
    accelerators = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(accelerators), torch.no_grad():
        output = module(*moved, **named)
    return output if isinstance(output, tuple | list) else (output,)


def _of(tensors: Sequence[Tensor]) -> Shapes:
    return tuple((tuple(t.shape), t.dtype) for t in tensors)


def _unfit(plan: PipelinePlan, shapes: Sequence[Shapes]) -> str | None:
    """A hop of a path on which a stage is sent what it does not take."""
    for microbatch, path in enumerate(plan.paths):
        for (stage, _), (target, _) in pairwise(path):
            if shapes[stage + 1] != shapes[target]:
                return (
                    f"microbatch {microbatch} goes from stage {stage}, which puts out "
                    f"{_text(shapes[stage + 1])}, to stage {target}, which takes {_text(shapes[target])}"
                )
    return None


def _text(shapes: Shapes) -> str:
    return ", ".join(f"{str(dtype).removeprefix('torch.')}{list(shape)}" for shape, dtype in shapes)


def _empty(shapes: Shapes) -> tuple[Tensor, ...]:
    """Tensors without data; whatever has a gradient is sent one."""
    return tuple(
        torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)
        for shape, dtype in shapes
    )


def _device_of(module: nn.Module) -> torch.device:
    """Where the module is; one without parameters runs on the CPU."""
    return next((t.device for t in (*module.parameters(), *module.buffers())), torch.device("cpu"))


def _meet(group: dist.ProcessGroup, device: torch.device) -> None:
    """Every two ranks exchange a number: NCCL connects them at their first message, and waits there."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    number = torch.zeros(1, device=device)
    for low in range(ranks):
        for high in range(low + 1, ranks):
            if rank == low:
                dist.send(number, group=group, group_dst=high)
                dist.recv(number, group=group, group_src=high)
            elif rank == high:
                dist.recv(number, group=group, group_src=low)
                dist.send(number, group=group, group_dst=low)


def _replicas(plan: PipelinePlan, group: dist.ProcessGroup, rank: int) -> dict[int, dist.ProcessGroup]:
    """A group for each stage of this rank that other ranks have, too."""
    found: dict[int, dist.ProcessGroup] = {}
    made: dict[tuple[int, ...], Any] = {}
    for stage, devices in enumerate(plan.stage_devices):
        if len(devices) > 1:
            if devices not in made:
                made[devices] = dist.new_group([dist.get_global_rank(group, d) for d in devices])
            if rank in devices:
                found[stage] = made[devices]
    return found
