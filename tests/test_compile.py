"""Promise: compile. Every public function under torch.compile(fullgraph=True), with numbers that change between calls."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from topk_rkl import (
    AlphaBeta,
    JensenShannon,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    builders,
    composition,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    rewards,
    rollout,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    weighting,
)

V, K, H = 50, 6, 8


def inputs(n: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:  # (n, V), (n, V)
    z, w = torch.randn(2, n, V, generator=torch.Generator().manual_seed(seed))
    return z, w


HEAD = torch.randn(V, H, generator=torch.Generator().manual_seed(1))

Call = Callable[[Tensor, Tensor, float], Tensor]


def hidden(z: Tensor) -> Tensor:  # (n, V) -> (n, H)
    return z[:, :H]


def total(support) -> Tensor:
    return support.log_probs.exp().sum()


def diagnosed(z: Tensor, w: Tensor, t: float) -> Tensor:
    names = ("student_mass", "teacher_mass", "overlap_count", "overlap_token_advantage", "top1_agreement",
             "student_entropy", "teacher_entropy", "max_log_ratio")  # fmt: skip
    loss, found = topk_divergence(z, w, k=K, temperature=1 + t, diagnostics=names)
    return loss + sum(x.float().sum() for x in found.values())


# A function of the logits and of one number t, from 0 to 1, which changes at every call.
CALLS: dict[str, Call] = {
    "temperature": lambda z, w, t: topk_reverse_kl(z, w, k=K, temperature=1 + t),
    "temperature of a Support": lambda z, w, t: topk_reverse_kl(z, teacher_topk(w, K), temperature=1 + t),
    "temperature of the tail": lambda z, w, t: topk_divergence(z, w, k=K, mass="tail", temperature=1 + t),
    "denominator": lambda z, w, t: topk_reverse_kl(z, w, k=K, denominator=10 * t),
    "a number of tokens": lambda z, w, t: topk_reverse_kl(z, w, k=K, denominator=math.floor(100 * t)),
    "logit_scale": lambda z, w, t: linear_topk_reverse_kl(hidden(z), HEAD, w, k=K, logit_scale=1 + t),
    "softcap": lambda z, w, t: linear_topk_reverse_kl(hidden(z), HEAD, w, k=K, softcap=1 + t),
    "softcap of the tail": lambda z, w, t: linear_topk_divergence(
        hidden(z), HEAD, w, k=K, mass="tail", softcap=1 + t, temperature=2 - t
    ),
    "softcap of a teacher": lambda z, w, t: topk_reverse_kl(
        z, linear_teacher_topk(hidden(w), HEAD, K, softcap=1 + t, logit_scale=2 - t)
    ),
    "clamp": lambda z, w, t: topk_divergence(z, w, k=K, divergence=ReverseKL(clamp=(-t, t))),
    "JensenShannon": lambda z, w, t: topk_divergence(z, w, k=K, divergence=JensenShannon(t)),
    "Mixture": lambda z, w, t: topk_divergence(z, w, k=K, divergence=Mixture(t)),
    "SkewForwardKL": lambda z, w, t: topk_divergence(z, w, k=K, divergence=SkewForwardKL(t)),
    "SkewReverseKL": lambda z, w, t: topk_divergence(z, w, k=K, divergence=SkewReverseKL(t)),
    "AlphaBeta": lambda z, w, t: topk_divergence(z, w, k=K, divergence=AlphaBeta(t, 1 - t), mass="tail"),
    "diagnostics": diagnosed,
    "top_p of the teacher": lambda z, w, t: total(builders.teacher_top_p(w, t, K, normalize=True)),
    "mixture": lambda z, w, t: topk_reverse_kl(z, composition.mixture([w, -w], [t, 1 - t], k=K)),
    "residual": lambda z, w, t: topk_reverse_kl(z, composition.residual(w, -w, lam=1 + t, clip=t, k=K)),
    "extrapolation": lambda z, w, t: topk_reverse_kl(z, composition.extrapolation(w, -w, lam=1 + t, k=K)),
    "taid": lambda z, w, t: topk_reverse_kl(z, composition.taid(z, w, t=t, k=K)),
    "veto": lambda z, w, t: topk_reverse_kl(z, composition.veto(z, w, beta=t, k=K)),
    "clip of a reward": lambda z, w, t: (rewards.log_ratio(z, w, clip=(-t, t)) * z).sum(),
    "tau": lambda z, w, t: (rewards.tanh_log_ratio(z, w, tau=t) * z).sum(),
    "alpha": lambda z, w, t: (rewards.power_difference(-z.abs(), -w.abs(), alpha=t) * z).sum(),
    "alpha of Box-Cox": lambda z, w, t: (rewards.box_cox(-z.abs(), -w.abs(), alpha=t) * z).sum(),
    "lam of a reward": lambda z, w, t: (rewards.extrapolated_log_ratio(z, w, -w, lam=t) * z).sum(),
    "gamma": lambda z, w, t: (rewards.return_to_go(w, gamma=t) * z).sum(),
    "denominator of aggregate": lambda z, w, t: weighting.aggregate(z, w > 0, denominator=t),
    "norm": lambda z, w, t: weighting.aggregate(z, w > 0, "seq-mean-token-sum-norm", norm=t),
    "top_p": lambda z, w, t: rollout.top_p_filter(z, t, 1 + t).softmax(-1).square().sum(),
    "temperature of the sampled token": lambda z, w, t: rollout.sampled_token_loss(
        z, w, w.argmax(-1), temperature=1 + t
    ),
}  # fmt: skip

SCHEDULE = (0.1, 0.2, 0.3, 0.4)


def value_and_gradient(call: Call, t: float, n: int = 4) -> tuple[Tensor, Tensor]:
    z, w = inputs(n, seed=round(100 * t) + n)
    leaf = z.requires_grad_()
    loss = call(leaf, w, t)
    (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True, materialize_grads=True) if loss.requires_grad else (z,)
    return loss.detach(), gradient.detach()


def compare(compiled: Call, call: Call, t: float, n: int = 4) -> None:
    for got, want in zip(value_and_gradient(compiled, t, n), value_and_gradient(call, t, n), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CALLS)
def test_compile_with_a_number_that_changes(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], backend=counter, fullgraph=True)
    for t in SCHEDULE:
        compare(compiled, CALLS[name], t)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", CALLS)
def test_compile_with_every_size_dynamic(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(CALLS[name], backend=counter, fullgraph=True, dynamic=True)
    for t, n in zip(SCHEDULE, (4, 5, 7, 3), strict=True):
        compare(compiled, CALLS[name], t, n)
    assert counter.frame_count <= 2
