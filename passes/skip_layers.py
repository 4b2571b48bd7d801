"""The pass that removes blocks of a model, or their sublayers: less of the same kind of model."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from graphopt.errors import PlanError
from graphopt.passes.blocks import find_stack
from graphopt.passes.compensation import KINDS
from graphopt.passes.folding import fold, folded
from graphopt.passes.layer_sharing import let_save
from graphopt.passes.layer_times import PHASES, compare_steps, measure_units
from graphopt.passes.layer_trials import Quality
from graphopt.passes.made_up_inputs import as_batch, knows_inputs, made_up_batch
from graphopt.passes.module_pass import ModulePass
from graphopt.passes.removal_checks import check_function, check_generation, check_rebuild, check_shared
from graphopt.passes.skip_plan import SkipMeasurement, SkipPlan, speedup_text
from graphopt.passes.skip_strategies import (
    POSITION_ONLY,
    STRATEGIES,
    SUBLAYER_STRATEGIES,
    Evidence,
    Removed,
    Strategy,
)
from graphopt.passes.skip_units import GRANULARITIES
from graphopt.passes.sublayer_removal import can_be_saved, without_units

GOALS = ("keep", "remove", "max_kl", "max_ppl_increase", "min_top1", "target_speedup")
TOLERANCE = 0.05  # of a target speed-up, relative


@dataclass(frozen=True)
class SkipLayers(ModulePass):
    """Removes blocks of a model, so that it is faster, smaller and still the same kind of model.

    Give one goal:

    - `keep`: the positions that stay; `remove`: how many go.
    - `max_kl` (nats per token), `max_ppl_increase` (0.05 is 5 % of the perplexity) or `min_top1` (share
      of tokens with the same prediction): as many blocks go as the bound allows.
    - `target_speedup`: as many go as it takes to make a step this many times as fast, measured on the
      first calibration batch: a whole forward (`phase="prefill"`) or one more token ("decode").

    `calibration` are batches of the model's input: tensors, tuples or mappings. `strategy` decides
    which blocks go: "greedy", "exact" (few blocks), "block_influence" (ShortGPT), "angular" (Gromov et
    al.), and by position alone "unified" or "unified_published" (Unified Layer Skipping).
    `compensation` refits the projections in front of the gaps: "none", "scalar" or "linear"; the
    choice of "greedy" and "exact" is then for the refitted model. With `granularity="sublayers"` the
    attention and the MLP of each block go separately, and `keep` and `remove` count these; a model
    without some sublayers cannot be written by `save_pretrained`, which then says so.

    `strategy="fold"` (after FoldGPT, see `graphopt.passes.folding`) removes the blocks of least Block
    Influence, and lets `shared` of those that stay (one of four, where None) run with the weights of a
    neighbour: the same parameters, so that fewer are stored and gradients of all runs add up in them.
    Each block keeps its place in the cache and norms of its own, fitted anew on `calibration`; a step
    is as fast as without sharing. With `keep` only the sharing is chosen. `save_pretrained` writes the
    weights of every block, since its format has none that are shared: what `from_pretrained` then
    returns computes the same, with as much memory as without sharing, until
    `graphopt.share_weights(loaded, plan)` shares them again. `state_dict` has every name, and tensors
    in it are shared as in the model.
    """

    keep: Sequence[int] | None = None
    remove: int | None = None
    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_top1: float | None = None
    target_speedup: float | None = None
    calibration: Iterable[Any] = field(default=(), repr=False, compare=False)
    strategy: str = "greedy"
    compensation: str = "none"
    phase: str = "prefill"
    granularity: str = "layers"
    shared: int | None = None
    name: ClassVar[str] = "skip-layers"

    def __post_init__(self) -> None:
        object.__setattr__(self, "calibration", tuple(self.calibration))
        known = {"strategy": STRATEGIES, "compensation": KINDS, "phase": PHASES}
        for option, names in (known | {"granularity": GRANULARITIES}).items():
            if (value := getattr(self, option)) not in names:
                raise PlanError(f"{option}={value!r} is none of {', '.join(names)}")
        if self.granularity == "sublayers" and self.strategy not in SUBLAYER_STRATEGIES:
            raise PlanError(
                f"strategy={self.strategy!r} is for whole layers; granularity='sublayers' goes with "
                f"{' or '.join(SUBLAYER_STRATEGIES)}"
            )
        given = [goal for goal in GOALS if getattr(self, goal) is not None]
        if len(given) != 1:
            raise PlanError(f"give one of {', '.join(GOALS)}; given: {', '.join(given) or 'none'}")
        self._check_calibration(given[0])
        self._check_shared()

    def _check_shared(self) -> None:
        if self.strategy == "fold" and not self.calibration:
            raise PlanError("strategy='fold' needs calibration=, batches to fit the norms on")
        if self.shared is None:
            return
        if self.strategy != "fold":
            raise PlanError(f"shared={self.shared!r} is for strategy='fold', not {self.strategy!r}")
        if type(self.shared) is not int or self.shared < 1:
            raise PlanError(f"shared={self.shared!r}: one block or more runs with a neighbour's weights")

    def _check_calibration(self, goal: str) -> None:
        if self.calibration:
            return
        value = f"{goal}={getattr(self, goal)!r}"
        if goal == "remove" and self.strategy not in POSITION_ONLY:
            by_place = " or ".join(repr(name) for name in POSITION_ONLY)
            raise PlanError(
                f"{value} with strategy={self.strategy!r} needs calibration=, batches to judge the "
                f"blocks on; strategy={by_place} goes by position alone"
            )
        if goal not in ("keep", "remove"):
            raise PlanError(f"{value} needs calibration=, batches to measure it on")
        if self.compensation != "none":
            raise PlanError(
                f"compensation={self.compensation!r} needs calibration=, batches to fit it on"
            )

    def plan(self, model: nn.Module) -> SkipPlan:
        """Which blocks go; PlanError where the goal cannot be met."""
        evidence = self._evidence(model)
        plan = SkipPlan(evidence.stack.path, len(evidence.stack.blocks), (), "given")
        if self.granularity == "sublayers":
            plan = replace(plan, names=tuple(unit.name for unit in evidence.units))
        if self.keep is not None:
            plan = replace(plan, kept=tuple(self.keep))
        else:
            removed, speedup = self._chosen(evidence)
            kept = tuple(i for i in range(evidence.count) if i not in removed)
            plan = replace(plan, kept=kept, strategy=self.strategy, speedup=speedup)
        plan.check()
        if not self.calibration:
            return plan
        plan, removed = replace(plan, influence=evidence.influence), frozenset(plan.removed)
        if self.strategy == "fold":
            short, groups, saved = folded(evidence, removed, self.shared)
            plan = replace(plan, groups=groups, saved=saved)
            quality = evidence.trials.quality(frozenset(), short) if evidence.has_logits else None
        else:
            quality = evidence.quality(removed) if evidence.has_logits else None
        return plan if quality is None else replace(plan, **asdict(quality))

    def _chosen(self, evidence: Evidence) -> tuple[Removed, float | None]:
        """The blocks to remove, and the predicted speed-up where that is the goal."""
        choose = STRATEGIES[self.strategy](evidence)
        if self.remove is not None:
            return self._fixed(evidence, choose, self.remove), None
        if self.target_speedup is not None:
            return self._fast(evidence, choose, self.target_speedup)
        return self._within(evidence, choose), None

    def _fixed(self, evidence: Evidence, choose: Strategy, count: int) -> Removed:
        least = 0 if self.strategy == "fold" else 1
        if type(count) is not int or not least <= count < evidence.count:
            what = "blocks" if self.granularity == "layers" else self.granularity
            raise PlanError(f"remove={count!r}: the model has {evidence.count} {what}, one has to stay")
        return choose(count)

    def _within(self, evidence: Evidence, choose: Strategy) -> Removed:
        """The most blocks without which the quality still is within the bound."""
        found: Removed | None = None
        for count in range(0 if self.strategy == "fold" else 1, evidence.count):
            try:
                removed = choose(count)
                quality = self._quality(evidence, removed)
            except PlanError:
                if found is None:
                    raise
                break
            if excess := self._excess(quality):
                if found is None:
                    what = _without(evidence, removed)
                    raise PlanError(f"{excess} already {what}; none can go")
                break
            found = removed
        return found or frozenset()

    def _quality(self, evidence: Evidence, removed: Removed) -> Quality:
        """What is lost without the units `removed`, and by folding the others."""
        if self.strategy != "fold":
            return evidence.quality(removed)
        return evidence.trials.quality(frozenset(), folded(evidence, removed, self.shared)[0])

    def _excess(self, quality: Quality) -> str | None:
        """How a bound is broken, in words; None where it is kept."""
        if self.max_kl is not None and quality.kl > self.max_kl:
            return f"max_kl={self.max_kl}: the divergence is {quality.kl:.4g} nats per token"
        if self.min_top1 is not None and quality.top1 < self.min_top1:
            return f"min_top1={self.min_top1}: the share is {quality.top1:.4g}"
        if (bound := self.max_ppl_increase) is None:
            return None
        if (increase := quality.perplexity_increase) is None:
            raise PlanError(f"max_ppl_increase={bound} needs a model that predicts the next token")
        if increase > bound:
            return f"max_ppl_increase={bound}: the perplexity grows by {increase:.4g}"
        return None

    def _fast(self, evidence: Evidence, choose: Strategy, target: float) -> tuple[Removed, float]:
        """The fewest units that make a step fast enough: by the prediction nearly, and as timed."""
        if target <= 1:
            raise PlanError(f"target_speedup={target}: how many times as fast is above 1")
        batch = evidence.batches[0]
        times = measure_units(evidence.model, evidence.units, batch, self.phase)
        best, enough = 1.0, target * (1 - 2 * TOLERANCE)  # predictions count clocks between units as well
        for count in range(1, evidence.count):
            if times.speedup_bound(count) < enough:
                continue
            removed = choose(count)
            predicted = times.seconds() / times.seconds(removed)
            if predicted < enough:
                continue
            # weights of its own, as the result has: shared ones are in the cache after the other's step
            short = without_units(evidence.model, evidence.stack, evidence.units, removed)
            found = compare_steps(evidence.model, short, batch, self.phase)
            best = max(best, found.speedup)
            if found.speedup >= target * (1 - TOLERANCE / 2):
                return removed, predicted
        best = max(best, times.greatest_speedup)
        raise PlanError(
            f"target_speedup={target}: at most {best:.2f} is reachable ({self.phase}): "
            f"{1e3 * times.rest_seconds:.3g} ms of {1e3 * times.seconds():.3g} ms "
            "are outside the blocks"
        )

    def apply(self, model: nn.Module, plan: SkipPlan) -> nn.Module:
        """A copy of `model` with the blocks that `plan` keeps; VerifyError where it is not correct."""
        evidence = self._evidence(model, "sublayers" if plan.names else "layers")
        stack = evidence.stack
        if (stack.path, len(stack.blocks)) != (plan.path, plan.blocks):
            raise PlanError(
                f"the plan is for {plan.blocks} blocks at {plan.path!r}; the model has "
                f"{len(stack.blocks)} at {stack.path!r}"
            )
        names = tuple(unit.name for unit in evidence.units) if plan.names else ()
        if names != plan.names:
            raise PlanError(
                f"the plan is for the sublayers {' '.join(plan.names)}; the model has {' '.join(names)}"
            )
        plan.check()
        removed = frozenset(plan.removed)
        short = without_units(model, stack, evidence.units, removed)
        batch = made_up_batch(model) if knows_inputs(model) else evidence.batches[0]
        check_function(model, evidence.units, removed, short, batch)
        if self.compensation != "none" and removed:
            evidence.refit(short, removed)
        if plan.groups:
            self._fold(evidence, short, plan)
        if can_be_saved(short):
            check_rebuild(short, stack, batch)
        check_generation(short, batch)
        return short

    def _fold(self, evidence: Evidence, short: nn.Module, plan: SkipPlan) -> None:
        if not self.calibration:
            raise PlanError("the plan's blocks share weights; give calibration=, to fit the norms on")
        stored = sum(parameter.numel() for parameter in short.parameters())
        saved = fold(evidence, short, plan.kept, plan.groups)
        check_shared(short, stored, saved)
        let_save(short, plan.path)

    def measure(self, model: nn.Module, plan: SkipPlan, changed: nn.Module) -> SkipMeasurement:
        """Parameters; with calibration the quality of the result, and with a target its speed."""
        evidence = self._evidence(model)
        left, whole_size = (sum(p.numel() for p in m.parameters()) for m in (changed, model))
        quality = None
        if self.calibration and evidence.has_logits:
            quality = evidence.trials.quality(frozenset(), changed)
            if excess := self._excess(quality):
                raise PlanError(f"{excess} with compensation={self.compensation!r}")
        if self.target_speedup is None:
            return SkipMeasurement(left, whole_size, quality)
        found = compare_steps(model, changed, evidence.batches[0], self.phase)
        if found.speedup < self.target_speedup * (1 - TOLERANCE):
            raise PlanError(
                f"target_speedup={self.target_speedup}: the result is "
                f"{speedup_text(found.speedup, found.speedup_range)} in {found.rounds} rounds, "
                f"predicted were {plan.speedup or 1.0:.2f}"
            )
        times = found.seconds, found.whole_seconds, found.speedup, found.speedup_range
        return SkipMeasurement(left, whole_size, quality, *times)

    def _evidence(self, model: nn.Module, granularity: str | None = None) -> Evidence:
        if not isinstance(model, nn.Module):
            raise PlanError(f"SkipLayers takes a module, not {type(model).__name__}")
        given = tuple(as_batch(batch, model) for batch in self.calibration) or (made_up_batch(model),)
        stack = find_stack(model, given[0])
        return Evidence(model, stack, given, granularity or self.granularity, self.compensation)


def _without(evidence: Evidence, removed: Removed) -> str:
    if not removed:
        return "by sharing weights"
    return f"without one block, {evidence.units[min(removed)].name}"
