"""Collectives are timed on a real group, here of one rank, whatever their kind and size."""

import time
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.cost_models import link_probe
from graphopt.cost_models.collectives import KINDS, Collective
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_probe import LARGEST_BYTES, measured_links
from graphopt.errors import PlanError

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
CLUSTER = Cluster(GENERIC_CPU, 1, 1e9, 1e-5, "example")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group() -> Iterator[str]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD.group_name
    dist.destroy_process_group()


def test_every_kind(group: str) -> None:
    wanted = {kind: [4000, 40_000] for kind in KINDS}
    with FakeTensorMode():  # as while a graph is captured
        links = measured_links(group, wanted, CPU, CLUSTER)
    for kind in KINDS:
        assert [n for n, _ in links.samples[kind]] == [4000, 40_000]
        assert all(0 < seconds < 10 for _, seconds in links.samples[kind])
        assert links.timing(Collective(kind, 20_000)).source == "measured"  # type: ignore[arg-type]
        assert links.timing(Collective(kind, 10**6)).source == "fitted"  # type: ignore[arg-type]
    assert 0 <= links.contention <= 1 and links.contention_spread >= 0


@pytest.mark.parametrize(
    ("sizes", "tried"),
    [
        ([4000], [1000, 4000]),
        ([8, 8, 8], [2, 8]),
        (range(100, 200), [100, 125, 150, 174, 199]),
    ],
)
def test_a_few_sizes(group: str, sizes: list[int], tried: list[int]) -> None:
    links = measured_links(group, {"all_reduce": sizes}, CPU, CLUSTER)
    assert [n for n, _ in links.samples["all_reduce"]] == tried


def test_medians_of_runs_in_turn() -> None:
    """The first round sets up connections; one run in a few is faster or slower than the link."""
    order: list[str] = []

    def runs(name: str, first: float) -> Callable[[], float]:
        given = iter([first, 3.0, 1.0, 9.0, *[3.0] * 20])

        def run() -> float:
            order.append(name)
            return next(given)

        return run

    assert link_probe._in_turn([runs("a", 50.0), runs("b", 0.0)]) == [3.0, 3.0]
    assert order == ["a", "b"] * 10


def test_how_much_of_the_processor_is_held() -> None:
    """Sleeping is not computing, as waiting for another process is not."""
    slept = link_probe._Work(lambda: time.sleep(0.02), on_processor=True)
    assert slept.alone() >= 0.02 and slept.held < 0.5
    other = link_probe._Work(lambda: time.sleep(0.001), on_processor=False)
    other()
    assert other.held == 1.0


@pytest.mark.parametrize("seconds", [(1.0, 2.0), (2.0, 1.0)])
def test_every_rank_transfers_the_same(seconds: tuple[float, float]) -> None:
    """The kind that is timed beside computing does not depend on what a rank measured."""
    samples = {
        kind: ((8, 0.5), (64, s)) for kind, s in zip(("all_reduce", "all_gather"), seconds, strict=True)
    }
    assert link_probe._largest_of(samples) == ("all_reduce", (64, seconds[0]))


def test_nothing_wanted(group: str) -> None:
    links = measured_links(group, {}, CPU, CLUSTER)
    assert links.samples == {} and links.contention == 0
    assert LARGEST_BYTES == 64 * 2**20


def test_a_group_that_is_not_there(group: str) -> None:
    with pytest.raises(PlanError, match="there is no process group nowhere"):
        measured_links("nowhere", {"all_reduce": [8]}, CPU, CLUSTER)
