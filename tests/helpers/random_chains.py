"""Small functions of drawn operators, place by place and along rows, with inputs of drawn layouts."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

Function = Callable[..., Tensor]
UNARY: dict[str, Function] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu of tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu,
    "square": lambda x: x.pow(2),
    "cube": lambda x: torch.tanh(x).pow(3),
    "exp": lambda x: torch.exp(torch.tanh(x)),
    "neg": torch.neg,
    "abs": torch.abs,
    "clamp": lambda x: x.clamp(-1.5, 2.0),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "centred": lambda x: x - x.mean(-1, keepdim=True),
    "normed": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 0.5),
    "scaled": lambda x: x / (1 + x.abs().amax(-1, keepdim=True)),
    "halves": lambda x: torch.cat([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1),
    "reshaped": lambda x: torch.tanh(x.reshape(-1, x.shape[-1])).view(x.shape),
    "wide": lambda x: x.to(torch.promote_types(x.dtype, torch.float32)).tanh().to(x.dtype),
}
BINARY: dict[str, Function] = {
    "add": torch.add,
    "sub": lambda x, y: torch.sub(x, y, alpha=2),
    "mul": lambda x, y: torch.tanh(x) * y,
    "div": lambda x, y: x / (y.abs() + 1),
    "maximum": torch.maximum,
    "where": lambda x, y: torch.where(x > 0.25, x, y),
}


class Chain:
    """A function of x and y (rows, columns), a bias and a weight (columns), and a scale (rows, 1).

    Well conditioned, so that errors say something of the operators: no norm is of numbers near 0.
    """

    def __init__(self, data: st.DataObject, steps: int) -> None:
        self.steps = [
            (
                data.draw(st.sampled_from([*UNARY, *BINARY])),
                data.draw(st.integers(-2, -1)),
                data.draw(st.integers(0, 9)),
            )
            for _ in range(data.draw(st.integers(2, steps)))
        ]

    def __call__(
        self, x: Tensor, y: Tensor, bias: Tensor, weight: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        values = [y * scale, x + bias]
        for name, first, other in self.steps:
            operand = values[first]
            if name in UNARY:
                values.append(UNARY[name](operand))
            else:
                values.append(BINARY[name](operand, values[other % len(values)]))
        norm = F.layer_norm(values[-1], weight.shape, weight, bias, eps=0.5)
        return values[-1], norm


def drawn_inputs(data: st.DataObject, dtype: torch.dtype, special: Sequence[float]) -> list[Tensor]:
    """Inputs for a `Chain`; x and y of drawn strides, sometimes with one of the `special` numbers."""
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    rows = data.draw(st.sampled_from([(6,), (2, 3)]))
    columns = data.draw(st.sampled_from([8, 34]))
    found = []
    for _ in range(2):
        layout = data.draw(st.sampled_from(["plain", "sliced", "transposed"]))
        x = torch.randn(*rows, columns)
        if layout == "sliced":
            x = torch.randn(*rows, 2 * columns)[..., ::2]
        elif layout == "transposed":
            x = torch.randn(columns, *rows).movedim(0, -1)
        found.append(x.to(dtype))
    if special:
        found[0][(0,) * found[0].dim()] = data.draw(st.sampled_from(special))
    vectors = [torch.randn(columns).to(dtype), torch.randn(columns).to(dtype)]
    return [*found, *vectors, torch.randn(*rows, 1).to(dtype)]
