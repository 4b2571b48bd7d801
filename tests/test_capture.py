import pytest


@pytest.mark.parametrize(
    "name",
    [
        "perceptron",
        "residual",
        "u-net",
        "shared block",
        "cross attention",
        "dense",
        "views",
        "in place",
        "multi-output",
        "dropouts",
        "convolutions",
    ],
)
def test_x(programs, steps, name):
    model, kw = programs.named()[name]()
    s = steps.twin(model, **kw)
    print(
        name,
        steps.recomputed(s),
        [len(r.before.graph.nodes) for r in steps.records(s)],
        steps.records(s)[0].steps[0].plan,
    )
