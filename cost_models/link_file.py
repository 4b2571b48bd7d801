"""Measured costs of a link as a JSON file, so that it is measured once and planned with often."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from graphopt.cost_models.collectives import KINDS
from graphopt.cost_models.devices import Cluster, Device
from graphopt.cost_models.link_costs import LinkCosts, fitted
from graphopt.errors import GraphoptError

_FORMAT = 1


def links_to_json(links: LinkCosts) -> str:
    """`links` as text. Beside the samples stands the line through them: seconds, and seconds a byte."""
    lines = {kind: asdict(fitted(samples)) for kind, samples in links.samples.items()}
    collectives = {
        kind: {**lines[kind], "samples": [list(sample) for sample in sorted(samples)]}
        for kind, samples in links.samples.items()
    }
    data = {
        "graphopt_links": _FORMAT,
        "contention": links.contention,
        "contention_spread": links.contention_spread,
        "collectives": collectives,
        "cluster": asdict(links.cluster),
    }
    return json.dumps(data, indent=1) + "\n"


def read_links(path: str | Path) -> LinkCosts:
    """The costs in a file of `graphopt calibrate`, for `OverlapComm(links=...)`.

    Times are those of the samples; edit these to plan for another link. GraphoptError where the file is
    not there or no such file.
    """
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise GraphoptError(f"the links in {path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("graphopt_links") != _FORMAT:
        raise GraphoptError(f"{path} is no file of `graphopt calibrate`, format {_FORMAT}")
    try:
        found = {kind: item["samples"] for kind, item in data["collectives"].items()}
        if unknown := sorted(set(found) - set(KINDS)):
            raise GraphoptError(f"{path} has times of {unknown[0]}, which is none of {', '.join(KINDS)}")
        samples = {kind: tuple((int(n), float(s)) for n, s in item) for kind, item in found.items()}
        for item in samples.values():
            fitted(item)
        share, spread = float(data["contention"]), float(data.get("contention_spread", 0.0))
        return LinkCosts(_cluster(data["cluster"]), samples, share, spread)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GraphoptError(f"{path} is incomplete: {type(error).__name__} {error}") from error


def _cluster(data: dict[str, Any]) -> Cluster:
    device = data["device"]
    rates = tuple((name, float(rate)) for name, rate in device["flops_per_s"])
    return Cluster(**{**data, "device": Device(**{**device, "flops_per_s": rates})})
