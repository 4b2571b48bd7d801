"""Losses over a vocabulary in the forms that people write, on one projection."""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N, D, V = 12, 6, 19
Loss = Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class Projection(nn.Module):
    """`loss` of the scores of x (N, D) on a vocabulary, and what it reads beside them."""

    def __init__(self, loss: Loss, bias: bool = False, vocabulary: int = V, hidden: int = D) -> None:
        super().__init__()
        self.head = nn.Linear(hidden, vocabulary, bias=bias)
        self.loss = loss

    def forward(self, x: Tensor, t: Tensor, q: Tensor, w: Tensor) -> Tensor:
        return self.loss(self.head(torch.tanh(x)), {"t": t, "q": q, "w": w})


def inputs(seed: int = 0) -> dict[str, Tensor]:
    """x (N, D), targets t (N,) of which two are ignored, probabilities q (N, V), class weights w (V,)."""
    torch.manual_seed(seed)
    t = torch.randint(V, (N,))
    t[2] = t[7] = -100
    x = torch.randn(N, D).requires_grad_()
    return {"x": x, "t": t, "q": torch.rand(N, V).softmax(-1), "w": torch.rand(V) + 0.1}


def safe(t: Tensor) -> Tensor:
    """Targets of which none is ignored."""
    return t.clamp_min(0)


def _shifted(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    z, t = z.view(2, N // 2, V), g["t"].view(2, N // 2)
    return F.cross_entropy(z[..., :-1, :].contiguous().view(-1, V), t[..., 1:].reshape(-1))


def _z_loss(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(z, g["t"]) + 1e-2 * z.logsumexp(-1).square().mean()


def _capped(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    return F.cross_entropy(torch.tanh(z / 3.0) * 3.0, g["t"])


def _policy(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    """A policy gradient: log-probabilities of the tokens, weighted by advantages."""
    logp = z.log_softmax(-1).gather(-1, safe(g["t"])[:, None])[:, 0]
    return -(logp * g["q"][:, 0]).mean()


def _preference(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    """The logistic of a difference of sequence log-probabilities."""
    logp = -F.cross_entropy(z, safe(g["t"]), reduction="none")
    first, second = logp.view(2, -1).sum(1)
    return -F.logsigmoid(first - second)


def _difference(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    return (z.logsumexp(-1) - z.gather(-1, safe(g["t"])[:, None]).squeeze(-1)).mean()


def _by_hand(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    u = z - z.detach().amax(-1, keepdim=True)
    logp = u - u.exp().sum(-1, keepdim=True).log()
    return -logp.gather(-1, safe(g["t"])[:, None]).mean()


def _entropy(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    """A policy gradient with a bonus for the entropy."""
    logp = z.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    picked = logp.gather(-1, safe(g["t"])[:, None])[:, 0]
    return -(picked * g["q"][:, 0]).mean() - 0.1 * (entropy * g["q"][:, 1]).mean()


def _entropy_of_probabilities(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    return (z.softmax(-1) * z.log_softmax(-1)).sum(-1).square().mean()


def _entropy_of_logits(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    """The log-sum-exp less the mean of the logits."""
    return (z.logsumexp(-1) - (z.softmax(-1) * z).sum(-1)).sum() + F.cross_entropy(z, g["t"])


def _capped_entropy(z: Tensor, g: Mapping[str, Tensor]) -> Tensor:
    logp = (torch.tanh(z / 3.0) * 3.0).log_softmax(-1)
    return (logp.exp() * logp).sum()


FORMS: dict[str, Loss] = {
    "mean": lambda z, g: F.cross_entropy(z, g["t"]),
    "sum": lambda z, g: F.cross_entropy(z, g["t"], reduction="sum"),
    "none": lambda z, g: F.cross_entropy(z, g["t"], reduction="none").square().sum(),
    "weight": lambda z, g: F.cross_entropy(z, g["t"], g["w"]),
    "smoothing": lambda z, g: F.cross_entropy(z, g["t"], label_smoothing=0.1),
    "weight and smoothing": lambda z, g: F.cross_entropy(z, g["t"], g["w"], label_smoothing=0.1),
    "probabilities": lambda z, g: F.cross_entropy(z, g["q"]),
    "probabilities, all options": lambda z, g: F.cross_entropy(z, g["q"], g["w"], label_smoothing=0.1),
    "another index": lambda z, g: F.cross_entropy(z, safe(g["t"]), ignore_index=3),
    "scale": lambda z, g: F.cross_entropy(z * 0.3, g["t"]),
    "soft cap": _capped,
    "shift": _shifted,
    "z-loss": _z_loss,
    "policy gradient": _policy,
    "preference": _preference,
    "difference": _difference,
    "by hand": _by_hand,
    "log-likelihood": lambda z, g: F.nll_loss(z.log_softmax(-1), g["t"]),
    "entropy": _entropy,
    "entropy of probabilities": _entropy_of_probabilities,
    "entropy of logits": _entropy_of_logits,
    "capped entropy": _capped_entropy,
    "added bias": lambda z, g: F.cross_entropy(z + g["w"], g["t"]),
}
