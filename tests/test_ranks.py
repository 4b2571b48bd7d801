"""Groups of a program, and what one rank alone can be asked; tests/test_overlap.py has two ranks."""

from typing import Any

import pytest
import torch
from fake_ranks import fake_mesh

import graphopt
from graphopt.errors import PlanError
from graphopt.ranks import check_same, groups_of, is_real, largest, outside_tracing, size_of

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
collectives: Any = torch.ops._c10d_functional


def test_groups_are_named_in_the_order_of_their_use() -> None:
    def f(x: torch.Tensor) -> torch.Tensor:
        for group in ("b", "a", "b"):
            x = collectives.wait_tensor(collectives.all_reduce(x, "sum", group))
        return x + 1

    assert groups_of(graphopt.trace(f, [torch.ones(2)], training=False)) == ["b", "a"]
    assert groups_of(graphopt.trace(torch.relu, [torch.ones(2)], training=False)) == []


def test_a_group_without_other_ranks_agrees() -> None:
    with fake_mesh(4) as mesh:
        group = mesh.get_group().group_name
        assert size_of(group) == 4 and not is_real(group)
        check_same([group], ["anything"], "the graphs")
        assert largest([group], [1.0, 2.0], "the costs") == [1.0, 2.0]
        with pytest.raises(PlanError, match="there is no process group nowhere"):
            size_of("nowhere")


def test_tensors_are_real_outside_of_tracing() -> None:
    with torch._subclasses.FakeTensorMode(), outside_tracing():
        assert torch.ones(2).sum().item() == 2.0
