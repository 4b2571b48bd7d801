"""The fronts as a picture: memory against recomputation, per model, from `checkpoint_front`'s results.

    python benchmarks/figure.py [--models gpt2,llama,bert] [--out docs/fronts.svg]

Needs matplotlib.
"""

import argparse
from pathlib import Path
from typing import Any

from harness import stored

STYLES = {
    "eager": ("eager", "black", "s"),
    "checkpoint": ("torch.utils.checkpoint per block", "tab:orange", "^"),
    "partitioner": ("PyTorch's partitioner, all budgets", "tab:red", "x"),
    "graphopt": ("graphopt", "tab:blue", "o"),
}


def style_of(point: dict[str, Any]) -> tuple[str, str, str]:
    """Legend text, colour and marker of a point."""
    found = STYLES.get(point["kind"], STYLES["checkpoint"])
    return found


def draw(axes: Any, name: str, data: dict[str, Any]) -> None:
    """One model: every point, and those of ours joined that no other of ours is below."""
    seen: set[str] = set()
    line = []
    for point in data["points"]:
        if "peak" not in point or point.get("compiler") == "inductor":
            continue
        if "inductor" in point["label"] or "activations" in point["label"]:
            continue
        text, colour, marker = style_of(point)
        x, y = point["peak"] / 1e6, 100 * point["recomputed_flops"] / data["eager_flops"]
        axes.plot(
            x, y, marker, color=colour, label=None if text in seen else text, markersize=6, alpha=0.8
        )
        seen.add(text)
        if point["kind"] == "graphopt":
            line.append((x, y))
    front = [(x, y) for x, y in sorted(line) if not any(a <= x and b < y for a, b in line)]
    axes.plot(*zip(*front, strict=True), "-", color=STYLES["graphopt"][1], linewidth=1)
    axes.set_title(name)
    axes.set_xlabel("peak above parameters and inputs (MB)")
    axes.set_ylabel("recomputed FLOPs (% of a step)")
    axes.grid(alpha=0.3)


def main() -> None:
    """Draw the chosen models side by side."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "graphopt"
    from matplotlib import pyplot

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="gpt2,llama,bert")
    parser.add_argument("--out", default=str(Path(__file__).parent.parent / "docs" / "fronts.svg"))
    options = parser.parse_args()
    data = stored("checkpoint_front", {})
    names = [n for n in options.models.split(",") if n in data]
    figure, all_axes = pyplot.subplots(1, len(names), figsize=(4.4 * len(names), 3.6), squeeze=False)
    for axes, name in zip(all_axes[0], names, strict=True):
        draw(axes, name, data[name])
    all_axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    Path(options.out).parent.mkdir(exist_ok=True)
    figure.savefig(options.out, metadata={"Date": None})


if __name__ == "__main__":
    main()
