"""A model of four times the memory it gets, beside plain, and beside loading without overlap.

    python benchmarks/layer_streaming.py [--rounds 5]

A Llama of 16 blocks (about 0.45 GB) runs forwards of 256 tokens on one thread, so that a core is left to
the reader. The weights are in a file that is read at a given rate (the reader is throttled: a slow device
that is the same in every round), such that loading what does not stay takes about 0.5, 1 and 2 times as
long as computing. "synchronous" keeps as many blocks as fit beside the one that runs, and loads each of
the others when it is called. Each turn is one step that does not count and then STEPS in a row.
"""

import argparse
import gc
import importlib.util
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import answer, high_water, megabytes, note, setup, spawned, table, write
from torch import Tensor, nn

from graphopt import StreamLayers
from graphopt.measurement import measure
from graphopt.passes.blocks import find_stack
from graphopt.passes.layer_file import LayerFile, record_of, write_layers
from graphopt.passes.layer_plan import StreamLayersPlan
from graphopt.passes.layer_streaming import own_weights, without_weights
from graphopt.passes.transfer_thread import Throttle

BLOCKS, WIDTH, TOKENS, STEPS = 16, 768, 256, 3
RATIOS = (0.5, 1.0, 2.0)  # loading to computing
SHARE = 0.25  # of the bytes of all parameters: the cap


def built(width: int = 0) -> tuple[nn.Module, Tensor]:
    """The model with random weights, and its tokens."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=width or WIDTH,
        intermediate_size=2048,
        num_attention_heads=12,
        num_key_value_heads=12,
        num_hidden_layers=BLOCKS,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    return model, torch.randint(2048, (1, TOKENS))


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


class Synchronous:
    """The first blocks of a copy stay; each of the others is read into one buffer when it is called."""

    def __init__(self, model: nn.Module, plan: StreamLayersPlan, folder: Path, rate: float) -> None:
        stack = find_stack(model, (torch.zeros(1, 4, dtype=torch.long),))
        own, sizes = own_weights(model, stack), plan.block_bytes
        room = plan.memory_bytes - plan.fixed_bytes - plan.step_bytes - max(sizes)
        loaded = list(range(min(BLOCKS, room // max(sizes)), BLOCKS))
        self.file: LayerFile = write_layers(folder, [own[i].tensors for i in loaded], is_temporary=False)
        self.model = without_weights(model, stack, own, loaded, in_place=False)
        self.buffer = torch.empty(max(sizes), dtype=torch.uint8)
        self.throttle = Throttle(rate)
        self.seconds = len(loaded) * record_of(own[loaded[0]].tensors).nbytes / rate
        blocks = [*self.model.get_submodule(stack.path).children()]
        for record, block in enumerate(blocks[i] for i in loaded):
            block.register_forward_pre_hook(self._loading(record))

    def _loading(self, record: int) -> Any:
        def load(block: nn.Module, _: object) -> None:
            view = self.buffer.numpy().data[: self.file.records[record].nbytes]
            for begin in range(0, len(view), self.throttle.chunk):
                part = view[begin : begin + self.throttle.chunk]
                self.throttle.take(len(part))
                self.file.read(record, begin, part)
            for part_ in self.file.records[record].parts:
                path, _, name = part_.name.rpartition(".")
                weight = nn.Parameter(part_.of(self.buffer), requires_grad=False)
                block.get_submodule(path)._parameters[name] = weight

        return load


def turn(model: Any, ids: Tensor) -> float:
    """Seconds of a step, in the mean over `STEPS` in a row."""
    model(input_ids=ids, use_cache=False)
    begin = time.perf_counter()
    for _ in range(STEPS):
        model(input_ids=ids, use_cache=False)
    return (time.perf_counter() - begin) / STEPS


def rows(rounds: int) -> list[dict[str, Any]]:
    """All rates; plain, streamed and synchronous take turns."""
    model, ids = built()
    cap = int(SHARE * weight_bytes(model))
    batch = {"input_ids": ids, "use_cache": False}
    expected = model(**batch).logits
    found = []
    with tempfile.TemporaryDirectory() as folder:
        first = StreamLayers(cap, calibration=[batch], bytes_per_s=1e12).plan(model)
        loaded = sum(first.block_bytes[i] for i in first.streamed)
        for ratio in RATIOS:
            rate = loaded / (ratio * first.costs.step_seconds)
            pass_ = StreamLayers(cap, folder, [batch], bytes_per_s=rate, throttled=True)
            plan = pass_.plan(model)
            note(f"{ratio}: {plan}")
            streamed: Any = pass_.apply(model, plan)
            simple = Synchronous(model, plan, Path(folder), rate)
            found.append(compared(model, streamed, simple, ids, rounds, plan, rate))
            step = measure(lambda streamed=streamed: streamed(**batch).logits)
            held = pass_.measure(model, plan, streamed)
            found[-1] |= {
                "ratio": ratio,
                "cap_bytes": cap,
                "weight_bytes": weight_bytes(model),
                "peak_bytes": held.peak_bytes,
                "equal": bool(torch.equal(step.result, expected)),
            }
            note(str(found[-1]))
            streamed.close()
            del streamed, simple, step
            gc.collect()
    return found


def compared(
    model: nn.Module,
    streamed: nn.Module,
    simple: Synchronous,
    ids: Tensor,
    rounds: int,
    plan: StreamLayersPlan,
    rate: float,
) -> dict[str, Any]:
    """Seconds of steps in turns, medians."""
    kinds: dict[str, Any] = {"plain": model, "streamed": streamed, "synchronous": simple.model}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    ratios = []
    loading = sum(plan.block_bytes[i] for i in plan.streamed) / rate
    for _ in range(rounds):
        for kind, runner in kinds.items():
            seconds[kind].append(turn(runner, ids))
        ratios.append(seconds["streamed"][-1] / max(seconds["plain"][-1], loading))
    return {
        **{kind: statistics.median(values) for kind, values in seconds.items()},
        "loading": loading,
        "predicted": plan.seconds,
        "to_bound": statistics.median(ratios),
        "worst_to_bound": max(ratios),
        "resident": list(plan.resident),
        "slots": plan.slots,
        "rate": rate,
        "rounds": rounds,
    }


def resident_growth() -> dict[str, int]:
    """In a fresh process: what resident memory grows by, at the peak of steps of the streamed model.

    A small model goes the same way before it, so that libraries are loaded.
    """
    small, ids = built(48)
    in_place(small, ids, weight_bytes(small))[0].close()
    del small
    before = high_water(lambda: None)
    model, ids = built()
    streamed, batch = in_place(model, ids, int(SHARE * weight_bytes(model)))
    growth = high_water(lambda: [streamed(**batch) for _ in range(3)]) - before
    return {"growth_bytes": growth, "cap_bytes": streamed.cap}


def in_place(model: nn.Module, ids: Tensor, cap: int) -> tuple[Any, dict[str, Any]]:
    """The model, streamed itself, and its batch."""
    batch = {"input_ids": ids, "use_cache": False}
    pass_ = StreamLayers(cap, calibration=[batch], bytes_per_s=1e9, in_place=True)
    streamed: Any = pass_.apply(model, pass_.plan(model))
    streamed.cap = cap
    return streamed, batch


def report(data: dict[str, Any]) -> str:
    """One line for each rate."""
    head = ["loading / computing", "cap MB", "peak MB", "stay, slots", "computing ms", "loading ms"]
    head += ["streamed ms", "predicted ms", "/ max (worst)", "synchronous ms", "equal"]
    lines = []
    for r in data["rows"]:
        ms = {
            k: f"{1e3 * r[k]:.0f}" for k in ("plain", "loading", "streamed", "predicted", "synchronous")
        }
        bound = f"{r['to_bound']:.3f} ({r['worst_to_bound']:.3f})"
        line = [f"{r['ratio']:.1f}", megabytes(r["cap_bytes"]), megabytes(r["peak_bytes"])]
        line += [f"{len(r['resident'])}, {r['slots']}", ms["plain"], ms["loading"], ms["streamed"]]
        lines.append([*line, ms["predicted"], bound, ms["synchronous"], r["equal"]])
    grown = data["resident"]
    text = [
        f"{BLOCKS} blocks, {megabytes(data['rows'][0]['weight_bytes'])} MB of weights; medians of "
        f"{data['rows'][0]['rounds']} rounds of {STEPS} steps in a row.",
        table(head, lines),
        f"In a process of its own, streamed in place, resident memory at the peak of steps is "
        f"{megabytes(grown['growth_bytes'])} MB above that before the model was built "
        f"(cap {megabytes(grown['cap_bytes'])} MB).",
    ]
    if importlib.util.find_spec("accelerate") is None:
        text.append("accelerate is not installed here, so that its disk offload was not run.")
    return "\n\n".join(text)


def main() -> None:
    """All rates, then the resident memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--resident", action="store_true", help="only that, for a process of its own")
    options = parser.parse_args()
    setup()
    torch.set_num_threads(1)
    with torch.no_grad():
        if options.resident:
            answer(resident_growth())
            return
        grown = spawned(__file__, ["--resident"], {"MALLOC_MMAP_THRESHOLD_": "65536"})
        note(str(grown))
        data = {"rows": rows(options.rounds), "resident": grown}
    write("layer_streaming", "A model of four times its memory", data, report(data))


if __name__ == "__main__":
    main()
