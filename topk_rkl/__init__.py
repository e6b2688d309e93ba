"""Exact, sparse, fast: the truncated reverse-KL loss head of on-policy distillation."""

from topk_rkl.loss import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    LinearTopKDivergenceLoss,
    LinearTopKReverseKLLoss,
    Mixture,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Support,
    TopKDivergenceLoss,
    TopKReverseKLLoss,
    generalized_jsd,
    linear_teacher_topk,
    linear_topk_divergence,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_divergence,
    topk_reverse_kl,
    use_backend,
)

__version__ = "0.1.0"

__all__ = [
    "AlphaBeta",
    "ForwardKL",
    "JensenShannon",
    "LinearTopKDivergenceLoss",
    "LinearTopKReverseKLLoss",
    "Mixture",
    "ReverseKL",
    "SkewForwardKL",
    "SkewReverseKL",
    "Support",
    "TopKDivergenceLoss",
    "TopKReverseKLLoss",
    "generalized_jsd",
    "linear_teacher_topk",
    "linear_topk_divergence",
    "linear_topk_reverse_kl",
    "teacher_topk",
    "topk_divergence",
    "topk_reverse_kl",
    "use_backend",
]
