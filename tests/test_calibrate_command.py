"""`graphopt calibrate`: what two ranks measure and write, and its messages."""

from pathlib import Path

import pytest
import torch
from ranks import run_python

from graphopt import read_links
from graphopt.cli import main
from graphopt.cost_models.collectives import KINDS, Collective

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")


def test_two_ranks(tmp_path: Path) -> None:
    file = tmp_path / "links.json"
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "graphopt"]
    run = run_python(*start, "calibrate", "--backend", "gloo", "--json", str(file))
    links = read_links(file)
    assert set(links.samples) == set(KINDS) and 0 <= links.contention <= 1
    assert all(
        [n for n, _ in samples] == [2**e for e in (12, 15, 18, 21, 24)]
        for samples in links.samples.values()
    )
    assert {links.timing(Collective(kind, 2**20)).source for kind in KINDS} == {"measured"}  # type: ignore
    small, large = (links.timing(Collective("all_reduce", n)).seconds for n in (2**12, 2**24))
    assert 0 < small < large
    assert links.cluster.count == 2 and links.cluster.source == "measured on 2 ranks with gloo"
    assert (
        run.stdout.count("all_reduce") == 1 and "measured on 2 ranks with gloo, contention" in run.stdout
    )


@pytest.mark.parametrize(
    ("world", "said"),
    [(None, "(RANK is not set)"), ("1", "between ranks, and there is one: run `torchrun")],
)
def test_without_other_ranks(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: str | None,
    said: str,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
        if world is not None:
            monkeypatch.setenv(name, world)
    assert main(["calibrate", "--json", "links.json"]) == 1
    assert said in capsys.readouterr().err
