"""A language model small enough to list: a student and a teacher that are tables of logits, one row per previous token.

Sequences of T tokens are ids (n, T), without the start. Everything is float64. Gradients are those of the student's
table, flattened to P = (V + 1) V entries, and to be descended:

    g = sum over t of  w_t s_t,   s_t = grad log p(y_t | y_t-1),   r_t = log p(y_t | y_t-1) - log q(y_t | y_t-1)
"""

from typing import NamedTuple

import torch
from torch import Tensor

from topk_rkl.recipe.rewards import log_ratio, return_to_go
from topk_rkl.recipe.rollout import sample_top_p

NEVER = -30.0  # the logit of a token that does not follow: 1e-13 in probability


class Chain(NamedTuple):
    student: Tensor  # (V + 1, V) logits; row V is the start
    teacher: Tensor  # (V + 1, V)


def chain(vocab: int, seed: int, distance: float = 1.0, halves: bool = False) -> Chain:
    """A random teacher, and a student whose logits are away from it by normal numbers times `distance`.

    `halves` keeps a sequence in the half of the vocabulary where it starts.
    """
    generator = torch.Generator().manual_seed(seed)
    teacher, away = torch.randn((2, vocab + 1, vocab), generator=generator, dtype=torch.float64)  # (V + 1, V) each
    student = teacher + distance * away
    if halves:
        half = torch.arange(vocab) < vocab // 2  # (V,)
        across = torch.cat([half[:, None] != half, torch.zeros(1, vocab, dtype=torch.bool)])  # (V + 1, V)
        student, teacher = (x.masked_fill(across, NEVER) for x in (student, teacher))
    return Chain(student, teacher)


def every_sequence(vocab: int, length: int) -> Tensor:  # (V^T, T)
    return torch.cartesian_prod(*[torch.arange(vocab)] * length).view(-1, length)


def sampled(of: Chain, count: int, length: int, seed: int) -> Tensor:  # (n, T)
    """Sequences of the student."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.full((count,), len(of.student) - 1)  # (n,)
    ids = []
    for _ in range(length):
        row = sample_top_p(of.student[row], generator=generator)
        ids.append(row)
    return torch.stack(ids, 1)


def rows_of(
    ids: Tensor,  # (n, T)
    vocab: int,
) -> Tensor:  # (n, T)
    """The row of each token: the token before, and at first the start."""
    return torch.cat([torch.full_like(ids[:, :1], vocab), ids[:, :-1]], 1)


def token_log_probs(
    logits: Tensor,  # (V + 1, V)
    ids: Tensor,  # (n, T)
) -> Tensor:  # (n, T)
    return logits.log_softmax(-1)[rows_of(ids, logits.shape[1]), ids]


def probability(
    of: Chain,
    ids: Tensor,  # (n, T)
) -> Tensor:  # (n,)
    """The student's, of a whole sequence."""
    return token_log_probs(of.student, ids).sum(1).exp()


def penalties(
    of: Chain,
    ids: Tensor,  # (n, T)
) -> Tensor:  # (n, T)
    """r = log p - log q."""
    return -log_ratio(token_log_probs(of.student, ids), token_log_probs(of.teacher, ids))


def weighted_scores(
    of: Chain,
    ids: Tensor,  # (n, T)
    weights: Tensor,  # (n, T)
) -> Tensor:  # (n, P)
    """sum over t of w_t grad log p(y_t). A visit of row c adds w (1[y = v] - p(v | c)) to its token v."""
    rows, vocab = of.student.shape
    at_token = weights.new_zeros(len(ids), rows * vocab)  # (n, P)
    at_token = at_token.scatter_add_(1, rows_of(ids, vocab) * vocab + ids, weights).unflatten(1, (rows, vocab))
    return (at_token - at_token.sum(-1, keepdim=True) * of.student.softmax(-1)).flatten(1)


def estimates(
    of: Chain,
    ids: Tensor,  # (n, T)
    gamma: float | None,
) -> Tensor:  # (n, P)
    """The gradient as each sequence estimates it.

    gamma = 0 is the token level, 1 the causal sequence level. None lets every token pay for all r, the earlier too.
    """
    r = penalties(of, ids)  # (n, T)
    weights = r.sum(1, keepdim=True).expand_as(r) if gamma is None else return_to_go(r, gamma=gamma)  # (n, T)
    return weighted_scores(of, ids, weights)


def reverse_kl_gradient(of: Chain, length: int) -> Tensor:  # (P,)
    """Of the sum over all sequences of p log(p / q), by autograd."""
    student, ids = of.student.clone().requires_grad_(), every_sequence(of.student.shape[1], length)
    log_p, log_q = (token_log_probs(x, ids).sum(1) for x in (student, of.teacher))  # (V^T,) each
    (gradient,) = torch.autograd.grad((log_p.exp() * (log_p - log_q)).sum(), student)
    return gradient.flatten()


def expected(of: Chain, length: int, gamma: float) -> Tensor:  # (P,)
    """The mean of `estimates` over all sequences of any length, by recursion over time."""
    vocab = of.student.shape[1]
    log_p = of.student.log_softmax(-1)  # (V + 1, V)
    p, r = log_p.exp(), log_p - of.teacher.log_softmax(-1)  # (V + 1, V) each
    visits = [torch.eye(vocab + 1, dtype=p.dtype)[vocab]]  # (V + 1,) the distribution over rows at each time
    for _ in range(length - 1):
        visits.append(torch.cat([visits[-1] @ p, p.new_zeros(1)]))
    gradient, value = torch.zeros_like(p), p.new_zeros(vocab)  # value: of what follows each token
    for visit in reversed(visits):
        total = r + gamma * value  # (V + 1, V) the mean return of token v at row c
        mean = (p * total).sum(-1)  # (V + 1,)
        gradient += visit[:, None] * p * (total - mean[:, None])
        value = mean[:vocab]
    return gradient.flatten()


def moments(
    g: Tensor,  # (n, P)
    weights: Tensor,  # (n,) summing to 1
) -> tuple[float, float]:
    """The variance E|g - mean|^2, and the second moment E|g|^2."""
    return (weights @ (g - weights @ g).square().sum(1)).item(), (weights @ g.square().sum(1)).item()


def sizes(of: Chain) -> tuple[float, float]:
    """B_r and B_s of appendix D: the largest |r|, and the largest norm of a token's score."""
    p = of.student.softmax(-1)  # (V + 1, V)
    r = of.student.log_softmax(-1) - of.teacher.log_softmax(-1)  # (V + 1, V)
    scores = torch.eye(p.shape[1], dtype=p.dtype) - p[:, None]  # (V + 1, V, V)
    return r.abs().max().item(), scores.norm(dim=-1).max().item()
