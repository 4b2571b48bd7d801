"""What there is to choose from, as plain data: passes with their options, devices, models."""

import dataclasses
from typing import Any

from graphopt import passes as public_passes
from graphopt import zoo
from graphopt.cost_models.devices import KNOWN_DEVICES
from graphopt.passes.base import Pass
from graphopt.passes.module_pass import ModulePass
from graphopt.passes.split_vocab import SplitVocab


def passes() -> list[dict[str, Any]]:
    """The public passes: `name`, `class`, `summary`, and `options` with `name`, `type`, `default`."""
    kinds = [getattr(public_passes, name) for name in public_passes.__all__]
    return [
        {
            "name": kind.name,
            "class": kind.__name__,
            "summary": (kind.__doc__ or "").strip().splitlines()[0],
            "options": [_option(field) for field in dataclasses.fields(kind)],
        }
        for kind in kinds
        if isinstance(kind, type) and issubclass(kind, Pass | ModulePass | SplitVocab)
    ]


def _option(field: "dataclasses.Field[Any]") -> dict[str, str]:
    known = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    required = field.default is dataclasses.MISSING
    return {
        "name": field.name,
        "type": known,
        "default": "required" if required else repr(field.default),
    }


def devices() -> list[dict[str, Any]]:
    """The known devices, with the fields of `Device`; rates by dtype, per second."""
    return [
        {**dataclasses.asdict(device), "flops_per_s": dict(device.flops_per_s)}
        for device in KNOWN_DEVICES.values()
    ]


def models() -> list[dict[str, str]]:
    """The models of the zoo: `name`, `family`, and `class` in the package `source`."""
    return [
        {
            "name": entry.name,
            "family": entry.family,
            "class": entry.model_class,
            "source": entry.source,
        }
        for entry in zoo.ENTRIES.values()
    ]
