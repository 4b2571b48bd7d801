"""Passes as text: what is printed is read back, nothing is evaluated, and mistakes are named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import graphopt
from graphopt import GraphoptError, PlanError
from graphopt.cost_models.devices import GENERIC_CPU, Cluster
from graphopt.cost_models.link_costs import LinkCosts
from graphopt.pass_syntax import parse_passes, pass_syntax, plan_class, program_passes
from graphopt.passes.budget import Budget
from graphopt.plan import Plan

budgets = st.none() | st.just("min") | st.floats(0.1, 1.0) | st.integers(1, 2**40) | st.just("6GiB")


@given(budgets, st.booleans(), st.sampled_from(["graph", "chain", "ilp"]), st.integers(0, 9))
def test_what_is_printed_is_read_back(memory: Budget, hold: bool, solver: str, least: int) -> None:
    passes = [
        graphopt.Checkpoint(memory=memory, hold_outputs=hold, solver=solver),
        graphopt.Fuse(min_bytes=least),
        graphopt.StreamLoss(memory=memory),
    ]
    for write in (repr, pass_syntax):
        assert parse_passes(",".join(map(write, passes))) == passes


def test_options_that_repr_leaves_out_are_written() -> None:
    pass_ = graphopt.SparseUpdate("1MiB", scores={"weight": 2.0, "bias": 0.5})
    assert "scores" not in repr(pass_)
    assert parse_passes(pass_syntax(pass_)) == [pass_]


def test_names_are_those_of_classes_and_of_the_listing() -> None:
    wanted = [graphopt.Checkpoint(memory=0.6), graphopt.StreamLoss(returns="lazy"), graphopt.Fuse()]
    for text in (
        "Checkpoint(0.6), StreamLoss(returns='lazy'), Fuse()",
        'checkpoint(memory=0.6),stream-loss(returns="lazy"),fuse',
        "Checkpoint(memory=0.6),\n  stream_loss(returns='lazy'),\n  Fuse,",
    ):
        assert parse_passes(text) == wanted
    folder = parse_passes("offload-saved(folder='/tmp/a-b')")[0]
    assert folder == graphopt.OffloadSaved(folder="/tmp/a-b"), "dashes in texts stay"


REFUSED = {
    "": "cannot read the passes ''",
    "Checkpoint(": r"cannot read the passes 'Checkpoint\('",
    "Checkpoint()]+[Fuse()": "is not a pass|cannot read",
    "Chekpoint()": r"no pass is called 'Chekpoint' \(did you mean Checkpoint",
    "Checkpoint(memori=0.5)": r"no option 'memori' \(did you mean memory\?\); it has memory, activations",
    "PackSaved(memory=1)": "PackSaved has no option 'memory'; it has none",
    "Checkpoint(memory=__import__('os').getcwd())": "an option is a number, a text, a list or None",
    "Checkpoint(memory=x)": "memory=x: an option is a number",
    "Fuse(1, True, 2)": "Fuse has 2 options",
    "Fuse(1, min_bytes=2)": "min_bytes is given twice",
    "Fuse(**{})": "write each option with its name",
    "a.Fuse()": r"a.Fuse\(\) is not a pass",
    "SparseUpdate('1MiB', scores=3)": r"SparseUpdate\(.*\): 'int' object is not iterable",
    "SparseUpdate('1MiB', scores='ab')": r"SparseUpdate\(.*\): dictionary update sequence",
    "1 + 1": "1 \\+ 1 is not a pass",
    "SkipLayers(remove=1)": "SkipLayers changes the module, not its program",
    "skip-layers": "SkipLayers changes the module, not its program",
    "Checkpoint(memory=1.5)": "a share lies above 0",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=REFUSED)
def test_refused(text: str, message: str) -> None:
    with pytest.raises(GraphoptError, match=message):
        parse_passes(text)


def test_an_option_that_no_text_stands_for() -> None:
    links = LinkCosts(Cluster(GENERIC_CPU, 2, 1e9, 1e-6, "made up"))
    with pytest.raises(GraphoptError, match=r"OverlapComm\(links=LinkCosts\) cannot be written as text"):
        pass_syntax(graphopt.OverlapComm(links=links))


def test_every_pass_says_what_it_plans() -> None:
    kinds = [plan_class(kind) for kind in program_passes().values()]
    assert all(issubclass(kind, Plan) and kind is not Plan for kind in kinds)
    assert PlanError not in kinds and len(set(kinds)) == len(kinds)
