"""A vocabulary that is split over the ranks of a pipeline: its parameters on one rank."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.errors import GraphoptError
from graphopt.streamed import Head
from graphopt.vocab_loss import LossOptions
from graphopt.vocab_shard import Shard


class PipelineVocabulary(nn.Module):
    """This rank's words of a pipeline's embedding and of its output layer, as parameters.

    Made from the whole layers, alike on every rank of `group`: of `embedding` (V, D) and `head` (V, D)
    each rank keeps about V / ranks rows. Where both have one weight, so have their rows. Without an
    `embedding` the first stage takes what `step` is given.

    The loss of a microbatch is `F.cross_entropy` of the logits with `options`, its targets of the shape
    of the hidden values without the last dimension. `scale` scales and soft-caps the logits. `streamed`
    makes logits in blocks of `block` words and never keeps them, for 8 in place of 6 N D V / ranks FLOPs.

    Raises GraphoptError for layers that cannot be split so.
    """

    def __init__(
        self,
        embedding: nn.Embedding | None,
        head: nn.Linear,
        *,
        group: dist.ProcessGroup | None = None,
        options: LossOptions | None = None,
        scale: Head | None = None,
        streamed: bool = True,
        block: int = 2048,
    ) -> None:
        super().__init__()
        self.shard = Shard.on_group(
            head.out_features, group or dist.distributed_c10d._get_default_group()
        )
        self.options, self.scale = options or LossOptions(), scale or Head()
        self.streamed, self.block, self.padding_idx = streamed, block, None
        if self.options.reduction == "none" or block < 1:
            raise GraphoptError(f"{self.options} in blocks of {block} words is no loss of a pipeline")
        self.head = self._rows(head.weight)
        self.bias = None if head.bias is None else self._rows(head.bias)
        self.embedding = None
        if embedding is not None:
            _check_embedding(embedding, head)
            self.padding_idx = embedding.padding_idx
            is_tied = embedding.weight is head.weight
            self.embedding = self.head if is_tied else self._rows(embedding.weight)

    def _rows(self, whole: Tensor) -> nn.Parameter:
        return nn.Parameter(self.shard.part(whole).detach().clone(), whole.requires_grad)

    def forward(self, ids: Tensor) -> Tensor:
        """The rows (.., D) of the words of `ids` (..) that are this rank's, and zeros for the others."""
        assert self.embedding is not None
        inside, local = self.own(ids)
        return F.embedding(local, self.embedding).masked_fill_(~inside[..., None], 0)

    def own(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `ids` are words of this rank, and their places among them."""
        inside = (ids >= self.shard.start) & (ids < self.shard.stop)
        return inside, torch.where(inside, ids - self.shard.start, 0)


def _check_embedding(embedding: nn.Embedding, head: nn.Linear) -> None:
    if embedding.weight.shape != head.weight.shape:
        given = f"the embedding {tuple(embedding.weight.shape)}"
        raise GraphoptError(f"{given} and the head {tuple(head.weight.shape)} must be of one shape")
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(embedding, option):
            raise GraphoptError(f"an embedding with {option} cannot be split over a pipeline")
