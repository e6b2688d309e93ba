"""The losses of a token that the studies `method` and `smollm2` compare; docs/objectives.md has their formulas.

The sampled token stands for the tail in V4 and V5. Its importance weight p(y) / p_sampler(y) is left out. The tail is
thus biased where rollouts have a top-p below 1.
"""

from collections.abc import Callable

from torch import Tensor

from topk_rkl.loss import teacher_topk, topk_divergence, topk_reverse_kl
from topk_rkl.recipe.builders import student_topk, with_sampled
from topk_rkl.recipe.rewards import k1
from topk_rkl.recipe.rollout import sampled_token_loss

Loss = Callable[
    [
        Tensor,  # (R, B, T, V) the student's logits
        Tensor,  # (R, B, T, V) the teacher's
        Tensor,  # (R, B, T) the sampled tokens
        int,  # K
        Tensor,  # (R, B, T) the weights of the tokens
    ],
    Tensor,  # (R, B, T) already weighted
]


def sampled(z: Tensor, w: Tensor, y: Tensor, _: int, weights: Tensor) -> Tensor:
    return sampled_token_loss(z, w, y, weights=weights, reduction="none")


def topk(z: Tensor, w: Tensor, _: Tensor, k: int, weights: Tensor) -> Tensor:
    return topk_reverse_kl(z, w, k=k, weights=weights, reduction="none")


def student_topk_and_sampled(z: Tensor, w: Tensor, y: Tensor, k: int, weights: Tensor) -> Tensor:
    support = with_sampled(student_topk(z, w, k), y, w)
    return topk_reverse_kl(z, support, weights=weights, reduction="none")


def topk_and_sampled(z: Tensor, w: Tensor, y: Tensor, k: int, weights: Tensor) -> Tensor:
    return topk_reverse_kl(z, with_sampled(teacher_topk(w, k), y, w), weights=weights, reduction="none")


def student_ema_pg(z: Tensor, w: Tensor, y: Tensor, k: int, weights: Tensor) -> Tensor:
    support = student_topk(z, w, k, normalize=True)
    log_p, log_q = (x.log_softmax(-1).gather(-1, y.unsqueeze(-1)).squeeze(-1) for x in (z, w))  # (R, B, T)
    outside = (support.ids != y.unsqueeze(-1)).all(-1)  # (R, B, T)
    tail = outside * k1(log_p, log_q) * (log_p - log_p.detach()).exp()
    return topk_divergence(z, support, mass="raw", weights=weights, reduction="none") + weights * tail


def ema_pg(z: Tensor, w: Tensor, y: Tensor, k: int, weights: Tensor) -> Tensor:
    return topk_divergence(z, w, k=k, mass="ema_pg", sampled_ids=y, weights=weights, reduction="none")


def corrected_ema_pg(z: Tensor, w: Tensor, y: Tensor, k: int, weights: Tensor) -> Tensor:
    return topk_divergence(z, w, k=k, mass="ema_pg_corrected", sampled_ids=y, weights=weights, reduction="none")


def raw(z: Tensor, w: Tensor, _: Tensor, k: int, weights: Tensor) -> Tensor:
    return topk_divergence(z, w, k=k, mass="raw", weights=weights, reduction="none")


def raw_stop_grad(z: Tensor, w: Tensor, _: Tensor, k: int, weights: Tensor) -> Tensor:
    return topk_divergence(z, w, k=k, mass="raw_stop_grad", weights=weights, reduction="none")


def tail(z: Tensor, w: Tensor, _: Tensor, k: int, weights: Tensor) -> Tensor:
    return topk_divergence(z, w, k=k, mass="tail", weights=weights, reduction="none")


LOSSES: dict[str, Loss] = {
    "sampled": sampled,
    "top-K": topk,
    "V2": student_topk_and_sampled,
    "V3": topk_and_sampled,
    "V4": student_ema_pg,
    "V5": ema_pg,
    "V5, corrected": corrected_ema_pg,
    "raw": raw,
    "raw, stop-gradient": raw_stop_grad,
    "tail": tail,
}
