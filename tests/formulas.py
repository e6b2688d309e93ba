"""Every divergence and mass in float64, in as many steps as its definition has."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from topk_rkl import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Support,
    topk_divergence,
)

Formula = Callable[[Tensor, Tensor], Tensor]


def kl(x: Tensor, y: Tensor) -> Tensor:
    """The terms of KL(x | y), both given as log-probs."""
    return x.exp() * (x - y)


def blend(share: float, x: Tensor, y: Tensor) -> Tensor:
    return torch.logaddexp(math.log(share) + x, math.log(1 - share) + y)


def alpha_beta(a: float, b: float) -> Formula:
    """The general formula, for none of the limits."""
    r = a + b
    return lambda p, q: -((a * q + b * p).exp() - a / r * (r * q).exp() - b / r * (r * p).exp()) / (a * b)


def jensen_shannon(b: float) -> Formula:
    return lambda p, q: b * kl(q, blend(b, q, p)) + (1 - b) * kl(p, blend(b, q, p))


# Each as its definition says it: a term a slot, of log p and log q.
FORMULAS: dict[object, Formula] = {
    ReverseKL(): kl,
    ReverseKL(clamp=(-1.0, 0.7)): lambda p, q: p.exp() * (p - q).clamp(-1, 0.7),
    ForwardKL(): lambda p, q: kl(q, p),
    JensenShannon(): jensen_shannon(0.5),
    JensenShannon(0.1): jensen_shannon(0.1),
    Mixture(0.3): lambda p, q: 0.3 * kl(q, p) + 0.7 * kl(p, q),
    SkewReverseKL(): lambda p, q: kl(p, blend(0.9, q, p)),
    SkewForwardKL(0.4): lambda p, q: kl(q, blend(0.4, q, p)),
    AlphaBeta(0.2, 0.7): alpha_beta(0.2, 0.7),
    AlphaBeta(1.5, -0.4): alpha_beta(1.5, -0.4),
    AlphaBeta(-0.5, 0.2): alpha_beta(-0.5, 0.2),
    AlphaBeta(2, 0): lambda p, q: ((2 * q).exp() * 2 * (q - p) - (2 * q).exp() + (2 * p).exp()) / 4,
    AlphaBeta(0, 2): lambda p, q: ((2 * p).exp() * 2 * (p - q) - (2 * p).exp() + (2 * q).exp()) / 4,
    AlphaBeta(2, -2): lambda p, q: ((2 * (q - p)).exp() - 1 - 2 * (q - p)) / 4,
    AlphaBeta(0, 0): lambda p, q: (p - q) ** 2 / 2,
}
DIVERGENCES = list(FORMULAS)
UNCLAMPED = [one for one in DIVERGENCES if one != ReverseKL(clamp=(-1.0, 0.7))]
RAW = [ReverseKL(), ForwardKL(), Mixture(0.3)]


def log_probs(
    z: Tensor,  # (N, V)
    w: Tensor,  # (N, V)
    ids: Tensor,  # (N, K)
    mass: str,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:  # (N, K), or (N, K + 1) with the rest
    """Of both sides' classes, in float64 and in as many steps as the definition has."""
    both = [x.double() / temperature for x in (z, w)]
    if mass == "renormalized":
        return tuple(x.gather(1, ids).log_softmax(1) for x in both)
    outside = torch.ones_like(z, dtype=torch.bool).scatter(1, ids, False)
    both = [x.log_softmax(1) for x in both]
    classes = [x.gather(1, ids) for x in both]
    if mass != "tail":
        return tuple(classes)
    rests = (x.masked_fill(~outside, -torch.inf).logsumexp(1, keepdim=True) for x in both)
    return tuple(torch.cat((x, rest), 1) for x, rest in zip(classes, rests, strict=True))


def plain(z: Tensor, w: Tensor, ids: Tensor, formula: Formula, mass: str, temperature: float = 1.0) -> Tensor:
    """The loss of each row in float64, from which autograd finds the gradient."""
    log_p, log_q = log_probs(z, w, ids, mass, temperature)
    if mass != "raw_stop_grad":
        return formula(log_p, log_q).sum(1)
    value = formula(log_p, log_q).sum(1)
    # What the gradient of sum [ terms ] would be if the probabilities on S had a constant sum.
    surrogate = value - (1 if formula is kl else -1 if formula is FORMULAS[ForwardKL()] else 0.4) * log_p.exp().sum(1)
    return surrogate + (value - surrogate).detach()


def gradient(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def both(z: Tensor, teacher: Tensor | Support, divergence, want: Callable[[Tensor], Tensor], **options):
    """Loss and gradient of ours, and those wanted, in float64."""
    leaf, exact = z.clone().requires_grad_(), z.double().requires_grad_()
    loss, grad = gradient(topk_divergence(leaf, teacher, divergence=divergence, reduction="none", **options), leaf)
    want_loss, want_grad = gradient(want(exact), exact)
    return loss.double(), grad.double(), want_loss, want_grad
