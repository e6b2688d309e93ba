"""Rewards of the sampled token, for trainers that distil by policy gradient.

Everything is made of log-probs of the sampled tokens: p the student's, q the teacher's, each over its whole vocabulary.
A reward is positive where the teacher likes the token better than the student does, so that a trainer maximises it; k1,
k2 and k3 estimate a divergence, so a trainer that wants a reward of them takes the negative.

Arguments are tensors of one shape (...), such as (B, T), of bfloat16, float16, float32 or float64. Results have that
shape, are float32 (float64 where an argument is), and are detached: a reward is a constant of the policy gradient.
They mean nothing at padding; multiply the loss by the mask, not the reward. An argument that is not as said raises
TypeError or ValueError.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk_rkl import checks
from topk_rkl.recipe.sequences import require_cu_seqlens, starts
from topk_rkl.traced import clamped


def log_ratio(
    student_log_probs: Tensor,  # (...)
    teacher_log_probs: Tensor,  # (...)
    *,
    clip: tuple[float, float] | None = None,
) -> Tensor:  # (...)
    """log q - log p: positive where the teacher likes the token better. With `clip=(low, high)`, clamped to that.

    Its negative is the log-ratio of equation 5 of arXiv 2603.25562, whose average over y ~ p is KL(p || q).
    """
    if clip is not None:
        _require_interval("clip", clip)
    log_p, log_q = _constants(student_log_probs=student_log_probs, teacher_log_probs=teacher_log_probs)
    return log_q - log_p if clip is None else clamped(log_q - log_p, *map(float, clip))


def tanh_log_ratio(
    student_log_probs: Tensor,  # (...)
    teacher_log_probs: Tensor,  # (...)
    *,
    tau: float = 1.0,
) -> Tensor:  # (...)
    """tanh((log q - log p) / tau), between -1 and 1: positive where the teacher likes the token better."""
    checks.require_positive("tau", tau)
    return (log_ratio(student_log_probs, teacher_log_probs) / float(tau)).tanh()


def power_difference(
    student_log_probs: Tensor,  # (...)
    teacher_log_probs: Tensor,  # (...)
    *,
    alpha: float = 5.0,
) -> Tensor:  # (...)
    """q^alpha - p^alpha, between -1 and 1: positive where the teacher likes the token better.

    The reward of PowerOPD (arXiv 2606.17199) as its code has it, alpha > 0. `box_cox` is the same over alpha.
    """
    checks.require_positive("alpha", alpha)
    log_p, log_q = _constants(student_log_probs=student_log_probs, teacher_log_probs=teacher_log_probs)
    return _power_difference(log_p, log_q, float(alpha))


def box_cox(
    student_log_probs: Tensor,  # (...)
    teacher_log_probs: Tensor,  # (...)
    *,
    alpha: float,
) -> Tensor:  # (...)
    """(q^alpha - p^alpha) / alpha: positive where the teacher likes the token better; log q - log p at alpha = 0."""
    checks.require_not_negative("alpha", alpha)
    log_p, log_q = _constants(student_log_probs=student_log_probs, teacher_log_probs=teacher_log_probs)
    return log_q - log_p if alpha == 0 else _power_difference(log_p, log_q, float(alpha)) / float(alpha)


def probability_difference(
    student_log_probs: Tensor,  # (...)
    teacher_log_probs: Tensor,  # (...)
) -> Tensor:  # (...)
    """q - p, between -1 and 1: positive where the teacher likes the token better."""
    return power_difference(student_log_probs, teacher_log_probs, alpha=1.0)


def extrapolated_log_ratio(
    student_log_probs: Tensor,  # (...)
    teacher_log_probs: Tensor,  # (...)
    base_log_probs: Tensor,  # (...)
    *,
    lam: float = 1.25,
) -> Tensor:  # (...)
    """lam (log q - log b) - (log p - log b), which is `log_ratio` against a teacher q^lam b^(1 - lam).

    b is the base model; lam = 1 leaves it out, lam > 1 goes on beyond the teacher, in the direction from b to q. It is
    positive where that target, before it is normalised, likes the token better than the student does. The reward of
    G-OPD / ExOPD (arXiv 2602.12125) and of ListOPD (arXiv 2605.08737).
    """
    checks.require_number("lam", lam)
    log_p, log_q, log_b = _constants(
        student_log_probs=student_log_probs, teacher_log_probs=teacher_log_probs, base_log_probs=base_log_probs
    )
    return float(lam) * (log_q - log_b) - (log_p - log_b)


def contrast(
    right_log_probs: Tensor,  # (...)
    wrong_log_probs: Tensor | Sequence[Tensor],  # (...) each
) -> Tensor:  # (...)
    """log q_right - log q_wrong: positive where the first teacher likes the token better than the second.

    Of several wrong ones the mean of their probabilities is taken, as in RLCSD (arXiv 2606.11709), where one model is
    given a correct hint and several wrong ones.
    """
    wrong = [wrong_log_probs] if isinstance(wrong_log_probs, Tensor) else wrong_log_probs
    checks.require_list("wrong_log_probs", wrong, "teachers")
    right, *wrong = _constants(
        right_log_probs=right_log_probs, **{f"wrong_log_probs[{i}]": x for i, x in enumerate(wrong)}
    )
    return right - (torch.stack(wrong).logsumexp(0) - math.log(len(wrong)))


def return_to_go(
    rewards: Tensor,  # (..., T)
    mask: Tensor | None = None,  # (..., T) bool or float
    *,
    gamma: float = 1.0,
    cu_seqlens: Tensor | None = None,  # (sequences + 1,) int
) -> Tensor:  # (..., T)
    """The reward at t and the later ones, discounted: r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ...

    A position where the mask is 0 is passed over. Its reward counts as 0, even if it is NaN, and its return is 0. It
    takes no part in the discount, so that the answer of a tool costs nothing. gamma = 1 is the causal sequence-level
    objective, 0 the token-level one (equation 3 of arXiv 2603.25562).

    Args:
        rewards: (..., T) float, time along the last dimension.
        mask: (..., T), which positions count; None for all. Only whether it is 0 matters.
        gamma: in [0, 1].
        cu_seqlens: the sequences packed in a row, as in `weighting.aggregate`. A return ends with its own.
    """
    _require_returns(rewards, mask, gamma, cu_seqlens)
    (total,) = _constants(rewards=rewards)
    kept = torch.ones_like(total, dtype=torch.bool) if mask is None else mask != 0  # (..., T)
    total = torch.where(kept, total, 0)
    factor = (torch.zeros_like(total) + float(gamma)).masked_fill(~kept, 1)  # (..., T) how much of what follows arrives
    if cu_seqlens is not None:
        first = starts(rewards, cu_seqlens)  # (n,)
        total, factor = total.flatten(), factor.flatten()
        factor[:-1].masked_fill_(first[1:] != first[:-1], 0)
    distance = 1
    while distance < total.shape[-1]:  # windows double; the gamma^-t of one cumsum would overflow
        later, later_factor = (pad(x[..., distance:], (0, distance)) for x in (total, factor))
        total = total + torch.where(factor == 0, 0, factor * later)  # not by a factor alone: 0 * NaN is NaN
        factor = factor * later_factor
        distance *= 2
    return torch.where(kept, total.view(rewards.shape), 0)


def k1(
    student_log_probs: Tensor,  # (...)
    teacher_log_probs: Tensor,  # (...)
) -> Tensor:  # (...)
    """log p - log q, the plain estimate of KL(p || q) for y ~ p: unbiased, of either sign. `log_ratio` negated."""
    return -log_ratio(student_log_probs, teacher_log_probs)


def k2(
    student_log_probs: Tensor,  # (...)
    teacher_log_probs: Tensor,  # (...)
) -> Tensor:  # (...)
    """(log p - log q)^2 / 2, an estimate of KL(p || q) for y ~ p: never negative, biased, of low variance."""
    return log_ratio(student_log_probs, teacher_log_probs).square() / 2


def k3(
    student_log_probs: Tensor,  # (...)
    teacher_log_probs: Tensor,  # (...)
) -> Tensor:  # (...)
    """q/p - 1 - log(q/p), an estimate of KL(p || q) for y ~ p: never negative, unbiased."""
    ratio = log_ratio(student_log_probs, teacher_log_probs)
    return ratio.expm1() - ratio


def _constants(**log_probs: Tensor) -> list[Tensor]:
    """The tensors checked, detached, and of one dtype of at least float32."""
    _require_per_token(log_probs)
    double = any(x.dtype == torch.float64 for x in log_probs.values())
    return [x.detach().to(torch.float64 if double else torch.float32) for x in log_probs.values()]


def _power_difference(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """q^alpha - p^alpha without cancellation where the two are close, and without overflow where they are not."""
    larger = alpha * torch.maximum(log_p, log_q)
    gap = alpha * torch.where(log_q == log_p, 0, log_q - log_p)  # both may be -inf
    return -gap.sign() * larger.exp() * (-gap.abs()).expm1()


def _require_interval(name: str, value: tuple[float, float]) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} is {value!r}; it must be a pair (low, high)")
    for x in value:
        checks.require_number(name, x)
    if value[0] > value[1]:
        raise ValueError(f"{name} is {value!r}; low must not be above high")


def _require_per_token(log_probs: Mapping[str, Tensor]) -> None:
    first_name, first = next(iter(log_probs.items()))
    for name, x in log_probs.items():
        checks.require_tensor(name, x, checks.FLOATS)
        if x.shape != first.shape:
            shapes = f"{name} has shape {checks.shape_of(x)} and {first_name} {checks.shape_of(first)}"
            raise ValueError(f"{shapes}; both must hold one value per token")
        checks.require_same_device(name, x, first_name, first)


def _require_returns(
    rewards: Tensor,  # (..., T)
    mask: Tensor | None,  # (..., T)
    gamma: float,
    cu_seqlens: Tensor | None,  # (sequences + 1,)
) -> None:
    checks.require_tensor("rewards", rewards, checks.FLOATS)
    if rewards.dim() == 0:
        raise ValueError("rewards has no dimension; it must be (..., T)")
    if mask is not None:
        checks.require_factors("mask", mask)
        if mask.shape != rewards.shape:
            shapes = f"mask has shape {checks.shape_of(mask)} and rewards {checks.shape_of(rewards)}"
            raise ValueError(f"{shapes}; both must be (..., T)")
        checks.require_same_device("mask", mask, "rewards", rewards)
    checks.require_fraction("gamma", gamma)
    require_cu_seqlens(cu_seqlens, "rewards", rewards)
