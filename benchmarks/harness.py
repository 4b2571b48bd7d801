"""Common to the benchmarks: the work that is measured, the measurements, and how to write results.

A step is one forward and backward of a zoo model on one batch. Peaks are bytes that the allocator
held above what was there before the step (parameters, buffers and the batch are "static").
"""

import copy
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import unet
from torch import fx, nn

from graphopt import zoo
from graphopt.cost_models import flops
from graphopt.cost_models.flops import node_flops
from graphopt.measurement import measure

higher_order = torch.ops.higher_order

RESULTS = Path(__file__).parent / "results"
THREADS = 2
MB = 1e6
LLAMA_70B = {  # Grattafiori et al., "The Llama 3 Herd of Models", arXiv 2407.21783, table 3
    "num_hidden_layers": 80,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


@dataclass(frozen=True)
class Size:
    """How large a zoo model is built for a benchmark: overrides of "small" (or of "default")."""

    overrides: Mapping[str, Any]
    batch: int
    seq: int = 256
    base: str = "small"


def _decoder(layers: int, hidden: int = 192, **more: Any) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": hidden * 5 // 2,
        "num_attention_heads": 6 if hidden == 192 else 8,
        "num_key_value_heads": 3 if hidden == 192 else 4,
        "vocab_size": 1024,
        **more,
    }


def _encoder(layers: int, **more: Any) -> dict[str, Any]:
    widths = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    return {"num_hidden_layers": layers, **widths, "vocab_size": 1024, **more}


_GPT2 = {"n_layer": 12, "n_embd": 256, "n_head": 8, "n_positions": 256, "vocab_size": 1024}
_T5 = {"num_layers": 6, "d_model": 192, "d_kv": 32, "num_heads": 6, "d_ff": 768, "vocab_size": 1024}
_VIT = {
    "num_hidden_layers": 8,
    "hidden_size": 192,
    "intermediate_size": 768,
    "num_attention_heads": 6,
    "image_size": 128,
    "patch_size": 8,
    "num_labels": 100,
}
_SWIN = {"image_size": 128, "embed_dim": 64, "window_size": 4, "num_labels": 100}
_CONVNEXT = {"image_size": 128, "hidden_sizes": (64, 128), "depths": (3, 3), "num_labels": 100}
_CLIP = {
    f"{half}_config.{key}": value
    for half in ("text", "vision")
    for key, value in {
        "num_hidden_layers": 4,
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_attention_heads": 6,
    }.items()
} | {"vision_config.image_size": 128, "text_config.max_position_embeddings": 256}
_WHISPER = {
    "d_model": 192,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 768,
    "decoder_ffn_dim": 768,
    "num_mel_bins": 80,
    "max_source_positions": 256,
    "max_target_positions": 256,
}

SIZES: Mapping[str, Size] = {
    "gpt2": Size(_GPT2, 4),
    "llama": Size(_decoder(8, 256), 4),
    "bert": Size(
        _encoder(8, max_position_embeddings=258, attn_implementation="eager"),
        4,
    ),
    "t5": Size(_T5, 8, 128),
    "vit": Size(_VIT, 4),
    "resnet50": Size({"image_size": 128}, 4, base="default"),
    "qwen2": Size(_decoder(4), 8),
    "mistral": Size(_decoder(4), 8),
    "gemma": Size(_decoder(4, head_dim=32), 8),
    "phi3": Size(_decoder(4), 8),
    "mixtral": Size(_decoder(3), 8),
    "roberta": Size(_encoder(4, max_position_embeddings=258), 8),
    "swin": Size(_SWIN, 8),
    "convnext": Size(_CONVNEXT, 8),
    "clip": Size(_CLIP, 8, 128),
    "whisper": Size(_WHISPER, 8, 128),
    "mamba": Size({"hidden_size": 128, "num_hidden_layers": 2, "state_size": 8}, 8, 64),
}


@dataclass(frozen=True)
class Peak:
    """Bytes of one step above what was live before it.

    `minus_gradients` is the peak less all gradients; `activations` is the peak of what is no
    gradient, at each moment.
    """

    peak: int
    minus_gradients: int
    activations: int


@dataclass(frozen=True)
class Ratio:
    """Times of two steps run in turn: the median of the ratios b/a, and their quartiles."""

    median: float
    low: float
    high: float
    rounds: int
    a_seconds: float
    b_seconds: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"


# --- the work ----------------------------------------------------------------------------------


def setup() -> None:
    """The same conditions for every benchmark: number of threads, no advice on the terminal."""
    torch.set_num_threads(THREADS)
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def build(name: str, size: Size | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """A model of the zoo, or the U-Net, at the size of the benchmarks, and its batch."""
    if name == "unet":
        return unet.build(batch=2, size=128)
    size = size or SIZES[name]
    model = zoo.build(name, size.base, size.overrides)  # type: ignore[arg-type]
    return model, zoo.example_batch(name, model, size.batch, size.seq)


def twin(model: nn.Module) -> nn.Module:
    """A copy with weights of its own."""
    return copy.deepcopy(model)


def run_step(module: nn.Module, batch: Mapping[str, Any]) -> float:
    """Forward and backward; gradients are made anew. The loss."""
    module.zero_grad(set_to_none=True)
    loss = module(**batch).loss
    loss.backward()
    return float(loss.detach())


def gradients(module: nn.Module) -> list[torch.Tensor]:
    """The gradients that the parameters hold."""
    return [p.grad for p in module.parameters() if p.grad is not None]


def peak_of(module: nn.Module, batch: Mapping[str, Any], warm: int = 2) -> Peak:
    """The peak of one step, after `warm` others."""
    for _ in range(warm):
        run_step(module, batch)
    module.zero_grad(set_to_none=True)
    gc.collect()
    found = measure(lambda: run_step(module, batch), gradients=lambda: gradients(module))
    held = sum(g.untyped_storage().nbytes() for g in gradients(module))
    module.zero_grad(set_to_none=True)
    return Peak(found.peak_bytes, found.peak_bytes - held, found.activation_bytes)


def interleaved(a: Callable[[], Any], b: Callable[[], Any], rounds: int, warm: int = 2) -> Ratio:
    """Run a b a b ..., after `warm` rounds that do not count."""
    pairs = []
    for number in range(rounds + warm):
        seconds = []
        for run in (a, b):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        if number >= warm:
            pairs.append(seconds)
    ratios = [second / first for first, second in pairs]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return Ratio(
        statistics.median(ratios),
        low,
        high,
        rounds,
        statistics.median(p[0] for p in pairs),
        statistics.median(p[1] for p in pairs),
    )


def graph_flops(graph: fx.Graph) -> int:
    """FLOPs of the matrix products in a graph."""
    return sum(_flops_of(n) for n in graph.nodes if n.op == "call_function")


def _flops_of(node: fx.Node) -> int:
    """FLOPs of one node; torch's checkpointing hides random operators in two that keep the state."""
    hidden = {higher_order.run_and_save_rng_state: 0, higher_order.run_with_rng_state: 1}
    if node.target not in hidden:
        return node_flops(node)
    operator, *args = node.args[hidden[node.target] :]
    formula = flops._FORMULAS.get(operator.overloadpacket)  # type: ignore[union-attr]
    values = fx.map_arg(tuple(args), lambda n: n.meta["val"])
    return int(formula(None, *values)) if formula is not None else 0  # type: ignore[misc]


# --- what graphopt planned ---------------------------------------------------------------------


def records(optimized: Any) -> list[Any]:
    """The captured graphs of an optimised module or function, in order."""
    return list(optimized._graphopt.log.records)


def prediction(optimized: Any) -> dict[str, Any]:
    """What the one training graph of `optimized` was planned to need, and how it was counted."""
    found = [r for r in records(optimized) if r.before.is_joint]
    plan = found[-1].steps[-1].plan
    static = found[-1].static_bytes
    return {
        "graphs": len(found),
        "static_bytes": static,
        "predicted_bytes": found[-1].compiled_peak_bytes or plan.peak_bytes,
        "budget_bytes": plan.budget_bytes,
        "recompute_flops": plan.recompute_flops,
        "counted_flops": graph_flops(found[-1].after.graph) - graph_flops(found[-1].before.graph),
        "plan_seconds": found[-1].steps[-1].seconds,
        "trace_seconds": found[-1].trace_seconds,
    }


def fresh() -> None:
    """Forget compiled code, so that the next point starts as in a new process."""
    torch._dynamo.reset()
    gc.collect()


# --- resident memory ---------------------------------------------------------------------------


def resident_peak_of(module: nn.Module, batch: Mapping[str, Any]) -> int:
    """Growth of the process's peak resident memory over one step, in bytes (Linux).

    The high-water mark is reset before the step. Start the process with `MALLOC_MMAP_THRESHOLD_`
    set low, or memory that the allocator of C kept from earlier steps hides the growth.
    """
    for _ in range(2):
        run_step(module, batch)
    module.zero_grad(set_to_none=True)
    before = high_water(lambda: None)
    return high_water(lambda: run_step(module, batch)) - before


def high_water(run: Callable[[], Any]) -> int:
    """The most resident memory of the process while `run` runs, in bytes, garbage before it left out."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return _status("VmHWM")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel reports no {key}")


# --- fresh processes ---------------------------------------------------------------------------

MARK = "RESULT "


def answer(found: Any) -> None:
    """In a process that `spawned` started: hand back the result."""
    print(MARK + json.dumps(found), flush=True)


def spawned(script: str, arguments: list[str], variables: dict[str, str] | None = None) -> Any:
    """What a fresh process of `script` answers, or an error."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=os.environ | (variables or {}))
    for line in done.stdout.splitlines():
        if line.startswith(MARK):
            return json.loads(line[len(MARK) :])
    return {"error": f"exit status {done.returncode}"}


# --- results -----------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Where the numbers come from, in general words."""
    flags = Path("/proc/cpuinfo")
    wide = flags.exists() and "avx512f" in flags.read_text()
    machine = "x86" if platform.machine() in ("x86_64", "AMD64") else platform.machine()
    return {
        "cpu": f"{os.cpu_count()} cores {machine}{' AVX-512' if wide else ''}",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table with columns as wide as they need."""
    cells = [[str(c) for c in head], *([_shown(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return "0" if value == 0 else f"{value:.2g}" if abs(value) < 0.01 else f"{value:.3f}"
    return "-" if value is None else str(value)


def megabytes(nbytes: float | None) -> str:
    """Bytes as MB with one decimal."""
    return "-" if nbytes is None else f"{nbytes / MB:.1f}"


def stored(name: str, otherwise: Any) -> Any:
    """The results that `write` saved before, or `otherwise`."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text())["results"] if path.exists() else otherwise


def replaced(rows: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with those of the model of `new` replaced, in the order of the zoo."""
    others = [r for r in rows if r["model"] != new[0]["model"]]
    return sorted([*others, *new], key=lambda r: zoo.names().index(r["model"]))


def write(name: str, title: str, data: Any, text: str) -> None:
    """Save `results/<name>.json` and `.md`, and print the latter."""
    RESULTS.mkdir(exist_ok=True)
    facts = environment()
    body = f"# {title}\n\n{', '.join(f'{k} {v}' for k, v in facts.items())}\n\n{text}\n"
    (RESULTS / f"{name}.md").write_text(body)
    saved = {"environment": facts, "results": data}
    (RESULTS / f"{name}.json").write_text(json.dumps(saved, indent=1) + "\n")
    print(body)


def note(text: str) -> None:
    """One line of progress."""
    print(text, file=sys.stderr, flush=True)
