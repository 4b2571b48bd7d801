"""Trains a small GPT-2 with its vocabulary split over the processes of torchrun.

    torchrun --nproc-per-node 2 examples/vocab_parallel.py

Every process sees the same batches and holds its share of the words: of the embedding, of the tied
projection, and of the gradients of both. A plain copy takes the same steps on rank 0, for comparison.
"""

import argparse
import copy

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import GPT2Config, GPT2LMHeadModel

import graphopt

MIB = 2**20


def parse_arguments() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description="Trains a GPT-2 with a vocabulary split over ranks.")
    parser.add_argument("--steps", type=int, default=5, help="training steps (default 5)")
    parser.add_argument("--words", type=int, default=16000, help="size of the vocabulary (default 16000)")
    parser.add_argument("--width", type=int, default=128, help="embedding size (default 128)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a step (default 256)")
    return parser.parse_args()


def make_model(words: int, width: int, length: int) -> GPT2LMHeadModel:
    """A GPT-2 of two blocks, with the same random weights on every rank."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=words,
        n_layer=2,
        n_embd=width,
        n_head=4,
        n_positions=length,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"  # its default; unnamed, it logs a warning
    return model


def take_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    """One training step on `ids` [batch, length]; the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def main() -> None:
    """Trains both, and prints losses and peaks from rank 0."""
    arguments = parse_arguments()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    torch.set_num_threads(1)
    device = torch.device("cuda", dist.get_rank()) if torch.cuda.is_available() else torch.device("cpu")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    first = dist.get_rank() == 0

    plain = make_model(arguments.words, arguments.width, arguments.length).to(device)
    model = graphopt.optimize(copy.deepcopy(plain), mesh=mesh, passes=[graphopt.SplitVocab()])
    models = [plain, model] if first else [model]
    optimizers = [torch.optim.AdamW(m.parameters(), lr=3e-4) for m in models]
    if first:
        print(model.split_vocab, "\n\n     plain loss    split loss", sep="")

    generator = torch.Generator().manual_seed(1)
    for number in range(arguments.steps):
        ids = torch.randint(arguments.words, (1, arguments.length), generator=generator).to(device)
        losses = [take_step(*pair, ids) for pair in zip(models, optimizers, strict=True)]
        if first:
            print(f"{number + 1:3}", *(f"{loss:13.6f}" for loss in losses))

    ids = torch.randint(arguments.words, (1, arguments.length), generator=generator).to(device)
    steps = [lambda m=m: m(input_ids=ids, labels=ids).loss.backward() for m in models]
    peaks = [graphopt.measure(step, device=device).peak_bytes / MIB for step in steps]
    if first:
        print(f"\npeak of a step on rank 0, MiB: {peaks[0]:.1f} plain, {peaks[1]:.1f} split")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
