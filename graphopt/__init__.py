"""graphopt: a training or inference step is a program; passes plan with cost models, then edit it.

A public name is loaded when it is first used, so `import graphopt` does not load torch.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphopt.api import OptimizedModule, optimize
    from graphopt.batch_plan import Dual, plan_batches
    from graphopt.cost_models.devices import GB, Cluster, Device, GiB
    from graphopt.cost_models.link_file import read_links
    from graphopt.cost_models.training_state import TrainingSetup
    from graphopt.errors import CodegenError, GraphoptError, PlanError, TraceError, VerifyError
    from graphopt.fitting import fit, peak_formula
    from graphopt.measurement import measure
    from graphopt.passes.arena import Arena
    from graphopt.passes.calibration import calibration_gradients
    from graphopt.passes.checkpoint import Checkpoint
    from graphopt.passes.fuse import Fuse
    from graphopt.passes.layer_sharing import share_weights
    from graphopt.passes.offload_optimizer import OffloadOptimizer, offload_optimizer
    from graphopt.passes.offload_saved import OffloadSaved
    from graphopt.passes.overlap_comm import OverlapComm
    from graphopt.passes.pack_saved import PackSaved
    from graphopt.passes.patch_inference import PatchInference
    from graphopt.passes.skip_decode import SkipDecode
    from graphopt.passes.skip_layers import SkipLayers
    from graphopt.passes.sparse_update import SparseUpdate
    from graphopt.passes.split_vocab import SplitVocab
    from graphopt.passes.stage_plan import PipelinePlan
    from graphopt.passes.stage_schedule import plan_pipeline
    from graphopt.passes.stream_blocks import StreamBlocks
    from graphopt.passes.stream_layers import StreamLayers
    from graphopt.passes.stream_loss import StreamLoss
    from graphopt.plan_file import PlanFile
    from graphopt.program import Program
    from graphopt.report import Report
    from graphopt.sharded_parameters import shard_parameters
    from graphopt.speculative import SpeculativeDecoder
    from graphopt.tracing import trace

__version__ = "0.1.0"

__all__ = [
    "GB",
    "Arena",
    "Checkpoint",
    "Cluster",
    "CodegenError",
    "Device",
    "Dual",
    "Fuse",
    "GiB",
    "GraphoptError",
    "OffloadOptimizer",
    "OffloadSaved",
    "OptimizedModule",
    "OverlapComm",
    "PackSaved",
    "PatchInference",
    "PipelinePlan",
    "PlanError",
    "PlanFile",
    "Program",
    "Report",
    "SkipDecode",
    "SkipLayers",
    "SparseUpdate",
    "SpeculativeDecoder",
    "SplitVocab",
    "StreamBlocks",
    "StreamLayers",
    "StreamLoss",
    "TraceError",
    "TrainingSetup",
    "VerifyError",
    "__version__",
    "calibration_gradients",
    "fit",
    "measure",
    "offload_optimizer",
    "optimize",
    "peak_formula",
    "plan_batches",
    "plan_pipeline",
    "read_links",
    "shard_parameters",
    "share_weights",
    "trace",
]

# In a checkout the folders `passes`, `cost_models` and `codegen` stand beside this one; once built,
# they are inside it.
if not Path(__file__).with_name("passes").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

# Public name -> the module that defines it.
_LAZY = {
    "Arena": "graphopt.passes.arena",
    "Checkpoint": "graphopt.passes.checkpoint",
    "Cluster": "graphopt.cost_models.devices",
    "CodegenError": "graphopt.errors",
    "Device": "graphopt.cost_models.devices",
    "Dual": "graphopt.batch_plan",
    "Fuse": "graphopt.passes.fuse",
    "GB": "graphopt.cost_models.devices",
    "GiB": "graphopt.cost_models.devices",
    "GraphoptError": "graphopt.errors",
    "OffloadOptimizer": "graphopt.passes.offload_optimizer",
    "OffloadSaved": "graphopt.passes.offload_saved",
    "OptimizedModule": "graphopt.api",
    "OverlapComm": "graphopt.passes.overlap_comm",
    "PackSaved": "graphopt.passes.pack_saved",
    "PatchInference": "graphopt.passes.patch_inference",
    "PipelinePlan": "graphopt.passes.stage_plan",
    "PlanError": "graphopt.errors",
    "PlanFile": "graphopt.plan_file",
    "Program": "graphopt.program",
    "Report": "graphopt.report",
    "SkipDecode": "graphopt.passes.skip_decode",
    "SkipLayers": "graphopt.passes.skip_layers",
    "SparseUpdate": "graphopt.passes.sparse_update",
    "SpeculativeDecoder": "graphopt.speculative",
    "SplitVocab": "graphopt.passes.split_vocab",
    "StreamBlocks": "graphopt.passes.stream_blocks",
    "StreamLayers": "graphopt.passes.stream_layers",
    "StreamLoss": "graphopt.passes.stream_loss",
    "TraceError": "graphopt.errors",
    "TrainingSetup": "graphopt.cost_models.training_state",
    "VerifyError": "graphopt.errors",
    "calibration_gradients": "graphopt.passes.calibration",
    "fit": "graphopt.fitting",
    "measure": "graphopt.measurement",
    "offload_optimizer": "graphopt.passes.offload_optimizer",
    "optimize": "graphopt.api",
    "peak_formula": "graphopt.fitting",
    "plan_batches": "graphopt.batch_plan",
    "plan_pipeline": "graphopt.passes.stage_schedule",
    "read_links": "graphopt.cost_models.link_file",
    "shard_parameters": "graphopt.sharded_parameters",
    "share_weights": "graphopt.passes.layer_sharing",
    "trace": "graphopt.tracing",
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
