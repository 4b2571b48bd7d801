"""Packed saved tensors: exact, in the memory that is predicted; what cannot be packed is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from eager_steps import records
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import program_text
from torch import Tensor, nn

import graphopt
from graphopt import Checkpoint, PackSaved, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.measurement import measure
from graphopt.packed_ops import (
    bits_by_torch,
    indices_by_torch,
    mask_by_torch,
    ops,
    places_by_torch,
)
from graphopt.passes.pack_saved import PackSavedPlan
from graphopt.split import saved_nodes

CPU = get_device("cpu-generic")


LOSS_BYTES = 8  # the loss and its own gradient, which the caller holds during the backward


class Dropped(nn.Module):
    """Words (batch, tokens, width) through linear maps with dropout behind."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = x + F.dropout(torch.tanh(part(x)), 0.3)
        return x.square().mean()


class Pooled(nn.Module):
    """Images (batch, 3, height, width) to a number, with two poolings."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.pools = nn.ModuleList([nn.MaxPool2d(3, 2, 1), nn.MaxPool2d((2, 3))])

    def forward(self, x: Tensor) -> Tensor:
        return self.pools[1](self.second(self.pools[0](self.first(x)).sin())).square().mean()


CASES = {
    "dropped": (Dropped, (8, 16, 32), 3, "bits"),
    "pooled": (Pooled, (4, 3, 29, 31), 2, "window"),
}


@given(st.integers(0, 200), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_bits(count: int, seed: int) -> None:
    """As numpy packs them, by both ways, and back."""
    mask = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = ops.pack_bits(mask)
    assert np.array_equal(packed.numpy(), np.packbits(mask.numpy(), bitorder="little"))
    assert torch.equal(packed, bits_by_torch(mask))
    for shape in ([count], [1, count]):
        assert torch.equal(ops.unpack_bits(packed, shape), mask.view(shape))
        assert torch.equal(mask_by_torch(packed, shape), mask.view(shape))


@given(st.data())
@settings(deadline=None)
def test_places_of_a_maximum(data: st.DataObject) -> None:
    """Of every window that torch's pooling takes; they are places within it."""
    pair = st.tuples(st.integers(1, 4), st.integers(1, 4))
    kernel, stride, dilation = (
        data.draw(pair),
        data.draw(pair),
        data.draw(st.tuples(*[st.integers(1, 2)] * 2)),
    )
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    height, width = (
        d * (k - 1) + 1 + data.draw(st.integers(0, 9)) for k, d in zip(kernel, dilation, strict=True)
    )
    x = torch.randn(2, 3, height, width)
    options = (kernel, stride, padding, dilation)
    _, indices = F.max_pool2d(x, *options, ceil_mode=data.draw(st.booleans()), return_indices=True)
    places = ops.pack_window(indices, *options, width)
    assert places.dtype is torch.uint8 and int(places.max()) < kernel[0] * kernel[1]
    assert torch.equal(places, places_by_torch(indices, *options, width))
    assert torch.equal(ops.unpack_window(places, *options, width), indices)
    assert torch.equal(indices_by_torch(places, *options, width), indices)


def test_the_operators_are_registered_well() -> None:
    mask, indices = torch.rand(5, 7) < 0.5, F.max_pool2d(torch.randn(2, 9, 9), 3, return_indices=True)[1]
    window = ([3, 3], [3, 3], [0, 0], [1, 1], 9)
    torch.library.opcheck(ops.pack_bits, (mask,))
    torch.library.opcheck(ops.unpack_bits, (ops.pack_bits(mask), [5, 7]))
    torch.library.opcheck(ops.pack_window, (indices, *window))
    torch.library.opcheck(ops.unpack_window, (ops.pack_window(indices, *window), *window))


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_memory(name: str) -> None:
    """Bitwise the gradients without packing; the saved bytes fall as planned, the peak as predicted."""
    kind, shape, count, form = CASES[name]
    torch.manual_seed(0)
    model, x = kind(), torch.randn(shape)
    gradients, peaks = [], []
    for passes in ((Checkpoint(),), (PackSaved(), Checkpoint())):
        ours = graphopt.optimize(model, passes=passes)
        torch.manual_seed(1)
        ours(x).backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad()
        record = records(ours)[-1]
        measured = measure(lambda ours=ours: ours(x).backward()).peak_bytes
        predicted = record.steps[-1].plan.peak_bytes - record.static_bytes
        assert measured - predicted in (0, LOSS_BYTES)  # the peak is in the forward, or in the backward
        peaks.append(measured)
        model.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    plan = records(ours)[-1].steps[0].plan
    assert [form for _, form in plan.packed] == [form] * count
    assert plan.saved_bytes >= 7.9 * plan.packed_bytes > 0
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved(name: str) -> None:
    """The backward takes the packed tensors from the forward, and nothing of what is packed."""
    kind, shape, count, _ = CASES[name]
    program = graphopt.trace(kind(), {"x": torch.randn(shape)})
    plan = PackSaved().plan(program, Costs.of(program, CPU))
    saved = {n.name for n in saved_nodes(PackSaved().apply(program, plan))}
    before = {n.name for n in saved_nodes(program)}
    assert len(plan.packed) == count
    for packed, _ in plan.packed:
        assert packed in before and packed not in saved
        assert any(name.startswith(f"{packed}_packed") for name in saved)
    assert PackSavedPlan.from_json(plan.to_json()) == plan


def test_nothing_to_pack() -> None:
    program = graphopt.trace(nn.Linear(4, 4), {"input": torch.randn(2, 4)})
    plan = PackSaved().plan(program, Costs.of(program, CPU))
    assert str(plan) == "no saved tensor can be packed"
    with pytest.raises(PlanError, match="'t' is no tensor of this program that can be packed as 'bits'"):
        PackSaved().apply(program, PackSavedPlan((("t", "bits"),), 8, 1))


GOLDEN = Path(__file__).parent.parent / "golden" / "pack_saved.txt"


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    program = graphopt.trace(Pooled(), {"x": torch.randn(4, 3, 29, 31)})
    plan = PackSaved().plan(program, Costs.of(program, CPU))
    after = PackSaved().apply(program, plan)
    parts = [program_text(program), str(plan), plan.to_json(), program_text(after)]
    text = "\n\n".join(parts) + "\n"
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert GOLDEN.read_text(encoding="utf-8") == text


def test_views_of_a_mask() -> None:
    """The backward reads a view of what is unpacked in place of a view that the forward made."""
    x = torch.randn(8, 64, 16, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return (x * (torch.rand(64, 16, 8) < 0.7).permute(2, 0, 1).reshape(8, 1024).view(8, 64, 16)).sum()

    torch.manual_seed(3)
    (expected,) = torch.autograd.grad(loss(x), x)
    ours = graphopt.optimize(loss, passes=[PackSaved()])
    torch.manual_seed(3)
    (found,) = torch.autograd.grad(ours(x), x)
    assert torch.equal(found, expected)


def test_compiled_code_draws_masks_again() -> None:
    ours = graphopt.optimize(Dropped(), passes=[PackSaved()], compiler="inductor")
    ours(torch.randn(8, 16, 32)).backward()
    assert str(records(ours)[-1].steps[0].plan) == "no saved tensor can be packed"
