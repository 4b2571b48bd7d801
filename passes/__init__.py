"""Passes: each plans with the cost models, then edits a Program. Import as `graphopt.passes`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.passes.arena import Arena
    from graphopt.passes.checkpoint import Checkpoint
    from graphopt.passes.fuse import Fuse
    from graphopt.passes.offload_optimizer import OffloadOptimizer
    from graphopt.passes.offload_saved import OffloadSaved
    from graphopt.passes.overlap_comm import OverlapComm
    from graphopt.passes.pack_saved import PackSaved
    from graphopt.passes.patch_inference import PatchInference
    from graphopt.passes.skip_decode import SkipDecode
    from graphopt.passes.skip_layers import SkipLayers
    from graphopt.passes.sparse_update import SparseUpdate
    from graphopt.passes.split_vocab import SplitVocab
    from graphopt.passes.stream_blocks import StreamBlocks
    from graphopt.passes.stream_layers import StreamLayers
    from graphopt.passes.stream_loss import StreamLoss

if __name__ != "graphopt.passes":
    raise ImportError(f"import this package as graphopt.passes, not as {__name__}")

__all__ = [
    "Arena",
    "Checkpoint",
    "Fuse",
    "OffloadOptimizer",
    "OffloadSaved",
    "OverlapComm",
    "PackSaved",
    "PatchInference",
    "SkipDecode",
    "SkipLayers",
    "SparseUpdate",
    "SplitVocab",
    "StreamBlocks",
    "StreamLayers",
    "StreamLoss",
]

# Public name -> the module that defines it.
_LAZY = {
    "Arena": "graphopt.passes.arena",
    "Checkpoint": "graphopt.passes.checkpoint",
    "Fuse": "graphopt.passes.fuse",
    "OffloadOptimizer": "graphopt.passes.offload_optimizer",
    "OffloadSaved": "graphopt.passes.offload_saved",
    "OverlapComm": "graphopt.passes.overlap_comm",
    "PackSaved": "graphopt.passes.pack_saved",
    "PatchInference": "graphopt.passes.patch_inference",
    "SkipDecode": "graphopt.passes.skip_decode",
    "SkipLayers": "graphopt.passes.skip_layers",
    "SparseUpdate": "graphopt.passes.sparse_update",
    "SplitVocab": "graphopt.passes.split_vocab",
    "StreamBlocks": "graphopt.passes.stream_blocks",
    "StreamLayers": "graphopt.passes.stream_layers",
    "StreamLoss": "graphopt.passes.stream_loss",
}

if not TYPE_CHECKING:  # a type checker reads the imports above, and knows which names are there

    def __getattr__(name):
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(globals().keys() | _LAZY.keys())
