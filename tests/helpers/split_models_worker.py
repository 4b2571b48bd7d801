"""Two gloo ranks that train language models with a split vocabulary beside plain ones.

    python split_models_worker.py FOLDER

Rank 0 writes FOLDER/results.json: for every model, what was found.
"""

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp
import transformers
from ranks import join, leave
from split_vocab_worker import Counter, refusal
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import graphopt
from graphopt.passes.split_vocab import SplitVocabPlan
from graphopt.vocab_exchange import ALGORITHMS

V = 101
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": V,
}
GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "vocab_size": V}


class Renamed(nn.Module):
    """A model whose parameters have names that say nothing, and whose two embeddings differ in size."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Embedding(32, 16)  # of positions
        self.b = nn.Embedding(V, 16, padding_idx=3)
        self.c = nn.Linear(16, 16)
        self.d = nn.Linear(16, V)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        """The loss of predicting `labels`, and the logits."""
        where = torch.arange(input_ids.shape[1])
        hidden = torch.tanh(self.c(self.b(input_ids) + self.a(where)))
        logits = self.d(hidden)[:, :-1] / 2
        loss = nn.functional.cross_entropy(
            logits.reshape(-1, V), labels[:, 1:].flatten(), label_smoothing=0.1
        )
        return transformers.modeling_outputs.CausalLMOutput(loss=loss, logits=logits)


def _of(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        config = getattr(transformers, f"{name}Config")(**options, bos_token_id=0, eos_token_id=0)
        config.loss_type = "ForCausalLM"
        config._attn_implementation = "eager"
        kind = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
        return getattr(transformers, kind)(config)  # type: ignore[no-any-return]

    return build


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2, tied": _of("GPT2", **GPT2),
    "llama, untied": _of("Llama", **SIZES, tie_word_embeddings=False),
    "gemma2, tied, soft cap": _of("Gemma2", **SIZES, head_dim=8, pad_token_id=0),
    "phi, bias": _of("Phi", **SIZES | {"num_key_value_heads": 2}),
    "renamed": Renamed,
}


def train(model: nn.Module, batches: Tensor) -> list[float]:
    """Three steps; the losses."""
    kind = torch.optim.AdamW if isinstance(model, Renamed) else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.01)
    losses = []
    for ids in batches:
        labels = ids.clone()
        labels[0, :3] = -100
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference between two state_dicts."""
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def compare(build: Callable[[], nn.Module], mesh: DeviceMesh, algorithm: str | None) -> dict[str, Any]:
    """One model, plain and split."""
    torch.manual_seed(0)
    plain = build().double().eval()
    start = {k: v.clone() for k, v in plain.state_dict().items()}
    split = copy.deepcopy(plain)
    options = {"mesh": mesh, "device": "cpu-generic"}
    assert graphopt.optimize(split, passes=[graphopt.SplitVocab(algorithm=algorithm)], **options) is split
    batches = torch.randint(V, (3, 2, 9), generator=torch.Generator().manual_seed(1))
    found: dict[str, Any] = {"plan": str(split.split_vocab), "names": split.split_vocab.names}
    found["rows"] = [split.get_parameter(name).shape[0] for name in split.split_vocab.names]
    found["same plan"] = SplitVocabPlan.from_json(split.split_vocab.to_json()) == split.split_vocab
    losses = [train(model, batches) for model in (plain, split)]
    found["loss"] = max(abs(a - b) for a, b in zip(*losses, strict=True))
    trained = split.state_dict()
    found["trained"] = distance(plain.state_dict(), trained)
    ids = {"input_ids": batches[0], "labels": batches[0]}
    with torch.no_grad():
        whole = [model(**ids).logits for model in (plain, split)]
        found["logits type"] = type(whole[1]).__name__
        found["logits"] = float((whole[0] - whole[1]).abs().max())
        with Counter() as counter:
            split(**ids)
        found["collectives without gradients"] = len(counter.seen)
    build().double().load_state_dict(trained)
    split.load_state_dict(start)
    found["loaded"] = distance(split.state_dict(), start)
    split.load_state_dict({k: v.clone() for k, v in split.state_dict().items()})
    twin = copy.deepcopy(split)
    found["copied"] = float(twin(**ids).loss.detach() - split(**ids).loss.detach())
    found["again"] = refusal(lambda: graphopt.optimize(split, passes=[graphopt.SplitVocab()], **options))
    return found


def with_checkpoint(mesh: DeviceMesh) -> dict[str, Any]:
    """A split vocabulary with recomputation between its ends, in one call, beside the plain model."""
    torch.manual_seed(0)
    plain = Renamed().double()
    split = copy.deepcopy(plain)
    passes = [graphopt.SplitVocab(), graphopt.Checkpoint(memory="min")]
    ours = graphopt.optimize(split, mesh=mesh, passes=passes, device="cpu-generic")
    ids = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(1))
    losses = [model(input_ids=ids, labels=ids).loss for model in (plain, ours)]
    for loss in losses:
        loss.backward()
    pairs = [(plain.c.weight.grad, split.c.weight.grad), (plain.a.weight.grad, split.a.weight.grad)]
    records = ours._graphopt.log.records
    return {
        "loss": float((losses[0] - losses[1]).abs()),
        "gradients": max(float((a - b).abs().max()) for a, b in pairs),
        "rows": [p.grad.shape[0] for p in (split.b.weight, split.d.weight)],
        "planned": sum(r.before.is_joint for r in records),
        "state": distance(plain.state_dict(), ours.state_dict()),
    }


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What `optimize` does not take."""
    model = Renamed()
    ours = graphopt.SplitVocab()
    grid = init_device_mesh("cpu", (1, mesh.size()), mesh_dim_names=("dp", "tp"))
    calls: dict[str, Callable[[], Any]] = {
        "mesh": lambda: graphopt.optimize(model, passes=[ours]),
        "passes": lambda: graphopt.optimize(model, passes=[graphopt.Checkpoint(), ours], mesh=mesh),
        "memory": lambda: graphopt.optimize(model, memory="min", mesh=mesh),
        "dimension": lambda: graphopt.optimize(model, passes=[ours], mesh=grid, device="cpu-generic"),
        "function": lambda: graphopt.optimize(len, passes=[ours], mesh=mesh),
        "batch": lambda: graphopt.optimize(nn.Linear(2, 2), passes=[ours], mesh=mesh),
        "algorithm": lambda: graphopt.SplitVocab(algorithm="no-barrier"),
    }
    return {name: refusal(call) for name, call in calls.items()}


def work(rank: int, folder: str) -> None:
    """One rank."""
    join(rank, folder)
    mesh = init_device_mesh("cpu", (2,))
    ways = [None, *ALGORITHMS, None]
    found: dict[str, Any] = {
        name: compare(build, mesh, None if "cap" in name else way)
        for (name, build), way in zip(MODELS.items(), ways, strict=True)
    }
    found["with checkpoint"] = with_checkpoint(mesh)
    found["refusals"] = refusals(mesh)
    leave(rank, folder, found)


if __name__ == "__main__":
    mp.start_processes(work, (sys.argv[1],), nprocs=2, start_method="fork")
