"""`graphopt calibrate`: measure what collectives take between the ranks that torchrun started."""

import argparse
import os
from typing import TYPE_CHECKING

from graphopt.errors import GraphoptError

if TYPE_CHECKING:
    import torch

    from graphopt.cost_models.link_costs import LinkCosts

_RUN = "torchrun --nproc-per-node 2 -m graphopt calibrate --json links.json"
_SMALLEST, _STEP, _COUNT = 2**12, 2**3, 5  # bytes that a rank puts in: 4 KiB to 16 MiB


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `graphopt calibrate`."""
    add = command.add_argument
    add("--json", metavar="FILE", required=True, help="where to write what was measured")
    add("--backend", choices=("gloo", "nccl"), help="default: nccl where there is a GPU")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Carry the command out on this rank; rank 0 prints and writes."""
    missing = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise GraphoptError(f"calibrate measures between ranks: run `{_RUN}` ({missing[0]} is not set)")
    if os.environ["WORLD_SIZE"] == "1":
        raise GraphoptError(f"calibrate measures between ranks, and there is one: run `{_RUN}`")
    import torch

    from graphopt.cost_models.link_file import links_to_json
    from graphopt.terminal import print_table, write_text

    backend = options.backend or ("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    torch.distributed.init_process_group(backend)
    try:
        links = calibrated(device)
        if torch.distributed.get_rank() == 0:
            write_text(options.json, links_to_json(links))
            share = f"{links.contention:.2f} +- {links.contention_spread:.2f}"
            title = f"{links.cluster.source}, contention {share}"
            print_table(title, ("collective", "alpha", "per GB", "largest"), _rows(links))
    finally:
        torch.distributed.destroy_process_group()


def calibrated(device: "torch.device") -> "LinkCosts":
    """What each kind of collective takes on all ranks, as the slowest of them sees it.

    Tensors are on `device`. Kinds that are not measured get the ring on a link that explains the
    all-reduces.
    """
    import torch

    from graphopt.cost_models.collectives import KINDS
    from graphopt.cost_models.devices import GENERIC_CPU, Cluster
    from graphopt.cost_models.link_costs import LinkCosts, fitted
    from graphopt.cost_models.link_probe import measured_links
    from graphopt.ranks import largest

    world = torch.distributed.group.WORLD
    assert world is not None
    group, count = world.group_name, world.size()
    sizes = [_SMALLEST * _STEP**i for i in range(_COUNT)]
    unknown = Cluster(GENERIC_CPU, count, 1.0, 0.0, "")
    own = measured_links(group, dict.fromkeys(KINDS, sizes), device, unknown)
    keys = [(kind, n) for kind, samples in own.samples.items() for n, _ in samples]
    seconds = [s for samples in own.samples.values() for _, s in samples]
    numbers = [*seconds, own.contention, own.contention_spread]
    *slowest, share, spread = largest([group], numbers, "the times")
    pairs = list(zip(keys, slowest, strict=True))
    found = {kind: tuple((n, s) for (k, n), s in pairs if k == kind) for kind in own.samples}
    line, steps = fitted(found["all_reduce"]), 2 * (count - 1)
    source = f"measured on {count} ranks with {torch.distributed.get_backend()}"
    rate = steps / count / max(line.beta_s, 1e-15)
    cluster = Cluster(GENERIC_CPU, count, rate, line.alpha_s / steps, source)
    return LinkCosts(cluster, found, share, spread)


def _rows(links: "LinkCosts") -> list[tuple[str, str, str, str]]:
    from graphopt.cost_models.link_costs import fitted

    rows = []
    for kind, samples in links.samples.items():
        line, (nbytes, seconds) = fitted(samples), max(samples)
        per_gb = f"{line.beta_s * 1e9:.3f} s"
        rows.append(
            (kind, f"{line.alpha_s * 1e6:.1f} us", per_gb, f"{nbytes} bytes {seconds * 1e3:.3f} ms")
        )
    return rows
