"""Two processes that average their gradients do so with an optimized model, too."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

WORKER = """
    import copy, sys
    import torch
    import torch.distributed as dist
    import torch.multiprocessing as mp
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    import graphopt

    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(6))

        def forward(self, x):
            for layer in self.layers:
                x = nn.functional.gelu(layer(x))
            return x

    def work(rank, mode, folder):
        torch.set_num_threads(1)
        store = dist.FileStore(f"{folder}/store", 2)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
        torch.manual_seed(0)
        width = 320 if mode == "buckets" else 64  # 2.5 MB of parameters, in buckets of 1 MB
        plain = Net(width)
        options = dict(memory="min", device="cpu-generic")
        results = []
        for optimized in (False, True):
            net = copy.deepcopy(plain)
            if mode == "outside":
                net = DistributedDataParallel(net)
                inner = net = graphopt.optimize(net, **options) if optimized else net
            else:
                inner = net = graphopt.optimize(net, **options) if optimized else net
                net = DistributedDataParallel(net, bucket_cap_mb=1)
            optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
            for step in range(3):
                torch.manual_seed(10 * step + rank)
                loss = net(torch.randn(4 * width, width)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            results.append([p.grad.clone() for p in net.parameters()])
        records = inner._graphopt.log.records
        again = sum(
            n.name.startswith("addmm") and n.name.endswith("_again")
            for r in records for n in r.after.graph.nodes
        )
        assert len(records) > 1 or mode != "buckets"
        same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        everywhere = [torch.empty_like(results[1][0]) for _ in range(2)]
        dist.all_gather(everywhere, results[1][0])
        if rank == 0:
            print("same", same, "shared", torch.equal(*everywhere), "again", again > 0)
        dist.destroy_process_group()

    if __name__ == "__main__":
        mp.spawn(work, (sys.argv[1], sys.argv[2]), nprocs=2)
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("mode", ["inside", "buckets", "outside"])
def test_data_parallel_training_is_eagers(mode: str, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(textwrap.dedent(WORKER))
    root = Path(__file__).resolve().parent.parent
    run = subprocess.run(
        [sys.executable, str(script), mode, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "same True shared True again True" in run.stdout, run.stdout + run.stderr[-3000:]
