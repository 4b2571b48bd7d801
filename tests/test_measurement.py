"""Measured peaks are those of the allocator, for steps whose bytes can be counted by hand."""

import pytest
import torch

from graphopt import measure
from graphopt.measurement import Measurement, _peak

MB = 10**6  # the tensors here have 250,000 float32


def tensor() -> torch.Tensor:
    return torch.empty(250, 1000)


@pytest.mark.parametrize(
    ("step", "megabytes"),
    [
        (lambda: None, 0),
        (lambda: tensor(), 1),
        (lambda: [tensor(), tensor(), tensor()], 3),
        (lambda: [tensor().shape for _ in range(5)], 1),  # freed each time
        (lambda: tensor().neg_().exp_(), 1),
        (lambda: (lambda a: (lambda b: a + b)(tensor()))(tensor()), 3),
        (lambda: tensor()[0].view(10, 100).t(), 1),
        (lambda: tensor().expand(7, 250, 1000), 1),
        (lambda: torch.cat([tensor(), tensor()]), 4),
    ],
)
def test_bytes_counted_by_hand(step: object, megabytes: int) -> None:
    assert measure(step).peak_bytes == megabytes * MB  # type: ignore[arg-type]


def test_what_lived_before_does_not_count_and_its_release_earns_nothing() -> None:
    held = [tensor(), tensor()]

    def step() -> torch.Tensor:
        held.clear()
        return tensor()

    assert measure(step).peak_bytes == MB


def test_the_result_is_given_back() -> None:
    found = measure(lambda: "result")
    assert found == Measurement(0, 0, "result")


def test_a_training_step_with_its_gradients_left_out() -> None:
    weight = torch.randn(1000, 1000, requires_grad=True)  # 4 MB
    x = torch.randn(250, 1000)

    def step() -> None:
        (x @ weight).tanh().sum().backward()

    step()
    weight.grad = None
    found = measure(step, gradients=lambda: [weight.grad])  # type: ignore[list-item]
    # tanh's result and its gradient, then that gradient beside the weight's: 1 + 4.
    assert found.peak_bytes - 5 * MB in range(0, 100)
    # Without the weight's gradient: product and tanh, or tanh and its gradient.
    assert found.activation_bytes - 2 * MB in range(0, 100)


def test_a_gradient_that_was_there_before_is_not_left_out_twice() -> None:
    weight = torch.randn(250, 1000, requires_grad=True)
    weight.grad = tensor()
    found = measure(lambda: tensor(), gradients=lambda: [weight.grad])  # type: ignore[list-item]
    assert (found.peak_bytes, found.activation_bytes) == (MB, MB)


def test_errors_of_the_step_reach_the_caller() -> None:
    def fails() -> None:
        raise ValueError("on purpose")

    with pytest.raises(ValueError, match="on purpose"):
        measure(fails)
    assert measure(tensor).peak_bytes == MB


@pytest.mark.parametrize(
    ("events", "left_out", "peak"),
    [
        ([], set(), 0),
        ([(1, 10), (2, 20), (1, -10), (3, 5)], set(), 30),
        ([(9, -100), (1, 10)], set(), 10),  # released: allocated before the step
        ([(1, 10), (1, -10), (1, 40), (1, -40)], set(), 40),  # an address used twice
        ([(1, 10), (2, 20)], {2}, 10),
        ([(2, 100), (2, -100), (1, 10), (2, 20)], {2}, 100),  # only its last life is left out
    ],
)
def test_the_peak_of_a_list_of_events(
    events: list[tuple[int, int]], left_out: set[int], peak: int
) -> None:
    assert _peak(events, left_out) == peak
