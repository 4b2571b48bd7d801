"""How a model without some layers compares with the whole one: quality, speed, and text of its own."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.passes.blocks import Batch, evaluation
from graphopt.passes.layer_times import LayerTimes, compare_steps, measure_units
from graphopt.passes.layer_trials import Quality
from graphopt.passes.skip_plan import SkipPlan, quality_text
from graphopt.passes.skip_strategies import Evidence


@dataclass(frozen=True)
class UnitRow:
    """One layer or sublayer: its score, what its absence alone costs, and its time in each phase.

    `influence` is the Block Influence, None for sublayers; `kl` is in nats per token; `weights_of` is
    the name of the layer whose weights this one runs with, None where they are its own.
    """

    name: str
    removed: bool
    influence: float | None
    kl: float | None
    seconds: Mapping[str, float]
    weights_of: str | None = None


@dataclass(frozen=True)
class PhaseRow:
    """The time of a step of one phase, which handles `tokens` tokens, or images.

    `predicted_seconds` and `seconds` are of the short model; `speedup` is how many times as fast it is,
    the median of steps in turns.
    """

    phase: str
    tokens: int
    whole_seconds: float
    predicted_seconds: float
    seconds: float
    speedup: float


@dataclass(frozen=True)
class SkipReport:
    """All that `graphopt skip` says; prints as its table does, and writes JSON.

    `free_running` is the share of greedily generated tokens that equal the whole model's at their
    place, None where the model does not generate; `quality` is None where there are no logits.
    """

    model: str
    plan: SkipPlan
    units: tuple[UnitRow, ...]
    phases: tuple[PhaseRow, ...]
    quality: Quality | None
    free_running: float | None
    parameters: int
    whole_parameters: int

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=1)

    def figures(self) -> list[str]:
        """The quality and the size, in words."""
        found = [f"{self.parameters} of {self.whole_parameters} parameters"]
        if self.plan.groups:
            found.append(f"{self.plan.saved} less by sharing")
        if (q := self.quality) is not None:
            found += quality_text(q.kl, q.top1, q.perplexity, q.whole_perplexity)
        if self.free_running is not None:
            found.append(f"free-running agreement {100 * self.free_running:.1f} %")
        return found


def compare(
    name: str, evidence: Evidence, plan: SkipPlan, short: nn.Module, new_tokens: int
) -> SkipReport:
    """The report of `short`, made from the model of `evidence` by `plan`, on batches of `evidence`.

    Up to `new_tokens` are generated behind the first half of each sample's tokens.
    """
    model, batch, removed = evidence.model, evidence.batches[0], frozenset(plan.removed)
    generates = _generates(model) and isinstance(batch, Mapping) and "input_ids" in batch
    phases = ("prefill", "decode") if generates else ("prefill",)
    times = {phase: measure_units(model, evidence.units, batch, phase) for phase in phases}
    agreement = free_running(model, short, evidence.batches, new_tokens) if generates else None
    return SkipReport(
        name,
        plan,
        tuple(_unit_row(evidence, i, plan, times) for i in range(evidence.count)),
        tuple(_phase_row(phase, times[phase], (model, short), batch, removed) for phase in phases),
        evidence.trials.quality(frozenset(), short) if evidence.has_logits else None,
        agreement,
        *(sum(p.numel() for p in m.parameters()) for m in (short, model)),
    )


def free_running(model: Any, short: Any, batches: Sequence[Batch], new_tokens: int) -> float:
    """The share of `new_tokens` greedily generated tokens that are the same at the same place.

    Each sample's prompt is the first half of its tokens; no more are generated than it has left.
    """
    same = total = 0
    for batch in batches:
        ids: Tensor = batch["input_ids"]  # type: ignore[call-overload]
        prompt, rest = ids.tensor_split(2, dim=1)
        count = max(1, min(new_tokens, rest.shape[1]))
        texts = [_generated(m, prompt, count) for m in (model, short)]
        same += int((texts[0] == texts[1]).sum())
        total += texts[0].numel()
    return same / total


def _generated(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    settings = type(model.generation_config)(
        max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, pad_token_id=0
    )
    with evaluation(model):
        text: Tensor = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
        )
    return text[:, prompt.shape[1] :]


def _generates(model: Any) -> bool:
    return hasattr(model, "can_generate") and bool(model.can_generate())


def _unit_row(
    evidence: Evidence, number: int, plan: SkipPlan, times: Mapping[str, LayerTimes]
) -> UnitRow:
    unit = evidence.units[number]
    alone = None
    if evidence.has_logits:
        alone = evidence.trials.kl(frozenset({number}), (unit.block, evidence.states))
    influence = evidence.influence[number] if unit.branch is None else None
    seconds = {phase: found.unit_seconds[number] for phase, found in times.items()}
    sources = {i: str(group[0]) for group in plan.groups for i in group[1:]}
    return UnitRow(unit.name, number in plan.removed, influence, alone, seconds, sources.get(number))


def _phase_row(
    phase: str,
    times: LayerTimes,
    models: tuple[nn.Module, nn.Module],
    batch: Batch,
    removed: frozenset[int],
) -> PhaseRow:
    found = compare_steps(*models, batch, phase)
    predicted = (
        found.whole_seconds * times.seconds(removed) / times.seconds()
    )  # without the clocks between layers
    given: Any = next(iter(batch.values() if isinstance(batch, Mapping) else batch))
    tokens = given.numel() if phase == "prefill" and given.ndim == 2 else len(given)
    return PhaseRow(phase, tokens, found.whole_seconds, predicted, found.seconds, found.speedup)
