"""Trains a small GPT-2 twice, plain and optimized by graphopt, and compares the two.

Both copies start from the same weights and see the same batches with the same seeds, step by step
in turn. Step 1 compiles, step 2 is measured by the allocator, the others are timed.
"""

import argparse
import copy
import time
from dataclasses import dataclass, field
from functools import partial
from pydoc_data.topics import topics
from statistics import median

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import graphopt

MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=30, help="training steps (default 30)")
    parser.add_argument("--layers", type=int, default=6, help="transformer blocks (default 6)")
    parser.add_argument("--width", type=int, default=256, help="embedding size (default 256)")
    parser.add_argument("--length", type=int, default=256, help="bytes per sequence (default 256)")
    parser.add_argument("--batch", type=int, default=4, help="sequences per batch (default 4)")
    parser.add_argument(
        "--memory",
        default="0.4",
        help="budget for the peak: '200MiB', a share of the plain peak (default 0.4), or 'min'",
    )
    arguments = parser.parse_args()
    if arguments.steps < 3:
        parser.error("--steps: at least 3, one to compile, one to measure, one to time")
    return arguments


def parse_memory(text: str) -> str | float:
    """A fraction as a number, anything else as it is written."""
    try:
        return float(text)
    except ValueError:
        return text


def make_model(layers: int, width: int, length: int) -> GPT2LMHeadModel:
    """A GPT-2 over bytes, with random weights."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_layer=layers,
        n_embd=width,
        n_head=width // 64,
        n_positions=length,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"  # its default; unnamed, it logs a warning
    return model


def make_batches(steps: int, batch: int, length: int) -> torch.Tensor:
    """Random pieces of the language reference that comes with Python: [steps, batch, length]."""
    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(text) - length, (steps, batch, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


@dataclass
class Run:
    """One training: a model, its optimizer, and what was seen step by step."""

    model: torch.nn.Module
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-4)

    def step(self, seed: int, batch: torch.Tensor) -> None:
        """One training step on `batch` of [batch, length] bytes."""
        torch.manual_seed(seed)
        begin = time.perf_counter()
        loss = self.model(input_ids=batch, labels=batch).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()  # here, so that the next step's peak has its gradients
        self.losses.append(loss.item())
        self.seconds.append(time.perf_counter() - begin)


def train(runs: list[Run], batches: torch.Tensor) -> None:
    """Takes the same steps with each run in turn, and prints their losses side by side."""
    print(f"{'step':>4}{'eager loss':>14}{'graphopt loss':>16}{'difference':>14}")
    for number, batch in enumerate(batches, start=1):
        for run in runs:
            step = partial(run.step, number, batch)
            if number == 2:
                run.peak_bytes = graphopt.measure(step).peak_bytes
            else:
                step()
        if number == 1 or number % 5 == 0:
            eager, ours = (run.losses[-1] for run in runs)
            print(f"{number:4}{eager:14.6f}{ours:16.6f}{abs(eager - ours):14.1e}", flush=True)


def main() -> None:
    """Trains both, then prints peaks and times."""
    arguments = parse_arguments()
    model = make_model(arguments.layers, arguments.width, arguments.length)
    optimized = graphopt.optimize(copy.deepcopy(model), memory=parse_memory(arguments.memory))
    print(f"GPT-2 of {model.num_parameters():,} parameters, memory={arguments.memory}\n")

    runs = [Run(model), Run(optimized)]
    train(runs, make_batches(arguments.steps, arguments.batch, arguments.length))

    print(f"\n{'':<20}{'eager':>12}{'graphopt':>12}{'ratio':>8}")
    static_bytes = sum(t.nbytes for t in {*model.parameters(), *model.buffers()})
    peaks = [(static_bytes + run.peak_bytes) / MIB for run in runs]
    times = [median(run.seconds[2:]) * 1e3 for run in runs]
    for label, (eager, ours) in [("peak memory, MiB", peaks), ("median step, ms", times)]:
        print(f"{label:<20}{eager:12.1f}{ours:12.1f}{ours / eager:8.2f}")
    print(f"{'predicted peak, MiB':<20}{'':12}{optimized.report.predicted_peak_bytes / MIB:12.1f}")


if __name__ == "__main__":
    main()
