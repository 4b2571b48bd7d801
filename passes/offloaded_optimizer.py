"""An optimizer whose state is in host memory: updated there, or fetched, updated and put back."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from graphopt.errors import GraphoptError
from graphopt.passes.optimizer_layout import Piece, Trained
from graphopt.passes.optimizer_rules import Rule
from graphopt.passes.optimizer_step import Group, StateStore, UpdateStep


class OffloadedOptimizer(Optimizer):
    """What `offload_optimizer` makes: steps like the optimizer that it was made from, with its groups.

    Its `state` is empty; `state_dict()` is whole, in memory of its own, and one of torch's optimizer of
    the same class. `plan` says what is done where. Parameters cannot be added, and it cannot be copied
    or pickled. Not to be used after `close()`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        parameters: Sequence[Trained],
        store: StateStore,
    ) -> None:
        self._is_ready, self._is_closed, self._failure = False, False, ""
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups  # one list: a schedule may hold either of them
        self.plan = store.plan
        self._rule, self._parameters, self._store = rule, tuple(parameters), store
        self._planned = [rule.states(group) for group in self.param_groups]
        self._counts = [0] * len(parameters)  # updates so far
        self._is_ready = True
        self._take(optimizer.state)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient; what `closure` returns, if there is one.

        GraphoptError for sparse gradients, and where a transfer failed; then some parameters are updated
        and some are not, so that a state_dict has to be loaded, and the parameters, before the next step.
        """
        self._check_usable()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self._gradients()
        if gradients:
            with torch.no_grad():
                self._update(gradients)
        return loss

    def _update(self, gradients: Mapping[int, Tensor]) -> None:
        for number in gradients:
            group = self.param_groups[self._parameters[number].group]
            self._counts[number] += self._rule.counts_steps or bool(self._rule.states(group))
        step = UpdateStep(
            self._store, self._rule, self._parameters, self.param_groups, self._counts, gradients
        )
        try:
            step.run()
        except BaseException as error:
            self._failure = f"a step of this optimizer was broken off ({error}); load a state_dict"
            step.abandon()
            raise

    def _gradients(self) -> dict[int, Tensor]:
        """The gradients that are there, by parameter, each laid out as its parameter."""
        found = {}
        for number, one in enumerate(self._parameters):
            gradient = one.tensor.grad
            if gradient is None:
                continue
            if gradient.layout is not torch.strided:
                raise GraphoptError(f"{one.name} has a sparse gradient; offloaded updates are dense")
            if gradient.stride() != one.tensor.stride() and not (
                one.is_flat and gradient.is_contiguous()
            ):
                gradient = torch.empty_like(one.tensor).copy_(gradient)
            found[number] = gradient.detach()
        for group, planned in zip(self.param_groups, self._planned, strict=True):
            if more := set(self._rule.states(group)) - set(planned):
                raise GraphoptError(
                    f"a group needs {', '.join(sorted(more))}, which it did not when the optimizer was "
                    "offloaded; set its options first"
                )
        if len(found) < sum(p.grad is not None for g in self.param_groups for p in g["params"]):
            raise GraphoptError(
                "a parameter has a gradient that had requires_grad=False when the optimizer was offloaded"
            )
        return found

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimizer of the same class has it, in memory of its own."""
        self._check_usable()
        for number, one in enumerate(self._parameters):
            if self._counts[number]:
                self.state[one.tensor] = self._state_of(number)
        try:
            return super().state_dict()
        finally:
            self.state = defaultdict(dict)

    def _state_of(self, number: int) -> dict[str, Tensor]:
        one = self._parameters[number]
        names = self._planned[one.group]
        whole = {name: torch.empty_like(one.tensor).detach() for name in names}
        for piece, states in self._store.tensors(number):
            for name, state in zip(names, states, strict=True):
                one.piece(whole[name], *piece.cut[1:]).copy_(state)
        if not self._rule.counts_steps:
            return whole
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        return {"step": torch.tensor(float(self._counts[number]), dtype=dtype), **whole}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes what `state_dict()` gave, or that of torch's optimizer of the same class."""
        if self._is_closed:
            self._check_usable()
        super().load_state_dict(state_dict)
        self._take(self.state)
        self._failure = ""

    def _take(self, state: Mapping[Tensor, Mapping[str, Any]]) -> None:
        """Take the state over from torch's form of it, which is empty afterwards."""
        for number, one in enumerate(self._parameters):
            held, names = state.get(one.tensor, {}), self._planned[one.group]
            if missing := [n for n in names if held and held.get(n) is None]:
                if self._rule.counts_steps:
                    raise GraphoptError(f"the state of {one.name} has no {missing[0]}")
                held = {}  # a momentum that has not begun
            self._counts[number] = int(held.get("step", 1)) if held else 0
            for piece, states in self._store.tensors(number):
                for name, target in zip(names, states, strict=True):
                    if held:
                        target.copy_(_laid_out(one, held[name], piece))
                    else:
                        target.zero_()
        self.state = defaultdict(dict)

    def add_param_group(self, param_group: Group) -> None:
        """Refused: the plan is for the parameters that were there."""
        if self._is_ready:
            raise GraphoptError(
                "an offloaded optimizer takes no more parameters: make an optimizer of torch of all of "
                "them, load this one's state into it, and offload that"
            )
        super().add_param_group(param_group)

    def close(self) -> None:
        """Ends the threads, and gives up the state."""
        self._is_closed, self._failure = True, "this optimizer was closed"
        self._store.close()

    def _check_usable(self) -> None:
        if self._failure:
            raise GraphoptError(self._failure)

    def __deepcopy__(self, memo: object) -> NoReturn:
        _refuse("copied")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        _refuse("pickled")


def _laid_out(one: Trained, whole: Tensor, piece: Piece) -> Tensor:
    """A piece of a state of torch, however that lies in memory."""
    if whole.stride() != one.tensor.stride() and not (one.is_flat and whole.is_contiguous()):
        whole = torch.empty_like(one.tensor).copy_(whole)
    return one.piece(whole, *piece.cut[1:])


def _refuse(what: str) -> NoReturn:
    raise GraphoptError(f"an offloaded optimizer cannot be {what}; its state_dict() can, which is whole")
