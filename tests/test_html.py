"""The report as an HTML page: its figures against other sums, and the page in a real browser."""

import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import CHROMIUM, Browser
from fake_ranks import fake_mesh
from torch import nn

from graphopt import Checkpoint, OverlapComm
from graphopt.analysis import analyse
from graphopt.cli import main
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.errors import GraphoptError
from graphopt.graph_report import Side
from graphopt.html_figures import front_figure, spans_figure
from graphopt.html_memory import lifetimes_figure, memory_figure
from graphopt.html_modules import modules_figure, own_costs
from graphopt.html_roofline import roofline_points
from graphopt.passes.overlap_plan import OverlapPlan
from graphopt.report import GraphBreak, Report
from graphopt.timeline import CATEGORIES
from graphopt.tracing import trace

go = pytest.importorskip("plotly.graph_objects")
HOSTILE = '<img src=x onerror="boom()">'
NAME = "</script><script>console.error('name')</script>&amp; \u2028 %{x}"
WIDTH, ROWS = 16, 256


class Block(nn.Module):
    """Two products and a costly function; the name of one module is markup."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH)
        self.add_module(HOSTILE, nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = torch.tanh(self.up(x)).exp()  # </script><b onclick="console.error('code')">
        return x + self.get_submodule(HOSTILE)(wide)


def net() -> nn.Sequential:
    return nn.Sequential(Block(), Block(), Block())


def report_of(memory: float | str | None) -> Report:
    program = trace(net(), torch.zeros(ROWS, WIDTH))
    return analyse(program, NAME, [Checkpoint(memory=memory)], GENERIC_CPU)


@pytest.fixture(scope="module")
def report() -> Report:
    return report_of(0.7)


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return report.to_html()


def figures_of(page: str) -> list[dict[str, Any]]:
    match = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    return list(json.loads(match[1]))


def sides_of(report: Report) -> tuple[Side, Side]:
    return Side.before(report.records[0]), Side.after(report.records[0])


def test_the_areas_reach_the_predicted_peaks(report: Report) -> None:
    figure = memory_figure(report.graphs[0], *sides_of(report))
    peaks = []
    for place in ("y", "y2"):
        areas = [t for t in figure["data"] if "stackgroup" in t and t["yaxis"] == place]
        assert {t["name"] for t in areas} <= set(CATEGORIES)
        total = [sum(column) for column in zip(*(t["y"] for t in areas), strict=True)]
        line, mark = (t for t in figure["data"] if "stackgroup" not in t and t["yaxis"] == place)
        assert line["y"] == total and mark["y"] == [max(total)]
        assert mark["x"][0] == areas[0]["x"][total.index(max(total))]
        peaks.append(max(total))
    assert peaks == [report.baseline_peak_bytes, report.predicted_peak_bytes]
    budgets = [shape["y0"] for shape in figure["layout"]["shapes"] if shape["y0"] == shape["y1"]]
    assert budgets == 2 * [report.graphs[0].budget_bytes]


def test_the_peak_tells_which_tensors_and_why(report: Report) -> None:
    (graph,) = report.graphs
    marks = [t for t in memory_figure(graph, *sides_of(report))["data"] if t["mode"] == "markers"]
    assert graph.peak is not None
    for fact in graph.peak.tensors[:3]:
        assert fact.name in marks[1]["text"][0] and fact.origin.place in marks[1]["text"][0]
        assert ("kept: making it again" in marks[1]["text"][0]) == (fact.category == "kept")


def test_bars_are_as_long_as_their_tensors_live(report: Report) -> None:
    _, after = sides_of(report)
    figure = lifetimes_figure(report.graphs[0], after)
    lives = {
        (after.flow.values[v].label, category, first, last + 1 - first)
        for v, category, first, last in after.timeline.lifetimes
    }
    bars = {
        (row.partition(",")[0], trace["name"], begin, length)
        for trace in figure["data"]
        for row, begin, length in zip(trace["y"], trace["base"], trace["x"], strict=True)
    }
    assert bars <= lives and len(bars) >= 20
    shown = min(
        after.flow.values[v].nbytes
        for v, *_ in after.timeline.lifetimes
        if after.flow.values[v].label in {bar[0] for bar in bars}
    )
    hidden = [
        after.flow.values[v].nbytes
        for v, *_ in after.timeline.lifetimes
        if after.flow.values[v].label not in {bar[0] for bar in bars}
    ]
    assert shown >= max(hidden)


def test_modules_sum_to_the_step_and_to_the_parameters(report: Report) -> None:
    record, (graph,) = report.records[0], report.graphs
    figure = modules_figure("net", own_costs(record.before, *sides_of(report)))
    (treemap,) = figure["data"]
    columns = [treemap["values"]]
    columns += [b["args"][0]["values"][0] for b in figure["layout"]["updatemenus"][0]["buttons"][1:]]
    for column in columns:
        for place, identity in enumerate(treemap["ids"]):
            inside = [c for c, above in zip(column, treemap["parents"], strict=True) if above == identity]
            assert not inside or sum(inside) == pytest.approx(column[place])
    seconds, kept, plain, parameters = columns
    assert seconds[0] == pytest.approx(graph.step_seconds + graph.recompute_seconds)
    assert kept[0] == sum(f.nbytes for f in graph.kept)
    assert plain[0] > kept[0]
    at = {path: size for path, size in zip(treemap["ids"], parameters, strict=True)}
    for path, module in net().named_modules():
        if list(module.parameters()):
            assert at[f"m:{path}"] == sum(4 * p.numel() for p in module.parameters())


def test_backward_operators_belong_to_the_module_they_differentiate(report: Report) -> None:
    own = own_costs(report.records[0].before, *sides_of(report))
    up, down = own["1.up"], own[f"1.{HOSTILE}"]
    assert up.backward_seconds > up.forward_seconds > 0
    assert down.backward_seconds > down.forward_seconds > 0
    assert sum(cost.recompute_seconds for cost in own.values()) == pytest.approx(
        report.graphs[0].recompute_seconds
    )


def test_the_front_has_the_plan_and_nothing_that_is_beaten(report: Report, page: str) -> None:
    figure = next(f for f in figures_of(page) if "this plan" in [t.get("name") for t in f["data"]])
    curve, star = figure["data"]
    points = list(zip(curve["x"], curve["y"], strict=True))
    plan = report.records[0].steps[0].plan
    assert (star["x"][0], star["y"][0]) in points
    assert star["x"] == [plan.peak_bytes]  # type: ignore[attr-defined]
    assert star["y"] == [
        pytest.approx(report.graphs[0].step_seconds + report.graphs[0].recompute_seconds)
    ]
    assert len(points) >= 5 and points[-1] == (report.baseline_peak_bytes, report.graphs[0].step_seconds)
    beaten = [a for a in points for b in points if a != b and b[0] <= a[0] and b[1] <= a[1]]
    assert not beaten
    assert front_figure([], plan)["data"][0]["x"] == [plan.peak_bytes]  # type: ignore[arg-type, attr-defined]


def test_points_are_below_the_roof_and_a_product_is_where_it_belongs(report: Report) -> None:
    points = roofline_points(sides_of(report)[0])
    roof = GENERIC_CPU.flops("float32")
    for point in points:
        reachable = min(roof, point.intensity * GENERIC_CPU.bytes_per_s)
        assert 0 < point.operations / point.seconds <= reachable
    product = next(p for p in points if p.operator == "aten.addmm" and p.origin.module.endswith(".up"))
    moved = 4 * (ROWS * WIDTH + WIDTH * 4 * WIDTH + 4 * WIDTH + ROWS * 4 * WIDTH)
    assert product.moved_bytes == moved and product.count == 1
    assert product.operations == pytest.approx(2 * ROWS * WIDTH * 4 * WIDTH, rel=0.1)
    alike = roofline_points(sides_of(report_of(None))[0])
    assert sum(p.count * p.seconds for p in alike) <= report.graphs[0].step_seconds


def test_the_schema_of_plotly_knows_all_of_it(page: str) -> None:
    figures = figures_of(page)
    assert [f["data"][0]["type"] for f in figures] == ["scatter", "bar", "scatter", "treemap", "scatter"]
    for figure in figures:
        go.Figure(figure)  # refuses properties and values that plotly has not
    figures[0]["data"][0]["stackgrup"] = 1
    with pytest.raises(ValueError, match="stackgrup"):
        go.Figure(figures[0])


def test_a_page_is_small_whole_and_the_same_each_time(report: Report, page: str) -> None:
    assert len(page.encode()) < 6_000_000
    assert not re.findall(
        r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=", page.partition("<script>")[0]
    )
    assert "Content-Security-Policy\" content=\"default-src 'none';" in page
    assert report.to_html() == page
    assert report.to_html(budgets=0).count('class="figure"') == page.count('class="figure"') - 1


class Texts(HTMLParser):
    """The tags of a page, and the text outside of scripts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_text_of_the_model_is_text(page: str) -> None:
    seen = Texts(page)
    tags = [tag for tag, _ in seen.tags]
    assert tags.count("script") == 3 and "img" not in tags and "b" not in tags
    assert not any(name.startswith("on") for _, attributes in seen.tags for name in attributes)
    assert NAME in seen.text and HOSTILE in seen.text
    ours = re.compile(r"</?b>|<br>|<extra></extra>")
    figures = figures_of(page)
    (treemap,) = figures[3]["data"]
    assert f"m:0.{HOSTILE}" in treemap.pop("ids") and treemap.pop("parents")  # which are not drawn
    assert "<" not in ours.sub("", json.dumps(figures))


def test_without_plotly_it_says_what_to_install(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(GraphoptError, match=r"pip install graphopt\[html\]"):
        report.to_html()
    assert main(["report", "no-such-model", "--html", str(tmp_path / "out.html")]) == 1
    assert "pip install graphopt[html]" in capsys.readouterr().err


def test_the_command_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "import torch", "def make():", "  return torch.nn.Linear(4, 4), (torch.zeros(2, 4),)"
    (tmp_path / "tiny.py").write_text("\n".join(lines))
    page = tmp_path / "out.html"
    options = ["--inference", "--device", "h100", "--html", str(page)]
    assert main(["report", f"{tmp_path}/tiny.py:make", *options]) == 0
    assert "graphopt report: " in capsys.readouterr().out
    text = Texts(page.read_text(encoding="utf-8")).text
    assert "forward only" in text and "Memory against time" not in text and "h100" in text
    assert main(["report", f"{tmp_path}/tiny.py:make", *options[:-1], f"{tmp_path}/none/out.html"]) == 1


def test_transfers_have_a_bar_each() -> None:
    collectives: Any = torch.ops._c10d_functional

    def f(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return collectives.wait_tensor(collectives.all_reduce(x @ w, "sum", "0")) @ w

    links = LinkCosts(Cluster(GENERIC_CPU, 2, 1e9, 5e-5, "example"))
    with fake_mesh(2):
        program = trace(f, [torch.ones(64, 64) for _ in range(2)], training=False)
        found = analyse(program, "f", [OverlapComm(links=links, split=1)], GENERIC_CPU)
    plan = found.records[0].steps[0].plan
    assert isinstance(plan, OverlapPlan)
    figure = spans_figure({"as captured": plan.spans_before, "as planned": plan.spans})
    ends = [b + x for t in figure["data"] for b, x in zip(t["base"], t["x"], strict=True)]
    assert max(ends) == pytest.approx(max(plan.seconds, plan.seconds_before))
    transfers = next(t for t in figure["data"] if t["name"] == "transfers")
    assert sum(transfers["x"]) == pytest.approx(2 * sum(row[3] for row in plan.transfers))
    assert "Transfers" in Texts(found.to_html()).text
    go.Figure(figure)


def test_graphs_and_breaks_have_their_own_parts(report: Report) -> None:
    breaks = (GraphBreak("net.py:3", "print(x < 1)", "a <call> that cannot be captured"),)
    two = Report(NAME, report.settings, 2 * report.records, 1, breaks)
    seen = Texts(two.to_html(budgets=0))
    assert "Graph 2: Roofline" in seen.text and "a <call> that cannot be captured" in seen.text
    assert "1 more graph compiled" in seen.text
    empty = Texts(Report(NAME, report.settings, (), 0, ()).to_html())
    assert "the first call captures the model" in empty.text and "Roofline" not in empty.text


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def file(page: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    written = tmp_path_factory.mktemp("page") / "report.html"
    written.write_text(page, encoding="utf-8")
    return written


SIZES = {"wide": (1400, 900), "narrow": (420, 800)}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_a_browser_draws_all_of_it_without_a_fault(
    browser: Browser, file: Path, page: str, size: tuple[int, int]
) -> None:
    browser.faults.clear()
    browser.open(file, *size)
    assert browser.faults == []
    assert browser.value("innerWidth") == size[0]
    assert browser.value("document.documentElement.scrollWidth <= innerWidth")
    assert browser.value("performance.getEntriesByType('resource').length") == 0
    assert browser.value("document.querySelector('h1').textContent") == NAME
    shapes = browser.value(
        "[...document.querySelectorAll('.figure')].map(figure => ["
        "'.scatterlayer .trace', '.barlayer .point', '.treemaplayer .slice']"
        ".map(of => figure.querySelectorAll(of).length))"
    )
    areas, bars, curve, modules, roofline = shapes
    figures = figures_of(page)
    assert areas[0] == len(figures[0]["data"]) and curve[0] == 2
    assert bars[1] == sum(len(trace["x"]) for trace in figures[1]["data"])
    assert modules[2] >= 10 and roofline[0] == len(figures[4]["data"])
    wider = "e => e.getBoundingClientRect().right > innerWidth"
    assert (
        browser.value(f"[...document.querySelectorAll('.figure, .scroll, .tile')].some({wider})") is False
    )


def test_a_click_sorts_a_table(browser: Browser, file: Path) -> None:
    browser.open(file, *SIZES["wide"])
    tables = "[...document.querySelectorAll('table.sortable')]"
    kept = f"{tables}.find(t => t.textContent.includes('why it is kept'))"
    column = "[...{0}.tBodies[0].rows].map(row => row.cells[{1}].{2})"
    sizes = [float(text) for text in browser.value(column.format(kept, 0, "dataset.v"))]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1
    click = f"{kept}.tHead.rows[0].cells[{{0}}].querySelector('button').click()"
    for place, part, descending in (
        (0, "dataset.v", True),
        (0, "dataset.v", False),
        (1, "textContent", False),
    ):
        browser.value(click.format(place))
        found = browser.value(column.format(kept, place, part))
        numbers = [float(t) for t in found] if part == "dataset.v" else found
        natural = numbers if place == 0 else [re.sub(r"\d+", lambda m: m[0].zfill(4), t) for t in numbers]
        assert natural == sorted(natural, reverse=descending)


def test_hovering_tells_what_is_there_and_dark_pages_are_dark(browser: Browser, file: Path) -> None:
    browser.faults.clear()
    for size in SIZES.values():
        browser.open(file, *size, scheme="dark")
        middle = "(r => [r.left + r.width / 2, r.top + r.height / 2])({0}.getBoundingClientRect())"
        mark = "[...document.querySelectorAll('.figure .points path')][1]"
        browser.value(f"{mark}.scrollIntoView({{block: 'center'}})")
        browser.value("new Promise(done => setTimeout(done, 100))")
        browser.hover(*browser.value(middle.format(mark)))
        browser.value("new Promise(done => setTimeout(done, 200))")
        text = browser.value("document.getElementById('readout').innerText")
        assert text.startswith("peak ") and "test_html.py:" in text and "kept: " in text
        assert browser.value("document.getElementById('readout').querySelector('img')") is None
        box = "(e => [e.left >= 0, e.right <= innerWidth, e.top >= 0, e.bottom <= innerHeight])"
        assert all(browser.value(f"{box}(document.getElementById('readout').getBoundingClientRect())"))
    ink = "getComputedStyle(document.querySelector('.figure .main-svg')).backgroundColor"
    dark = browser.value(ink)
    browser.open(file, *SIZES["wide"])
    assert sum(map(int, re.findall(r"\d+", dark)[:3])) < 200
    assert sum(map(int, re.findall(r"\d+", browser.value(ink))[:3])) > 600
    assert browser.faults == []


@pytest.mark.parametrize(
    "script",
    ["throw new Error('injected')", "console.error('injected')", "document.write('<img src=x>')"],
)
def test_faults_of_a_page_are_seen(browser: Browser, tmp_path: Path, script: str) -> None:
    browser.faults.clear()
    broken = tmp_path / "broken.html"
    broken.write_text(f"<!doctype html><body><script>{script}</script></body>")
    browser.open(broken, 420, 800)
    assert browser.faults
