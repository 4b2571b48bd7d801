"""What a notebook shows of programs, plans and answers: well-formed, complete, escaped."""

from dataclasses import dataclass
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt import Checkpoint, Fuse
from graphopt.batch_plan import BatchPlan, BatchStage, Dual
from graphopt.cost_models.costs import Costs
from graphopt.cost_models.devices import GENERIC_CPU
from graphopt.html_table import INLINE, MOST, cell_text, fields_table, folded, table
from graphopt.module_report import ModuleReport, ModuleStep
from graphopt.passes.skip_plan import SkipMeasurement
from graphopt.plan import Plan
from graphopt.program import Program


class Page(HTMLParser):
    """Its tags, and the texts between them; fails where tags do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.cells.append(data.strip())


@dataclass(frozen=True)
class RiskyPlan(Plan):
    """A plan whose texts are HTML."""

    names: tuple[str, ...] = ()
    rows: tuple[tuple[str, int], ...] = ()
    parts: tuple[SkipMeasurement, ...] = ()
    seconds: float = 0.25
    limit: int | None = None
    text: str = "<script>"

    def __str__(self) -> str:
        return "<b>"


@pytest.fixture(scope="module")
def program() -> Program:
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 1))
    return graphopt.trace(lambda x: net(x).sum(), torch.zeros(64, 8))


def test_a_table_of_nothing_is_nothing() -> None:
    assert table(("a", "b"), []) == "" and folded("all", "") == ""


def test_short_tuples_are_shown_and_long_ones_folded() -> None:
    few, many = (tuple(map(str, range(n))) for n in (INLINE, MOST + 3))
    text = fields_table(RiskyPlan(names=few))
    assert Page(text).tags.count("details") == 0 and cell_text(few) in text
    page = Page(fields_table(RiskyPlan(names=many)))
    assert page.tags.count("details") == 1
    shown = " ".join(page.cells)
    assert f"{MOST + 3}: 0, 1, 2, 3, .." in shown and "and 3 more" in shown
    assert str(MOST - 1) in shown and f", {MOST}" not in shown


def test_rows_and_records_are_folded_tables() -> None:
    plan = RiskyPlan(rows=(("a", 1), ("b", 2)), parts=(SkipMeasurement(5, 7), SkipMeasurement(6, 8)))
    page = Page(fields_table(plan))
    assert {"2 rows", "2 of SkipMeasurement", "whole_parameters", "5", "8"} <= set(page.cells)
    assert {"a, 1", "b, 2"} <= set(page.cells)


def test_every_text_is_escaped() -> None:
    risky = ("<i>",) * (INLINE + 1)
    plan = RiskyPlan(names=risky, rows=(("<u>", 1),))
    page = Page(plan._repr_html_())
    assert not {"script", "b", "i", "u"} & (set(page.tags) - {"b"}) and page.tags.count("b") == 1
    assert any("<script>" in cell for cell in page.cells) and "&lt;u&gt;" in plan._repr_html_()
    report = ModuleReport("<i>", (ModuleStep("<u>", plan, "<i>"),))
    assert not {"i", "u", "script"} & set(Page(report._repr_html_()).tags)


@pytest.mark.parametrize("pass_", [Checkpoint(memory="min"), Fuse()])
def test_a_plan_shows_all_its_fields(program: Program, pass_: Any) -> None:
    plan = pass_.plan(program, Costs.of(program, GENERIC_CPU))
    text = plan._repr_html_()
    page = Page(text)
    names = set(vars(plan))
    assert names <= set(page.cells) and cell_text(plan.peak_bytes) in page.cells
    assert str(plan) in text and type(plan).__name__ in text


def test_a_program_shows_its_inputs_and_operators(program: Program) -> None:
    page = Page(program._repr_html_())
    weights = (8 * 16 + 16 + 16 + 16 + 16 + 1) * 4
    place = page.cells.index("parameter")
    assert page.cells[place : place + 3] == ["parameter", "6", f"{weights:,}"]
    assert page.cells[page.cells.index("input") + 2] == f"{64 * 8 * 4:,}"
    place = page.cells.index("aten.gelu")
    assert page.cells[place : place + 3] == ["aten.gelu", "1", f"{64 * 16 * 4:,}"]
    calls = [int(page.cells[i + 1]) for i, cell in enumerate(page.cells) if cell.startswith("aten.")]
    assert sum(calls) <= sum(1 for _ in program.operators())


def test_a_fit_shows_a_row_for_each_set_of_passes() -> None:
    found = graphopt.fit(
        nn.Linear(8, 1),
        memory="1MiB",
        inputs=lambda batch: (torch.ones(batch, 8), torch.ones(batch, 1)),
        loss=nn.functional.mse_loss,
        device="cpu-generic",
        passes=[Checkpoint(memory="min")],
    )
    page = Page(found._repr_html_())
    assert page.tags.count("tr") == 3
    assert {"as it is", "Checkpoint", str(found.rows[0].largest_batch), found.rows[1].formula} <= {
        *page.cells
    }
    assert str(found).startswith(f"{found.question}:\n")


def test_a_batch_plan_shows_its_stages() -> None:
    stages = tuple(BatchStage(size, 9000, 12, (1, 1), 10**6, 1.0, 0.9) for size in (64, 128))
    page = Page(BatchPlan("<b>", "seq", 10**9, Dual(), stages, 1, 1)._repr_html_())
    assert {"64", "128", "9,000", "12", "1.00 MB"} <= set(page.cells) and page.tags.count("b") == 1
