"""What training holds besides activations, on one of many devices: weights, gradients, optimizer.

| what               | bytes, for weights of b bytes each                    | divided from |
|--------------------|-------------------------------------------------------|--------------|
| weights            | b                                                     | ZeRO stage 3 |
| gradients          | b, as the backward makes them                         | ZeRO stage 2 |
| master weights     | 4, where there are any                                | ZeRO stage 1 |
| SGD; with momentum | 0; b, or 4 beside master weights                      | ZeRO stage 1 |
| Adam               | two of b, or of 4 beside master weights; 4 per tensor | ZeRO stage 1 |

(Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020,
sections 3.1 and 5: Adam in mixed precision holds 2 + 2 + 12 bytes per parameter; b and the 4 bytes of a
step count are torch.optim's.) Shards are gathered, and gradients reduced, a unit at a time (a layer):
one unit computes and the next is on its way, as PyTorch's FSDP prefetches (Zhao et al., "PyTorch FSDP",
VLDB 2023, section 3.3.2).

Tensor parallelism of degree t divides weights and, with sequence parallelism, activations by t. A
pipeline of p stages divides the weights by p; its first stage keeps p microbatches of a p-th of the
layers under 1F1B, which is as much as one microbatch keeps of all layers (Korthikanti et al., "Reducing
Activation Recomputation in Large Transformer Models", 2022, sections 4.2.2 and 4.2.3).
"""

from dataclasses import dataclass

from graphopt.errors import GraphoptError

STATES = {"none": 0, "sgd": 0, "momentum": 1, "adam": 2}  # tensors like the weights
MASTER_BYTES = 4
_STEP_BYTES = 4  # torch.optim.Adam counts its steps in a float32 for each parameter
ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class State:
    """Of a model: bytes of parameters, of those trained, of the largest one trained, and their number.

    `unit_bytes` are those of the largest unit that is gathered and reduced at a time; `itemsize` those of
    one element.
    """

    parameter_bytes: int
    gradient_bytes: int
    largest_bytes: int
    tensors: int
    unit_bytes: int = 0
    itemsize: int = 4


@dataclass(frozen=True)
class TrainingSetup:
    """The optimizer ("none", "sgd", "momentum", "adam"), and over how many devices what is divided.

    `zero` is the stage of ZeRO over the `data` ranks, `tensor` and `pipeline` are the other degrees. The
    batch of a formula is that of one data rank, and of one microbatch of a pipeline.
    """

    optimizer: str = "none"
    master_weights: bool = False
    zero: int = 0
    data: int = 1
    tensor: int = 1
    pipeline: int = 1

    def __post_init__(self) -> None:
        if self.optimizer not in STATES:
            raise GraphoptError(f"optimizer={self.optimizer!r} is none of {', '.join(STATES)}")
        if self.zero not in ZERO_STAGES:
            raise GraphoptError(f"zero={self.zero} is no stage of ZeRO; there are 0, 1, 2 and 3")
        for name in ("data", "tensor", "pipeline"):
            if getattr(self, name) < 1:
                raise GraphoptError(f"{name}={getattr(self, name)}: a degree is at least 1")

    @property
    def _model_ranks(self) -> int:
        return self.tensor * self.pipeline

    def _divided(self, nbytes: int, stage: int) -> int:
        """A device's part of `nbytes` that ZeRO shards from `stage` on, rounded up."""
        ranks = self._model_ranks * (self.data if self.zero >= stage else 1)
        return -(-nbytes // ranks)

    def held_bytes(self, state: State) -> int:
        """What is there all through the step: weights, with those gathered, and the optimizer's state."""
        gathered = 2 * -(-state.unit_bytes // self.tensor) if self._shards(3) else 0
        return self._divided(state.parameter_bytes, 3) + gathered + self.optimizer_bytes(state)

    def optimizer_bytes(self, state: State) -> int:
        """Master weights and the optimizer's state."""
        elements = state.gradient_bytes // state.itemsize
        each = MASTER_BYTES if self.master_weights else state.itemsize
        whole = elements * each * STATES[self.optimizer]
        whole += elements * MASTER_BYTES if self.master_weights else 0
        counts = _STEP_BYTES * state.tensors if self.optimizer == "adam" else 0
        return self._divided(whole, 1) + -(-counts // self.pipeline)

    def gradient_bytes(self, state: State, live_bytes: int) -> int:
        """What `live_bytes` of gradients take: whole, or a shard and the unit that is being reduced."""
        unit = min(live_bytes, state.unit_bytes) if self._shards(2) else 0
        return self._divided(live_bytes, 2) + -(-unit // self.tensor)

    def update_bytes(self, state: State) -> int:
        """What the optimizer's step allocates while it works on the largest parameter."""
        temporaries = 2 if self.optimizer == "adam" else 0  # the root of a moment, and it over a number
        largest = state.largest_bytes * (MASTER_BYTES if self.master_weights else state.itemsize)
        return temporaries * self._divided(largest // state.itemsize, 1)

    @property
    def divides(self) -> bool:
        """Whether a device has only a part of the weights, or of what training holds for them."""
        return self._model_ranks > 1 or self._shards(1)

    def _shards(self, stage: int) -> bool:
        return self.zero >= stage and self.data > 1


ALONE = TrainingSetup()  # one device, and no optimizer: forward and backward
