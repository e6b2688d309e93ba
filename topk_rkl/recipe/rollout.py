"""The student's side of a rollout: nucleus sampling, and the sampled-token objective to compare with.

An argument that is not as a function says raises TypeError or ValueError.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from topk_rkl import checks
from topk_rkl.autograd import differentiable_once, savable, save
from topk_rkl.reduction import Reduction, as_factors, reduce, require_reduction
from topk_rkl.rows import chunks, result_dtype, times
from topk_rkl.traced import converted, traced


def top_p_filter(
    logits: Tensor,  # (..., V)
    top_p: float,
    temperature: float = 1.0,
) -> Tensor:  # (..., V)
    """Scaled logits with every token outside the nucleus at -inf.

    A token stays if and only if the tokens ranked above it hold less than `top_p` of the probability. So the best token
    always stays, and `top_p=1` keeps every token. Rank is by (value descending, id ascending): of equal logits at the
    edge, the lower ids stay.

    Args:
        logits: (..., V) bfloat16, float16, float32 or float64. Tokens at +inf share all of the probability equally. A
            row that holds NaN, or nothing but -inf, is no distribution and keeps every token.
        top_p: in (0, 1].
        temperature: positive; divides the logits before the nucleus is found.

    Returns:
        (..., V) `logits / temperature`, float64 for float64 logits and float32 for every other dtype.
    """
    outside = _outside_nucleus(logits, top_p, temperature)
    return (logits.to(result_dtype(logits)) / float(temperature)).masked_fill(outside, -torch.inf)


@torch.no_grad()
def sample_top_p(
    logits: Tensor,  # (..., V)
    top_p: float = 1.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:  # (...)
    """One token for every position, drawn from its nucleus (see `top_p_filter`).

    Args:
        logits: (..., V) bfloat16, float16, float32 or float64.
        top_p: in (0, 1]; 1 samples from the whole vocabulary.
        temperature: positive.
        generator: on the device of `logits`; None draws from that device's default generator.

    Returns:
        (...) int64 ids. The same generator state gives the same ids. A row that is no distribution gives -1: one that
        holds NaN, or nothing but -inf.
    """
    checks.require_logits("logits", logits)
    _require_generator(generator, logits)
    outside = _outside_nucleus(logits, top_p, temperature)
    probs = _relative(logits, temperature).exp_().masked_fill_(outside, 0)  # (..., V), of the best token 1
    # The first of V exponential clocks with rates `probs` rings at v with probability probs[v]; torch.multinomial
    # does the same but checks its input on the host. A clock at 0 would let a token of probability 0 win as 0 / 0.
    noise = torch.empty_like(probs).exponential_(generator=generator)  # (..., V)
    ids = (probs / noise.clamp_min_(torch.finfo(probs.dtype).tiny)).argmax(-1)
    return ids.masked_fill(probs[..., 0].isnan(), -1)


def _outside_nucleus(
    logits: Tensor,  # (..., V)
    top_p: float,
    temperature: float,
) -> Tensor:  # (..., V) bool
    checks.require_logits("logits", logits)
    checks.require_top_p(top_p)
    checks.require_temperature(temperature)
    if top_p == 1:
        return torch.zeros_like(logits, dtype=torch.bool)  # a rounded sum could reach 1 early and cut the tail
    ranked, order = logits.sort(dim=-1, descending=True, stable=True)  # (..., V)
    mass = _relative(ranked, temperature).softmax(-1)[..., :-1].cumsum(-1, dtype=torch.float64)
    # A shifted sum, not `cumsum - mass`: it never decreases, so the nucleus is always a prefix of the ranking.
    outside = pad(mass >= float(top_p), (1, 0))  # (..., V)
    return outside.scatter(-1, order, outside)


def _relative(
    logits: Tensor,  # (..., V)
    temperature: float,
) -> Tensor:  # (..., V) at least float32
    """(logits - the best) / temperature, the difference first, since the quotients of large logits lose it.

    Tokens at +inf are at 0 and the others of their row at -inf. A row that is no distribution is NaN.
    """
    logits = logits.to(result_dtype(logits))
    best = logits.amax(-1, keepdim=True)  # (..., 1)
    best = best.masked_fill(best == -torch.inf, torch.nan)
    return ((logits - best) / float(temperature)).masked_fill_(logits == best, 0)


def sampled_token_loss(
    student_logits: Tensor,  # (..., V)
    teacher_logits: Tensor,  # (..., V_teacher)
    ids: Tensor,  # (...)
    *,
    weights: Tensor | None = None,  # (...)
    temperature: float = 1.0,
    reduction: Reduction = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:  # (...) or ()
    """The sampled-token objective of on-policy distillation: the log-ratio of the sampled token is its own penalty.

    It is equation 5 of "Revisiting On-Policy Distillation" (arXiv 2603.25562), the baseline `topk_reverse_kl` is
    compared with. For a token y sampled from the student, with p the student's and q the teacher's distribution over
    the whole vocabulary:

        value     r = log p(y) - log q(y)
        gradient  r * grad log p(y), with r held constant

    The gradient is on purpose not the derivative of the value. Averaged over y ~ p the value is KL(p || q), but its
    derivative, grad log p(y), averages to 0 and teaches nothing. The gradient above is the score-function estimate
    (REINFORCE with advantage -r), which averages to grad KL(p || q). Both averages are over p itself: ids drawn from a
    nucleus below 1 bias them.

    Args:
        student_logits: (..., V) bfloat16, float16, float32 or float64.
        teacher_logits: (..., V_teacher), where the same ids mean the same tokens; must not require grad.
        ids: (...) int32 or int64, the sampled tokens. They must be below V and V_teacher wherever the weight is not 0:
            others are refused on a CPU; on a GPU, and under torch.compile, they make their position NaN.
        weights: (...) bool or float, the factor of each position; None is 1 for all. A position of weight 0
            contributes exactly 0 whatever it holds, NaN included.
        temperature: a positive number, which divides both sides' logits; use the one that sampled `ids`.
        reduction: "none" gives the weighted value of each position, (...); "sum" their sum; "mean" that sum over
            sum(weights).
        denominator: a number or 0-d tensor instead of sum(weights).

    Returns:
        float32, or float64 from float64 student logits; the gradient has the dtype of student_logits. A position is NaN
        where a row of either side holds NaN or +inf.
    """
    checks.require_logits("student_logits", student_logits)
    checks.require_logits("teacher_logits", teacher_logits)
    checks.require_plain(student_logits=student_logits, teacher_logits=teacher_logits, weights=weights)
    checks.require_constant("teacher_logits", teacher_logits)
    checks.require_same_positions("teacher_logits", teacher_logits, student_logits)
    checks.require_sampled_ids(ids, student_logits)
    checks.require_weights(weights, student_logits)
    _require_known(ids, weights, min(student_logits.shape[-1], teacher_logits.shape[-1]))
    checks.require_temperature(temperature)
    require_reduction(reduction, denominator, student_logits)
    weights = as_factors(weights, student_logits)
    kept = torch.ones_like(ids, dtype=torch.bool) if weights is None else weights != 0  # (...)
    per_token = _LogRatio.apply(
        student_logits.reshape(-1, student_logits.shape[-1]),
        teacher_logits.reshape(-1, teacher_logits.shape[-1]),
        ids.reshape(-1),
        kept.reshape(-1),
        traced(float(temperature), torch.empty(0, dtype=torch.float64, device=ids.device)),
    ).view(ids.shape)  # (...)
    if weights is not None:
        per_token = per_token * savable(weights)
    return reduce(per_token, weights, reduction, denominator)


class _LogRatio(torch.autograd.Function):
    """log p(y) - log q(y) of each row, with that ratio times grad log p(y) as its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        student_logits: Tensor,  # (N, V)
        teacher_logits: Tensor,  # (N, V)
        ids: Tensor,  # (N,)
        kept: Tensor,  # (N,) bool
        temperature: Tensor,  # () float64
    ) -> Tensor:  # (N,)
        known = (ids >= 0) & (ids < min(student_logits.shape[1], teacher_logits.shape[1]))  # (N,)
        ids = ids.long().masked_fill(~(kept & known), 0)  # padding may hold an id that is no token, -100 for one
        log_p, best, total = _token_log_probs(student_logits, ids, temperature)  # (N,) each
        log_q, _, _ = _token_log_probs(teacher_logits, ids, temperature)  # (N,)
        ratio = (log_p - log_q).masked_fill_(~known, torch.nan).masked_fill_(~kept, 0)  # (N,) float64
        save(ctx, student_logits, ids, best, total, ratio / temperature, temperature)
        return converted(ratio, result_dtype(student_logits))

    @staticmethod
    @differentiable_once
    def backward(
        _: Any,
        grad_output: Tensor,  # (N,)
        student_logits: Tensor,  # (N, V)
        ids: Tensor,  # (N,)
        best: Tensor,  # (N,)
        total: Tensor,  # (N,)
        slope: Tensor,  # (N,) float64, of the ratio, held constant, times log p
        temperature: Tensor,  # () float64
    ) -> tuple[Tensor | None, ...]:
        scale = times(slope[:, None], grad_output)  # (N, 1)
        grad = torch.empty_like(student_logits)  # (N, V)
        for rows in _chunks(student_logits):
            exponentials = _exponentials(student_logits[rows], best[rows], temperature)  # (n, V)
            at_token = scale[rows].to(exponentials.dtype)  # (n, 1)
            everywhere = (-scale[rows] / total[rows, None]).to(exponentials.dtype)  # (n, 1)
            dense = exponentials.mul_(everywhere).scatter_add_(-1, ids[rows, None], at_token)
            grad[rows] = dense.masked_fill_(scale[rows] == 0, 0)  # not by the factor: 0 * NaN is NaN
        return grad, None, None, None, None


def _token_log_probs(
    logits: Tensor,  # (N, V)
    ids: Tensor,  # (N,)
    temperature: Tensor,  # ()
) -> tuple[Tensor, Tensor, Tensor]:  # (N,) float64, (N,), (N,) float64
    """log softmax(logits / temperature) at ids, the best logit, and the sum of the exponentials relative to it.

    Differences come before quotients and rounding, or the log-prob would lose what the logits' size takes.
    """
    best = logits.amax(-1)  # (N,)
    parts = (_exponentials(logits[rows], best[rows], temperature) for rows in _chunks(logits))
    total = torch.cat([x.sum(-1, dtype=torch.float64) for x in parts])  # (N,)
    chosen = logits.gather(-1, ids[:, None]).squeeze(-1).double() - best.double()  # (N,)
    return chosen / temperature - total.log(), best, total


def _exponentials(
    logits: Tensor,  # (n, V)
    best: Tensor,  # (n,)
    temperature: Tensor,  # ()
) -> Tensor:  # (n, V) at least float32
    return logits.to(result_dtype(logits)).sub(best[:, None]).div_(temperature).exp_()


def _chunks(
    logits: Tensor,  # (N, V)
) -> Iterator[slice]:
    """Rows of which two float32 copies are held, or all of them under torch.compile, which fuses what it can."""
    return chunks(len(logits), bytes_per_row=8 * logits.shape[1], whole=torch.compiler.is_compiling())


def _require_generator(
    generator: torch.Generator | None,
    logits: Tensor,  # (..., V)
) -> None:
    if generator is None:
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator is {checks.kind_of(generator)}; it must be a torch.Generator, or None")
    if generator.device.type != logits.device.type:
        raise ValueError(f"generator is on {generator.device} and logits on {logits.device}; make one there")


def _require_known(
    ids: Tensor,  # (...)
    weights: Tensor | None,  # (...)
    vocab: int,
) -> None:
    """Refuses ids outside the vocabulary on a CPU alone, where a value is read without waiting for a device."""
    if not ids.is_cpu or torch.compiler.is_compiling():
        return
    outside = (ids < 0) | (ids >= vocab)
    if weights is not None:
        outside &= weights != 0
    if outside.any().tolist():
        raise ValueError(
            f"ids has {ids[outside][0].tolist()}; where the weight is not 0 it must be from 0 to {vocab - 1}, a token "
            "of student_logits and teacher_logits"
        )
