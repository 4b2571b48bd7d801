"""What is learned when only some parameters are updated, at equal memory.

    pip install scikit-learn
    python benchmarks/sparse_update.py [--tasks digits,text] [--seeds 3]

Two small models are pretrained, then fine-tuned on other data with Adam: a convolutional network from
upright digits to the same digits turned by 90 degrees (scikit-learn's 1797 images), and a transformer
from Python's documentation (as `pydoc_data.topics` carries it) to Python's source code (`argparse`).
Every way updates its own choice of parameters: all; the head; the biases and norms; the last layers;
and what `SparseUpdate` chooses, from the gradients of a few batches, within the memory of each of
those. Memory is that of the whole step: parameters, buffers, batch, Adam's state, and the peak that
the allocator reports for forward and backward. All ways run through graphopt, so that the choice is all
that differs. What is reached is of held-out data: accuracy, or loss in nats per character; the mean
over seeds, with the standard deviation.
"""

import argparse
import copy
import pydoc_data.topics
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from harness import fresh, megabytes, note, records, setup, stored, table, write
from torch import nn

import graphopt
from graphopt import PlanError, SparseUpdate, calibration_gradients
from graphopt.cost_models.calibrate import calibrated_cpu
from graphopt.cost_models.costs import Costs
from graphopt.measurement import measure

ALL = SparseUpdate(optimizer="adam")  # of the parameters that want a gradient
CALIBRATION_BATCHES = 4
ALPHABET, LENGTH = 128, 64
Batch = tuple[torch.Tensor, torch.Tensor]


class Digits(nn.Module):
    """Six convolutions with norms over images [batch, 1, 16, 16]; returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, stride in (
            *((1, 16, 1), (16, 16, 1), (16, 32, 2)),
            *((32, 32, 1), (32, 64, 2), (64, 64, 1)),
        ):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(64, 10)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, 10]."""
        return self.head(self.features(x).mean((2, 3)))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean loss."""
        return F.cross_entropy(self.logits(x), target)


class Text(nn.Module):
    """A causal transformer of three blocks over characters [batch, 64]; returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(ALPHABET, 64)
        self.place = nn.Embedding(LENGTH, 64)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(3)
        )
        self.head = nn.Linear(64, ALPHABET)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH))

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean loss, in nats per character."""
        y = self.embed(x) + self.place.weight
        for block in self.blocks:
            y = block(y, src_mask=self.mask, is_causal=True)
        return F.cross_entropy(self.head(y).flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class Task:
    """A model, its data before and after the change, and how it is trained and judged.

    `last` names the modules that "the last layers" are. `batch(step, new, held_out)` draws a batch.
    """

    model: Callable[[], nn.Module]
    last: tuple[str, ...]
    batch: Callable[[torch.Generator, bool, bool], Batch]
    score: Callable[[nn.Module, Sequence[Batch]], float]
    unit: str
    pretraining: int
    steps: int
    learning_rate: float


# --- data --------------------------------------------------------------------------------------


def digits() -> Task:
    """Upright digits, then digits turned by 90 degrees."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    classes = torch.tensor(data.target)
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    parts = {True: order[:500], False: order[500:]}  # held out or not

    def batch(generator: torch.Generator, new: bool, held_out: bool) -> Batch:
        part = parts[held_out]
        rows = part[torch.randint(len(part), (64,), generator=generator)]
        x = images[rows]
        return (x.rot90(1, (2, 3)).contiguous() if new else x), classes[rows]

    def accuracy(model: nn.Module, batches: Sequence[Batch]) -> float:
        logits: Any = model.logits
        right = [(logits(x).argmax(1) == y).float().mean().item() for x, y in batches]
        return 100 * statistics.mean(right)

    return Task(Digits, ("features.15", "features.16", "head"), batch, accuracy, "%", 200, 60, 2e-3)


def text() -> Task:
    """Python's documentation, then Python's source code."""
    prose = "\n".join(pydoc_data.topics.topics.values())
    code = Path(argparse.__file__).read_text(encoding="utf-8")
    found = {new: _characters(words) for new, words in ((False, prose), (True, code))}

    def batch(generator: torch.Generator, new: bool, held_out: bool) -> Batch:
        every = found[new]
        border = len(every) * 4 // 5
        part = every[border:] if held_out else every[:border]
        starts = torch.randint(len(part) - LENGTH, (16,), generator=generator).tolist()
        rows = torch.stack([part[s : s + LENGTH + 1] for s in starts])
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()

    def loss(model: nn.Module, batches: Sequence[Batch]) -> float:
        return statistics.mean(model(*b).item() for b in batches)

    return Task(Text, ("blocks.2", "head"), batch, loss, "nats", 400, 100, 1e-3)


def _characters(words: str) -> torch.Tensor:
    return torch.tensor([min(ord(c), ALPHABET - 1) for c in words])


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "text": text}


# --- training ----------------------------------------------------------------------------------


def train(model: nn.Module, task: Task, steps: int, new: bool, generator: torch.Generator) -> None:
    """Update the parameters that want a gradient, with Adam."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(wanted, lr=task.learning_rate)
    for _ in range(steps):
        optimizer.zero_grad()
        model(*task.batch(generator, new, False)).backward()
        optimizer.step()


def updating(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """A copy of `model` in which only the parameters `names` want a gradient."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return model


def reached(model: nn.Module, task: Task) -> float:
    """The score on held-out data after the change; the model's mode is put back."""
    generator = torch.Generator().manual_seed(1)
    model.eval()
    with torch.no_grad():
        found = task.score(model, [task.batch(generator, True, True) for _ in range(16)])
    model.train()
    return found


def step_bytes(model: nn.Module, batch: Batch, pass_: SparseUpdate = ALL) -> int:
    """The whole step: what is there before it, Adam's state, the peak."""
    torch._dynamo.reset()
    ours = graphopt.optimize(copy.deepcopy(model), passes=[pass_])
    ours(*batch).backward()
    ours.zero_grad(set_to_none=True)
    peak = measure(lambda: ours(*batch).backward()).peak_bytes
    record = records(ours)[-1]
    static = record.static_bytes
    return int(static + record.steps[0].plan.state_bytes + peak)


def fixed_choices(model: nn.Module, task: Task) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The ways that do not depend on the data, and the parameters that they update."""
    names = [name for name, _ in model.named_parameters()]
    small = {name for name, p in model.named_parameters() if p.dim() == 1}
    yield "all", tuple(names)
    yield "head", tuple(n for n in names if n.startswith("head."))
    yield "biases and norms", tuple(n for n in names if n in small or n.startswith("head."))
    yield "last layers", tuple(n for n in names if n.startswith(tuple(f"{m}." for m in task.last)))


# --- one task ----------------------------------------------------------------------------------


def measured(name: str, seeds: int) -> list[dict[str, Any]]:
    """A row for each way: its memory, and what it reached with each seed."""
    fresh()
    task = TASKS[name]()
    torch.manual_seed(0)
    model = task.model()
    batch = task.batch(torch.Generator().manual_seed(0), True, False)
    rows: dict[str, dict[str, Any]] = {}
    for way, names in fixed_choices(model, task):
        used = step_bytes(updating(model, names), batch)
        rows[way] = {"task": name, "way": way, "bytes": used, "unit": task.unit, "reached": []}
    program = graphopt.trace(model, {"x": batch[0], "target": batch[1]})
    costs = Costs.measured(program, calibrated_cpu())
    for seed in range(seeds):
        torch.manual_seed(seed)
        pretrained = task.model()
        train(pretrained, task, task.pretraining, False, torch.Generator().manual_seed(seed))
        choices = dict(fixed_choices(pretrained, task))
        scores = _contributions(pretrained, task, seed)
        for way in [way for way in rows if way in choices and way != "all"]:
            ours = f"SparseUpdate, as {way}"
            try:
                pass_ = SparseUpdate(rows[way]["bytes"], scores=scores, optimizer="adam")
                plan = pass_.plan(program, costs)
            except PlanError as error:
                note(f"{name} {ours}: {error}")
                continue
            choices[ours] = plan.update
            if ours not in rows:
                row = {"task": name, "way": ours, "unit": task.unit, "reached": []}
                used = step_bytes(model, batch, pass_)
                rows[ours] = {**row, "bytes": used, "predicted_bytes": plan.peak_bytes}
        for way, names in choices.items():
            tuned = updating(pretrained, names)
            train(tuned, task, task.steps, True, torch.Generator().manual_seed(100 + seed))
            rows[way]["reached"].append(reached(tuned, task))
            rows[way]["updated"] = len(names)
            note(f"{name} seed {seed} {way}: {len(names)} tensors, {rows[way]['reached'][-1]:.3f}")
        rows["all"].setdefault("untuned", []).append(reached(pretrained, task))
    return list(rows.values())


def _contributions(model: nn.Module, task: Task, seed: int) -> dict[str, float]:
    """What a step of Adam on a few batches of the new data owes to each parameter."""
    generator = torch.Generator().manual_seed(200 + seed)
    batches = [task.batch(generator, True, False) for _ in range(CALIBRATION_BATCHES)]
    gradients = calibration_gradients(copy.deepcopy(model), batches)
    return dict(SparseUpdate(optimizer="adam", calibration=gradients).scores)  # type: ignore[arg-type]


def report(rows: list[dict[str, Any]]) -> str:
    """The table, a block for each task."""
    lines: list[list[Any]] = []
    for row in rows:
        whole = next(r for r in rows if (r["task"], r["way"]) == (row["task"], "all"))
        if row is whole:
            before = _spread(row["untuned"], row["unit"])
            lines.append([row["task"], "none, as pretrained", None, None, None, before])
        share = f"{row['bytes'] / whole['bytes']:.2f}"
        line = [row["task"], row["way"], row.get("updated"), megabytes(row["bytes"]), share]
        lines.append([*line, _spread(row["reached"], row["unit"])])
    head = ["task", "updated", "tensors (last seed)", "step MB", "of all", "reached"]
    return table(head, lines)


def _spread(found: Sequence[float], unit: str) -> str:
    return f"{statistics.mean(found):.2f} ± {statistics.stdev(found):.2f} {unit}"


def main() -> None:
    """Both tasks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    setup()
    rows = stored("sparse_update", [])
    for name in options.tasks.split(","):
        rows = [r for r in rows if r["task"] != name] + measured(name, options.seeds)
        write("sparse_update", "Fine-tuning with a part of the parameters", rows, report(rows))


if __name__ == "__main__":
    main()
