"""The tables and verdicts of `checkpoint_front`, from its results alone."""

from collections.abc import Iterable
from typing import Any

from harness import megabytes, table

CONVOLUTIONAL = ("resnet50", "unet")
LEAST = ("graphopt min", "graphopt streamed min")
BAR = 0.6  # our least peak without gradients, of the least of each kind of peer
BAR_CONVOLUTIONAL = 0.7
Points = list[dict[str, Any]]


def front_text(data: dict[str, Any]) -> str:
    """Verdicts first, then the points of each model."""
    good = {k: v for k, v in data.items() if "points" in v}
    parts = ["## Verdicts", verdict_peaks(good), verdict_flops(good), verdict_budgets(good)]
    parts += ["## Resident memory", resident_text(data)]
    for name, found in data.items():
        parts += [f"## {name}", points_text(found) if "points" in found else str(found["error"])]
    return "\n\n".join(parts)


def _done(found: dict[str, Any]) -> Points:
    return [p for p in found["points"] if "error" not in p]


def _at(found: dict[str, Any], label: str) -> dict[str, Any] | None:
    return next((p for p in _done(found) if p["label"] == label), None)


def _least(points: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    return min(points, key=lambda p: p["minus_gradients"], default=None)


def verdict_peaks(data: dict[str, Any]) -> str:
    """(a) the least peak, gradients taken off."""
    rows = []
    for name, found in data.items():
        ours = _least(p for label in LEAST if (p := _at(found, label)) is not None)
        kinds: dict[str, Points] = {}
        for point in _done(found):
            kinds.setdefault(point["kind"], []).append(point)
        bar = BAR_CONVOLUTIONAL if name in CONVOLUTIONAL else BAR
        for kind in ("checkpoint", "compiled checkpoint", "partitioner"):
            best = _least(kinds.get(kind, ()))
            if ours is None or best is None:
                rows.append([name, kind, *[None] * 5, bar, False])
                continue
            share = ours["minus_gradients"] / best["minus_gradients"]
            act = ours["activations"] / best["activations"]
            rows.append(
                [
                    name,
                    kind,
                    best["label"],
                    megabytes(best["minus_gradients"]),
                    megabytes(ours["minus_gradients"]),
                    f"{share:.3f}",
                    f"{act:.3f}",
                    bar,
                    share <= bar,
                ]
            )
    head = ["model", "against", "their best", "theirs MB", "ours MB", "ratio", "activations ratio"]
    text = table([*head, "bar", "met"], rows)
    return (
        "(a) Least peak minus gradients: memory='min', recomputing alone or with streamed blocks, "
        f"against the best of each kind.\n\n{text}"
    )


def verdict_flops(data: dict[str, Any]) -> str:
    """(b) recomputation at each peer's own peak."""
    rows, met, total = [], 0, 0
    for name, found in data.items():
        ours = [p for p in found["points"] if "peer_peak" in p]
        for peer in _done(found):
            if peer["kind"] in ("eager", "graphopt"):
                continue
            fitting = [p for p in ours if p["peer_peak"] <= peer["peak"]]
            match = max(fitting, key=lambda p: p["peer_peak"], default=None)
            known = match is not None and "error" not in match
            mine = match["recomputed_flops"] if match is not None and known else None
            base = found["eager_flops"]
            whole = peer.get("joint_flops") is None or peer["joint_flops"] >= base
            ok = mine is not None and mine <= peer["recomputed_flops"] if whole else None
            met, total = met + bool(ok), total + whole
            rows.append(
                [
                    name,
                    peer["label"],
                    megabytes(peer["peak"]),
                    f"{'' if whole else '> '}{_share(peer['recomputed_flops'], base)}",
                    _share(mine, base),
                    megabytes(match["peak"]) if known and match else None,
                    ok,
                ]
            )
    head = ["model", "peer", "its peak MB", "recomputes", "ours recomputes", "our peak MB", "met"]
    return (
        f"(b) Recomputed FLOPs, as a share of the step's, at each peer's peak: met in {met} of "
        f"{total}. A peer that ran a part of the step outside its graphs (>) recomputes more than "
        f"was counted, and is left out.\n\n{table(head, rows)}"
    )


def verdict_budgets(data: dict[str, Any]) -> str:
    """(c) budgets kept, predictions."""
    rows, met, total, ratios = [], 0, 0, []
    for name, found in data.items():
        for p in found["points"]:
            if p["kind"] != "graphopt":
                continue
            if "error" in p:
                rows.append([name, p["label"], p["error"].replace("|", "/"), *[None] * 4])
                continue
            predicted = p["predicted_bytes"] - p["static_bytes"]
            ratio = None if "activations" in p["options"] else p["peak"] / predicted
            ratios += [ratio] if ratio else []
            if p["within"] is not None:
                met, total = met + p["within"], total + 1
            shown = [megabytes(predicted), megabytes(p["peak"])]
            counted = p["counted_flops"] == p["recomputed_flops"]
            rows.append([name, p["label"], *shown, ratio, p["within"], counted])
    head = ["model", "ours", "predicted MB", "measured MB", "measured/predicted"]
    text = table([*head, "within budget", "FLOPs as counted"], rows)
    span = f"{min(ratios):.4f} to {max(ratios):.4f}" if ratios else "-"
    return f"(c) Budgets kept: {met} of {total}; measured/predicted {span}.\n\n{text}"


def resident_text(data: dict[str, Any]) -> str:
    """Growth of resident memory beside the allocator's events."""
    rows = []
    for name, found in data.items():
        for label, both in found.get("resident", {}).items():
            if "error" in both:
                rows.append([name, label, both["error"], None, None])
                continue
            ratio = both["resident"] / both["events"]
            shown = [megabytes(both["events"]), megabytes(both["resident"])]
            rows.append([name, label, *shown, f"{ratio:.3f}"])
    return table(["model", "point", "events MB", "resident MB", "ratio"], rows)


def points_text(found: dict[str, Any]) -> str:
    """All points of one model."""
    rows = []
    for p in found["points"]:
        if "error" in p:
            rows.append([p["label"], p["error"].replace("|", "/"), *[None] * 5])
            continue
        time = p.get("time")
        shown = f"{time['median']:.2f} ({time['low']:.2f}-{time['high']:.2f})" if time else None
        shown = "1" if p["kind"] == "eager" else shown
        rows.append(
            [
                p["label"],
                megabytes(p["peak"]),
                megabytes(p["minus_gradients"]),
                megabytes(p["activations"]),
                _share(p["recomputed_flops"], found["eager_flops"]),
                f"{p['recomputed_flops'] / 1000000000.0:.2f}",
                shown,
            ]
        )
    rounds = {p["time"]["rounds"] for p in found["points"] if p.get("time")}
    head = ["strategy", "peak MB", "minus gradients", "activations", "recomputed", "GFLOP", "time"]
    runs = f"peak: 1 measured step each; time: median (quartiles) of {max(rounds, default=0)} pairs"
    return (
        f"One step is {found['eager_flops'] / 1e9:.2f} GFLOP; {runs}; "
        f"{found['environment']['date']}, torch {found['environment']['torch']}"
        f"{', quick' if found['quick'] else ''}.\n\n{table(head, rows)}"
    )


def _share(flops: int | None, total: int) -> str | None:
    return None if flops is None else f"{flops / total:+.1%}" if flops else "0"
