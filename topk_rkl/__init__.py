"""Exact, sparse, fast: the truncated reverse-KL loss head of on-policy distillation.

A `divergence=` is one of ReverseKL, ForwardKL, JensenShannon, Mixture, SkewForwardKL, SkewReverseKL and AlphaBeta.
The losses as modules: TopKReverseKLLoss, TopKDivergenceLoss, LinearTopKReverseKLLoss and LinearTopKDivergenceLoss.
`topk_rkl.diagnostics` has what to watch, `topk_rkl.recipe` what stands around the loss, `topk_rkl.trainers` adapters.
"""

# What is no function is named twice, which exports it; `__all__` leaves it out, and help(topk_rkl) stays short.
from topk_rkl.loss import (
    AlphaBeta as AlphaBeta,
    ForwardKL as ForwardKL,
    JensenShannon as JensenShannon,
    LinearTopKDivergenceLoss as LinearTopKDivergenceLoss,
    LinearTopKReverseKLLoss as LinearTopKReverseKLLoss,
    Mixture as Mixture,
    ReverseKL as ReverseKL,
    SkewForwardKL as SkewForwardKL,
    SkewReverseKL as SkewReverseKL,
    Support,
    TopKDivergenceLoss as TopKDivergenceLoss,
    TopKReverseKLLoss as TopKReverseKLLoss,
    causal_topk_reverse_kl,
    generalized_jsd,
    linear_causal_topk_reverse_kl,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    use_backend,
)
from topk_rkl.trainers.patch import patch

__version__ = "0.1.0"

__all__ = [
    "Support",
    "causal_topk_reverse_kl",
    "generalized_jsd",
    "linear_causal_topk_reverse_kl",
    "linear_teacher_topk",
    "linear_topk_divergence",
    "linear_topk_reverse_kl",
    "patch",
    "teacher_topk",
    "topk_divergence",
    "topk_reverse_kl",
    "use_backend",
]
