"""The mathematics on K slots, once, in plain PyTorch: what every kernel must equal.

p and q are the softmax of the student's and of the teacher's logits over the slots of S, at temperature T. A divergence
is a sum of terms. h is p times the derivative of the sum with respect to p. The gradient is

    dL/dz   = (h - p sum_S h) / T                  on S, exactly 0 elsewhere

A multiple of p may be added to h without a change. For the truncated, renormalised reverse KL

    L       = sum_S p (log p - log q)              h = p (log p - log q)

Three families cover those that are built in. A divergence crosses the border of an op as its family and parameters:

    reverse KL    L = sum p d,   d = log p - log q clamped to [low, high]
    blended KLs   L = c KL(p | s p + (1 - s) q) + e KL(q | t q + (1 - t) p)
    alpha-beta    L = -1/(alpha beta) sum [ q^alpha p^beta - alpha/r q^r - beta/r p^r ],   r = alpha + beta
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from topk_rkl import checks
from topk_rkl.rows import finite_max
from topk_rkl.terms import of_function

Terms = Callable[[Tensor, Tensor], Tensor]  # of log p and log q, (..., K) each: a term per slot
Code = Sequence[float]

LARGEST_EXPONENT = 709.0  # whose exp is finite in float64
SUMMABLE = 1e300  # in size: many such numbers add up to a finite one in float64
SERIES_FROM = -0.01  # where three orders are within 2e-10, and the quotient begins to lose digits to cancellation

REVERSE, CLAMPED, BLENDED, ALPHA_BETA = range(4)
REVERSE_CODE: Code = (REVERSE,)

Mass = Literal["renormalized", "tail", "raw", "raw_stop_grad", "ema_pg", "ema_pg_corrected"]
MASSES: tuple[str, ...] = get_args(Mass)  # C++ and Triton know a mass by its place here


@dataclass(frozen=True)
class Divergence:
    """How student p and teacher q are compared. Parameters of the wrong kind or size raise TypeError or ValueError."""

    @property
    def code(self) -> Code:
        """The family and its parameters, as the kernels take them."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(p | q) = sum p d with d = log p - log q: the default, which seeks the teacher's modes.

    `clamp=(low, high)` keeps each d within those bounds. A slot at which d lies outside has the gradient that
    torch.clamp gives: none through d. The loss may then be negative.
    """

    clamp: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if self.clamp is None:
            return
        if not isinstance(self.clamp, (tuple, list)) or len(self.clamp) != 2:
            raise TypeError(f"clamp is {self.clamp!r}; it must be (low, high), or None")
        low, high = self.clamp
        for x in self.clamp:
            if not (isinstance(x, float) and abs(x) == math.inf):
                checks.require_number("clamp", x)
        if not low <= high:
            raise ValueError(f"clamp is {self.clamp}; it must be (low, high) with low <= high")

    @property
    def code(self) -> Code:
        return REVERSE_CODE if self.clamp is None else (CLAMPED, *map(float, self.clamp))


REVERSE_KL = ReverseKL()  # the default


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(q | p) = sum q (log q - log p), which covers the teacher's modes; its gradient is p - q.

    A student logit of -inf in S makes the loss of that position +inf. Its gradient there is 0, and p - q elsewhere.
    """

    @property
    def code(self) -> Code:
        return (BLENDED, 0.0, 1.0, 1.0, 0.0)


@dataclass(frozen=True)
class JensenShannon(Divergence):
    """beta KL(q | M) + (1 - beta) KL(p | M) with M = beta q + (1 - beta) p, 0 < beta < 1; beta = 0.5 is the plain one.

    It tends to 0 with beta and with 1 - beta: divided by beta to forward KL, divided by 1 - beta to reverse KL.
    DistiLLM's js_distance(lam) has beta = 1 - lam. See `generalized_jsd` for GKD's convention at the ends.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        checks.require_number("beta", self.beta)
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta is {self.beta}; it must be between 0 and 1; at the ends that divergence is 0, and "
                "generalized_jsd gives forward and reverse KL there"
            )

    @property
    def code(self) -> Code:
        beta = float(self.beta)
        return (BLENDED, 1.0 - beta, 1.0 - beta, beta, beta)


@dataclass(frozen=True)
class Mixture(Divergence):
    """lam KL(q | p) + (1 - lam) KL(p | q), both in one pass, 0 <= lam <= 1."""

    lam: float

    def __post_init__(self) -> None:
        checks.require_number("lam", self.lam)
        if not 0 <= self.lam <= 1:
            raise ValueError(f"lam is {self.lam}; it must be from 0, reverse KL, to 1, forward KL")

    @property
    def code(self) -> Code:
        lam = float(self.lam)
        return (BLENDED, 1.0 - lam, 0.0, lam, 0.0) if lam else REVERSE_CODE


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(p | (1 - lam) q + lam p), 0 <= lam < 1 (DistiLLM's SRKL, with lam = 0.1); lam = 0 is reverse KL."""

    lam: float = 0.1

    def __post_init__(self) -> None:
        _require_skew(self.lam)

    @property
    def code(self) -> Code:
        return (BLENDED, 1.0, float(self.lam), 0.0, 1.0) if self.lam else REVERSE_CODE


@dataclass(frozen=True)
class SkewForwardKL(Divergence):
    """KL(q | lam q + (1 - lam) p), 0 <= lam < 1 (DistiLLM's SKL, with lam = 0.1); lam = 0 is forward KL."""

    lam: float = 0.1

    def __post_init__(self) -> None:
        _require_skew(self.lam)

    @property
    def code(self) -> Code:
        return (BLENDED, 0.0, 1.0, 1.0, float(self.lam))


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """The alpha-beta divergence of q to p (Cichocki et al. 2011; ABKD), for any finite alpha and beta.

    -1/(alpha beta) sum [ q^alpha p^beta - alpha/r q^r - beta/r p^r ] with r = alpha + beta, and its limit where one of
    the three is 0. (1, 0) is forward KL, (0, 1) reverse KL, (0, 0) half the sum of (log p - log q)^2. The limit at
    alpha = 0 has a factor 1/beta^2 (1/alpha^2 at beta = 0 and at r = 0), where published code has 1/beta. A student
    logit of -inf in S makes the loss +inf unless beta > 0 and r > 0.

    With a negative alpha, beta or r a term can exceed any float. The loss is then +inf. Gradients that grow with the
    term are infinite or huge, with their sign, and none is NaN.
    """

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        checks.require_number("alpha", self.alpha)
        checks.require_number("beta", self.beta)

    @property
    def code(self) -> Code:
        return (ALPHA_BETA, float(self.alpha), float(self.beta))


def generalized_jsd(beta: float) -> Divergence:
    """GKD's convention: forward KL at beta = 0, reverse KL at beta = 1, and the Jensen-Shannon divergence between."""
    checks.require_fraction("beta", beta)
    if beta == 0:
        return ForwardKL()
    return ReverseKL() if beta == 1 else JensenShannon(beta)


def _require_skew(lam: float) -> None:
    checks.require_number("lam", lam)
    if not 0 <= lam < 1:
        raise ValueError(f"lam is {lam}; it must be at least 0 and below 1, where that divergence would be 0")


def slots_loss(
    z: Tensor,  # (..., K) the student's logits
    w: Tensor,  # (..., K) the teacher's logits or log-probs, up to a constant per row
    live: Tensor,  # (..., K) bool, the slots that are in S
    temperature: float,
    divergence: Code | Terms = REVERSE_CODE,
    mass: str = "renormalized",
) -> tuple[Tensor, Tensor]:  # (...), (..., K) float64
    """The loss of each row and its gradient with respect to z, both in float64.

    The last slot is the tail where `mass` is not "renormalized": temperature times the logsumexp of all other logits /
    temperature. p and q are then probabilities among all tokens.

    float32 would miss the promised accuracy by a factor of 3.5 at temperature 0.05. float64 on K numbers per row costs
    nothing that can be measured. A row without a live slot gives 0. A NaN or +inf on a live slot, or of the teacher on
    any slot, gives NaN, and a gradient of NaN on the live slots. A student logit of -inf has probability 0 and gradient
    0, and leaves the teacher's side as it is.
    """
    inv_t = 1.0 / temperature
    z = torch.where(live, z.double(), -torch.inf)
    w = torch.where(live | ~(w < torch.inf), w.double(), -torch.inf)
    a = z - finite_max(z)
    b = w - finite_max(w)
    p, q = (a * inv_t).exp(), (b * inv_t).exp()
    p_sum, q_sum = _nonzero(p.sum(-1, keepdim=True)), _nonzero(q.sum(-1, keepdim=True))
    p, q, poison = p / p_sum, q / q_sum, 0 * (p_sum + q_sum)  # 0, or NaN
    # The difference of the logits is taken first, so that equal logits give 0 and not a rounding error.
    d = torch.where(live, (a - b) * inv_t - (p_sum.log() - q_sum.log()), 0)
    log_q = torch.where(live, b * inv_t - q_sum.log(), 0)
    reachable = live & (z != -torch.inf)
    if callable(divergence):
        terms, h = of_function(divergence, torch.where(reachable, d + log_q, 0), log_q, reachable)
    else:
        terms, h = _terms(divergence, p, q, d, log_q)
        if mass not in ("renormalized", "tail"):
            terms, h = _without_tail(divergence, mass, terms, h, p, d, reachable)
    loss = terms.sum(-1, keepdim=True)
    if mass in ("renormalized", "tail") and not callable(divergence) and divergence[0] != CLAMPED:
        loss = torch.where(loss < 0, 0, loss)  # which only rounding makes it
    gradient = torch.where(reachable, (h - p * h.sum(-1, keepdim=True)) * inv_t, 0)
    return (loss + poison).squeeze(-1), torch.where(live, gradient + poison, 0)


def _terms(
    code: Code,
    p: Tensor,  # (..., K)
    q: Tensor,  # (..., K)
    d: Tensor,  # (..., K) log p - log q
    log_q: Tensor,  # (..., K)
) -> tuple[Tensor, Tensor]:  # (..., K), (..., K)
    """The terms of the sum, and h: both 0 where p = q, so that a distribution is at distance 0 from itself."""
    if code[0] == REVERSE:
        x = _times(p, d)
        return x, x
    if code[0] == CLAMPED:
        low, high = code[1:]
        inside = (d >= low) & (d <= high)
        bounded = d.clamp(low, high)
        return _times(p, bounded), _times(p, torch.where(inside, bounded, bounded - 1))
    if code[0] == BLENDED:
        of_p, own_p, of_q, own_q = code[1:]
        log_p_blend, q_part = _blend(d, own_p)
        log_q_blend, p_part = _blend(-d, own_q)
        terms = of_p * _times(p, log_p_blend) + of_q * _times(q, log_q_blend)
        rise = _times(p, log_p_blend + (q_part - (1 - own_p)))
        fall = (q - p) * p_part + p * (p_part - (1 - own_q))  # split so that fusion leaves nothing where p = q
        return terms, of_p * rise - of_q * fall
    return _alpha_beta(code[1], code[2], d, log_q)


def _without_tail(
    code: Code,
    mass: str,
    terms: Tensor,  # (..., K)
    h: Tensor,  # (..., K)
    p: Tensor,  # (..., K)
    d: Tensor,  # (..., K)
    reachable: Tensor,  # (..., K) bool
) -> tuple[Tensor, Tensor]:  # (..., K), (..., K)
    """Terms and h without those of the tail; "ema_pg" has those of the sampled token, the last slot but one, instead.

    The probabilities on S have no constant sum, so here it matters which multiple of p stands in h. Alone, h is that of
    the generalised KL, sum [ p log(p / q) - p + q ]; the terms as they are have h + kappa p.
    """
    forward = code[0] == BLENDED and code[1] == 0
    kappa = 1.0 if code[0] == REVERSE else code[1] * (1 - code[2]) - code[3] * (1 - code[4])
    if mass in ("raw", "ema_pg") or (mass == "ema_pg_corrected" and forward):
        h = h + kappa * p
    terms, h = terms.clone(), h.clone()
    terms[..., -1] = h[..., -1] = 0
    if mass in ("ema_pg", "ema_pg_corrected"):
        d, drawn = d[..., -2], reachable[..., -2]
        ratio = (-d).exp()
        terms[..., -2] = torch.where(drawn, -ratio * d if forward else d, 0)
        published = 1.0 if mass == "ema_pg" else 0.0
        h[..., -2] = torch.where(drawn, _summable(published - ratio) if forward else d, 0)
    return terms, h


def _blend(d: Tensor, own: float) -> tuple[Tensor, Tensor]:
    """Of x and y with d = log x - log y, and B = own x + (1 - own) y: log x - log B, and (1 - own) y / B."""
    other = 1 - own
    if own == 0 or own == 1:  # B is y, or x, and the other may be 0
        return d if other else torch.zeros_like(d), torch.full_like(d, other)
    smaller = (-d.abs()).exp()  # over the larger
    blend = torch.where(d < 0, other + own * smaller, own + other * smaller)  # over the larger
    return torch.where(d < 0, d, 0) - blend.log(), torch.where(d < 0, other, other * smaller) / blend


def _alpha_beta(
    alpha: float,
    beta: float,
    d: Tensor,  # (..., K)
    log_q: Tensor,  # (..., K)
) -> tuple[Tensor, Tensor]:
    """A term is d^2 times the second divided difference of exp at r log q, alpha log q + beta log p and r log p.

    That has no denominator which vanishes with alpha, beta or r, so it holds in the limits and near them; h is d times
    the first divided difference at the last two. Beyond float64 a term is inf, and h as large as can be added up.
    """
    r = alpha + beta
    vanished = d == -torch.inf  # the student's probability is 0
    d = torch.where(vanished, 0, d)
    first, second = beta * d, r * d  # the points, less the one of q
    low, high = torch.minimum(first, second).clamp(max=0), torch.maximum(first, second).clamp(min=0)
    middle = first + second - low - high  # of the points 0, first and second
    root = _root_exp(r * log_q + high)
    terms = (d * root) * (d * root) * _second_chord(middle - high, low - high)
    top = torch.maximum(first, second)
    root = _root_exp(r * log_q + top)
    h = (d * root) * root * _chord(-(alpha * d).abs())
    limit = (r * log_q).exp()
    end_term = limit / (beta * r) if beta > 0 and r > 0 else torch.full_like(limit, torch.inf)
    end_h = -limit / alpha if beta == 0 and alpha > 0 else torch.zeros_like(limit)
    return torch.where(vanished, end_term, terms), torch.where(vanished, end_h, _summable(h))


def _root_exp(x: Tensor) -> Tensor:
    """exp(x / 2), finite: 0 times it stays 0, and d times it, twice, reaches inf where d exp(x) d exceeds float64."""
    return (x / 2).clamp(max=LARGEST_EXPONENT).exp()


def _summable(h: Tensor) -> Tensor:
    """What exceeds float64 as a number of which many can be added, so that inf - inf does not occur."""
    return h.clamp(-SUMMABLE, SUMMABLE)


def _chord(x: Tensor) -> Tensor:
    """(exp(x) - 1) / x of x <= 0, and 1 at 0."""
    return torch.where(x == 0, 1, x.expm1() / x)


def _second_chord(x: Tensor, y: Tensor) -> Tensor:
    """The divided difference of exp at 0, x and y, for y <= x <= 0."""
    series = 1 / 2 + (x + y) / 6 + (x * x + x * y + y * y) / 24 + (x + y) * (x * x + y * y) / 120
    return torch.where(y > SERIES_FROM, series, (_chord(x) - x.exp() * _chord(y - x)) / -y)


def _times(probability: Tensor, x: Tensor) -> Tensor:
    """0 where the probability is, even if x is infinite."""
    return torch.where(probability == 0, 0, probability * x)


def capped(
    raw: Tensor,  # (...) hidden @ head.T + bias
    logit_scale: float | Tensor,
    softcap: float | Tensor | None,
) -> tuple[Tensor, Tensor]:  # (...), (...) or ()
    """The logits that a model makes of the product with its head, and their derivative with respect to it.

    The scale comes first (Cohere), then softcap * tanh(z / softcap) (Gemma 2).
    """
    z = raw * logit_scale
    if softcap is None:
        return z, raw.new_ones(()) * logit_scale
    bent = (z / softcap).tanh()
    return softcap * bent, logit_scale * (1 - bent * bent)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)
