"""Optimizer state in host memory: which subgroups are updated there, and which visit the device."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch.optim import Optimizer

from graphopt.cost_models.devices import format_bytes
from graphopt.cost_models.optimizer_tasks import UpdateCosts
from graphopt.errors import GraphoptError, PlanError
from graphopt.passes.budget import Budget, check_budget, resolve_budget
from graphopt.passes.host_memory import Host
from graphopt.passes.offloaded_optimizer import OffloadedOptimizer
from graphopt.passes.optimizer_choice import Cutting, choose_updates, least_bytes
from graphopt.passes.optimizer_layout import (
    Cut,
    Trained,
    check_cuts,
    cut,
    layouts,
    scratch_bytes,
    trained,
)
from graphopt.passes.optimizer_plan import OffloadOptimizerPlan, plan_of
from graphopt.passes.optimizer_rules import SCRATCH, Rule, is_splittable, rule_of
from graphopt.passes.optimizer_step import StateStore
from graphopt.passes.optimizer_times import measured_costs

_SUBGROUPS = (24, 48, 96)  # numbers of them that are tried
_LEAST_ELEMENTS = 2**12  # of a subgroup
_CHUNK_ELEMENTS = {"cpu": 2**17, "cuda": 2**24}  # updated at once: what a core's cache holds; a kernel
_LEAST_CHUNK = 2**10
_PROBE_ELEMENTS = 2**20


@dataclass(frozen=True)
class OffloadOptimizer:
    """Keeps the state of an `Adam`, `AdamW` or `SGD` in host memory, and updates in subgroups.

    `memory` bounds the state that is held beside it, and the scratch of updates: bytes, "2GiB", a share
    of the whole state (0.25), or "min". A subgroup's state stays within it, or is fetched for the update
    and put back, or never leaves the host, which then updates; what is best is decided by measured times,
    so that transfers, updates here and updates on the host overlap.

    For parameters on the CPU, host memory is a file in `folder` (None: the system's for temporary files;
    choose one that is not in memory itself), mapped for a thread that updates there. `bytes_per_s` in
    either direction and `host_elements_per_s` are rates to hold that to, to try out what slower hardware
    would do. For parameters on CUDA it is pinned memory. `host_share` sets how many of the subgroups that
    do not stay are updated on the host, from 0.0 to 1.0.

    Results are those of torch's optimizer with `foreach=False`, its default on the CPU: bit for bit
    there, while on CUDA what the host updates may round otherwise.
    """

    memory: Budget
    folder: str | Path | None = None
    bytes_per_s: float | None = None
    host_elements_per_s: float | None = None
    host_share: float | None = None
    name: ClassVar[str] = "offload-optimizer"

    def __post_init__(self) -> None:
        check_budget(self.memory)
        if self.memory is None:
            raise PlanError('memory=None: give bytes, a size, a share of the whole state, or "min"')
        for option in ("bytes_per_s", "host_elements_per_s"):
            rate = getattr(self, option)
            if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
                raise PlanError(f"{option}={rate!r} is no rate above 0")
        share = self.host_share
        if share is not None and not (isinstance(share, int | float) and 0 <= share <= 1):
            raise PlanError(f"host_share={share!r} is no share from 0 to 1")

    def plan(self, optimizer: Optimizer) -> OffloadOptimizerPlan:
        """What stays, what visits the device, and what the host updates, in what order.

        PlanError with the least memory that works.
        """
        rule, parameters = self._found(optimizer)
        groups = optimizer.param_groups
        whole = layouts(parameters, groups, rule, cut(parameters, 2**62))
        state_bytes = sum(layout.subgroup.state_bytes for layout in whole)
        share = self._share(parameters)
        if not state_bytes:
            raise PlanError(f"{rule.name} with these options has no state: nothing can be offloaded")
        limit = resolve_budget(self.memory, state_bytes)
        subgroups = self._cuts(parameters)
        cuttings = [self._cutting(parameters, groups, rule, cuts, limit) for cuts in subgroups]
        limit = least_bytes(cuttings, share) if limit is None else limit
        costs = self._costs(rule, parameters, groups, cuttings, limit)
        found = choose_updates(cuttings, costs, limit, share)
        return plan_of(
            rule.name,
            subgroups[found.cutting],
            cuttings[found.cutting],
            costs,
            limit,
            found.places,
            found.order,
            found.schedule.bound.seconds,
            self._channel(parameters, costs),
        )

    def apply(self, optimizer: Optimizer, plan: OffloadOptimizerPlan) -> OffloadedOptimizer:
        """An optimizer that steps as `plan` says; `optimizer` gives its state to it, and is used up."""
        rule, parameters = self._found(optimizer)
        if plan.optimizer != rule.name:
            raise PlanError(f"the plan is for {plan.optimizer}, not {rule.name}")
        check_cuts(parameters, plan.subgroups)
        records = layouts(parameters, optimizer.param_groups, rule, plan.subgroups)
        if plan.state_bytes != tuple(record.subgroup.state_bytes for record in records):
            raise PlanError("the plan is for parameters of another dtype, or for other options")
        plan.check()
        device = parameters[0].tensor.device
        store = StateStore(plan, records, device, self._host())
        offloaded = OffloadedOptimizer(optimizer, rule, parameters, store)
        optimizer.state.clear()
        optimizer.step = _used_up  # type: ignore[method-assign]
        return offloaded

    def _found(self, optimizer: Optimizer) -> tuple[Rule, tuple[Trained, ...]]:
        if isinstance(optimizer, OffloadedOptimizer):
            raise PlanError("the optimizer is offloaded already")
        if not isinstance(optimizer, Optimizer):
            raise PlanError(f"an optimizer of torch is offloaded, not a {type(optimizer).__name__}")
        rule, parameters = rule_of(optimizer), trained(optimizer)
        if parameters[0].tensor.device.type == "cuda" and self._host() != Host():
            raise PlanError(
                "folder=, bytes_per_s= and host_elements_per_s= are for parameters on the CPU: CUDA has "
                "pinned memory"
            )
        return rule, parameters

    def _share(self, parameters: Sequence[Trained]) -> float | None:
        """`host_share`, which is 0 where an update in two parts would round otherwise."""
        for one in parameters:
            if not is_splittable(one.tensor.dtype):
                if self.host_share:
                    raise PlanError(
                        f"host_share={self.host_share}: {one.name} is {one.tensor.dtype}; the host "
                        "updates float32 and float64"
                    )
                return 0.0
        return self.host_share

    def _cuts(self, parameters: Sequence[Trained]) -> list[tuple[tuple[Cut, ...], ...]]:
        total = sum(one.tensor.numel() for one in parameters)
        sizes = (max(_LEAST_ELEMENTS, -(-total // number)) for number in _SUBGROUPS)
        return list(dict.fromkeys(cut(parameters, size) for size in sizes))

    def _cutting(
        self,
        parameters: Sequence[Trained],
        groups: Sequence[dict[str, Any]],
        rule: Rule,
        cuts: Sequence[Sequence[Cut]],
        limit: int | None,
    ) -> Cutting:
        """The subgroups in numbers, with scratch of at most an eighth of the memory on either side."""
        device, size = parameters[0].tensor.device, parameters[0].tensor.element_size()
        chunk = _CHUNK_ELEMENTS[device.type]
        while chunk > _LEAST_CHUNK and (limit is None or 8 * SCRATCH * chunk * size > limit):
            chunk //= 2
        scratch = scratch_bytes(parameters, cuts, chunk)
        found = layouts(parameters, groups, rule, cuts)
        host = scratch if device.type == "cpu" else 0
        return Cutting(tuple(layout.subgroup for layout in found), scratch, host)

    def _costs(
        self,
        rule: Rule,
        parameters: Sequence[Trained],
        groups: Sequence[dict[str, Any]],
        cuttings: Sequence[Cutting],
        limit: int,
    ) -> UpdateCosts:
        """As measured on a subgroup: a smaller one where that would take more than half of the memory."""
        most = max(parameters, key=lambda one: (len(rule.states(groups[one.group])), one.tensor.numel()))
        group = groups[most.group]
        held = (2 + len(rule.states(group))) * most.tensor.element_size()
        largest = max(s.elements for c in cuttings for s in c.subgroups)
        elements = min(largest, _PROBE_ELEMENTS, max(_LEAST_ELEMENTS, limit // 2 // held))
        scratch = cuttings[0].scratch_bytes
        every = [most.tensor, *(one.tensor for one in parameters if one is not most)]
        return measured_costs(rule, group, every, self._host(), elements, scratch)

    def _host(self) -> Host:
        folder = None if self.folder is None else str(self.folder)
        return Host(folder, self.bytes_per_s, self.host_elements_per_s)

    def _channel(self, parameters: Sequence[Trained], costs: UpdateCosts) -> str:
        where = "pinned memory" if parameters[0].tensor.device.type == "cuda" else "file"
        size = 2**22
        rates = (format_bytes(int(size / line.seconds(size))) for line in (costs.fetch, costs.put))
        return "{}, measured {}/s to the device, {}/s back".format(where, *rates)


def offload_optimizer(optimizer: Optimizer, memory: Budget, **options: Any) -> OffloadedOptimizer:
    """`optimizer` with its state in host memory, within `memory`; see `OffloadOptimizer` for the options.

    >>> import torch
    >>> model = torch.nn.Linear(64, 64)
    >>> optimizer = offload_optimizer(torch.optim.AdamW(model.parameters()), memory=1.0)
    >>> model(torch.ones(64)).sum().backward()
    >>> optimizer.step()
    """
    pass_ = OffloadOptimizer(memory, **options)
    return pass_.apply(optimizer, pass_.plan(optimizer))


def _used_up(*_: Any, **__: Any) -> Any:
    raise GraphoptError("this optimizer was offloaded: step the one that offload_optimizer gave")
