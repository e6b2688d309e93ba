"""The mathematics on K slots, once, in plain PyTorch: what every kernel must equal.

With p and q the softmax of the student's and of the teacher's logits over the slots of S, at temperature T:

    L       = sum_S p (log p - log q)              truncated, renormalised reverse KL
    dL/dz   = p (log p - log q - L) / T            on S, exactly 0 elsewhere
"""

import torch
from torch import Tensor


def reverse_kl(
    z: Tensor,  # (..., K) the student's logits
    w: Tensor,  # (..., K) the teacher's logits or log-probs, up to a constant a row
    live: Tensor,  # (..., K) bool, the slots that are in S
    temperature: float,
) -> tuple[Tensor, Tensor]:  # (...), (..., K) float64
    """The loss of each row and its gradient with respect to z, both in float64.

    float64, because at temperature 0.05 float32 misses the promised accuracy by a factor of 3.5; on K numbers a row
    it costs nothing that can be measured. A row without a live slot gives 0; a NaN or +inf on a live slot gives NaN;
    a student logit of -inf has probability 0 and leaves the teacher's side as it is.
    """
    inv_t = 1.0 / temperature
    z = torch.where(live, z.double(), -torch.inf)
    w = torch.where(live, w.double(), -torch.inf)
    a = z - _finite_max(z)
    b = w - _finite_max(w)
    p = (a * inv_t).exp()
    p_sum = _nonzero(p.sum(-1, keepdim=True))
    q_sum = _nonzero((b * inv_t).exp().sum(-1, keepdim=True))
    p = p / p_sum
    # The difference of the logits is taken first, so that equal logits give 0 and not a rounding error.
    log_ratio = torch.where(p == 0, 0, a - b) * inv_t - (p_sum.log() - q_sum.log())
    loss = (p * log_ratio).sum(-1, keepdim=True)
    gradient = torch.where(live, p * (log_ratio - loss) * inv_t, 0)
    return loss.squeeze(-1), gradient


def capped(
    raw: Tensor,  # (...) hidden @ head.T + bias
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # (...), (...)
    """The logits that a model makes of the product with its head, and their derivative with respect to it.

    The scale comes first (Cohere), then softcap * tanh(z / softcap) (Gemma 2).
    """
    z = raw * logit_scale
    if softcap is None:
        return z, torch.full_like(z, logit_scale)
    bent = (z / softcap).tanh()
    return softcap * bent, logit_scale * (1 - bent * bent)


def _finite_max(x: Tensor) -> Tensor:  # (..., K) -> (..., 1)
    top = x.amax(-1, keepdim=True)
    return torch.where(top == -torch.inf, 0, top)


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x == 0, 1, x)
