"""`graphopt report --mesh`: the model that the options name, and the report on one rank."""

import argparse
from typing import TYPE_CHECKING

from graphopt.errors import GraphoptError
from graphopt.model_options import loaded_model, passes_of

if TYPE_CHECKING:
    from graphopt.mesh_report import MeshModel
    from graphopt.models import LoadedModel
    from graphopt.report import Report


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of a mesh."""
    group = command.add_argument_group("one rank of a mesh")
    add = group.add_argument
    add("--mesh", metavar="AXIS=N,...", help="degrees of data and tensor parallelism: dp=2,tp=4")
    add("--links", metavar="FILE", help="what collectives take, as `graphopt calibrate` writes it")


def asked(options: argparse.Namespace) -> bool:
    """True where the report is to be on a mesh; GraphoptError for links without one."""
    if options.links and not options.mesh:
        raise GraphoptError("--links is for a report on a mesh: give --mesh, too")
    return bool(options.mesh)


def report(options: argparse.Namespace) -> "Report":
    """The report on one rank; without a budget nothing is recomputed."""
    import warnings

    from graphopt.cost_models.devices import get_device
    from graphopt.cost_models.link_file import read_links
    from graphopt.mesh import Mesh
    from graphopt.mesh_report import report_on
    from graphopt.terminal import bar

    mesh = Mesh.parse(options.mesh)
    links = read_links(options.links) if options.links else None
    bounded = options.memory is not None or options.activations is not None
    passes = passes_of(options, training=True) if bounded else []
    device = get_device(options.device)
    with warnings.catch_warnings(), bar(f"capturing one rank of {mesh}") as advance:
        warnings.simplefilter("ignore")
        model = model_of(options)
        return report_on(model, mesh, device, passes, links, not options.inference, advance)


def model_of(options: argparse.Namespace) -> "MeshModel":
    """A zoo model with as few layers as are asked for, or what a file makes."""
    import torch

    from graphopt import zoo
    from graphopt.mesh_report import MeshModel
    from graphopt.sized_model import sized_model

    if options.model not in zoo.ENTRIES:
        if options.model.endswith(".pt2"):
            raise GraphoptError(f"{options.model} is exported for one device: a mesh takes the model")
        if ".py:" not in options.model:
            zoo.entry_of(options.model)
        return MeshModel(options.model, lambda layers: _with_inputs(loaded_model(options)))
    sizes = {k: getattr(options, k) for k in ("batch", "seq") if getattr(options, k) is not None}
    sized = sized_model(
        options.model,
        size=options.size or "default",
        overrides=zoo.parse_overrides(",".join(options.set)),
        dtype=getattr(torch, options.dtype) if options.dtype else None,
    )

    def load(layers: int | None) -> "LoadedModel":
        return sized.load(**sizes, **({} if layers is None else {"layers": layers}))

    return MeshModel(options.model, load, sized.layers)


def _with_inputs(loaded: "LoadedModel") -> "LoadedModel":
    if not loaded.example_args and not loaded.example_kwargs:
        raise GraphoptError(f"{loaded.name} comes without inputs; return (model, inputs)")
    return loaded
