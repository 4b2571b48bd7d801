"""The operators that one block runs on its hidden states, with the modules that run them."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.passes.blocks import Batch, Stack, call, evaluation


@dataclass(frozen=True, eq=False)
class Op:
    """One operator: its tensors by number, and the modules of the block that were running."""

    target: Any
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True, eq=False)
class BlockGraph:
    """What a block ran between its hidden states `source` and its output `sink`, in order.

    `others` is, of each module that returned a tuple, how many values followed the first.
    """

    ops: tuple[Op, ...]
    source: int
    sink: int
    others: Mapping[nn.Module, int]

    def producers(self) -> dict[int, int]:
        """The position of the operator that made each tensor."""
        return {tensor: at for at, op in enumerate(self.ops) for tensor in op.outputs}

    def derived(self, stops: frozenset[int] = frozenset()) -> frozenset[int]:
        """The tensors that depend on the source by a way around `stops`."""
        found = {self.source} - stops
        for op in self.ops:
            if found & set(op.inputs):
                found |= set(op.outputs) - stops
        return frozenset(found)


class _Recorder(TorchDispatchMode):
    """Notes every operator while one of the blocks runs."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops: list[Op] = []
        self.others: dict[nn.Module, int] = {}
        self.running: list[nn.Module] = []
        self.kept: list[Tensor] = []  # an address is not used again as long as its tensor lives

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.running:
            inputs, outputs = (self._numbers(tree) for tree in ((args, kwargs), result))
            self.ops.append(Op(func, inputs, outputs, tuple(self.running)))
        return result

    def _numbers(self, tree: Any) -> tuple[int, ...]:
        tensors = [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
        self.kept += tensors
        return tuple(id(tensor) for tensor in tensors)


def block_graphs(model: nn.Module, stack: Stack, batch: Batch) -> tuple[BlockGraph, ...]:
    """The graph of each block of `stack`, as it runs on `batch`."""
    recorder, graphs = _Recorder(), []

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        recorder.ops.clear()

    def end(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        sink = output if isinstance(output, Tensor) else output[0]
        source = stack.hidden(args, kwargs)
        graphs.append(BlockGraph(tuple(recorder.ops), id(source), id(sink), recorder.others))

    with _tracked(stack, recorder), contextlib.ExitStack() as hooks:
        for block in stack.blocks:
            for handle in (
                block.register_forward_pre_hook(begin, with_kwargs=True, prepend=True),
                block.register_forward_hook(end, with_kwargs=True),
            ):
                hooks.callback(handle.remove)
        with evaluation(model), recorder:
            call(model, batch)
    return tuple(graphs)


@contextlib.contextmanager
def _tracked(stack: Stack, recorder: _Recorder) -> Iterator[None]:
    """The recorder knows which modules of the blocks are running."""

    def enter(module: nn.Module, args: Any) -> None:
        recorder.running.append(module)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        recorder.running.pop()
        if isinstance(output, tuple):
            recorder.others[module] = len(output) - 1

    modules = [module for block in stack.blocks for module in block.modules()]
    handles = [
        handle
        for module in modules
        for handle in (
            module.register_forward_pre_hook(enter),
            module.register_forward_hook(leave),
        )
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
