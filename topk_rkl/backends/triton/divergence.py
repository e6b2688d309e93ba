"""The divergence of K slots and its gradient, line by line as topk_rkl/divergence.py, in float64."""

import triton
import triton.language as tl

from topk_rkl import divergence
from topk_rkl.backends.triton.launch import float32_halves

REVERSE = tl.constexpr(divergence.REVERSE)
CLAMPED = tl.constexpr(divergence.CLAMPED)
BLENDED = tl.constexpr(divergence.BLENDED)
LARGEST_EXPONENT = tl.constexpr(divergence.LARGEST_EXPONENT)
SUMMABLE = tl.constexpr(divergence.SUMMABLE)

RENORMALIZED, TAIL, RAW = (tl.constexpr(divergence.MASSES.index(x)) for x in ("renormalized", "tail", "raw"))


def encoded(code: divergence.Code | divergence.Terms) -> tuple[int, tuple[float, ...]]:
    """FAMILY, and the parameters as `number` reads them."""
    assert not callable(code)  # `choose` sends a function to the reference
    return int(code[0]), tuple(half for number in code[1:] for half in float32_halves(number))


@triton.jit
def number(parameters, PLACE: tl.constexpr):
    return tl.cast(parameters[2 * PLACE], tl.float64) + tl.cast(parameters[2 * PLACE + 1], tl.float64)


@triton.jit
def of_named(
    column,  # [K] ids
    w,  # [K] the teacher's log-probs
    vocab,  # the student's
):
    """As slots_loss takes them: -inf where the slot is not in S, unless a NaN or +inf there has to spoil the row."""
    return tl.where((column >= 0) & ((column < vocab) | ~(w < float("inf"))), w, float("-inf"))


@triton.jit
def slots_loss(
    z,  # [K] the student's logits, -inf where the slot is empty
    w,  # [K] the teacher's, likewise, but for a NaN or +inf, which spoils the row
    live,  # [K] bool: the slot is in S
    inv_t,  # float64: 1 / temperature
    parameters,
    in_support,  # [K] bool: all slots but the tail; None where there is no tail
    FAMILY: tl.constexpr,
    MASS: tl.constexpr,
):
    """-> loss (float64), gradient [K] (float64)."""
    z = z.to(tl.float64)
    w = w.to(tl.float64)
    z_max = tl.max(z, 0)
    w_max = tl.max(w, 0)
    a = z - tl.where(z_max == float("-inf"), 0.0, z_max)  # [K]
    b = w - tl.where(w_max == float("-inf"), 0.0, w_max)  # [K]
    p = tl.exp(a * inv_t)  # [K]
    p_sum = tl.sum(p, 0)
    p_sum = tl.where(p_sum == 0.0, 1.0, p_sum)
    q = tl.exp(b * inv_t)  # [K]
    q_sum = tl.sum(q, 0)
    q_sum = tl.where(q_sum == 0.0, 1.0, q_sum)
    p = p / p_sum
    if FAMILY == REVERSE and MASS == RENORMALIZED:
        d = tl.where(p == 0.0, 0.0, a - b) * inv_t - (tl.log(p_sum) - tl.log(q_sum))  # [K]
        loss = tl.sum(p * d, 0)
        gradient = tl.where(live, p * (d - loss) * inv_t, 0.0)
        return tl.where(loss < 0.0, 0.0, loss), gradient  # which only rounding makes it
    else:
        q = q / q_sum
        poison = 0.0 * (p_sum + q_sum)  # 0, or NaN
        d = tl.where(live, (a - b) * inv_t - (tl.log(p_sum) - tl.log(q_sum)), 0.0)  # [K]
        term, h = _terms(p, q, d, tl.where(live, b * inv_t - tl.log(q_sum), 0.0), parameters, FAMILY)
        if MASS == RAW:
            kappa = 1.0
            if FAMILY == BLENDED:
                kappa = number(parameters, 0) * (1.0 - number(parameters, 1)) - number(parameters, 2) * (
                    1.0 - number(parameters, 3)
                )
            h += kappa * p
        if MASS > TAIL:
            term = tl.where(in_support, term, 0.0)
            h = tl.where(in_support, h, 0.0)
        loss = tl.sum(term, 0)
        if MASS <= TAIL and FAMILY != CLAMPED:
            loss = tl.where(loss < 0.0, 0.0, loss)  # which only rounding makes it
        gradient = tl.where(z != float("-inf"), (h - p * tl.sum(h, 0)) * inv_t, 0.0)
        return loss + poison, tl.where(live, gradient + poison, 0.0)


@triton.jit
def _terms(
    p,  # [K]
    q,  # [K]
    d,  # [K] log p - log q
    log_q,  # [K]
    parameters,
    FAMILY: tl.constexpr,
):
    """-> the terms of the sum and h, p times the derivative of the sum with respect to p: both 0 where p = q."""
    if FAMILY == REVERSE:
        x = _times(p, d)
        return x, x
    elif FAMILY == CLAMPED:
        bounded = tl.where(d < number(parameters, 0), number(parameters, 0), d)
        bounded = tl.where(bounded > number(parameters, 1), number(parameters, 1), bounded)
        return _times(p, bounded), _times(p, tl.where(bounded == d, bounded, bounded - 1.0))
    elif FAMILY == BLENDED:
        log_p_blend, q_part = _blend(d, number(parameters, 1))
        log_q_blend, p_part = _blend(-d, number(parameters, 3))
        term = number(parameters, 0) * _times(p, log_p_blend) + number(parameters, 2) * _times(q, log_q_blend)
        fall = (q - p) * p_part + p * (p_part - (1.0 - number(parameters, 3)))
        rise = _times(p, log_p_blend + (q_part - (1.0 - number(parameters, 1))))
        return term, number(parameters, 0) * rise - number(parameters, 2) * fall
    else:
        return _alpha_beta(number(parameters, 0), number(parameters, 1), d, log_q)


@triton.jit
def _times(probability, x):
    """0 where the probability is, even if x is infinite."""
    return tl.where(probability == 0.0, 0.0, probability * x)


@triton.jit
def _blend(d, own):
    """Of x and y with d = log x - log y, and B = own x + (1 - own) y: log x - log B, and (1 - own) y / B."""
    other = 1.0 - own
    smaller = tl.exp(-tl.abs(d))
    total = tl.where(d < 0.0, other + own * smaller, own + other * smaller)
    log_ratio = tl.where(d < 0.0, d, 0.0) - tl.log(total)
    part = tl.where(d < 0.0, other, other * smaller) / total
    inside = (own > 0.0) & (own < 1.0)  # else B is y, or x, and the other may be 0
    return tl.where(inside, log_ratio, tl.where(own == 0.0, d, 0.0)), tl.where(inside, part, other)


@triton.jit
def _alpha_beta(alpha, beta, d, log_q):
    r = alpha + beta
    vanished = d == float("-inf")
    d = tl.where(vanished, 0.0, d)
    first = beta * d
    second = r * d
    top = tl.maximum(first, second)
    low = tl.minimum(tl.minimum(first, second), 0.0)
    high = tl.maximum(top, 0.0)
    middle = first + second - low - high
    root = _root_exp(r * log_q + high)
    term = (d * root) * (d * root) * _second_chord(middle - high, low - high)
    root = _root_exp(r * log_q + top)
    h = (d * root) * root * _chord(-tl.abs(alpha * d))
    h = tl.where(tl.abs(h) > SUMMABLE, tl.where(h < 0.0, -SUMMABLE, SUMMABLE), h)
    limit = tl.exp(r * log_q)
    end_term = tl.where((beta > 0.0) & (r > 0.0), limit / (beta * r), float("inf"))
    end_h = tl.where((beta == 0.0) & (alpha > 0.0), -limit / alpha, 0.0)
    return tl.where(vanished, end_term, term), tl.where(vanished, end_h, h)


@triton.jit
def _root_exp(x):
    """exp(x / 2), finite."""
    return tl.exp(tl.minimum(0.5 * x, LARGEST_EXPONENT))


@triton.jit
def _chord(x):
    """(exp(x) - 1) / x of x <= 0, by a series near 0, where that cancels: the interpreter has no expm1."""
    series = 1.0 + x * (1.0 / 2.0 + x * (1.0 / 6.0 + x * (1.0 / 24.0 + x * (1.0 / 120.0))))
    return tl.where(x > -0.01, series, (tl.exp(x) - 1.0) / x)


@triton.jit
def _second_chord(x, y):
    """The divided difference of exp at 0, x and y, for y <= x <= 0."""
    series = 0.5 + (x + y) / 6.0 + (x * x + x * y + y * y) / 24.0 + (x + y) * (x * x + y * y) / 120.0
    return tl.where(y > -0.01, series, (_chord(x) - tl.exp(x) * _chord(y - x)) / -y)
