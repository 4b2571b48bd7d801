"""A process group whose other ranks do not exist, to capture what one rank of a real one would run."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@contextmanager
def fake_mesh(*sizes: int) -> Iterator[DeviceMesh]:
    """A mesh of these sizes, seen from rank 0. Nothing may be run on it, only captured."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    count = 1
    for size in sizes:
        count *= size
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield init_device_mesh("cpu", sizes)
    finally:
        dist.destroy_process_group()
