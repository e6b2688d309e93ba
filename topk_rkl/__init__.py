"""Exact, sparse, fast: the truncated reverse-KL loss head of on-policy distillation."""

from topk_rkl.loss import (
    LinearTopKReverseKLLoss,
    Support,
    TopKReverseKLLoss,
    linear_teacher_topk,
    linear_topk_reverse_kl,
    teacher_topk,
    topk_reverse_kl,
    use_backend,
)

__version__ = "0.1.0"

__all__ = [
    "LinearTopKReverseKLLoss",
    "Support",
    "TopKReverseKLLoss",
    "linear_teacher_topk",
    "linear_topk_reverse_kl",
    "teacher_topk",
    "topk_reverse_kl",
    "use_backend",
]
