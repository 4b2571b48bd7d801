"""How the parameters of an optimizer are cut into subgroups, and where the state of each piece lies."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.cost_models.optimizer_tasks import Subgroup
from graphopt.errors import PlanError
from graphopt.passes.layer_file import Part
from graphopt.passes.optimizer_rules import SCRATCH, Group, Rule

_ALIGNED = 64  # bytes between tensors of a record, and elements between pieces of a parameter
Cut = tuple[int, int, int]  # the parameter, its first element and the one behind its last


@dataclass(frozen=True, eq=False)
class Trained:
    """A parameter of an optimizer: its name, for errors, and the number of its group."""

    tensor: Tensor
    group: int
    name: str

    @property
    def is_flat(self) -> bool:
        """Whether it can be cut: it is in memory in the order of its elements."""
        return self.tensor.is_contiguous()

    def piece(self, tensor: Tensor, begin: int, end: int) -> Tensor:
        """The elements from `begin` to `end` of a tensor that lies in memory as the parameter does."""
        return tensor.detach().view(-1)[begin:end] if self.is_flat else tensor.detach()


def trained(optimizer: Optimizer) -> tuple[Trained, ...]:
    """The parameters that can get a gradient, in the order of the groups.

    PlanError for those that are not plain dense tensors, or not on one CPU or CUDA device.
    """
    found = []
    for number, group in enumerate(optimizer.param_groups):
        names = group.get("param_names") or [
            f"parameter {i} of group {number}" for i in range(len(group["params"]))
        ]
        for name, tensor in zip(names, group["params"], strict=True):
            if tensor.requires_grad:
                found.append(Trained(tensor, number, name))
    if not found:
        raise PlanError("the optimizer has no parameter with requires_grad=True")
    device = found[0].tensor.device
    for one in found:
        tensor = one.tensor
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            raise PlanError(f"{one.name} is a {type(tensor).__name__}, not a plain dense parameter")
        if tensor.device != device or device.type not in ("cpu", "cuda"):
            raise PlanError(
                f"{one.name} is on {tensor.device}: all must be on the CPU or one CUDA device"
            )
        if not tensor.is_floating_point():
            raise PlanError(
                f"{one.name} is {tensor.dtype}; the state of real parameters can be offloaded"
            )
        if torch.empty_like(tensor, device="meta").stride() != tensor.stride() and not one.is_flat:
            raise PlanError(f"{one.name} has gaps or overlaps in memory (strides {tensor.stride()})")
    return tuple(found)


def cut(parameters: Sequence[Trained], elements: int) -> tuple[tuple[Cut, ...], ...]:
    """Subgroups of about `elements`, in the parameters' order; those that are not flat stay whole."""
    total = sum(one.tensor.numel() for one in parameters)
    each = max(_ALIGNED, ceil(total / max(1, ceil(total / elements))))
    found: list[list[Cut]] = [[]]
    room = each
    for number, one in enumerate(parameters):
        begin, end = 0, one.tensor.numel()
        while True:
            if room < _ALIGNED and found[-1]:
                found.append([])
                room = each
            step = end - begin if not one.is_flat or end - begin <= room else room // _ALIGNED * _ALIGNED
            found[-1].append((number, begin, begin + step))
            begin, room = begin + step, room - step
            if begin >= end:
                break
    return tuple(tuple(some) for some in found)


@dataclass(frozen=True)
class Piece:
    """A cut, and where in the record of its subgroup its state is, and what is sent to the host."""

    cut: Cut
    states: tuple[Part, ...]
    value: Part
    gradient: Part


@dataclass(frozen=True)
class Layout:
    """The record of a subgroup: the state first, then room for what is sent to the host."""

    pieces: tuple[Piece, ...]
    subgroup: Subgroup
    host_bytes: int


def layouts(
    parameters: Sequence[Trained],
    groups: Sequence[Group],
    rule: Rule,
    subgroups: Sequence[Sequence[Cut]],
) -> tuple[Layout, ...]:
    """The records of all subgroups; those of the state of a piece have the names of its rule."""
    return tuple(_layout(parameters, groups, rule, cuts) for cuts in subgroups)


def _layout(
    parameters: Sequence[Trained], groups: Sequence[Group], rule: Rule, cuts: Sequence[Cut]
) -> Layout:
    offset = 0

    def part(name: str, cut: Cut) -> Part:
        nonlocal offset
        found = _part(name, parameters[cut[0]], cut, offset)
        offset += _up(prod(found.shape) * parameters[cut[0]].tensor.element_size())
        return found

    named = [rule.states(groups[parameters[c[0]].group]) for c in cuts]
    states = [tuple(part(n, c) for n in names) for names, c in zip(named, cuts, strict=True)]
    state_bytes = offset
    gradients = [part("gradient", c) for c in cuts]
    values = [part("value", c) for c in cuts]
    pieces = tuple(map(Piece, cuts, states, values, gradients))
    elements = sum(end - begin for _, begin, end in cuts)
    sizes = [_up((end - begin) * parameters[n].tensor.element_size()) for n, begin, end in cuts]
    needed = (rule.needs_value(groups[parameters[c[0]].group]) for c in cuts)
    values_bytes = sum(size for size, is_needed in zip(sizes, needed, strict=True) if is_needed)
    subgroup = Subgroup(elements, sum(sizes), state_bytes, sum(sizes) + values_bytes)
    return Layout(pieces, subgroup, offset)


def _part(name: str, one: Trained, cut: Cut, offset: int) -> Part:
    _, begin, end = cut
    if one.is_flat:
        return Part(name, str(one.tensor.dtype), (end - begin,), (1,), offset)
    shape, stride = tuple(one.tensor.shape), tuple(one.tensor.stride())
    return Part(name, str(one.tensor.dtype), shape, stride, offset)


def scratch_bytes(parameters: Sequence[Trained], subgroups: Sequence[Sequence[Cut]], most: int) -> int:
    """What one update writes over that takes at most `most` elements at once, of those that are flat."""

    def sizes() -> Iterator[int]:
        for cuts in subgroups:
            for number, begin, end in cuts:
                one = parameters[number]
                elements = min(end - begin, most) if one.is_flat else end - begin
                yield elements * one.tensor.element_size()

    return SCRATCH * _up(max(sizes()))


def check_cuts(parameters: Sequence[Trained], subgroups: Sequence[Sequence[Cut]]) -> None:
    """PlanError unless the cuts are all of the parameters, each element once, in order."""
    ends = [0] * len(parameters)
    for number, begin, end in (c for cuts in subgroups for c in cuts):
        if not 0 <= number < len(parameters) or begin != ends[number] or end < begin:
            raise PlanError(f"the plan cuts parameter {number} at {begin}, where nothing begins")
        ends[number] = end
    for one, end in zip(parameters, ends, strict=True):
        if end != one.tensor.numel():
            raise PlanError(f"{one.name} has {one.tensor.numel()} elements; the plan has {end} of them")


def options_of(groups: Sequence[dict[str, Any]]) -> list[Group]:
    """The options of each parameter group, without its parameters."""
    return [{k: v for k, v in group.items() if k not in ("params", "param_names")} for group in groups]


def _up(size: int) -> int:
    return -(-size // _ALIGNED) * _ALIGNED
