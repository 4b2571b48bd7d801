"""The passes that run where nobody names any."""

from graphopt.passes.base import Pass
from graphopt.passes.budget import Budget
from graphopt.passes.checkpoint import Checkpoint
from graphopt.passes.fuse import Fuse

# A kernel compiles in about a second when it is first met: one that saves less traffic in each call,
# about 0.1 ms of a CPU's, is left to torch.
KERNEL_BYTES = 1 << 20


def default_passes(
    memory: Budget, activations: Budget, training: bool, compiler: str
) -> tuple[Pass, ...]:
    """A checkpoint plan within the budgets; in inference generated kernels, too.

    Not where Inductor compiles, which fuses by itself. A training step has the bits of eager mode, until
    `Fuse` is asked for by name.
    """
    checkpoint = Checkpoint(memory=memory, activations=activations)
    if training or compiler != "eager":
        return (checkpoint,)
    return (checkpoint, Fuse(min_bytes=KERNEL_BYTES))
