"""The largest batch, and the longest sequence, that fit: solved on the formula of the step's peak."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt import zoo
from graphopt.api import _device
from graphopt.cost_models.devices import Device, parse_bytes
from graphopt.cost_models.polynomials import NotPolynomialError
from graphopt.cost_models.symbolic import SymbolicFlow
from graphopt.cost_models.training_state import TrainingSetup
from graphopt.errors import GraphoptError
from graphopt.fit_answer import Fit, FitRow
from graphopt.passes.base import Pass
from graphopt.passes.checkpoint import Checkpoint, CheckpointPlan, plan_of
from graphopt.passes.checkpoint_choice import everything, step_of, without_gradient_bytes
from graphopt.passes.nested_choice import choose_best
from graphopt.passes.stream_loss import StreamLoss
from graphopt.passes.symbolic_peak import PeakFormula, SymbolicStep
from graphopt.sized_model import LEAST, Captures, SizedModel, sized_model
from graphopt.tracing import Examples

PASSES: tuple[Pass, ...] = (StreamLoss(returns="lazy"), Checkpoint(memory="min"))


def fit(
    model: str | nn.Module,
    *,
    memory: int | str,
    seq: int | None = None,
    batch: int | None = None,
    inputs: Callable[..., Examples] | None = None,
    passes: Sequence[Pass] | None = None,
    device: str | Device | None = None,
    setup: TrainingSetup | None = None,
    loss: Callable[..., torch.Tensor] | None = None,
    size: zoo.Size | None = None,
    overrides: Mapping[str, zoo.Value] | None = None,
    dtype: torch.dtype | None = None,
    scratch: str = "shapes",
    advance: Callable[[int, int], None] | None = None,
) -> Fit:
    """The largest batch with which a training step fits into `memory`, without running it.

    Args:
        model: a zoo name, "file.py:factory" (called with `batch` and `seq`), or a module with `inputs`.
        memory: bytes, or a size like "80GiB", of everything: weights, gradients, optimizer, activations.
        seq: the sequence length to find the largest batch for.
        batch: a batch to find the longest sequence for; with `seq`, both questions are answered.
        inputs: for a module, `inputs(batch, seq)` makes what it is called with; `inputs(batch)` where
            there is no sequence. With `loss`, a pair of its input and the target.
        passes: what to try, each alone and all in turn; by default streaming the loss, and recomputing
            as much as makes the peak least. A `Checkpoint` among them is planned for the least peak.
        device: whose memory and rates count; None for this one.
        setup: optimizer, ZeRO stage and degrees of parallelism; None: no optimizer, one device.
        size, overrides, dtype: of a zoo model.
        scratch: "shapes", or "measured" to run each kernel here for the scratch it takes.
        advance: told how many rows of the answer are there, of how many.

    Raises:
        GraphoptError: sizes that do not enter as polynomials, or a model that is another one at them.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    >>> found = fit(
    ...     net,
    ...     memory="1MiB",
    ...     inputs=lambda batch: (torch.ones(batch, 8), torch.ones(batch, 1)),
    ...     loss=torch.nn.functional.mse_loss,
    ...     device="cpu-generic",
    ...     passes=[],
    ... )
    >>> found.rows[0].formula
    'Piecewise((164*batch + 2576, batch <= 8), (296*batch + 1424, batch <= 65536))'
    """
    chosen = sized_model(model, inputs, size=size, overrides=overrides, dtype=dtype, loss=loss)
    known = _device(device, model)
    fitting = Fitting(chosen, known, setup or TrainingSetup(), scratch)
    return fitting.fit(memory, seq, batch, passes, advance)


def peak_formula(
    model: str | nn.Module,
    *,
    seqs: tuple[int, int] = (64, 1024),
    widths: tuple[int, int] | None = None,
    passes: Sequence[Pass] = (),
    at: tuple[int, ...] | None = None,
    inputs: Callable[..., Examples] | None = None,
    device: str | Device | None = None,
    setup: TrainingSetup | None = None,
    **of_model: Any,
) -> PeakFormula:
    """The peak of a training step, in bytes, as a formula of batch and sequence length.

    The sequences `seqs`, shortest and longest, are captured; the formula holds from the shortest to the
    longest that the model takes. Two equal ones fix the sequence: a formula of the other sizes. `passes`
    decide at the batch and sequence `at` (by default 8 and the longest captured) and their decisions hold
    at all sizes. The other arguments are those of `fit`.

    With `widths`, the smallest and the largest hidden size, it is a formula of the hidden size, too,
    within these, and `at` has one (by default the largest). Causal and masked language models of the zoo
    grow by whole heads of one size, their key-value heads and feed-forward layers in proportion;
    hidden sizes in between are refused, and so are setups that divide weights.

    >>> import torch
    >>> net = torch.nn.Linear(8, 4)
    >>> formula = peak_formula(
    ...     net,
    ...     inputs=lambda batch, seq: (torch.ones(batch, seq, 8), torch.ones(batch, seq, 4)),
    ...     loss=torch.nn.functional.mse_loss,
    ...     device="cpu-generic",
    ... )
    >>> print(formula)
    bytes at the peak, the largest of:
      80*batch*seq + 152   (backward, mse_loss_backward)
    """
    chosen = sized_model(model, inputs, widths=widths, **of_model)
    fitting = Fitting(chosen, _device(device, model), setup or TrainingSetup())
    sizes = at or (8, seqs[1])
    if chosen.width is not None and len(sizes) < len(chosen.variables):
        sizes = (*sizes, chosen.width.high)
    return fitting.step(seqs, tuple(passes), sizes).formula(fitting.setup)


class Fitting:
    """Formulas of one model, made as they are asked for."""

    def __init__(
        self, model: SizedModel, device: Device, setup: TrainingSetup, scratch: str = "shapes"
    ) -> None:
        if scratch not in ("shapes", "measured"):
            raise GraphoptError(f"scratch={scratch!r} is neither 'shapes' nor 'measured'")
        self.model, self.device, self.setup = model, device, setup
        self.captures = Captures(model, device, scratch == "measured")
        self.capture_seconds = 0.0
        self._flows: dict[Any, SymbolicFlow] = {}

    def fit(
        self,
        memory: int | str,
        seq: int | None,
        batch: int | None,
        passes: Sequence[Pass] | None,
        advance: Callable[[int, int], None] | None = None,
    ) -> Fit:
        """Answer for no passes, each of `passes` alone, and all of them."""
        begin, limit = time.perf_counter(), parse_bytes(memory)
        tried = PASSES if passes is None else tuple(passes)
        _split(tried)
        if "seq" not in self.model.variables:
            if seq is not None:
                raise GraphoptError(f"{self.model.name} has no sequence: leave seq away")
        elif seq is None and batch is None:
            raise GraphoptError(
                "give seq= for the largest batch, batch= for the longest sequence, or both"
            )
        sets: list[tuple[Pass, ...]] = [(), *((p,) for p in tried)]
        sets += [tried] if len(tried) > 1 else []
        rows = [self.row((), limit, seq, batch)]
        for chosen in sets[1:]:
            if advance is not None:
                advance(len(rows), len(sets))
            try:
                rows.append(self.row(chosen, limit, seq, batch))
            except NotPolynomialError as error:
                names = tuple(type(p).__name__ for p in chosen)
                rows.append(FitRow(names, remark=f"no formula: {error}"))
        seconds = time.perf_counter() - begin
        return Fit(
            self.model.name,
            self.device.name,
            limit,
            batch,
            seq,
            self.setup,
            tuple(rows),
            self.captures.count,
            self.capture_seconds,
            seconds - self.capture_seconds,
        )

    def row(self, passes: tuple[Pass, ...], limit: int, seq: int | None, batch: int | None) -> FitRow:
        """What fits with `passes`, in this order."""
        names = tuple(type(p).__name__ for p in passes)
        asks_batch = seq is not None or "seq" not in self.model.variables
        found: dict[str, Solved] = {}
        if asks_batch:
            found["batch"] = self._solve("batch", passes, limit, {} if seq is None else {"seq": seq})
        if batch is not None and "seq" in self.model.variables:
            found["seq"] = self._solve("seq", passes, limit, {"batch": batch})
        solved = next(iter(found.values()))
        largest = {name: s.largest for name, s in found.items()}
        parts = solved.step.parts(solved.sizes, self.setup)
        return FitRow(
            names,
            largest.get("batch"),
            largest.get("seq"),
            solved.formula.compiled(*solved.sizes),
            tuple(parts.items()),
            *self._binding(solved),
            solved.step.seconds(solved.sizes, self.device),
            solved.text,
            solved.plan,
        )

    def _binding(self, solved: "Solved") -> tuple[str, str]:
        piece = solved.formula.binding(*solved.sizes)
        return piece.operator, piece.half

    def _solve(
        self, variable: str, passes: tuple[Pass, ...], limit: int, fixed: Mapping[str, int]
    ) -> "Solved":
        """The largest size of `variable` beside the `fixed` others."""
        before, recomputes = _split(passes)
        plain = self._best(variable, SymbolicStep.of(self.flow(fixed, LEAST, ())), limit)
        least = LEAST[variable]
        size = least if plain is None or not before else max(least, plain.largest)
        for low in dict.fromkeys((size, least)):
            # Passes decide on blocks of tokens, say, of which there are several from `low` on.
            reference = {**fixed, variable: max(least, low // 2)}
            flow = self.flow(fixed, {**LEAST, variable: low}, before, reference)
            if (found := self._of_flow(variable, flow, recomputes, limit)) is not None:
                return found
        if variable == "seq":
            return self._missed(flow, recomputes)
        if flow.ranges[0][0] > least:
            raise NotPolynomialError(f"less than {flow.ranges[0][0]} fit, from where on there is one")
        alone = {**fixed, "batch": 1}
        flow = self.flow(alone, LEAST, before, alone)
        step, plan = self.planned(flow) if recomputes else (SymbolicStep.of(flow), None)
        formula = step.formula(self.setup)
        return Solved(step, formula, int(formula.at() <= limit), (), str(formula.expression), plan)

    def _of_flow(
        self, variable: str, flow: SymbolicFlow, recomputes: bool, limit: int
    ) -> "Solved | None":
        """The best answer with `flow`, planned again at what became possible; None where nothing fits."""
        best = self._best(variable, SymbolicStep.of(flow), limit)
        (low, high), size = flow.ranges[0], 0
        while recomputes and size < high:
            # The least peak one above the answer decides whether there is more; the first are far apart.
            size = low if best is None else min(high, best.largest + 1)
            step, plan = self.planned(flow, size)
            found = self._best(variable, step, limit, plan)
            if found is None or (best is not None and found.largest <= best.largest):
                break
            best = found
        return best

    def _missed(self, flow: SymbolicFlow, recomputes: bool) -> "Solved":
        """The step at the smallest size, which does not fit."""
        sizes = tuple(low for low, _ in flow.ranges)
        step, plan = self.planned(flow, *sizes) if recomputes else (SymbolicStep.of(flow), None)
        formula = step.formula(self.setup)
        return Solved(step, formula, 0, sizes, str(formula.piecewise(flow.terms.variables[0])), plan)

    def planned(self, flow: SymbolicFlow, *sizes: int) -> tuple[SymbolicStep, CheckpointPlan]:
        """The step of the least peak that recomputation reaches at some sizes, and its plan."""
        concrete = flow.at(sizes, self.device)
        if self.setup.zero >= 2 and self.setup.data > 1:  # shards of gradients bind nothing
            concrete = without_gradient_bytes(concrete)
        choice = choose_best(concrete, True, None)
        baseline = concrete.static_bytes + step_of(concrete, everything(concrete)).peak_bytes
        return SymbolicStep.under(flow, choice), plan_of(concrete, choice, None, baseline)

    def _best(
        self, variable: str, step: SymbolicStep, limit: int, plan: CheckpointPlan | None = None
    ) -> "Solved | None":
        """`step` solved for its one variable; None where not even the smallest size fits."""
        formula = step.formula(self.setup)
        largest = formula.largest(variable, limit)
        if largest is None:
            return None
        return Solved(step, formula, largest, (largest,), str(formula.piecewise(variable)), plan)

    def step(self, seqs: tuple[int, int], passes: tuple[Pass, ...], at: tuple[int, ...]) -> SymbolicStep:
        """The step of batch and sequence (if any) under what `passes` decide at the sizes `at`."""
        before, recomputes = _split(passes)
        sizes = at[: len(self.model.variables)]
        reference = dict(zip(self.model.variables, sizes, strict=True))
        fixed: dict[str, int] = {}
        if "seq" in reference and seqs[0] == seqs[1]:
            fixed = {"seq": seqs[0]}
            reference |= fixed
            sizes = tuple(n for v, n in reference.items() if v not in fixed)
        flow = self.flow(fixed, {**LEAST, "seq": seqs[0]}, before, reference, seqs[1])
        return self.planned(flow, *sizes)[0] if recomputes else SymbolicStep.of(flow)

    def flow(
        self,
        fixed: Mapping[str, int],
        low: Mapping[str, int],
        passes: Sequence[Pass],
        reference: Mapping[str, int] | None = None,
        high: int | None = None,
    ) -> SymbolicFlow:
        """The symbolic step after `passes`, which decide at the sizes `reference`; kept.

        `high` is the longest sequence that is captured.
        """
        begin = time.perf_counter()
        key = (tuple(sorted(fixed.items())), tuple(sorted(low.items())), tuple(passes), high)
        if key not in self._flows:
            steps = self.captures.plans(passes, self.captures.shallow(reference or {})) if passes else []
            self._flows[key] = self.captures.flow(fixed, low, steps, high)
        self.capture_seconds += time.perf_counter() - begin
        return self._flows[key]


@dataclass(frozen=True)
class Solved:
    """A formula, solved: the size found, and all sizes of the formula there (or at its smallest)."""

    step: SymbolicStep
    formula: PeakFormula
    largest: int
    sizes: tuple[int, ...]
    text: str
    plan: CheckpointPlan | None


def _split(passes: tuple[Pass, ...]) -> tuple[tuple[Pass, ...], bool]:
    """The passes that rewrite the captured step, and whether a `Checkpoint` is behind them."""
    if any(isinstance(p, Checkpoint) for p in passes[:-1]):
        raise GraphoptError("Checkpoint goes last: what others leave is what it recomputes")
    last = bool(passes) and isinstance(passes[-1], Checkpoint)
    return (passes[:-1] if last else passes), last
