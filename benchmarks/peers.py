"""The peers: checkpoint by hand, under compilers too, and torch's own partitioner with its budget.

Every peer runs the model it is given. Compiled peers run their graphs boxed, so that arguments can
die, and their logging calls break no graph.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from harness import graph_flops
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._functorch import config as functorch_config
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomPartitionerFn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from transformers.modeling_layers import GradientCheckpointingLayer

from graphopt.capture import CaptureSettings
from graphopt.cost_models import flops

aten = torch.ops.aten

BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.05, 0.0)
SOLVERS = ("dp", "greedy", "ilp")
GROUPS = (2, 3, 4, 6)
_PRODUCTS = [  # what a selective policy keeps: the products, and attention
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.convolution.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
]
# Ops that torch's counter leaves out, or counts otherwise than `graphopt.cost_models.flops`.
_COUNTED_HERE = (
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten.convolution_backward,
)


@dataclass(frozen=True)
class Peer:
    """One way to run a model.

    `compiler`: "" (eager), "aot" (min-cut partitioner, eager order), "aot-decomp" (the same on
    Inductor's decompositions), "inductor". `every`: each how-manieth block is checkpointed; 0 none.
    `group`: how many consecutive blocks are one checkpoint, all but the last group of each stack, as
    `checkpoint_sequential` does. `selective`: products inside of checkpointed blocks are kept.
    """

    compiler: str = ""
    every: int = 0
    group: int = 1
    selective: bool = False
    budget: float = 1.0
    solver: str = "dp"

    @property
    def kind(self) -> str:
        """What is compared together: "eager", "checkpoint", "compiled checkpoint", "partitioner"."""
        if self.every:
            return "compiled checkpoint" if self.compiler else "checkpoint"
        return "partitioner" if self.compiler else "eager"

    def __str__(self) -> str:
        blocks = {0: "", 1: "checkpoint", 2: "checkpoint every 2nd block"}[self.every]
        blocks = f"checkpoint groups of {self.group}" if self.group > 1 else blocks
        blocks = "selective checkpoint" if self.selective else blocks
        if not self.compiler:
            return blocks or "eager"
        if blocks:
            return f"{self.compiler} + {blocks}"
        solver = f" {self.solver}" if 0 < self.budget < 1 else ""
        return f"{self.compiler} {self.budget:g}{solver}"


@dataclass
class Running:
    """A peer ready to run, and the FLOPs of each graph it compiled: (joint, forward and backward)."""

    module: Any
    counts: list[tuple[int, int]] = field(default_factory=list)

    @property
    def recomputed_flops(self) -> int:
        """What the compiled graphs do more than the joint graph they came from."""
        return sum(after - before for before, after in self.counts)


def peers(quick: bool) -> list[Peer]:
    """What is measured: every compiler, budget and solver; a choice of them in the quick mode."""
    found = [Peer(every=1), Peer(every=2), Peer(every=1, selective=True)]
    found += [Peer(every=1, group=size) for size in GROUPS]
    found += [Peer(c, every=1) for c in ("aot", "aot-decomp", "inductor")]
    if quick:
        found += [Peer("aot-decomp", budget=b) for b in BUDGETS]
        found += [Peer("aot-decomp", budget=0.1, solver=s) for s in SOLVERS[1:]]
        return found + [Peer("aot", budget=b) for b in BUDGETS[::2]]
    for compiler in ("aot-decomp", "aot", "inductor"):
        for budget in BUDGETS:
            solvers = SOLVERS if 0 < budget < 1 else SOLVERS[:1]
            found += [Peer(compiler, budget=budget, solver=s) for s in solvers]
    return found


@contextlib.contextmanager
def running(peer: Peer, model: nn.Module) -> Iterator[Running]:
    """`model`, or a copy that checkpoints, as `peer` runs it; to be used inside the context."""
    module = checkpointed(model, peer) if peer.every else model
    if not peer.compiler:
        yield Running(module)
        return
    result = Running(module)
    with contextlib.ExitStack() as stack:
        stack.enter_context(CaptureSettings())
        stack.enter_context(
            functorch_config.patch(
                activation_memory_budget=peer.budget,
                activation_memory_budget_solver=peer.solver,
                enable_autograd_cache=False,
                unlift_effect_tokens=True,
            )
        )
        backend: Any = "inductor"
        if peer.compiler == "inductor":
            counted = CountingPartitioner(result.counts)
            stack.enter_context(
                inductor_config.patch(force_disable_caches=True, custom_partitioner_fn=counted)
            )
        else:
            backend = _eager_order(peer.compiler == "aot-decomp", result.counts)
        result.module = torch.compile(module, backend=backend, dynamic=False)
        yield result


def _eager_order(decompose: bool, counts: list[tuple[int, int]]) -> Callable[..., Any]:
    """A backend: torch's partitioner, then each graph operator by operator."""
    from torch._inductor.compile_fx import select_decomp_table

    return aot_autograd(
        fw_compiler=boxed_nop,
        bw_compiler=boxed_nop,
        partition_fn=functools.partial(_partition, counts),
        decompositions=select_decomp_table() if decompose else None,
        keep_inference_input_mutations=True,
    )


def _partition(counts: list[tuple[int, int]], joint: Any, inputs: Any, **options: Any) -> Any:
    before = graph_flops(joint.graph)
    forward, backward = min_cut_rematerialization_partition(joint, inputs, **options)
    counts.append((before, graph_flops(forward.graph) + graph_flops(backward.graph)))
    return forward, backward


class CountingPartitioner(CustomPartitionerFn):
    """Inductor's default partitioner; what it decides is counted."""

    def __init__(self, counts: list[tuple[int, int]]) -> None:
        self.counts = counts

    def __call__(self, gm: Any, joint_inputs: Sequence[object], **kwargs: Any) -> Any:
        return _partition(self.counts, gm, joint_inputs, **kwargs)

    def uuid(self) -> Any:
        """No caching."""
        return None


# --- checkpoint by hand ------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Consecutive blocks that recompute their forward in the backward; each takes the last's result."""

    def __init__(self, blocks: Sequence[nn.Module], selective: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.options = {"use_reentrant": False} | ({"context_fn": _keep_products} if selective else {})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The blocks, checkpointed."""
        return checkpoint(self._run, *args, **self.options, **kwargs)

    def _run(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        result = x
        for block in self.blocks:
            first = result[0] if isinstance(result, tuple) else result
            result = block(first, *args, **kwargs)
        return result


def _keep_products() -> Any:
    return create_selective_checkpoint_contexts(_PRODUCTS)


def checkpointed(model: nn.Module, peer: Peer) -> nn.Module:
    """A copy of `model` whose blocks are checkpointed as `peer` says."""
    twin: Any = copy.deepcopy(model)
    by_option = twin.supports_gradient_checkpointing and peer.group == 1 and not peer.selective
    if not by_option:
        twin.config.use_cache = False  # a block that runs twice would extend the cache twice
        for stack in _stacks(twin):
            _wrap(stack, peer)
        return twin
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    blocks = [m for m in twin.modules() if getattr(m, "gradient_checkpointing", None) is True]
    leaves = [b for b in blocks if not any(o is not b and o in blocks for o in b.modules())]
    for number, block in enumerate(leaves):
        block.gradient_checkpointing = number % peer.every == 0
    return twin


def _stacks(model: Any) -> list[nn.Module]:
    """The lists of blocks of one class, of transformers, or the layers of the stages of a ResNet."""
    if hasattr(model.base_model, "encoder") and hasattr(model.base_model.encoder, "stages"):
        return [stage.layers for stage in model.base_model.encoder.stages]
    blocks = (GradientCheckpointingLayer, *getattr(model, "blocks", ()))
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    found = [m for m in lists if all(isinstance(b, blocks) for b in m)]
    return [m for m in found if not any(o is not m and o in found for o in m.modules())]


def _wrap(stack: Any, peer: Peer) -> None:
    """Checkpoint the blocks of `stack` in groups; of groups of several, all but the last."""
    blocks = list(stack.named_children())
    groups = [blocks[i : i + peer.group] for i in range(0, len(blocks), peer.group)]
    whole = groups[:-1] if peer.group > 1 else groups
    for number, group in enumerate(whole):
        if number % peer.every == 0:
            for name, _ in group[:-1]:
                delattr(stack, name)
            setattr(stack, group[-1][0], Checkpointed([b for _, b in group], peer.selective))


# --- counting ----------------------------------------------------------------------------------


def eager_flops(step: Callable[[], Any]) -> int:
    """FLOPs of what runs in eager mode; of no use for compiled code, which modes do not see."""
    mapping = {packet: _raw(packet) for packet in _COUNTED_HERE}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        step()
    return counter.get_total_flops()


def _raw(packet: Any) -> Callable[..., int]:
    def count(*args: Any, out_val: Any = None, **_: Any) -> int:
        return flops._FORMULAS[packet](out_val, *args)

    count._get_raw = True  # type: ignore[attr-defined]
    return count
