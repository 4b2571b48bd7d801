"""What `SkipLayers` decides and measures, as plain data that prints."""

from dataclasses import dataclass

from graphopt.errors import PlanError
from graphopt.passes.layer_trials import Quality
from graphopt.plan import Plan

Groups = tuple[tuple[int, ...], ...]  # positions of blocks that share weights; the first owns them


@dataclass(frozen=True)
class SkipPlan(Plan):
    """Which blocks of the list `path` stay, why, and what is expected of the model then.

    `blocks` is how many there are, and `kept` the positions of those that stay. Where sublayers were
    chosen, `names` has the name of each (`3.attention`), and `kept` are positions in it. `influence` is
    the Block Influence of every block. The blocks of each of `groups` run with the weights of its
    first, their norms excepted, so that `saved` parameters less are stored. `kl` (nats per token),
    `top1` (share of tokens) and `perplexity` are expected on the calibration batches; `speedup` is that
    of a step of the phase asked for. Figures that nothing asked for are empty or None.
    """

    path: str
    blocks: int
    kept: tuple[int, ...]
    strategy: str
    influence: tuple[float, ...] = ()
    kl: float | None = None
    top1: float | None = None
    perplexity: float | None = None
    whole_perplexity: float | None = None
    speedup: float | None = None
    names: tuple[str, ...] = ()
    groups: Groups = ()
    saved: int = 0

    @property
    def units(self) -> int:
        """How many there were to choose from: blocks or sublayers."""
        return len(self.names) or self.blocks

    @property
    def removed(self) -> tuple[int, ...]:
        """The positions of the blocks, or sublayers, that go."""
        return tuple(sorted(set(range(self.units)) - set(self.kept)))

    def check(self) -> None:
        """PlanError unless the positions exist, ascend, and are at least one."""
        kept = list(self.kept)
        what = "sublayers" if self.names else "blocks"
        if not kept:
            raise PlanError(f"keep={kept}: at least one of the {self.units} {what} stays")
        if any(type(i) is not int or not 0 <= i < self.units for i in kept):
            raise PlanError(f"keep={kept}: the {what} of {self.path} are 0 to {self.units - 1}")
        if sorted(set(kept)) != kept:
            raise PlanError(f"keep={kept}: positions ascend, each once")
        self._check_groups()

    def _check_groups(self) -> None:
        if not self.groups:
            return
        groups = [list(group) for group in self.groups]
        members = [i for group in groups for i in group]
        if self.names:
            raise PlanError(f"groups={groups}: whole blocks share weights, not sublayers")
        if any(len(group) < 2 for group in groups) or len(set(members)) != len(members):
            raise PlanError(f"groups={groups}: two blocks or more share weights, each in one group")
        if gone := sorted(set(members) - set(self.kept)):
            raise PlanError(f"groups={groups}: {', '.join(map(str, gone))} does not stay")

    def __str__(self) -> str:
        path = self.path or "the model"
        what = "sublayers" if self.names else "blocks"
        lines = [
            f"{len(self.kept)} of {self.units} {what} of {path} stay ({self.strategy})",
            f"  kept     {self._written(self.kept)}",
            f"  removed  {self._written(self.removed)}",
        ]
        if self.groups:
            shared = "; ".join(
                f"{' '.join(map(str, others))} with the weights of {first}"
                for first, *others in self.groups
            )
            lines.append(f"  shared   {shared}: {self.saved} parameters less")
        if self.influence:
            lines.append("  block influence  " + " ".join(f"{value:.3f}" for value in self.influence))
        figures = quality_text(self.kl, self.top1, self.perplexity, self.whole_perplexity)
        if self.speedup is not None:
            figures.append(f"{self.speedup:.2f} times as fast")
        if figures:
            lines.append(f"  predicted  {', '.join(figures)}")
        return "\n".join(lines)

    def _written(self, positions: tuple[int, ...]) -> str:
        return " ".join(self.names[i] if self.names else str(i) for i in positions) or "none"


@dataclass(frozen=True)
class SkipMeasurement:
    """What was measured of the shortened model; None where there was nothing to measure it on.

    `seconds` are of a step of the shortened model, `whole_seconds` of the whole one; `speedup` is the
    median ratio of steps in turns, in `speedup_range` with 95 % confidence.
    """

    parameters: int
    whole_parameters: int
    quality: Quality | None = None
    seconds: float | None = None
    whole_seconds: float | None = None
    speedup: float | None = None
    speedup_range: tuple[float, float] | None = None

    def __str__(self) -> str:
        figures = [f"{self.parameters} of {self.whole_parameters} parameters"]
        if (q := self.quality) is not None:
            figures += quality_text(q.kl, q.top1, q.perplexity, q.whole_perplexity)
        if self.speedup is not None and self.speedup_range is not None:
            figures.append(speedup_text(self.speedup, self.speedup_range))
        return f"  measured   {', '.join(figures)}"


def quality_text(
    kl: float | None, top1: float | None, perplexity: float | None, whole: float | None
) -> list[str]:
    """The figures that are known.

    >>> quality_text(0.05, 0.9, 12.0, 10.0)
    ['KL 0.05 nats', 'top-1 90.0 %', 'perplexity 12 (whole 10)']
    """
    found = []
    if kl is not None and top1 is not None:
        found += [f"KL {kl:.4g} nats", f"top-1 {100 * top1:.1f} %"]
    if perplexity is not None and whole is not None:
        found.append(f"perplexity {perplexity:.4g} (whole {whole:.4g})")
    return found


def speedup_text(speedup: float, bounds: tuple[float, float]) -> str:
    """The ratio and its range.

    >>> speedup_text(1.5, (1.48, 1.52))
    '1.50 (1.48 to 1.52) times as fast'
    """
    return f"{speedup:.2f} ({bounds[0]:.2f} to {bounds[1]:.2f}) times as fast"
