"""Triton kernels for NVIDIA and AMD GPUs: one file an op, the kernel first, then its launcher."""

from topk_rkl.backends.triton.linear_loss import linear_loss, linear_weight_grad
from topk_rkl.backends.triton.mass_loss import mass_grad, mass_loss, tail_logit
from topk_rkl.backends.triton.scatter import scatter
from topk_rkl.backends.triton.select import select, select_loss
from topk_rkl.backends.triton.support_loss import support_loss

SLABS = True  # see topk_rkl/rows.py

__all__ = [
    "linear_loss",
    "linear_weight_grad",
    "mass_grad",
    "mass_loss",
    "scatter",
    "select",
    "select_loss",
    "support_loss",
    "tail_logit",
]
