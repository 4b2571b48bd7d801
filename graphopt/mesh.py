"""A mesh of ranks that need not exist: its axes, and a model split over it as one of them holds it.

Tensor parallelism is that of the model itself: transformers has a plan for many models, which names for
each projection how it is split. It is carried out by `torch.distributed.tensor.parallel`, so that what is
captured has the collectives that a run would have.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor.parallel import ParallelStyle

AXES = ("dp", "tp", "pp")


@dataclass(frozen=True)
class Mesh:
    """Degrees of data, tensor and pipeline parallelism. Ranks of one `tp` group are neighbours."""

    dp: int = 1
    tp: int = 1
    pp: int = 1

    @property
    def ranks(self) -> int:
        """How many ranks there are in all."""
        return self.dp * self.tp * self.pp

    @staticmethod
    def parse(text: str) -> "Mesh":
        """The mesh that `text` says; GraphoptError for another axis, or a degree that is none.

        >>> Mesh.parse("dp=2,tp=4"), Mesh.parse("tp=8").ranks
        (Mesh(dp=2, tp=4, pp=1), 8)
        """
        degrees: dict[str, int] = {}
        for part in text.split(","):
            axis, _, degree = (piece.strip() for piece in part.partition("="))
            if axis not in AXES:
                raise GraphoptError(f"mesh {text!r}: {axis!r} is no axis; there are {', '.join(AXES)}")
            if axis in degrees:
                raise GraphoptError(f"mesh {text!r} gives {axis} twice")
            if not degree.isdigit() or int(degree) < 1:
                raise GraphoptError(f"mesh {text!r}: write {axis}=N with a degree N of at least 1")
            degrees[axis] = int(degree)
        if degrees.get("pp", 1) > 1:
            raise GraphoptError(
                f"mesh {text!r}: a report on a stage of a pipeline is not made yet; cut the model with "
                "graphopt.passes.stage_partition.cut_stages, plan with graphopt.plan_pipeline"
            )
        return Mesh(**degrees)

    def __str__(self) -> str:
        return ",".join(f"{a}={getattr(self, a)}" for a in AXES if getattr(self, a) > 1) or "tp=1"


@contextlib.contextmanager
def ranks_of(count: int) -> "Iterator[DeviceMesh]":
    """A mesh of `count` ranks, seen from rank 0 of a group of which nothing can be sent.

    What is split over it can be captured, and must not be run. GraphoptError where the process belongs to
    a group already.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if not dist.is_available():
        raise GraphoptError("a mesh needs a torch that was built with torch.distributed")
    if dist.is_initialized():
        raise GraphoptError("this process is a rank of a group already: ask in one that is not")
    # Registers the backend "fake".
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", (count,), mesh_dim_names=("tp",))
    finally:
        dist.destroy_process_group()


def tensor_plan(model: nn.Module, name: str) -> dict[str, str]:
    """How the model's own plan splits its modules: a style for each path, `*` for any number.

    GraphoptError for a model without one.
    """
    plan: Mapping[str, str] | None = getattr(model, "tp_plan", None) or getattr(model, "_tp_plan", None)
    if not plan:
        raise GraphoptError(
            f"{name} ({type(model).__name__}) has no plan of tensor parallelism; models of transformers "
            "have one where their configuration says base_model_tp_plan, as those of llama, qwen2, "
            "mistral, gemma and phi3 do"
        )
    return dict(plan)


def split_over(model: nn.Module, name: str, mesh: "DeviceMesh") -> None:
    """Split `model` over `mesh` in place by its own plan; it may be on the meta device.

    GraphoptError for a model without a plan, a style that is not known here, or a degree that does not
    divide what it splits.
    """
    from torch.distributed.tensor.parallel import parallelize_module

    plan, degree = tensor_plan(model, name), mesh.size()
    styles = _styles()
    if unknown := next((p for p, s in plan.items() if s not in styles), None):
        raise GraphoptError(f"{name} splits {unknown} by {plan[unknown]!r}, which is not supported")
    _check_heads(model, name, plan, degree)
    tied = _tied(model)
    for path, style in plan.items():
        for module_path, module in _matching(model, path):
            _check_sizes(module_path, module, style, degree)
    chosen: Any = {path: styles[style] for path, style in plan.items() if styles[style] is not None}
    parallelize_module(model, mesh, chosen)
    for first, others in tied.items():
        _tie(model, first, others)


def _styles() -> "dict[str, ParallelStyle | None]":
    """Styles of transformers by their names there, as those of torch; None where a module stays whole."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    gathered = ColwiseParallel(output_layouts=Replicate())
    from_whole = RowwiseParallel(input_layouts=Replicate())
    return {
        "colwise": ColwiseParallel(),
        "colwise_gather_output": gathered,
        "colwise_rep": gathered,
        "rowwise": RowwiseParallel(),
        "rowwise_split_input": from_whole,
        "rowwise_rep": from_whole,
        "embedding_rowwise": from_whole,
        "replicate": None,
    }


def _matching(model: nn.Module, path: str) -> list[tuple[str, nn.Module]]:
    """The modules that `path` of a plan names."""
    pattern = re.compile(re.escape(path).replace(r"\*", r"\d+"))
    return [(name, module) for name, module in model.named_modules() if pattern.fullmatch(name)]


def _check_heads(model: nn.Module, name: str, plan: Mapping[str, str], degree: int) -> None:
    """Whole heads are split: their numbers must divide."""
    if not any(style == "colwise" and "attn" in path for path, style in plan.items()):
        return
    config: Any = getattr(model, "config", None)
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, key, None)
        if heads is not None and heads % degree:
            raise GraphoptError(f"tp={degree} does not divide the {heads} {key} of {name}")


def _check_sizes(path: str, module: nn.Module, style: str, degree: int) -> None:
    weight = getattr(module, "weight", None)
    if weight is None or style == "replicate":
        return
    by_rows = style.startswith("rowwise")
    size = weight.shape[1 if by_rows else 0]
    if size % degree:
        what = "inputs" if by_rows else "rows" if style.startswith("embedding") else "outputs"
        raise GraphoptError(f"tp={degree} does not divide the {size} {what} of {path}")


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Parameters with several names: the first, and the others."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {first: others for first, *others in names.values() if others}


def _tie(model: nn.Module, first: str, others: list[str]) -> None:
    """Let parameters that were one be one again; GraphoptError where they are split in different ways."""
    kept: Any = model.get_parameter(first)
    for name in others:
        found: Any = model.get_parameter(name)
        if getattr(found, "placements", None) != getattr(kept, "placements", None):
            raise GraphoptError(f"{first} and {name} are one parameter, and the plan splits them apart")
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner).register_parameter(last, kept)
