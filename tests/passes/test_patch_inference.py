"""Patches against eager inference, their windows and predicted peaks, refusals, and a golden text."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import arguments
from texts import program_text
from torch import nn

import graphopt
from graphopt import PatchInference, PlanError
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import get_device
from graphopt.lower import boxed, overwrite_dead_operands
from graphopt.measurement import measure
from graphopt.passes.local_windows import COLUMNS, ROWS
from graphopt.passes.patch_inference import PatchInferencePlan, windows_of
from graphopt.passes.patch_region import Prefix, Region
from graphopt.passes.patch_search import Search, cuts, exact, forward_peak
from graphopt.program import Program
from graphopt.verify import verify

CPU = get_device("cpu-generic")


class Stack(nn.Module):
    """Convolutions, norms, pools and residual blocks, then the mean over the image."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean((2, 3))


class Residual(nn.Module):
    """x + f(x), with the shortcut through a convolution where the grid or the channels change."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, dilation: int) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.main = nn.Sequential(
            nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation),
            norm(outputs),
            nn.ReLU6(),
        )
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.main(x)


class Branches(nn.Module):
    """Two convolutions of different reach side by side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.near = nn.Conv2d(channels, 2, 1)
        self.far = nn.Conv2d(channels, 2, 5, padding=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.near(x), self.far(x)], dim=1)


class Padded(nn.Module):
    """Zeros on two sides only, as in networks with "same" padding, then a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, 4, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(F.pad(x, (0, 1, 0, 1)))


def norm(channels: int) -> nn.BatchNorm2d:
    result = nn.BatchNorm2d(channels)
    nn.init.normal_(result.running_mean)
    nn.init.uniform_(result.running_var, 0.5, 1.5)
    nn.init.normal_(result.weight)
    return result


def layer(kind: str, inputs: int, kernel: int, stride: int, dilation: int) -> tuple[nn.Module, int]:
    """A layer by the name of its kind, and its number of output channels."""
    if kind == "residual":
        return Residual(inputs, 4, kernel, stride, dilation), 4
    if kind == "depthwise":
        return nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs), inputs
    if kind == "valid":
        return nn.Sequential(nn.Conv2d(inputs, 3, kernel, stride), nn.Hardswish()), 3
    if kind == "max":
        return nn.MaxPool2d(kernel, stride, kernel // 2, ceil_mode=stride > 1), inputs
    if kind == "average":
        return nn.AvgPool2d(kernel, stride, kernel // 2), inputs
    if kind == "branches":
        return Branches(inputs), 4
    return Padded(inputs), 4


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, torch.Tensor]:
    """A random stack in float64, and an image for it."""
    torch.manual_seed(draw(st.integers(0, 99)))
    layers, channels = [], draw(st.integers(1, 3))
    image = torch.randn(draw(st.integers(1, 2)), channels, draw(st.integers(17, 26)), 21)
    kinds = ("residual", "depthwise", "valid", "max", "average", "branches", "padded")
    for _ in range(draw(st.integers(1, 4))):
        sizes = draw(st.sampled_from((1, 2, 3, 5))), draw(st.integers(1, 2)), draw(st.integers(1, 2))
        kind = draw(st.sampled_from(kinds))
        if kind == "residual":
            sizes = (sizes[0] | 1, *sizes[1:])
        made, channels = layer(kind, channels, *sizes)
        layers.append(made)
    return Stack(*layers).double().eval(), image.double()


def traced(model: nn.Module, image: torch.Tensor) -> Program:
    return graphopt.trace(model, {"x": image}, training=False)


def run(program: Program, model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """The output, run as the runtime runs a forward."""
    given_ = arguments(program, model, {"x": image})
    module = program.copy().module
    overwrite_dead_operands(module)
    with torch.no_grad():
        return boxed(module)([given_[i.name].clone() for i in program.inputs])[0]


def plan_by_hand(program: Program, region: Region, p: int, q: int) -> PatchInferencePlan:
    rows, columns = cuts(region.size[0], p), cuts(region.size[1], q)
    windows = windows_of(region, rows, columns)
    return PatchInferencePlan(region.end.name, rows, columns, windows, None, 0, 0, 0, 0)


# --- outputs and windows -----------------------------------------------------------------------


@settings(max_examples=20)
@given(networks(), st.data())
def test_patches_compute_what_eager_does(
    network: tuple[nn.Module, torch.Tensor], data: st.DataObject
) -> None:
    model, image = network
    try:
        with torch.no_grad():
            want = model(image)
    except RuntimeError:  # the stack shrank the image to nothing
        return
    program = traced(model, image)
    prefix = Prefix.of(program)
    assert prefix.regions and "mean" in prefix.remark
    for region in prefix.regions[-2:]:
        grid = [data.draw(st.integers(1, min(4, size))) for size in region.size]
        try:
            plan = plan_by_hand(program, region, *grid)
        except PlanError as error:
            assert "reads only padding" in str(error)
            continue
        patched = PatchInference().apply(program, plan)
        verify(patched, before=program)
        got = run(patched, model, image)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@settings(max_examples=6)
@given(networks(), st.integers(1, 3), st.integers(1, 3))
def test_nothing_outside_a_window_counts(network: tuple[nn.Module, torch.Tensor], p: int, q: int) -> None:
    model, image = network
    try:
        program = traced(model, image)
    except graphopt.TraceError:
        return
    region = Prefix.of(program).regions[-1]
    try:
        plan = plan_by_hand(program, region, min(p, region.size[0]), min(q, region.size[1]))
    except PlanError:
        return
    with torch.no_grad():
        whole = model.layers(image)
    patches = [(r, c) for r in pairwise(plan.rows) for c in pairwise(plan.columns)]
    for (rows, columns), (top, bottom, left, right) in zip(patches, plan.windows, strict=True):
        spoilt = torch.full_like(image, 1e3)
        spoilt[:, :, top:bottom, left:right] = image[:, :, top:bottom, left:right]
        with torch.no_grad():
            part = model.layers(spoilt)[:, :, slice(*rows), slice(*columns)]
        torch.testing.assert_close(part, whole[:, :, slice(*rows), slice(*columns)])


def network(channels: int = 16) -> tuple[nn.Module, torch.Tensor]:
    """Large maps first, small ones after two strides."""
    model = Stack(
        nn.Conv2d(3, channels, 3, 2, 1),
        norm(channels),
        nn.ReLU(),
        Residual(channels, channels, 3, 1, 1),
        nn.MaxPool2d(3, 2, 1),
        Residual(channels, 2 * channels, 3, 2, 1),
    )
    return model.eval(), torch.randn(1, 3, 96, 96)


@pytest.mark.parametrize("budget", [None, "min", 0.5])
def test_the_predicted_peak_is_the_allocators(budget: object) -> None:
    model, image = network()
    ours = graphopt.optimize(model, passes=[PatchInference(activations=budget)], device=CPU)

    def step() -> torch.Tensor:
        with torch.no_grad():
            return ours(image)

    with torch.no_grad():
        torch.testing.assert_close(step(), model(image), rtol=1e-5, atol=1e-5)
        plain = measure(lambda: model(image)).peak_bytes
    record = ours._graphopt.log.records[-1]
    plan, static = record.steps[-1].plan, record.costs.dataflow(record.before).static_bytes
    measured = measure(step).peak_bytes
    assert plan.end and plan.peak_bytes < plan.baseline_bytes
    assert measured == plan.peak_bytes - static
    assert measured < plain and (budget != "min" or measured < 0.45 * plain)
    assert plan.budget_bytes is None or plan.peak_bytes <= plan.budget_bytes
    assert "patches up to" in str(ours.report)
    assert ours.report.predicted_peak_bytes == plan.peak_bytes


def test_channels_last_maps_stay_so() -> None:
    model, image = network()
    model, image = (t.to(memory_format=torch.channels_last) for t in (model, image))
    program = traced(model, image)
    region = Prefix.of(program).regions[-1]
    patched = PatchInference().apply(program, plan_by_hand(program, region, 3, 2))
    buffer = next(n for n in patched.operators() if n.target is torch.ops.aten.empty_strided.default)
    assert buffer.meta["val"].stride() == region.end.meta["val"].stride()
    with torch.no_grad():
        torch.testing.assert_close(run(patched, model, image), model(image), rtol=1e-5, atol=1e-5)


def test_a_patch_of_each_kind_has_the_peak_of_all() -> None:
    model, image = network()
    program = traced(model, image)
    costs = Costs.of(program, CPU)
    search = Search(program, costs, Prefix.of(program))
    for estimate in search.estimates[::80]:
        found = exact(program, costs, estimate)
        plan = plan_by_hand(program, found.region, len(found.rows) - 1, len(found.columns) - 1)
        patched = PatchInference().apply(program, plan)
        new = [n for n in patched.operators() if n.name not in costs.nodes]
        flow = costs.with_nodes(new).dataflow(patched)
        assert forward_peak(flow) == found.peak_bytes
        flops = sum(o.flops for o in flow.operators) - sum(o.flops for o in search.flow.operators)
        assert flops == found.extra_flops


def test_windows_grow_backwards() -> None:
    model, image = network()
    region = Prefix.of(traced(model, image)).regions[-1]
    assert region.size == (12, 12)
    # Backwards through a strided 3x3, a strided pool, a 3x3 and a strided 3x3, padded by one each:
    # 11 to 14, 21 to 28, 20 to 29, 39 to 58.
    assert region.windows((0, 12), ROWS)[region.image] == (0, 96)
    assert region.windows((6, 7), COLUMNS)[region.image] == (39, 58)


# --- budgets and refusals ----------------------------------------------------------------------


def planned(model: nn.Module, image: torch.Tensor, **options: object) -> PatchInferencePlan:
    program = traced(model, image)
    return PatchInference(**options).plan(program, Costs.of(program, CPU))  # type: ignore[arg-type]


def test_a_budget_bounds_the_peak_at_the_fewest_flops() -> None:
    model, image = network()
    least = planned(model, image, memory="min")
    middle = (least.peak_bytes + least.baseline_bytes) // 2
    plan = planned(model, image, memory=middle)
    assert plan.peak_bytes <= middle == plan.budget_bytes
    assert 0 <= plan.extra_flops <= least.extra_flops
    assert planned(model, image, memory=least.peak_bytes).peak_bytes <= least.peak_bytes
    free = planned(model, image, memory=1.0)
    assert free.end == "" and free.peak_bytes == least.baseline_bytes and "within" in str(free)
    light = planned(model, image)
    assert light.extra_flops <= 0.1 * light.step_flops
    with pytest.raises(PlanError, match="no patches keep the forward within") as caught:
        planned(model, image, memory=least.peak_bytes // 2)
    assert caught.value.reachable_bytes == least.peak_bytes


class Gate(nn.Module):
    """Scales channels by their mean over the whole image."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.mean((2, 3), keepdim=True).sigmoid()


@pytest.mark.parametrize(
    ("blocker", "why"),
    [
        (Gate(), "mean"),
        (nn.ConvTranspose2d(3, 3, 2, 2), "transposed convolution"),
        (nn.AvgPool2d(2, 2, ceil_mode=True), "cut-off windows"),
        (nn.AvgPool2d(3, 1, 1, count_include_pad=False), "count_include_pad"),
        (nn.Softmax(dim=2), "not known to be spatially local"),
        (nn.InstanceNorm2d(3), "spatially local"),
    ],
)
def test_what_blocks_the_prefix_is_named(blocker: nn.Module, why: str) -> None:
    model = Stack(blocker, nn.Conv2d(3, 8, 3)).eval()
    plan = planned(model, torch.randn(1, 3, 13, 13))
    assert plan.end == "" and plan.grid == (0, 0) and why in plan.remark and why in str(plan)
    with pytest.raises(PlanError, match=why) as caught:
        planned(model, torch.randn(1, 3, 13, 13), memory=plan.peak_bytes - 1)
    assert caught.value.reachable_bytes == plan.peak_bytes


def test_a_step_with_a_backward_gets_no_patches() -> None:
    model, image = network()
    program = graphopt.trace(model, {"x": image})
    plan = PatchInference().plan(program, Costs.of(program, CPU))
    assert plan.end == "" and "no_grad" in plan.remark
    assert len(PatchInference().apply(program, plan).graph.nodes) == len(program.graph.nodes)


def test_what_inductor_runs_gets_no_patches() -> None:
    program = traced(*network())
    costs = replace(Costs.of(program, CPU), fused=True)
    plan = PatchInference("min").plan(program, costs)
    assert plan.end == "" and "Inductor" in plan.remark
    with pytest.raises(PlanError, match="Inductor"):
        PatchInference(0.5).plan(program, costs)


def test_no_image_no_patches() -> None:
    program = graphopt.trace(nn.Linear(4, 4), torch.ones(3, 4), training=False)
    plan = PatchInference("min").plan(program, Costs.of(program, CPU))
    assert plan.end == "" and "no input is an image" in plan.remark


def test_a_plan_that_does_not_fit_is_refused() -> None:
    model, image = network()
    program = traced(model, image)
    region = Prefix.of(program).regions[-1]
    plan = plan_by_hand(program, region, 2, 2)
    again = PatchInferencePlan.from_json(plan.to_json())
    assert again == plan
    for change, message in (
        ({"end": "nowhere"}, "another program"),
        ({"rows": (0, 12, 6)}, "does not cut 0 to 12"),
        ({"columns": (0, 5, 11)}, "does not cut 0 to 12"),
        ({"rows": (0, 5, 12)}, "windows are not those"),
    ):
        with pytest.raises(PlanError, match=message):
            PatchInference().apply(program, PatchInferencePlan(**{**plan.__dict__, **change}))


def test_budgets_are_checked_at_once() -> None:
    with pytest.raises(PlanError, match="memory='plenty'"):
        PatchInference(memory="plenty")
    with pytest.raises(PlanError, match="one of memory= and activations="):
        PatchInference(memory="min", activations="min")
    assert PatchInference.name == "patch-inference"


# --- golden text -------------------------------------------------------------------------------

GOLDEN = Path(__file__).parent.parent / "golden" / "patch_inference.txt"


def test_the_golden_text(request: pytest.FixtureRequest) -> None:
    model = Stack(nn.Conv2d(1, 4, 3, 1, 1), norm(4), nn.ReLU(), nn.Conv2d(4, 2, 2, 2)).eval()
    program = traced(model, torch.ones(1, 1, 16, 8))
    region = Prefix.of(program).regions[-1]
    plan = plan_by_hand(program, region, 2, 1)
    parts = {
        "before": program_text(program),
        "plan": f"end {plan.end}\nrows {plan.rows}\ncolumns {plan.columns}\nwindows {plan.windows}",
        "after": program_text(PatchInference().apply(program, plan)),
    }
    text = "".join(f"# {title}\n{part}\n\n" for title, part in parts.items())
    if request.config.getoption("--regenerate-golden"):
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")
