"""What graphopt uses of `torch.distributed.pipelining` that is not public, all in this file.

A plan runs on torch's own runtime: its actions, its stages, its backward in two parts. What is added:

- a stage sends to, and receives from, where each microbatch's path leads, with a tag for each message;
- losses and outputs are kept by microbatch. torch keeps them in the order in which they are computed and
  reads them by number: where the last stage runs microbatches in another order, it trains on the wrong
  gradients without an error;
- a stage may be on several devices, whose gradients are summed after the step;
- a parameter of several stages on one device is divided by the number of microbatches once. torch does
  so for every stage that has it;
- the passes S and T of a split vocabulary run as the custom functions of two kinds of actions that
  nothing else uses here, those that gather and free the parameters of FSDP.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import pipelining
from torch.distributed.pipelining import _utils, schedules, stage

from graphopt.errors import GraphoptError
from graphopt.passes.stage_plan import PipelinePlan
from graphopt.pipeline_transfers import Routes, Rows, check_messages, with_transfers
from graphopt.vocab_sweeps import gradient_of
from graphopt.vocabulary_passes import VocabularyPasses

# What has to be there: classes with their methods, and what their instances have.
CLASSES: dict[str, tuple[str, ...]] = {
    "schedules._Action": ("from_str",),
    "schedules._PipelineScheduleRuntime": (
        "_initialize_stages",
        "_maybe_compute_loss",
        "_maybe_get_loss",
        "_step_microbatches",
        "_update_losses",
        "register_custom_function",
        "step",
    ),
    "stage.PipelineStage": (
        "_prepare_backward_infra",
        "_prepare_forward_infra",
        "clear_runtime_states",
        "forward_one_chunk",
        "get_bwd_recv_ops",
        "get_bwd_send_ops",
        "get_fwd_recv_ops",
        "get_fwd_send_ops",
        "get_local_bwd_output",
        "perform_reduce_grad",
        "scale_grads",
        "set_local_bwd_input",
        "set_local_fwd_input",
    ),
}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "schedules._PipelineScheduleRuntime": (
        "_internal_losses",
        "_n_microbatches",
        "pipeline_order",
        "stage_index_to_group_rank",
    ),
    "stage.PipelineStage": ("fwd_cache", "output_chunks", "stage_index_to_group_rank"),
}


def missing(modules: Mapping[str, Any]) -> list[str]:
    """The names that this file takes from torch and `modules` (`schedules`, `stage`) do not have."""
    found = []
    for path, methods in CLASSES.items():
        module, _, name = path.partition(".")
        if (owner := getattr(modules[module], name, None)) is None:
            found.append(path)
            continue
        found += [f"{path}.{method}" for method in methods if not hasattr(owner, method)]
        inits = [vars(base).get("__init__") for base in inspect.getmro(owner)]
        made = {name for init in inits if inspect.isfunction(init) for name in init.__code__.co_names}
        found += [f"{path}.{name}" for name in ATTRIBUTES.get(path, ()) if name not in made]
    return found


def require(modules: Mapping[str, Any], version: str) -> None:
    """GraphoptError, naming what is not there, on a torch whose pipelining is another."""
    if names := missing(modules):
        raise GraphoptError(
            f"torch {version} has no {', '.join(names)} in torch.distributed.pipelining: graphopt runs "
            "pipelines on torch 2.11 to 2.13"
        )


require({"schedules": schedules, "stage": stage}, torch.__version__)


PASSES = {"S": "UNSHARD", "T": "RESHARD"}  # the actions that stand for those of a vocabulary
_PASS = re.compile(rf"^(\d+)([{''.join(PASSES)}])(\d+)$")

_BACKWARD = re.compile(r"\d([IBW]\d|SEND_B|RECV_B|REDUCE)")  # what an evaluation leaves out


class RoutedStage(pipelining.PipelineStage):
    """A stage that exchanges each microbatch with the stages before and after it on its own path.

    `rows` makes what the first stage takes of what it is given, where its embedding is split.
    """

    rows: Callable[[int, tuple[Any, ...]], tuple[Any, ...]] | None = None

    def follow(self, routes: Routes, here: Mapping[int, "RoutedStage"]) -> None:
        """Take the paths of `routes`; `here` are all stages on this device."""
        self._routes, self._here = routes, here
        self._order: list[int] = []

    def forward_one_chunk(self, fwd_chunk_id: int, args: Any, *rest: Any, **kwargs: Any) -> Any:
        """torch's; which microbatch an output is of is kept."""
        count = len(self.output_chunks)
        if self.rows is not None:
            args = self.rows(fwd_chunk_id, args)
        output = super().forward_one_chunk(fwd_chunk_id, args, *rest, **kwargs)
        if len(self.output_chunks) > count:
            self._order.append(fwd_chunk_id)
        return output

    def sort_outputs(self) -> None:
        """Outputs by microbatch, which torch has in the order of computation."""
        pairs = sorted(zip(self._order, self.output_chunks, strict=True), key=lambda pair: pair[0])
        self.output_chunks[:] = [chunk for _, chunk in pairs]

    def clear_runtime_states(self) -> None:
        """torch's."""
        super().clear_runtime_states()
        self._order.clear()

    def scale_grads(self, grad_scale_factor: int) -> None:
        """torch's, but a parameter that several stages of this device have is scaled once."""
        before = [s for index, s in self._here.items() if index < self.stage_index]
        scaled = {id(p) for s in before for p in s.submod.parameters()}
        for parameter in self.submod.parameters():
            if parameter.grad is not None and id(parameter) not in scaled:
                parameter.grad.div_(grad_scale_factor)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """The receives of a microbatch's activations; none where they come from this device."""
        stage, device = self._routes.before[self.stage_index, fwd_chunk_id]
        if device == self.group_rank:
            self.set_local_fwd_input(self._here[stage].fwd_cache[fwd_chunk_id][0], fwd_chunk_id)
            return []
        with self._beside(before=device):
            return self._tagged(super().get_fwd_recv_ops(fwd_chunk_id), self.stage_index, fwd_chunk_id, 0)

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """The sends of what this stage made of a microbatch."""
        stage, device = self._routes.after[self.stage_index, fwd_chunk_id]
        with self._beside(after=device):
            return self._tagged(super().get_fwd_send_ops(fwd_chunk_id), stage, fwd_chunk_id, 0)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The receives of a microbatch's gradients; none where they come from this device."""
        if not self.has_backward:
            return []
        stage, device = self._routes.after[self.stage_index, bwd_chunk_id]
        if device == self.group_rank:
            gradients: Any = self._here[stage]
            self.set_local_bwd_input(gradients.get_local_bwd_output(bwd_chunk_id), bwd_chunk_id)
            return []
        with self._beside(after=device):
            return self._tagged(super().get_bwd_recv_ops(bwd_chunk_id), self.stage_index, bwd_chunk_id, 1)

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The sends of the gradients of what this stage was sent."""
        stage, device = self._routes.before[self.stage_index, bwd_chunk_id]
        with self._beside(before=device):
            return self._tagged(super().get_bwd_send_ops(bwd_chunk_id), stage, bwd_chunk_id, 1)

    @contextmanager
    def _beside(self, before: int | None = None, after: int | None = None) -> Iterator[None]:
        """The neighbours of this stage in the model are on these devices: torch sends only to them."""
        kept = self.stage_index_to_group_rank
        beside = {self.stage_index - 1: before, self.stage_index + 1: after}
        self.stage_index_to_group_rank = {s: d for s, d in beside.items() if d is not None}
        try:
            yield
        finally:
            self.stage_index_to_group_rank = kept

    def _tagged(self, ops: list[dist.P2POp], target: int, microbatch: int, way: int) -> list[dist.P2POp]:
        """`ops` with the tag of a message: gloo gives no message to a receive with another tag."""
        stages, microbatches = self._routes.plan.stages, self._routes.plan.microbatches
        for place, op in enumerate(ops):
            op.tag = ((place * stages + target) * microbatches + microbatch) * 2 + way
        return ops


class PlanSchedule(schedules._PipelineScheduleRuntime):
    """A schedule of `torch.distributed.pipelining` that runs a plan; `graphopt.distributed` makes them.

    `step` and `eval` are torch's. In `losses`, `step` leaves those of the microbatches whose last stage
    is on this device, by their numbers; all of them, where the vocabulary is split.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        stages: Sequence[RoutedStage],
        loss_fn: Callable[..., torch.Tensor] | None,
        scale_grads: bool,
        replicas: Mapping[int, dist.ProcessGroup],
        vocabulary: VocabularyPasses | None = None,
    ) -> None:
        made: Any = super()
        made.__init__(list(stages), plan.microbatches, loss_fn=loss_fn, scale_grads=scale_grads)
        self._routed, self._replicas = list(stages), replicas
        self._vocabulary = vocabulary
        for kind, name in PASSES.items() if vocabulary else ():
            self.register_custom_function(schedules._ComputationType(name), partial(self._pass, kind))
        self._by_microbatch: dict[int, torch.Tensor] = {}
        self._prepared: bool | None = None  # whether the stages are, and for a backward
        self.group = stages[0].group
        self.follow(plan)

    def follow(self, plan: PipelinePlan) -> None:
        """Run `plan` from the next step on: every device calls this with the same plan.

        `graphopt.distributed.follow` calls this when stages and microbatches are as they were.
        """
        rows = with_transfers(plan)
        check_messages(plan, rows)
        self.plan, self.rows = plan, rows
        routes, here = Routes(plan), {s.stage_index: s for s in self._routed}
        for routed in self._routed:
            routed.follow(routes, here)
            if self._vocabulary is not None and routed.is_first:
                routed.rows = self._vocabulary.rows
        if self._vocabulary is not None:
            self._vocabulary.follow(plan)
        self.stage_index_to_group_rank = {s: d[0] for s, d in enumerate(plan.stage_devices)}
        self.pipeline_order = actions_of(plan.orders)
        forward = tuple(tuple(text for text in row if not _BACKWARD.search(text)) for row in rows)
        self._actions = {True: actions_of(rows), False: actions_of(forward)}

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """torch's; then the devices of a stage sum their gradients."""
        output = super().step(*args, **kwargs)
        if self._has_backward:
            for routed in self._routed:
                if group := self._replicas.get(routed.stage_index):
                    sum_gradients(routed.submod, group)
        return output

    def _initialize_stages(self, *args: Any, **kwargs: Any) -> None:
        """Buffers by the shapes that are known; torch would ask the neighbours of each stage."""
        if self._prepared is self._has_backward:
            return
        for routed in self._routed:
            prepare(routed, self._n_microbatches, self._has_backward)
        self._prepared = self._has_backward

    def _step_microbatches(
        self,
        arg_mbs: Any = None,
        kwarg_mbs: Any = None,
        target_mbs: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        self._by_microbatch.clear()
        self.pipeline_order_with_comms = self._actions[self._has_backward]
        if self._vocabulary is not None:
            self._vocabulary.begin(arg_mbs, target_mbs, self._has_backward)
        super()._step_microbatches(arg_mbs, kwarg_mbs, target_mbs, *args, **kwargs)
        for routed in self._routed:
            routed.sort_outputs()

    def _pass(self, kind: str, action: Any, context: Any) -> None:
        """A pass of the vocabulary, as a custom function of torch's."""
        assert self._vocabulary is not None
        self._vocabulary.run(kind, action.microbatch_index)

    def _maybe_compute_loss(
        self, stage: Any, output: Any, target_mbs: Any, mb_index: int, *args: Any, **kwargs: Any
    ) -> None:
        if self._vocabulary is not None and stage.is_last:
            self._by_microbatch[mb_index] = self._vocabulary.send(mb_index, output)
            return
        runtime: Any = super()
        runtime._maybe_compute_loss(stage, output, target_mbs, mb_index, *args, **kwargs)
        if self._internal_losses:
            self._by_microbatch[mb_index] = self._internal_losses.pop()

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> torch.Tensor | None:
        return self._by_microbatch[mb_index] if stage.is_last and self._has_backward else None

    def _update_losses(self, stages: Any, losses: list[torch.Tensor] | None) -> None:
        if self._vocabulary is not None:
            self._by_microbatch = self._vocabulary.finish()
        if losses is not None and self._by_microbatch:
            losses[:] = [self._by_microbatch[m] for m in sorted(self._by_microbatch)]
        self._by_microbatch.clear()


def actions_of(rows: Rows) -> dict[int, list[Any]]:
    """Rows of texts as torch has them."""
    texts = [[_PASS.sub(lambda t: f"{t[1]}{PASSES[t[2]]}{t[3]}", text) for text in row] for row in rows]
    return {
        device: [schedules._Action.from_str(text) for text in row] for device, row in enumerate(texts)
    }


def prepare(routed: RoutedStage, microbatches: int, has_backward: bool) -> None:
    """Buffers for what the stage is sent; torch 2.12 has to be told that it knows the shapes."""
    known: dict[str, Any] = {}
    if (mode := getattr(_utils, "InferenceMode", None)) is not None:
        routed._inference_mode = mode.STATIC
    if "has_backward" in inspect.signature(routed._prepare_forward_infra).parameters:
        known["has_backward"] = has_backward
    routed._prepare_forward_infra(microbatches, (), **known)
    if has_backward:
        routed._prepare_backward_infra(microbatches)


def sum_gradients(module: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Sum the gradients of `module` over `group`; where a device has none, they count as zeros."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            dist.all_reduce(gradient_of(parameter), group=group)
