"""Files of measured links: what is written is read, and what is no such file is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import GraphoptError, read_links
from graphopt.cost_models.collectives import KINDS
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.cost_models.link_file import links_to_json

CLUSTER = Cluster(GENERIC_CPU, 2, 1e9, 1e-4, "example")
SAMPLE = st.tuples(st.integers(1, 2**40), st.floats(1e-9, 1e3))
LINKS = LinkCosts(CLUSTER, {"all_reduce": ((1000, 3e-4), (2000, 5e-4))}, 0.25)


@given(
    st.dictionaries(st.sampled_from(KINDS), st.lists(SAMPLE, min_size=1, max_size=4, unique=True)),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, samples: dict[str, Any], contention: float, spread: float
) -> None:
    links = LinkCosts(CLUSTER, {k: tuple(sorted(v)) for k, v in samples.items()}, contention, spread)
    path = tmp_path_factory.mktemp("links") / "links.json"
    path.write_text(links_to_json(links))
    assert read_links(path) == links


def test_a_file_without_a_spread(tmp_path: Path) -> None:
    data = json.loads(links_to_json(LINKS))
    del data["contention_spread"]
    (tmp_path / "links.json").write_text(json.dumps(data))
    assert read_links(tmp_path / "links.json") == LINKS


def test_the_lines(tmp_path: Path) -> None:
    data = json.loads(links_to_json(LINKS))["collectives"]["all_reduce"]
    assert data["alpha_s"] == pytest.approx(1e-4) and data["beta_s"] == pytest.approx(2e-7)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: d.clear(), "is no file of `graphopt calibrate`"),
        (lambda d: d.update(graphopt_links=2), "is no file of `graphopt calibrate`, format 1"),
        (lambda d: d.pop("cluster"), "is incomplete: KeyError 'cluster'"),
        (lambda d: d.update(contention="a lot"), "is incomplete: ValueError"),
        (
            lambda d: d["collectives"].update(gossip={"samples": []}),
            "times of gossip, which is none of all_g",
        ),
        (lambda d: d["collectives"]["all_reduce"].update(samples=[[8, -1.0]]), "no line fits"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    data = json.loads(links_to_json(replace(LINKS)))
    change(data)
    (tmp_path / "links.json").write_text(json.dumps(data))
    with pytest.raises(GraphoptError, match=said):
        read_links(tmp_path / "links.json")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("links")
    for name in ("nowhere", "text"):
        with pytest.raises(GraphoptError, match=f"the links in .*{name} cannot be read"):
            read_links(tmp_path / name)
