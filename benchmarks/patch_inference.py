"""Peak of an inference with patches against the plain one: a MobileNetV2 and a ResNet-50, large images.

    python benchmarks/patch_inference.py [--models mobilenet-v2,resnet-50] [--sizes 512,768,1024]

One image, weights untrained with made-up running statistics, no gradients. Peaks are of the
allocator, above what was live before (parameters, buffers, the image), one run after one that warms
up: its events repeat exactly. `plain` is the model as it is. Seconds are medians of a few runs in turn.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import fresh, interleaved, megabytes, note, records, setup, stored, table, write
from torch import nn

import graphopt
from graphopt import PlanError, zoo
from graphopt.measurement import measure

BUDGETS: tuple[Any, ...] = (None, 0.25, "min")
BAR = 4.0
ROUNDS = 5
# Table 2 of Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018):
# expansion, channels, blocks, stride of the first block.
STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution, its norm and ReLU6."""
    padding = kernel // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


class InvertedResidual(nn.Module):
    """Wide inside, narrow outside; the input is added where the shapes allow it."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.layers = nn.Sequential(
            *([layer(inputs, wide, 1)] if expansion > 1 else []),
            layer(wide, wide, 3, stride, groups=wide),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, inputs, h, w] to [batch, outputs, h / stride, w / stride]."""
        return x + self.layers(x) if self.adds else self.layers(x)


class MobileNetV2(nn.Module):
    """Width 1.0, 1000 classes."""

    def __init__(self) -> None:
        super().__init__()
        blocks, channels = [layer(3, 32, 3, 2)], 32
        for expansion, outputs, count, stride in STAGES:
            for i in range(count):
                step = stride if i == 0 else 1
                blocks.append(InvertedResidual(channels, outputs, step, expansion))  # type: ignore[arg-type]
                channels = outputs
        self.features = nn.Sequential(*blocks, layer(channels, 1280, 1))
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[batch, 3, h, w] to [batch, 1000]."""
        return self.classifier(self.features(pixel_values).mean((2, 3)))


def made_up_statistics(model: nn.Module) -> nn.Module:
    """`model` in inference mode, with running statistics that are not zeros and ones."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return model.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet-v2": MobileNetV2,
    "resnet-50": lambda: zoo.build("resnet50", "default"),
}


def logits(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """One inference."""
    with torch.no_grad():
        result = model(pixel_values=image)
    return result if isinstance(result, torch.Tensor) else result.logits


def cell(name: str, size: int, budget: Any) -> dict[str, Any]:
    """One model at one size of image and one budget for the activations: planned and measured."""
    fresh()
    model = made_up_statistics(MODELS[name]())
    image = torch.randn(1, 3, size, size)
    found: dict[str, Any] = {"model": name, "size": size, "budget": str(budget)}
    want = logits(model, image)
    found["plain_peak"] = measure(lambda: logits(model, image)).peak_bytes
    try:
        ours = graphopt.optimize(model, passes=[graphopt.PatchInference(activations=budget)])
        got = logits(ours, image)
    except PlanError as error:
        return found | {"error": str(error)}
    found["peak"] = measure(lambda: logits(ours, image)).peak_bytes
    record = records(ours)[-1]
    plan, static = record.steps[-1].plan, record.static_bytes
    ratio = interleaved(lambda: logits(model, image), lambda: logits(ours, image), ROUNDS, 1)
    return found | {
        "predicted_peak": plan.peak_bytes - static,
        "end": plan.end,
        "grid": list(plan.grid),
        "extra_flops_share": plan.extra_flops / plan.step_flops,
        "time_ratio": ratio.median,
        "plan_seconds": record.steps[-1].seconds,
        "difference": float((got - want).abs().max() / want.abs().max()),
    }


def report(rows: list[dict[str, Any]]) -> str:
    """The table of peaks."""
    head = ["model", "image", "budget", "plain MB", "patches MB", "times less", "predicted/measured"]
    head += ["prefix ends at", "grid", "more FLOPs", "time ratio", "difference", "plan s"]
    lines = []
    for row in rows:
        shown = [row["model"], row["size"], row["budget"], megabytes(row["plain_peak"])]
        if "error" in row:
            lines.append([*shown, *[None] * 3, "cannot be met", *[None] * 5])
            continue
        shown += [megabytes(row["peak"]), row["plain_peak"] / row["peak"]]
        shown += [f"{row['predicted_peak'] / row['peak']:.4f}", row["end"]]
        shown += ["x".join(map(str, row["grid"])), f"{row['extra_flops_share']:.1%}"]
        lines.append([*shown, row["time_ratio"], row["difference"], row["plan_seconds"]])
    least = [r["plain_peak"] / r["peak"] for r in rows if r["budget"] == "min" and "peak" in r]
    good = sum(r >= BAR for r in least)
    return f'{table(head, lines)}\n\nAt least {BAR:g} times less at "min": {good} of {len(least)}.'


def main() -> None:
    """All models at all sizes and budgets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--sizes", default="512,768,1024")
    options = parser.parse_args()
    setup()
    rows = stored("patch_inference", [])
    for name in options.models.split(","):
        for size in map(int, options.sizes.split(",")):
            rows = [r for r in rows if (r["model"], r["size"]) != (name, size)]
            for budget in BUDGETS:
                rows.append(cell(name, size, budget))
                note(f"{rows[-1]}")
            rows.sort(key=lambda r: (r["model"], r["size"]))
            write("patch_inference", "Inference patch by patch", rows, report(rows))


if __name__ == "__main__":
    main()
